"""Arenas of modules that are not all on the processor: one block for each region of a layout, lent together.

Rules this module keeps:

- An offset is one of the layout; which block it lies in is decided here and nowhere else, so that what fills and copies
  modules needs to know of no device.
- The blocks are lent together and free together. One of them may be the processor's, and is an ordinary `Arena`.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from hotglm.weights.arena import Arena, Lease, tie
from hotglm.weights.device import Device
from hotglm.weights.device_arena import DeviceArena, DeviceLease
from hotglm.weights.layout import Region

__all__ = ["SplitArena", "SplitLease"]


class SplitLease(Lease):
    """The right to make tensors over all blocks of a `SplitArena`."""

    __slots__ = ("_parts", "regions")

    def __init__(self, regions: Sequence[Region], parts: Sequence[Lease | DeviceLease]) -> None:
        """Take one lease for each region."""
        self.regions = tuple(regions)
        self._parts = tuple(parts)
        self.nbytes = sum(region.nbytes for region in regions)

    @property
    def devices(self) -> tuple[DeviceLease, ...]:
        """The leases of devices."""
        return tuple(part for part in self._parts if isinstance(part, DeviceLease))

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds any of the parts any more."""
        return _watch_all([part.watch for part in self._parts])

    def locate(self, offset: int) -> tuple[Lease | DeviceLease, int]:
        """Return the part that an offset of the layout lies in, and the offset there."""
        at = bisect.bisect_right(self.regions, offset, key=lambda region: region.start) - 1
        return self._parts[at], offset - self.regions[at].start

    def tie_to(self, holder: object) -> None:
        """Keep the lease for as long as `holder` lives, too; see `Lease.tie_to`."""
        for part in self._parts:
            if isinstance(part, DeviceLease):
                tie(part.memory, holder)
            else:
                part.tie_to(holder)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a writable window of a region of the processor.

        Raises:
            ValueError: it is a device's (a bug in the caller, never a user's mistake).
        """
        part, start = self.locate(offset)
        if isinstance(part, DeviceLease):
            raise ValueError("the host cannot write the memory of a device")
        return part.bytes(start, nbytes)

    def view(
        self, offset: int, *, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a tensor over the region that `offset` lies in; see `Lease.view`."""
        part, start = self.locate(offset)
        return part.view(start, dtype=dtype, shape=shape, stride=stride)

    def settle(self) -> None:
        """Wait until the side streams are done."""
        for part in self.devices:
            part.settle()

    def settle_passes(self) -> None:
        """Wait until every stream is done with what was submitted to it before this call."""
        events = [event for part in self.devices for event in part.device.record_passes()]
        self.settle()
        for event in events:
            event.wait()

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Have torch submit to the side streams of all devices."""
        with contextlib.ExitStack() as stack:
            for part in self.devices:
                stack.enter_context(part.device.submitting())
            yield


class SplitArena(Arena):
    """One block for each device of a layout."""

    __slots__ = ("_blocks",)

    def __init__(self, regions: Sequence[Region]) -> None:
        """Take a block for each region.

        Raises:
            MemoryPlanError: a device, or the system, has no such memory to give; what was taken is given back.
        """
        self._blocks = tuple(_make_block(region) for region in regions)
        self.nbytes = sum(block.nbytes for block in self._blocks)
        self.left = {}

    @property
    def blocks(self) -> tuple[DeviceArena, ...]:
        """The blocks of devices."""
        return tuple(block for block in self._blocks if isinstance(block, DeviceArena))

    @property
    def address(self) -> int:
        """Address of the first byte of the first block."""
        return self._blocks[0].address

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds a lease of any block any more."""
        return _watch_all([block.watch for block in self._blocks])

    @property
    def is_free(self) -> bool:
        """Whether all blocks are."""
        return all(block.is_free for block in self._blocks)

    def find_nbytes(self, device: Device | None) -> int:
        """Return the bytes that it has on a device; None stands for the processor."""
        return sum(block.nbytes for block in self._blocks if _find_device(block) is device)

    def fits(self, nbytes: int, regions: Sequence[Region]) -> bool:
        """Tell whether each region has room in the block of the same device."""
        del nbytes
        pairs = zip(regions, self._blocks, strict=False)
        return len(regions) == len(self._blocks) and all(
            region.device is _find_device(block) and region.nbytes <= block.nbytes for region, block in pairs
        )

    def populate(self, start: int, nbytes: int) -> None:
        """Fault a range in where it is the processor's; `start` counts over the blocks as the layout does."""
        for block in self._blocks:
            if isinstance(block, Arena) and start + nbytes > 0:
                first = max(start, 0)
                block.populate(first, min(start + nbytes, block.nbytes) - first)
            start -= block.nbytes

    def lend(self, regions: Sequence[Region]) -> SplitLease:
        """Lend all blocks for a layout that fits."""
        return SplitLease(regions, [block.lease() for block in self._blocks])


def _make_block(region: Region) -> Arena | DeviceArena:
    if region.device is None:
        return Arena(region.nbytes)
    return DeviceArena(region.nbytes, device=region.device, room_nbytes=region.room_nbytes)


def _find_device(block: Arena | DeviceArena) -> Device | None:
    return block.device if isinstance(block, DeviceArena) else None


def _watch_all(watches: Sequence[Callable[[], object | None]]) -> Callable[[], object | None]:
    def find_any() -> object | None:
        return next((found for watch in watches if (found := watch()) is not None), None)

    return find_any
