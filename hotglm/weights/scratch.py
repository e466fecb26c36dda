"""Scratch memory of the threads that migrate: one block for each, cut into tensors for one unit of work at a time.

Rules this module keeps:

- A block belongs to one thread, is as large as the largest unit that thread had, and is gone with the thread.
- Memory that somebody still refers to (a free function that kept its argument) is left to them and never written again.
- It is taken through the arena, and so through the seam: a test can count it, and make it fail.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from hotglm.weights.arena import ALIGNMENT, Arena, Lease

__all__ = ["Scratch", "Workspace", "align"]


def align(nbytes: int) -> int:
    """Return how much room `nbytes` take in a workspace."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """One block of memory for each thread that asks."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._own = threading.local()

    def open(self, nbytes: int) -> Workspace:
        """Return a workspace of `nbytes` for the calling thread; its earlier ones are void.

        Raises:
            MemoryPlanError: the system has no such memory to give.
        """
        if not nbytes:
            return Workspace(None)
        arena: Arena | None = getattr(self._own, "arena", None)
        if arena is None or arena.nbytes < nbytes or not arena.is_free:
            self._own.arena = arena = None  # first, so that two blocks never stand beside each other
            self._own.arena = arena = Arena(nbytes)
        return Workspace(arena.lease())


class Workspace:
    """The memory of one unit of work, cut off piece by piece; what does not fit any more is torch's own."""

    def __init__(self, lease: Lease | None) -> None:
        """Made by `Scratch.open` only."""
        self._lease = lease
        self._used = 0

    def take(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Return a contiguous tensor with whatever values."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._lease is None or self._used + nbytes > self._lease.nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        tensor = self._lease.view(self._used, dtype=dtype, shape=shape)
        self._used += align(nbytes)
        return tensor

    def mark(self) -> int:
        """Return how much is used, for `reset`."""
        return self._used

    def reset(self, mark: int) -> None:
        """Take back what was taken since `mark`; nobody may use that any more."""
        self._used = mark
