"""How a watcher goes about it: how often it looks, how long a trial lasts, and what must hold before an update.

Rules this module keeps: no IO. What cannot be meant is refused when the policy is made, with every field named.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hotglm.errors import ArgumentError
from hotglm.slot.checks import StagePolicy

__all__ = ["Clock", "Precondition", "WatchPolicy"]

Precondition = Callable[[], str | None]
"""Asked before an update: returns the reason to wait, in words, or None."""

DEFAULT_TRIAL_S = 10.0
"""How long a trial lasts where a service notes it; without a service there is none by default."""


class Clock:
    """The time as a watcher needs it. Only differences count, so a wall clock that is set changes nothing (K08)."""

    def now_s(self) -> float:
        """Return the time of the monotonic clock, in seconds."""
        return time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPolicy:
    """How a watcher looks, waits, tries and gives up. Times are in seconds of the monotonic clock.

    Attributes:
        interval_s: how often it looks at the directory.
        uses_events: whether events of the operating system make it look sooner (extra `watch`). They are hints only.
        debounce_s: how long events must have ceased before it looks.
        prereleases: whether a constraint admits pre-releases; one that names a pre-release always does.
        trial_s: how long a version is on trial after it went live; then it is confirmed. 0 confirms at once,
            `math.inf` waits for `confirm()`. None means 10 s with a service, and 0 without.
        probe: asked with the slot in every round of a trial; the trial fails if it raises, or returns anything else
            than None or True. Text that it returns is the reason.
        preconditions: asked before every update; one that returns a reason, or anything else than None, or
            raises, delays it.
        retry_s: pause after the first transient failure; it doubles with each further one.
        max_retry_s: the longest such pause.
        quarantine: directory of reason files where there is no service, made where it is missing; None remembers
            what was refused in memory only.
        stage: what a version must prove; the slot's own policy by default.
    """

    interval_s: float = 2.0
    uses_events: bool = False
    debounce_s: float = 0.1
    prereleases: bool = False
    trial_s: float | None = None
    probe: Callable[[Any], object] | None = None
    preconditions: tuple[Precondition, ...] = ()
    retry_s: float = 1.0
    max_retry_s: float = 300.0
    quarantine: str | os.PathLike[str] | None = None
    stage: StagePolicy | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ArgumentError: naming the fields.
        """
        if isinstance(self.preconditions, list):
            object.__setattr__(self, "preconditions", tuple(self.preconditions))
        first_s = self.retry_s if _is_time(self.retry_s) else 0.0
        wrong = [
            *(["interval_s"] if not _is_time(self.interval_s) or self.interval_s <= 0 else []),
            *(["debounce_s"] if not _is_time(self.debounce_s) else []),
            *(["trial_s"] if self.trial_s is not None and not _is_time(self.trial_s, limit_s=math.inf) else []),
            *(["probe"] if self.probe is not None and not callable(self.probe) else []),
            *(["preconditions"] if not _are_callable(self.preconditions) else []),
            *(["retry_s"] if first_s <= 0 else []),
            *(["max_retry_s"] if not _is_time(self.max_retry_s) or self.max_retry_s < first_s else []),
            *(["stage"] if self.stage is not None and not isinstance(self.stage, StagePolicy) else []),
        ]
        if wrong:
            raise ArgumentError(
                f"Expected a watch policy that can be meant, got bad {', '.join(wrong)}.",
                remedy="see WatchPolicy: times are positive, preconditions a tuple of functions without arguments.",
            )


def _is_time(value: Any, *, limit_s: float = sys.float_info.max) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and bool(0 <= value <= limit_s)


def _are_callable(functions: object) -> bool:
    return isinstance(functions, tuple) and all(map(callable, functions))
