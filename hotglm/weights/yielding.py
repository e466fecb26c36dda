"""The share of the time in which a load works that leaves the service alone, and what decides on it.

Rules this module keeps:

- No thread, no clock and no sleep: what threads have met is told to it (weights/pace.py).
- Work is cut into pieces. One that kept a core or a copy engine busy for `b` is followed by a pause of `b/u - t`, where
  `u` is the share and `t` what the piece took. Time in which a thread waited, for a disk, a core or the GIL, is pause
  already. So a load that is busy for `B` and waits for `W` ends within `W + B / min_share`, whatever is sensed.
- A pass pays nothing and tells nothing (P3). What is sensed is the load's own fate: what its pieces cost, and how long
  its threads stood in the queue for a core.

[Note: yielding]
That the harm which a background task does can be told from its own progress is Douceur and Bolosky's ("Progress-based
regulation of low-importance processes", SOSP 1999). That the least cost seen is what a piece costs alone, and that any
excess is contention, is LEDBAT's (RFC 6817; there, too, the least is that of recent intervals). The share follows
additive increase, multiplicative decrease (Chiu and Jain, 1989), once in an interval:

    u <- max(min_share, u / 2)             where the interval was contended
    u <- min(max_share, u + max_share / 8) where it was not

An interval is contended if its pieces of one kind cost more than 1.3 times the least, or if more than a tenth of the
time in which its threads could have run was spent in the queue for a core.

- Cost is the thread's time on its core (`CLOCK_THREAD_CPUTIME_ID`) for a byte: a core that waits for a bus, a cache or
  its sibling thread is busy, and one that waits for a disk is not. For a copy to or from a device it is the time until
  the host saw it done.
- Pieces of one kind are compared with each other, as hashing hardly feels a bus that reading waits for. The least is
  that of runs of four; of pieces of less than 256 KiB, and of kinds that are less than a tenth of the work, Python is
  most. A piece in which the thread waited for longer than it worked says nothing: it has met a cold page cache.
- The least is that of the last half minute to minute, in intervals. A service that leaves no gap for longer than that
  is sensed as contention no more, by cost; it is by the queue.

Not everything that disturbs a service can be sensed from here. `max_share` bounds that: a pass that takes `1 + s` of
its time beside a load that never pauses takes `1 + s * max_share` beside one whose pieces are much shorter than the
pass. So the largest share is a quarter, and not all of the time where nothing is sensed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hotglm.errors import ArgumentError
from hotglm.quantity import is_amount

__all__ = ["EXCESS", "INTERVAL_S", "QUEUED", "STEPS", "PaceRecord", "Share", "Work", "Yielding", "next_share"]

INTERVAL_S = 0.05
"""How often the share is decided on, at most."""

EXCESS = 1.3
"""Cost over the least cost from which on an interval is contended."""

MATTERS = 0.1
"""Part of the cost of an interval from which on a kind of work is judged."""

QUEUED = 0.1
"""Part of the time in which a thread could have run, from which on queueing for a core is contention."""

STEPS = 8
"""Intervals without contention from a share of nothing to the largest."""

_MIN_SHARE = 0.001
_BACK_OFF = 0.5
_RUN = 4
_MIN_JUDGED_NBYTES = 256 << 10
_NUM_REMEMBERED = 600


class Work(enum.Enum):
    """What is done with the bytes of a piece; pieces of one kind cost alike."""

    READ = "read"
    COPY = "copy"
    HASH = "hash"
    SCAN = "scan"
    UPLOAD = "upload"
    FETCH = "fetch"
    FAULT = "fault"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Yielding:
    """Stage in a share of one core's time that shrinks when the machine is wanted; see `StagePolicy.pace`.

    Attributes:
        max_share: largest part of the time in which each thread of a load works, above 0 and at most 1.
        min_share: the part that is always its own, at least a thousandth, so that a load ends: what takes `B` of work
            is done within `B / min_share`, and whatever it waits for disks and cores.
    """

    max_share: float = 0.25
    min_share: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ArgumentError: the shares are not in order.
        """
        are_numbers = is_amount(self.min_share) and is_amount(self.max_share)
        if not (are_numbers and _MIN_SHARE <= self.min_share <= self.max_share <= 1):
            raise ArgumentError(
                f"Expected {_MIN_SHARE} <= min_share <= max_share <= 1, got {self}.",
                remedy="Yielding() takes a twentieth to a quarter of a core; min_share is what it never goes below.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceRecord:
    """How a load yielded.

    Attributes:
        busy_s: time in which its threads worked, in seconds.
        yielded_s: time in which they paused for the service.
        num_intervals: how often the share was decided on.
        num_contended: how often somebody else wanted the machine.
        least_share: smallest share of the time that it took.
        last_share: the share that it took at the end.
    """

    busy_s: float
    yielded_s: float
    num_intervals: int
    num_contended: int
    least_share: float
    last_share: float

    def explain(self) -> str:
        """Return it as a phrase."""
        return (
            f"worked for {self.busy_s * 1e3:.1f} ms, yielded for {self.yielded_s * 1e3:.1f} ms; contended in "
            f"{self.num_contended} of {self.num_intervals} intervals, share {self.least_share:.3f} at least and "
            f"{self.last_share:.3f} at the end"
        )


class _Costs:
    """What pieces of one kind cost for a byte: in this interval, and at least in recent ones."""

    __slots__ = ("_run", "_run_nbytes", "_run_s", "before", "latest", "nbytes", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.nbytes = 0
        self.latest = self.before = float("inf")
        self._run = self._run_nbytes = 0
        self._run_s = 0.0

    def add(self, seconds: float, nbytes: int) -> None:
        self.seconds += seconds
        self.nbytes += nbytes
        self._run, self._run_s, self._run_nbytes = self._run + 1, self._run_s + seconds, self._run_nbytes + nbytes
        if self._run == _RUN:
            self.latest = min(self.latest, self._run_s / self._run_nbytes)
            self._run, self._run_s, self._run_nbytes = 0, 0.0, 0

    @property
    def least(self) -> float:
        return min(self.latest, self.before)

    def forget(self) -> None:
        self.before, self.latest = self.latest, float("inf")


def next_share(share: float, policy: Yielding, *, is_contended: bool) -> float:
    """Return the share after an interval: additive increase, multiplicative decrease ([Note: yielding]).

    Example:
        >>> next_share(0.25, Yielding(), is_contended=True), next_share(0.0625, Yielding(), is_contended=True)
        (0.125, 0.05)
        >>> next_share(0.125, Yielding(), is_contended=False), next_share(0.24, Yielding(), is_contended=False)
        (0.15625, 0.25)
    """
    if is_contended:
        return max(policy.min_share, share * _BACK_OFF)
    return min(policy.max_share, share + policy.max_share / STEPS)


class Share:
    """The share, and what decides on it; whoever calls holds the lock of its pace."""

    def __init__(self, policy: Yielding, *, now_s: float) -> None:
        self._policy = policy
        self.value = self.least = policy.min_share
        self.num_intervals = self.num_contended = 0
        self._costs: dict[Work, _Costs] = {}
        self._since_s = now_s
        self._used_s = self._queued_s = 0.0

    def add(self, work: Work, nbytes: int, *, cost_s: float, wall_s: float, used_s: float, queued_s: float) -> None:
        """Take what a thread met at one piece, and since it was last asked for how long it queued; all in seconds."""
        self._used_s += used_s
        self._queued_s += queued_s
        if work is not Work.OTHER and nbytes >= _MIN_JUDGED_NBYTES and wall_s <= 2 * cost_s:
            self._costs.setdefault(work, _Costs()).add(cost_s, nbytes)

    def decide(self, now_s: float) -> None:
        """End the interval if it has lasted long enough."""
        if now_s - self._since_s < INTERVAL_S:
            return
        is_contended = self._is_contended()
        self.num_intervals += 1
        self.num_contended += is_contended
        self.value = next_share(self.value, self._policy, is_contended=is_contended)
        self.least = min(self.least, self.value)
        self._begin(now_s)

    def _is_contended(self) -> bool:
        runnable_s = self._queued_s + self._used_s
        if runnable_s > 0 and self._queued_s > QUEUED * runnable_s:
            return True
        total_s = sum(costs.seconds for costs in self._costs.values())
        return any(
            costs.seconds > MATTERS * total_s and costs.seconds > EXCESS * costs.nbytes * costs.least
            for costs in self._costs.values()
        )

    def _begin(self, now_s: float) -> None:
        self._since_s = now_s
        self._used_s = self._queued_s = 0.0
        for costs in self._costs.values():
            costs.seconds, costs.nbytes = 0.0, 0
            if self.num_intervals % _NUM_REMEMBERED == 0:
                costs.forget()
