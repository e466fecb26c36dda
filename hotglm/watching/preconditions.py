"""Reasons to put an update off: a machine that is busy, memory that is short, an hour that is wrong.

Rules this module keeps: each is a function without arguments that returns the reason to wait, in words, or None. What
the machine cannot say is no reason to wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.slot.memory import read_available_nbytes
from hotglm.weights.workers import count_cores

__all__ = ["FreeMemory", "LoadBelow", "TimeWindow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBelow:
    """Wait while the machine's load of the last minute, per core of this process, is at or above a limit.

    Attributes:
        limit: load per core, such as 0.8.
        read: what tells the loads of the last 1, 5 and 15 minutes.
    """

    limit: float
    read: Callable[[], tuple[float, float, float]] = os.getloadavg

    def __call__(self) -> str | None:
        """Return the reason to wait, or None."""
        try:
            load = self.read()[0] / count_cores()
        except OSError:
            return None
        return f"load {load:.2f} per core, limit {self.limit:.2f}" if load >= self.limit else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Wait while less memory is available to this process than a number of bytes.

    Attributes:
        nbytes: how much must be available.
        read: what tells how much is, in bytes: of the machine, the container and the process the least.
    """

    nbytes: int
    read: Callable[[], int] = read_available_nbytes

    def __call__(self) -> str | None:
        """Return the reason to wait, or None."""
        found = self.read()
        return f"{found} bytes of memory available, {self.nbytes} needed" if found < self.nbytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeWindow:
    """Wait outside of some hours of the day, in local time; a window may go past midnight.

    Attributes:
        start: first minute, as `"22:00"`.
        end: the minute at which it is over, as `"06:00"`.
        read: what tells the time.

    Example:
        >>> TimeWindow(start="22:00", end="06:00", read=lambda: datetime(2026, 1, 1, 23, 30))()
        >>> TimeWindow(start="22:00", end="06:00", read=lambda: datetime(2026, 1, 1, 12, 0))()
        'it is 12:00, updates are made from 22:00 to 06:00'
    """

    start: str
    end: str
    read: Callable[[], datetime] = datetime.now

    def __post_init__(self) -> None:
        """Refuse hours that cannot be meant.

        Raises:
            ArgumentError: one does not parse, or names a time zone, or both are equal.
        """
        try:
            start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
            if start != end and start.tzinfo is end.tzinfo is None:
                return
        except (TypeError, ValueError):
            pass
        found = f"{shorten_repr(self.start)} and {shorten_repr(self.end)}"
        raise ArgumentError(f"Expected two hours of the day, got {found}.", remedy="write them as '22:00' and '06:00'.")

    def __call__(self) -> str | None:
        """Return the reason to wait, or None."""
        start, end, now = time.fromisoformat(self.start), time.fromisoformat(self.end), self.read().time()
        is_inside = start <= now < end if start < end else now >= start or now < end
        return None if is_inside else f"it is {now:%H:%M}, updates are made from {self.start} to {self.end}"
