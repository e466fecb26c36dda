"""Memory for weights that are let go of piece by piece: blocks of their own, each gone with its last tensor.

Rules this module keeps:

- A tensor lies in one block with all that overlaps it. Small ones share a block, so that there are not too many maps.
- Nobody but tensors holds a block, once the arena and its lease are dropped; then a block is unmapped as soon as the
  last tensor over it dies, whatever becomes of the others.
- It is lent once and not taken back.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hotglm import seam
from hotglm.errors import MemoryPlanError
from hotglm.problem import describe_exception
from hotglm.weights.arena import ALIGNMENT, Arena, Lease
from hotglm.weights.layout import Layout, Region

__all__ = ["ScatteredArena"]

_BLOCK_NBYTES = 1 << 20
"""Tensors are put together in one block until it has this size, in bytes."""

_NUM_BLOCKS = 4096
"""Or this part of all of them: the system allows a process some 65 thousand maps."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A range of a layout with memory of its own."""

    start: int
    nbytes: int
    memory: mmap.mmap


class ScatteredArena(Arena):
    """Memory of the processor for one layout, in blocks."""

    __slots__ = ("_blocks",)

    def __init__(self, layout: Layout) -> None:
        """Map a block for each large tensor of `layout`, which is all the processor's, and for small ones together.

        Raises:
            MemoryPlanError: the system has no such memory to give.
        """
        self.nbytes = layout.nbytes
        self.left = {}
        self._lease = None
        self._blocks = tuple(_map(start, end - start) for start, end in _find_ranges(layout))

    def populate(self, start: int, nbytes: int) -> None:
        """Fault a range in now; it is clipped to whole pages inside the blocks."""
        for block in self._blocks:
            first = max(0, start - block.start) // mmap.PAGESIZE * mmap.PAGESIZE
            stop = min(start + nbytes - block.start, block.nbytes)
            if stop > first:
                seam.active.populate(block.memory, first, stop - first)

    def lend(self, regions: Sequence[Region]) -> Lease:
        """Lend all blocks for the layout they were made for."""
        if regions:
            raise RuntimeError("an arena of the processor has no regions")
        return _ScatteredLease(self._blocks, nbytes=self.nbytes)


class _ScatteredLease(Lease):
    """The right to make tensors over the blocks."""

    __slots__ = ("_pieces", "_starts")

    def __init__(self, blocks: Sequence[_Block], *, nbytes: int) -> None:
        self.nbytes = nbytes
        self._starts = [block.start for block in blocks]
        self._pieces = [
            Lease((ctypes.c_char * len(block.memory)).from_buffer(block.memory), nbytes=block.nbytes)
            for block in blocks
        ]

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds any of the blocks; holding it holds nothing."""
        watches = [piece.watch for piece in self._pieces]
        return lambda: next((found for watch in watches if (found := watch()) is not None), None)

    def tie_to(self, holder: object) -> None:
        """Keep all blocks for as long as `holder` lives."""
        for piece in self._pieces:
            piece.tie_to(holder)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a writable window of `nbytes` from `offset`, all of one block; it holds that block."""
        piece, start = self._find(offset)
        return piece.bytes(start, nbytes)

    def view(
        self, offset: int, *, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a tensor from byte `offset`; see `Lease.view`. Its storage holds its block."""
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        piece, start = self._find(offset)
        return piece.view(start, dtype=dtype, shape=shape, stride=stride)

    def _find(self, offset: int) -> tuple[Lease, int]:
        at = bisect.bisect_right(self._starts, offset) - 1
        return self._pieces[at], offset - self._starts[at]


def _find_ranges(layout: Layout) -> list[tuple[int, int]]:
    """Return the ranges of a layout that get blocks, in order: no span is in two of them."""
    most = max(_BLOCK_NBYTES, layout.nbytes // _NUM_BLOCKS)
    ranges: list[tuple[int, int]] = []
    for span in sorted(layout.spans, key=lambda span: span.offset):
        start = span.offset // ALIGNMENT * ALIGNMENT
        if ranges and span.offset + span.nbytes - ranges[-1][0] <= most:
            ranges[-1] = ranges[-1][0], span.offset + span.nbytes
        else:
            ranges.append((start, span.offset + span.nbytes))
    return ranges


def _map(start: int, nbytes: int) -> _Block:
    try:
        return _Block(start, nbytes, seam.active.map_anonymous(nbytes))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise MemoryPlanError(
            f"Expected {nbytes} bytes of memory for plain weights, got none: {describe_exception(error)}.",
            remedy="free memory, or raise the process's limit.",
        ) from error
