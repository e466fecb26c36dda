"""Memory in blocks of its own: the same views as an arena's, each block gone with its last tensor."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotglm import seam
from hotglm.errors import MemoryPlanError
from hotglm.seam import Seam
from hotglm.weights import scattered
from hotglm.weights.arena import ALIGNMENT, Arena, Lease
from hotglm.weights.layout import Extent, Layout, plan_layout
from hotglm.weights.scattered import ScatteredArena


def make_layout(sizes: list[int]) -> Layout:
    extents = [Extent(name=f"t{i}", address=(i + 1) << 24, nbytes=size) for i, size in enumerate(sizes)]
    return plan_layout(extents, alignment=ALIGNMENT)


@given(st.lists(st.integers(0, 3 << 19), max_size=8), st.integers(0, 1 << 22))
@settings(max_examples=20, deadline=None)
def test_views_and_windows_are_those_of_an_arena(sizes: list[int], start: int) -> None:
    """Whatever is written through one is read through the other, at the same offsets; nothing overlaps."""
    layout = make_layout(sizes)
    arena: Any = ScatteredArena(layout)
    arena.populate(start, 1 << 20)
    leases: list[Lease] = [arena.lend(()), Arena(max(layout.nbytes, 1)).lease()]
    for lease in leases:
        for index, size in enumerate(sizes):
            view = lease.view(layout.offsets[f"t{index}"], dtype=torch.uint8, shape=(size,))
            view.fill_(index + 1)
        for index, size in enumerate(sizes):
            if size:
                assert bytes(lease.bytes(layout.offsets[f"t{index}"], size)) == bytes([index + 1]) * size


def test_strides_and_dtypes_are_kept() -> None:
    """As in an arena."""
    layout = make_layout([4 * 12])
    view = ScatteredArena(layout).lend(()).view(layout.offsets["t0"], dtype=torch.float32, shape=(3, 4), stride=(1, 3))
    assert (view.stride(), view.dtype) == ((1, 3), torch.float32)


def test_a_block_goes_with_its_last_tensor() -> None:
    """Small tensors share one; the lease and the arena hold nothing once they are dropped."""
    layout = make_layout([2 << 20, 100, 200, 2 << 20])
    arena = ScatteredArena(layout)
    lease = arena.lend(())
    views = [lease.view(layout.offsets[f"t{i}"], dtype=torch.uint8, shape=(8,)) for i in range(4)]
    watches = [piece.watch for piece in lease._pieces]  # type: ignore[attr-defined]
    whole = lease.watch
    del arena, lease
    assert len(watches) == 3
    for index, gone in ((0, [True, False, False]), (1, [True, False, False]), (2, [True, True, False])):
        views[index] = torch.empty(0)
        assert [watch() is None for watch in watches] == gone
        assert whole() is not None
    views.clear()
    assert whole() is None


def test_there_are_never_too_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many tensors more share a block than a block's usual size holds."""
    monkeypatch.setattr(scattered, "_BLOCK_NBYTES", 64)
    monkeypatch.setattr(scattered, "_NUM_BLOCKS", 8)
    assert len(ScatteredArena(make_layout([64] * 1000))._blocks) <= 16


def test_memory_that_is_not_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was mapped before it is given back."""
    made: list[Any] = []

    class Failing(Seam):
        def map_anonymous(self, nbytes: int) -> Any:
            if made:
                raise OSError(errno.ENOMEM, "no memory")
            made.append(nbytes)
            return super().map_anonymous(nbytes)

    monkeypatch.setattr(seam, "active", Failing())
    with pytest.raises(MemoryPlanError, match="plain weights"):
        ScatteredArena(make_layout([2 << 20, 2 << 20]))
