"""One commit's turn at a gate: who waits for its end, in threads and in event loops, and how they are woken.

Rules this module keeps:

- Whoever waits looks again by itself now and then, so a wake-up that is lost costs a moment and never more: the one
  that an interrupt swallows, and the one for an event loop that was closed.
- Ending never fails because of who waits.
- A task that is cancelled while it waits leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading

__all__ = ["Closing"]

_POLL_S = 0.005
"""How soon a commit looks again where the wake-up of the last pass was lost."""

_SLICE_S = 0.05
"""How often a pass that is held back looks whether anybody is left to open the gate."""


class Closing:
    """One commit's turn at a gate."""

    __slots__ = ("_opened", "_waiters", "_wakes", "is_torn", "worker")

    def __init__(self, worker: threading.Thread) -> None:
        """Begin the turn of `worker`, which alone opens the gate again, unless it dies.

        `is_torn` is for it to set while the live weights are not those of one version.
        """
        self.worker = worker
        self.is_torn = False
        self._opened = threading.Event()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # `put` is safe in finalisers and signal handlers
        self._waiters: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Have the commit look again whether the gate is empty."""
        self._wakes.put(None)

    def wait_for_wake(self, timeout_s: float) -> None:
        """Wait until a pass has left, or for a moment."""
        with contextlib.suppress(queue.Empty):
            self._wakes.get(timeout=min(_POLL_S, timeout_s))

    def wait_opened(self) -> bool:
        """Wait for the commit's end; return whether it came, and not only a moment passed."""
        return self._opened.wait(_SLICE_S)

    async def wait_opened_async(self) -> bool:
        """Wait as `wait_opened` does, while the event loop goes on; without one of asyncio the thread waits."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self.wait_opened()
        waiter = loop.create_future()
        self._waiters.add(waiter)
        timer = loop.call_later(_SLICE_S, _settle, waiter)
        try:
            if not self._opened.is_set():  # asked after the waiter is there, as `end` sets it before it looks for any
                await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)
        return self._opened.is_set()

    def end(self) -> None:
        """Let everybody go on who waits for the end of it."""
        self._opened.set()
        for waiter in self._waiters.copy():
            with contextlib.suppress(RuntimeError):  # its loop was closed, and it waits no more
                waiter.get_loop().call_soon_threadsafe(_settle, waiter)


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
