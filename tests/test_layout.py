"""Layouts: what overlapped still overlaps in the same way, what did not never meets, and everything is aligned."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hotglm.model.extents import lay_out
from hotglm.model.inspection import find_state
from hotglm.weights.arena import ALIGNMENT
from hotglm.weights.layout import Extent, plan_layout

EXTENTS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 90)), max_size=12).map(
    lambda pairs: [Extent(name=f"t{i}", address=a, nbytes=n) for i, (a, n) in enumerate(pairs)]
)
ALIGNMENTS = st.sampled_from([1, 8, 64])


def _overlap(one: Extent, other: Extent) -> bool:
    return one.address < other.address + other.nbytes and other.address < one.address + one.nbytes


@given(EXTENTS, ALIGNMENTS)
def test_overlaps_are_kept(extents: list[Extent], alignment: int) -> None:
    """Two tensors that share a byte lie at the same distance from each other as before."""
    layout = plan_layout(extents, alignment=alignment)
    for one, other in combinations([e for e in extents if e.nbytes], 2):
        if _overlap(one, other):
            moved = layout.offsets[other.name] - layout.offsets[one.name]
            assert moved == other.address - one.address


@given(EXTENTS, ALIGNMENTS)
def test_what_was_apart_stays_apart(extents: list[Extent], alignment: int) -> None:
    """Two spans never share a line of `alignment` bytes, all lie in the arena, and its size is a multiple of it."""
    layout = plan_layout(extents, alignment=alignment)
    taken: set[int] = set()
    for span in layout.spans:
        lines = set(range(span.offset // alignment, -(-(span.offset + span.nbytes) // alignment)))
        assert not lines & taken
        taken |= lines
        assert 0 <= span.offset <= span.offset + span.nbytes <= layout.nbytes
    assert layout.nbytes % alignment == 0
    for one, other in combinations(layout.spans, 2):
        assert one.address + one.nbytes <= other.address or other.address + other.nbytes <= one.address


@given(EXTENTS, ALIGNMENTS)
def test_a_tensor_of_its_own_is_aligned(extents: list[Extent], alignment: int) -> None:
    """A tensor that overlaps no other starts at a multiple of the alignment, wherever it lay before."""
    layout = plan_layout(extents, alignment=alignment)
    for extent in (e for e in extents if e.nbytes):
        if not any(_overlap(extent, other) for other in extents if other is not extent and other.nbytes):
            assert layout.offsets[extent.name] % alignment == 0


@given(EXTENTS, ALIGNMENTS, st.sampled_from([2, 4, 8]))
def test_overlapping_tensors_stay_as_aligned_as_they_were(extents: list[Extent], alignment: int, itemsize: int) -> None:
    """An address that was a multiple of the item size is one in the arena, in a span of several tensors too."""
    layout = plan_layout(extents, alignment=alignment)
    if alignment % itemsize == 0:
        for extent in (e for e in extents if e.nbytes and e.address % itemsize == 0):
            assert layout.offsets[extent.name] % itemsize == 0


@given(EXTENTS, ALIGNMENTS, st.integers(0, 700), st.integers(0, 100))
def test_find_offset_follows_any_bytes_of_a_span(
    extents: list[Extent], alignment: int, address: int, nbytes: int
) -> None:
    """Bytes inside a span are found where they went; bytes that are partly outside, or none, are not."""
    layout = plan_layout(extents, alignment=alignment)
    found = layout.find_offset(address, nbytes)
    homes = [s for s in layout.spans if s.address <= address and address + nbytes <= s.address + s.nbytes]
    if nbytes == 0 or not homes:
        assert found is None
    else:
        assert found == homes[0].offset + address - homes[0].address
    for extent in (e for e in extents if e.nbytes):
        assert layout.find_offset(extent.address, extent.nbytes) == layout.offsets[extent.name]


@given(EXTENTS)
def test_the_order_given_is_the_order_laid_out(extents: list[Extent]) -> None:
    """Spans follow each other in the order in which their first tensor was given, so a module has one layout."""
    layout = plan_layout(extents, alignment=64)
    assert layout == plan_layout(list(extents), alignment=64)
    firsts: list[int] = []
    for extent in (e for e in extents if e.nbytes):
        span = next(s for s in layout.spans if s.address <= extent.address < s.address + s.nbytes)
        if span.offset not in firsts:
            firsts.append(span.offset)
    assert firsts == sorted(firsts)


def test_ties_take_room_once() -> None:
    """A tied tensor has one place under both of its names."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    layout = lay_out(find_state(model))
    assert layout.offsets["0.weight"] == layout.offsets["1.weight"] == 0
    assert layout.nbytes == 8 * 4 * 4


def test_views_of_one_flat_block_stay_in_order_and_apart() -> None:
    """Neighbouring slices of one flat block overlap nowhere, so each becomes aligned on its own."""
    flat = torch.arange(30, dtype=torch.float32)
    model = nn.ParameterList([nn.Parameter(flat[:7]), nn.Parameter(flat[7:30])])
    layout = lay_out(find_state(model))
    assert layout.offsets == {"0": 0, "1": ALIGNMENT}


def test_an_expanded_buffer_gets_room_for_every_element() -> None:
    """A buffer whose elements share memory is laid out with an element each, so that it can be loaded."""
    model = nn.Module()
    model.register_buffer("mask", torch.ones(1, 1).expand(8, 8))
    model.register_buffer("scale", torch.ones(2))
    layout = lay_out(find_state(model))
    assert layout.offsets == {"mask": 0, "scale": 8 * 8 * 4}
