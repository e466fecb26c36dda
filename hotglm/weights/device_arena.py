"""Arenas on devices: one block of a device's memory, lent by leases as the arenas on the CPU are.

Rules this module keeps:

- A lease is a storage over the whole block, and every tensor made from it has a storage of its own that holds that
  one: `[Note: lease]` of weights/arena.py, with DLPack in place of `torch.frombuffer`. A watch holds nothing.
- The block is torch's own memory: whoever still holds a tensor of a block that was given up keeps it.
- A dead lease says that nobody can submit work any more, not that the work is done. `begin` puts the side stream behind
  all of it (`[Note: streams]` in weights/device.py), before anything else is submitted for the new lease.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented, and not in the stub

from hotglm.weights.device import Device

__all__ = ["DeviceArena", "DeviceLease", "watch_storage"]


def watch_storage(tensor: torch.Tensor) -> Callable[[], object | None]:
    """Return a function that returns None once nobody holds the storage of `tensor` any more; it holds nothing."""
    return functools.partial(_find, StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]


def _find(reference: StorageWeakRef) -> object | None:
    return None if reference.expired() else reference  # type: ignore[no-untyped-call]


class DeviceLease:
    """The right to make tensors over one block; lives as long as any of them."""

    __slots__ = ("_lent", "device")

    def __init__(self, lent: torch.Tensor, device: Device) -> None:
        """Take the tensor whose storage is the lease."""
        self._lent = lent
        self.device = device

    @property
    def memory(self) -> object:
        """What holds the lease while somebody refers to it."""
        return self._lent

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds this lease any more."""
        return watch_storage(self._lent)

    def range(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return `nbytes` from `offset` as a flat uint8 tensor, to be copied to; it holds the lease."""
        return self._lent[offset : offset + nbytes]

    def view(
        self, offset: int, *, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a tensor over the block from byte `offset`, with a storage of its own; see `Lease.view`."""
        if math.prod(shape) == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self._lent.device)
        steps = stride if stride is not None else _contiguous_stride(shape)
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        piece = self.range(offset, extent * dtype.itemsize)
        return _share(piece).view(dtype).as_strided(tuple(shape), tuple(steps))

    def settle(self) -> None:
        """Wait, in the calling thread, until everything that was submitted to the side stream is done (O3)."""
        self.device.record().wait()


def _contiguous_stride(shape: Sequence[int]) -> list[int]:
    steps, step = [0] * len(shape), 1
    for at in range(len(shape) - 1, -1, -1):
        steps[at] = step
        step *= shape[at]
    return steps


class DeviceArena:
    """One block of a device's memory, lent to one generation at a time."""

    __slots__ = ("__weakref__", "_block", "_lease", "device", "nbytes", "room_nbytes")

    def __init__(self, nbytes: int, *, device: Device, room_nbytes: int = 0) -> None:
        """Allocate `nbytes`, at least one; `room_nbytes` at the end of them are for exchanges.

        Raises:
            MemoryPlanError: the device has no such memory to give.
        """
        self.nbytes = nbytes
        self.room_nbytes = room_nbytes
        self.device = device
        self._block = device.allocate(max(nbytes, 1))
        self._lease: Callable[[], object | None] = _nobody

    def __del__(self) -> None:
        """Tell the device, while the block still exists: it goes with its last holder, which may be this."""
        with contextlib.suppress(AttributeError):  # there was no memory for it
            self.device.let_go()

    @property
    def address(self) -> int:
        """Address of the first byte, in the address space that all devices share with the host."""
        return self._block.data_ptr()

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds the latest lease any more; holding it holds nothing."""
        return self._lease

    @property
    def is_free(self) -> bool:
        """Whether no tensor over this block is left anywhere in the process; work over it may still be queued."""
        return self._lease() is None

    def find_offset(self, tensor: torch.Tensor) -> int | None:
        """Return where in this block `tensor` begins, or None if it lies elsewhere."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < self.nbytes else None

    def range(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return `nbytes` from `offset` as a flat uint8 tensor, for whoever knows that the lease lives on."""
        return self._block[offset : offset + nbytes]

    def lease(self) -> DeviceLease:
        """Lend the block; work that is submitted to the side stream from now on comes after all work of before.

        Raises:
            RuntimeError: it is lent already (a bug in the caller, never a user's mistake).
        """
        if not self.is_free:
            raise RuntimeError("the arena is still lent; wait until it is free or take another")
        begin(self.device)
        lent = _share(self._block)
        self._lease = watch_storage(lent)
        return DeviceLease(lent, self.device)


def _share(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor with a storage of its own, which holds that of `tensor`."""
    return from_dlpack(to_dlpack(tensor))


def _nobody() -> None:
    """Answer for a block that was never lent."""


def begin(device: Device) -> None:
    """Put the side stream behind everything that was submitted to any stream so far ("reuse" in [Note: streams])."""
    device.wait_for(device.record_passes())
