"""Arenas in pinned memory of the host: where the image of what is on a device lies when the device has no room for it.

Rules this module keeps:

- It is an arena of the processor in everything but where its memory comes from and how it goes.
- The memory stays pinned for as long as the arena or anybody who holds its lease does. Nobody waits when it goes: a
  thread of its own unpins it, because the last holder may be a thread of the service, and unpinning may wait for the
  device. Where no such thread can be had, the memory stays.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from hotglm.errors import ThreadStartError
from hotglm.weights.arena import Arena, Lease
from hotglm.weights.device import Device, Pinned
from hotglm.weights.layout import Region
from hotglm.weights.workers import start_thread

__all__ = ["PinnedArena"]

_PAGE_NBYTES = 4096


class _Keeper:
    """What the arena and its lease hold, so that the memory is unpinned when both are gone."""

    __slots__ = ("__weakref__",)


class PinnedArena(Arena):
    """One block of pinned memory, lent to one generation at a time."""

    __slots__ = ("_keeper", "_pinned", "device")

    def __init__(self, nbytes: int, *, device: Device) -> None:
        """Pin `nbytes` for `device`.

        Raises:
            MemoryPlanError: there is no such memory to be had.
        """
        self.nbytes = nbytes
        self.left = {}
        self.device = device
        self._lease = None
        pinned_nbytes = -(-max(nbytes, 1) // _PAGE_NBYTES) * _PAGE_NBYTES
        self._pinned = device.pin(pinned_nbytes)
        self._memory = self._pinned.bytes(0, pinned_nbytes)  # type: ignore[assignment]  # a buffer, as a map is
        self._keeper = _Keeper()
        weakref.finalize(self._keeper, _unpin, self._pinned).atexit = False

    def populate(self, start: int, nbytes: int) -> None:
        """Do nothing: what is pinned is there."""

    def fits(self, nbytes: int, regions: Sequence[Region]) -> bool:
        """Tell whether a layout of one region that is pinned for the same device has room in it."""
        return len(regions) == 1 and regions[0].pinned_for is self.device and nbytes <= self.nbytes

    def lend(self, regions: Sequence[Region]) -> Lease:
        """Lend the memory for a layout that fits."""
        del regions
        return self.lease()

    def _overlay(self) -> ctypes.Array[ctypes.c_char]:
        memory = super()._overlay()
        memory.keeper = self._keeper  # type: ignore[attr-defined]
        return memory

    def find_offset(self, tensor: torch.Tensor) -> int | None:
        """Return where in this block `tensor` begins, or None if it lies elsewhere."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < self.nbytes else None

    def range(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return `nbytes` from `offset` as a flat uint8 tensor, for whoever knows that the lease lives on."""
        return self._pinned.tensor[offset : offset + nbytes]


_lost: list[Pinned] = []
"""Pinned memory that could not be unpinned: it must not be unmapped while the driver knows it."""


def _unpin(pinned: Pinned) -> None:
    try:
        start_thread(pinned.release, name="hotglm-unpin")
    except ThreadStartError:
        _lost.append(pinned)
