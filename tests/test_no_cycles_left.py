"""What a slot lets go of is free at once: no reference cycle waits for the garbage collector (P9)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import hotglm

TWO_COPIES = hotglm.MemoryPolicy(small_nbytes=0)
X = torch.ones(1, 64)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Turn the garbage collector off, so that only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_slot() -> hotglm.ModuleSlot:
    slot = hotglm.ModuleSlot(nn.Linear(64, 64), name="m", version="1.0.0", memory=TWO_COPIES)
    for patch in (1, 2):
        slot.update(nn.Linear(64, 64), version=f"1.0.{patch}")
    return slot


def refuse_golden(slot: hotglm.ModuleSlot) -> None:
    golden = hotglm.Golden(inputs=X, outputs=torch.zeros(1, 64))
    with pytest.raises(hotglm.GoldenMismatchError):
        slot.update(nn.Linear(64, 64), version="1.0.3", policy=hotglm.StagePolicy(goldens=(golden,)))


def refuse_check(slot: hotglm.ModuleSlot) -> None:
    policy = hotglm.StagePolicy(checks=(lambda module: bool(module(X).sum() != module(X).sum()),))
    with pytest.raises(hotglm.CallableCheckError):
        slot.update(nn.Linear(64, 64), version="1.0.3", policy=policy)


@pytest.mark.parametrize("refuse", [refuse_golden, refuse_check])
def test_a_refused_stage_leaves_no_third_copy(refuse: Callable[[hotglm.ModuleSlot], None]) -> None:
    """After a stage that failed its proof, the next one reuses the spare, and two copies stay two copies."""
    slot = make_slot()
    nbytes = slot.status().arenas_nbytes
    before = slot(X)
    refuse(slot)
    assert torch.equal(slot(X), before)
    with slot.stage(nn.Linear(64, 64), version="1.0.4") as staged:
        assert staged.plan.allocates_nbytes == 0
    assert slot.status().arenas_nbytes == nbytes


@pytest.mark.parametrize("look", ["status", "find_holders"])
def test_looking_keeps_nothing_alive(look: str) -> None:
    """A look at who holds what leaves no reference behind."""
    slot = make_slot()
    kept = slot.live.module
    for patch in (5, 6):
        slot.update(nn.Linear(64, 64), version=f"1.0.{patch}")
    module = weakref.ref(kept)
    getattr(slot, look)()
    del kept
    assert module() is None


def test_waiting_keeps_nothing_alive() -> None:
    """A wait for an old generation to be free ends as soon as its last holder lets go, not at the next collection."""
    slot = make_slot()
    with slot.acquire() as generation:
        module = weakref.ref(generation.module)
        slot.update(nn.Linear(64, 64), version="1.0.7")
        with pytest.raises(hotglm.DrainTimeoutError):
            slot.wait_drained(timeout_s=0.0)
    del generation
    slot.close()
    assert module() is None
    assert slot(X).shape == (1, 64)
