"""How fast a stage may move bytes, so that a load does not move the service's tail.

Rules this module keeps:

- A budget is a bucket of bytes that fills at a fixed rate and holds one tenth of a second of it: bytes are taken before
  they are moved, and whoever takes more than is there waits for what is missing. Over any time `t` at most
  `rate * (t + 0.1 s) + one piece` are moved.
- Threads share one bucket and wait side by side, without the lock.
- Waiting ends when the stage is cancelled. Without a limit nothing is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hotglm.weights.workers import Cancellation

__all__ = ["BURST_S", "UNLIMITED", "Budget", "Unlimited"]

BURST_S = 0.1
"""How many seconds' worth of bytes may be moved at once after a pause."""

_SLICE_S = 0.05
"""How long a thread sleeps at most before it looks whether its stage was cancelled."""


class Unlimited:
    """The budget that is always there."""

    def take(self, nbytes: int, *, cancellation: Cancellation) -> None:
        """Return at once."""


UNLIMITED = Unlimited()


class Budget:
    """A bucket of bytes, filled at a fixed rate; `clock` and `sleep` are those of `time`, or a test's own."""

    def __init__(
        self,
        max_bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Start full."""
        self._rate = max_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._level = max_bytes_per_s * BURST_S
        self._filled_at_s = clock()

    def take(self, nbytes: int, *, cancellation: Cancellation) -> None:
        """Take `nbytes`, and return when they may be moved.

        What is taken may exceed what the bucket can hold: the debt is waited for, by this thread and by those that come
        after it.

        Raises:
            BaseException: the cancellation's reason; what was taken stays taken.
        """
        due_s = self._reserve(nbytes)
        while (left_s := due_s - self._clock()) > 0:
            cancellation.raise_if_cancelled()
            self._sleep(min(left_s, _SLICE_S))

    def _reserve(self, nbytes: int) -> float:
        """Take bytes now; return the time at which the bucket has them."""
        with self._lock:
            now_s = self._clock()
            filled = self._level + (now_s - self._filled_at_s) * self._rate
            self._level = min(filled, self._rate * BURST_S) - nbytes
            self._filled_at_s = now_s
            return now_s - min(0.0, self._level) / self._rate
