"""Pinned host memory for CUDA: exactly as much as asked for, page-locked once.

Rules this module keeps:

- The memory is an anonymous map of our own that is registered with the driver: torch's own pinned allocator rounds up
  to a power of two. Where the driver refuses to register memory, torch's is taken.
- It is kept out of forked children: copy-on-write would give this process another page than the one that the device
  reads from.
- It is unlocked before it is unmapped; the driver would go on pinning pages of whatever is mapped there next.
- A refusal of the driver is asked for in a thread of its own. It stays behind as the last CUDA error of the thread that
  asked, where torch would raise it at the next kernel.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from hotglm import seam
from hotglm.errors import MemoryPlanError
from hotglm.problem import describe_exception
from hotglm.weights.digest import view_buffer
from hotglm.weights.plan import CHUNK_NBYTES
from hotglm.weights.workers import start_thread

__all__ = ["PinnedMemory"]

_PORTABLE = 1
"""`cudaHostRegisterPortable`: pinned for every device, not only for the one that was current."""


class PinnedMemory:
    """Pinned memory; see `Pinned` in weights/device.py."""

    def __init__(
        self,
        nbytes: int,
        *,
        index: int,
        within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """Map, fault in and register `nbytes`.

        Args:
            nbytes: how much; a multiple of a page.
            index: the device whose driver context is used.
            within: what a thread that asks the driver works in (`Device.staging`).

        Raises:
            MemoryPlanError: there is no such memory, pinned either way.
        """
        self._index = index
        self._within = within
        self._lock = threading.Lock()
        self.tensor, self._is_registered = self._map(nbytes), True
        address = self.tensor.data_ptr()
        if self._ask(lambda: _cudart().cudaHostRegister(address, nbytes, _PORTABLE)):
            return
        self._is_registered = False
        try:
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise MemoryPlanError(
                f"Expected {nbytes} bytes of pinned memory, got none: {describe_exception(error)}.",
                remedy="free memory, or raise the limit on locked memory.",
            ) from error

    def bytes(self, start: int, nbytes: int) -> memoryview:
        """Return a writable window; this object must outlive it."""
        return view_buffer(self.tensor[start : start + nbytes])

    def release(self) -> None:
        """Unlock the memory and let it go."""
        with self._lock:
            was_registered, self._is_registered = self._is_registered, False
        address = self.tensor.data_ptr()
        if was_registered:
            self._ask(lambda: _cudart().cudaHostUnregister(address))
        self.tensor = torch.empty(0, dtype=torch.uint8)  # only now may the map go

    def _map(self, nbytes: int) -> torch.Tensor:
        try:
            memory = seam.active.map_anonymous(nbytes)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise MemoryPlanError(
                f"Expected {nbytes} bytes of memory for the ring, got none: {describe_exception(error)}.",
                remedy="free memory, or raise the process's limit.",
            ) from error
        seam.active.keep_from_children(memory)
        for start in range(0, nbytes, CHUNK_NBYTES):
            seam.active.populate(memory, start, min(CHUNK_NBYTES, nbytes - start))
        return torch.frombuffer(memory, dtype=torch.uint8)  # holds the map

    def _ask(self, call: Callable[[], object]) -> bool:
        """Make a call of the CUDA runtime aside; return whether it succeeded."""
        codes: list[int] = []

        def ask() -> None:
            # A device that has failed raises here; the caller then tries, and says, what it can.
            with contextlib.suppress(RuntimeError), self._within(), torch.cuda.device(self._index):
                codes.append(int(call()))  # type: ignore[call-overload]

        start_thread(ask, name="hotglm-pin").join()
        return codes == [0]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
