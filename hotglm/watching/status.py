"""What a watcher is doing, as data that can be printed, logged or served."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from hotglm.watching.refusals import Refused

__all__ = ["Counts", "WatchState", "WatchStatus"]


class WatchState(enum.Enum):
    """What a watcher is doing."""

    IDLE = "idle"
    """It was not started, or its thread is in the process that this one was forked from."""
    FOLLOWING = "following"
    """What should be live is."""
    WAITING = "waiting"
    """There is nothing eligible, or the place cannot be read."""
    LOADING = "loading"
    """It stages and commits a release."""
    DELAYED = "delayed"
    """A precondition delays the update."""
    ON_TRIAL = "on trial"
    """What it made live is on trial."""
    RETRYING = "retrying"
    """The update failed for a reason that may pass."""
    REFUSED = "refused"
    """What is followed leads to a release that must not be tried."""
    PAUSED = "paused"
    """Somebody asked it to pause."""
    FAILED = "failed"
    """Its own code raised; it starts again after a pause."""
    CLOSED = "closed"
    """It was closed, or its slot was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often what happened since the watcher was made.

    Attributes:
        scans: looks at the place.
        loads: releases that it began to stage.
        commits: releases that it made live, going back to a held one by a label included.
        skipped: releases that were eligible, or moves of the label, that a newer one overtook.
        superseded: loads that it broke off because a newer release was there.
        retries: failures for reasons that may pass.
        refused: releases that it refused.
        rollbacks: trials that failed or were taken back.
        crashes: failures of its own code, after each of which it started again.
    """

    scans: int = 0
    loads: int = 0
    commits: int = 0
    skipped: int = 0
    superseded: int = 0
    retries: int = 0
    refused: int = 0
    rollbacks: int = 0
    crashes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchStatus:
    """One look at a watcher. Times are of the monotonic clock, in seconds.

    Attributes:
        state: what it is doing.
        place: the directory that it looks at.
        follow: the label or constraint that it follows.
        applied: version that it made live last; None before the first.
        target: version that is to be live, as of the latest scan; None where nothing is eligible.
        reasons: why it waits or leaves the target alone, in words.
        code: code of the latest error that still stands; empty where there is none.
        error: text of that error.
        last_scan_s: when it looked last; None before the first time.
        next_try_s: when it next tries again something that failed; None where nothing has.
        refused: what must not be tried again, with reasons.
        events: whether events of the operating system are heard: `"off"`, `"on"`, or why not.
        is_alive: whether its thread runs.
        counts: how often what happened.
    """

    state: WatchState
    place: str
    follow: str
    applied: str | None = None
    target: str | None = None
    reasons: tuple[str, ...] = ()
    code: str = ""
    error: str = ""
    last_scan_s: float | None = None
    next_try_s: float | None = None
    refused: tuple[Refused, ...] = ()
    events: str = "off"
    is_alive: bool = False
    counts: Counts = dataclasses.field(default_factory=Counts)

    def to_dict(self) -> dict[str, Any]:
        """Return it as data that `json.dumps` takes."""
        plain = dataclasses.asdict(self)
        plain["state"] = self.state.value
        for one in plain["refused"]:
            one["scope"] = one["scope"].value
        return plain

    def __str__(self) -> str:
        """Return it as one line."""
        versions = f"live {self.applied or 'as it was'}, target {self.target or 'none'}"
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        error = f" [{self.code}]" if self.code else ""
        return f"watching {self.place!a} for {self.follow!r}, {self.state.value}, {versions}{why}{error}"
