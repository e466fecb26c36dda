"""The pinned ring: windows of host memory that reader threads fill while the copy engine drains others, or fills them.

Rules this module keeps:

- The ring is as large as the ring, not as the largest tensor; it is pinned once, to the byte, and kept.
- A window is lent to one thread at a time, and only after the event of its last copy was seen to be done (O3 in
  weights/device.py): the one wait of the pipeline, and it is the host's.
- A window comes back whatever happened, with an event behind every copy that was submitted from it. Where not even that
  event can be recorded the window is never lent again.
- Nobody waits for a window holding another one, so no two stages that share a ring can wait for each other.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import torch

from hotglm.errors import StageFailedError
from hotglm.weights.device import DEVICE_ALIGNMENT, Device, Event
from hotglm.weights.plan import CHUNK_NBYTES, IOV_MAX
from hotglm.weights.workers import Cancellation

__all__ = ["NUM_WINDOWS", "WINDOW_NBYTES", "Ring", "Window"]

NUM_WINDOWS = 16
"""Windows of a ring: more than there are reader threads for one device, so that some are always draining."""

GAP_NBYTES = DEVICE_ALIGNMENT
"""Padding between two tensors of an arena, which travels with them when they are copied as one."""

WINDOW_NBYTES = CHUNK_NBYTES + IOV_MAX * GAP_NBYTES
"""Bytes of a window: the largest single read, and the padding between as many tensors as one read may have."""

_POLL_S = 0.05
"""How long a thread waits for a window before it looks whether its stage was cancelled."""


class Window:
    """One window, while it is lent: fill `bytes`, then `copy` from it; or `fetch`, and read what came."""

    def __init__(self, ring: Ring, start: int, nbytes: int) -> None:
        """Made by `Ring` only."""
        self._ring = ring
        self._start = start
        self.nbytes = nbytes
        self.event: Event | None = None
        self.is_dirty = False

    def bytes(self, start: int, nbytes: int) -> memoryview:
        """Return `nbytes` of it from byte `start`, to be written by the host."""
        return self._ring.pinned.bytes(self._start + start, nbytes)

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Return the same as a flat uint8 tensor."""
        first = self._start + start
        return self._ring.pinned.tensor[first : first + nbytes]

    def copy(self, start: int, target: torch.Tensor) -> None:
        """Submit a copy of the bytes from `start` to `target`, flat uint8 on the device."""
        self.is_dirty = True  # first: what raises may have submitted something
        self._ring.device.copy(self.tensor(start, target.numel()), target)

    def fetch(self, source: torch.Tensor) -> torch.Tensor:
        """Copy `source`, flat uint8 on the device, here, and wait for it; return the bytes, to be read while lent."""
        target = self.tensor(0, source.numel())
        self.is_dirty = True
        self._ring.device.copy(source, target)
        self._ring.device.record().wait()  # O3: the host may read it from here on
        return target


class Ring:
    """The windows of one device. Any thread may lend one."""

    def __init__(self, device: Device, *, num_windows: int = NUM_WINDOWS, window_nbytes: int = WINDOW_NBYTES) -> None:
        """Pin the memory.

        Raises:
            MemoryPlanError: there is none to be had.
        """
        self.device = device
        self.window_nbytes = window_nbytes
        self.nbytes = num_windows * window_nbytes
        self.pinned = device.pin(self.nbytes)
        self._idle: queue.SimpleQueue[Window] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.num_windows = num_windows
        for index in range(num_windows):
            self._idle.put(Window(self, index * window_nbytes, window_nbytes))

    @property
    def chunk_nbytes(self) -> int:
        """Most bytes of one read into a window, with the padding that may lie between its pieces."""
        return max(1, self.window_nbytes - IOV_MAX * GAP_NBYTES)

    @property
    def num_idle(self) -> int:
        """How many windows nobody is filling now; some of them may be draining."""
        return self._idle.qsize()

    @contextlib.contextmanager
    def lend(self, *, cancellation: Cancellation) -> Iterator[Window]:
        """Lend the window that came back longest ago, once the device has drained it.

        Raises:
            StageFailedError: the device has failed under every window.
            BaseException: the cancellation's reason.
        """
        window = self._take(cancellation)
        try:
            self._wait_drained(window)
            cancellation.raise_if_cancelled()
            yield window
        finally:
            self._give_back(window)

    def drain(self) -> None:
        """Wait until no copy reads any idle window; for the end of a process or a test, with no stage under way."""
        for _ in range(self.num_idle):
            window = self._idle.get_nowait()
            self._wait_drained(window)
            self._idle.put(window)

    def _wait_drained(self, window: Window) -> None:
        if window.event is not None:
            window.event.wait()
            window.event = None

    def _take(self, cancellation: Cancellation) -> Window:
        while True:
            cancellation.raise_if_cancelled()
            if not self.num_windows:
                raise StageFailedError(
                    f"Expected {self.device.name} to drain the ring, got errors under all of its windows.",
                    remedy="restart the process; a device that has failed once does not come back in it.",
                )
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=_POLL_S)

    def _give_back(self, window: Window) -> None:
        if window.is_dirty:
            try:
                window.event = self.device.record()  # after the last copy, on its stream
            except BaseException:
                with self._lock:  # a count that one of two threads loses would leave a third waiting for ever
                    self.num_windows -= 1  # copies may read it for ever: it is never lent again
                raise
        window.is_dirty = False
        self._idle.put(window)
