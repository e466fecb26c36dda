"""Reasons to put an update off: a machine that is busy, memory that is short, an hour that is wrong.

Rules this module keeps: each is a function without arguments that returns the reason to wait, in words, or None. What
the machine cannot say is no reason to wait. What a host's own function cannot say, or says in another way, is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, time

from hotglm.errors import ArgumentError, HotglmError, shorten_repr
from hotglm.problem import describe_exception, escape_text
from hotglm.slot.memory import read_available_nbytes
from hotglm.weights.workers import count_cores

__all__ = ["FreeMemory", "LoadBelow", "TimeWindow", "Waits", "ask_all"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What preconditions answered.

    Attributes:
        reasons: all reasons to wait, in words; empty for none.
        error: what is wrong with a precondition itself; None for nothing.
    """

    reasons: tuple[str, ...] = ()
    error: HotglmError | None = None


def ask_all(preconditions: Iterable[Callable[[], object]]) -> Waits:
    """Ask every precondition; one that raises, or answers anything else than None or text, is a reason to wait."""
    reasons: list[str] = []
    failure: HotglmError | None = None
    for ask in preconditions:
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001 - a precondition is the host's code and may raise anything
            answer = f"a precondition raised {describe_exception(error)}"
        if isinstance(answer, str):
            reasons.append(escape_text(answer, limit=200))
        elif answer is not None:
            failure = _refuse_answer(ask, answer)
            reasons.append(f"a precondition answered {shorten_repr(answer)}")
    return Waits(reasons=tuple(reasons), error=failure)


def _refuse_answer(ask: object, answer: object) -> ArgumentError:
    return ArgumentError(
        f"Expected None or a text from the precondition {shorten_repr(ask)}, got {shorten_repr(answer)}.",
        remedy="return None where the update may be made, and the reason to wait, in words, where it may not.",
    )
