"""From records to numbers: what became of every request of a run.

Rules this module keeps:

- Pure: records in, numbers out. Every request is in exactly one of answered, torn and failed.
- Steady is the time from the first request to the first update of the same run.
- Time without answers is the longest time between two successive answers of the service, whichever client got them
  (from the start and to the end of the traffic included), less the longest such time while the run was steady.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from hotglm.demo.traffic import TORN, Answer
from hotglm.demo.training import SHEET_SIZE

__all__ = ["Kind", "Moment", "Run", "Tally", "find_gaps", "measure_accuracy", "tally"]


class Kind(Enum):
    """What happened at a moment."""

    UPDATE = "update"
    REFUSAL = "refusal"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Something that was done to a service while it was asked.

    Attributes:
        kind: what it was.
        title: what it was, in words.
        began_s: when it was begun, in seconds of `time.perf_counter`.
        ended_s: when it was over.
        serving: the version that serves from then on.
        text: what came back, of any number of lines.
        code: the lines that did it.
        is_repeat: whether it only repeats an earlier one, to have more of them.
    """

    kind: Kind
    title: str
    began_s: float
    ended_s: float
    serving: str
    text: str = ""
    code: str = ""
    is_repeat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way of updating, under traffic from `began_s` to `ended_s`."""

    name: str
    began_s: float
    ended_s: float
    answers: Sequence[Answer]
    moments: Sequence[Moment] = field(default_factory=tuple)

    @property
    def changes(self) -> list[Moment]:
        """The moments that changed the version, in order."""
        return [moment for moment in self.moments if moment.kind is not Kind.REFUSAL]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """One line of the table.

    Attributes:
        name: of the run.
        num_changes: changes of the version: updates and rollbacks.
        num_requests: requests made.
        num_failed: requests without an answer.
        num_torn: answers that are of no version.
        num_stale: answers of a version that was not the live one at any time between question and answer.
        median_ms: median latency of the answered requests, while steady.
        worst_ms: worst latency of an answered request.
        silent_ms: time without answers, see above.
        longest_gap_ms: longest time between two successive answers.
        steady_gap_ms: the same while steady.
    """

    name: str
    num_changes: int
    num_requests: int
    num_failed: int
    num_torn: int
    num_stale: int
    median_ms: float
    worst_ms: float
    silent_ms: float
    longest_gap_ms: float
    steady_gap_ms: float


def tally(run: Run) -> Tally:
    """Count a run."""
    answered = [answer for answer in run.answers if answer.version is not None]
    steady_end_s = run.moments[0].began_s if run.moments else run.ended_s
    steady = [answer for answer in answered if answer.ended_s < steady_end_s]
    longest_s = _longest_gap([run.began_s, *(a.ended_s for a in answered), run.ended_s])
    steady_s = _longest_gap([run.began_s, *(a.ended_s for a in steady)])
    return Tally(
        name=run.name,
        num_changes=len(run.changes),
        num_requests=len(run.answers),
        num_failed=len(run.answers) - len(answered),
        num_torn=sum(answer.version == TORN for answer in answered),
        num_stale=sum(_is_stale(answer, run.changes) for answer in answered),
        median_ms=1e3 * statistics.median([a.ended_s - a.began_s for a in steady] or [0.0]),
        worst_ms=1e3 * max((a.ended_s - a.began_s for a in answered), default=0.0),
        silent_ms=1e3 * max(0.0, longest_s - steady_s),
        longest_gap_ms=1e3 * longest_s,
        steady_gap_ms=1e3 * steady_s,
    )


def _longest_gap(times_s: Sequence[float]) -> float:
    return max((later - earlier for earlier, later in itertools.pairwise(sorted(times_s))), default=0.0)


def find_gaps(run: Run, *, longer_than_s: float) -> Iterator[tuple[float, float]]:
    """Yield the times between two successive answers that are longer than that, the edges of the traffic included."""
    times_s = [run.began_s, *(a.ended_s for a in run.answers if a.version is not None), run.ended_s]
    yield from (pair for pair in itertools.pairwise(sorted(times_s)) if pair[1] - pair[0] > longer_than_s)


def _is_stale(answer: Answer, changes: Sequence[Moment]) -> bool:
    """Tell whether an answer is of a version that was live at no time between the question and the answer."""
    before = [change for change in changes if change.ended_s <= answer.began_s]
    during = [change for change in changes if change.ended_s > answer.began_s and change.began_s < answer.ended_s]
    if answer.version == TORN or not before:
        return False
    return answer.version not in {before[-1].serving, *(change.serving for change in during)}


def measure_accuracy(run: Run, *, begin_s: float, end_s: float) -> float:
    """Return the share of digits that were right in the requests wholly inside a time, 0 to 1."""
    inside = [a.num_right for a in run.answers if a.version is not None and a.began_s >= begin_s and a.ended_s <= end_s]
    return sum(inside) / (len(inside) * SHEET_SIZE) if inside else 0.0
