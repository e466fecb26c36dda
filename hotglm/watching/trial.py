"""A release that went live and has to prove itself: how it is judged, confirmed, failed or taken back.

Rules this module keeps:

- Going back comes first, records on disk second: passes matter more, and a process that dies between the two leaves a
  trial whose lock is free, which refuses the release as well (S11).
- A trial ends once: confirmed, failed, or withdrawn without a judgement.
- Only differences of the monotonic clock count (K08).
- Going back may have to wait for passes, where weights are swapped in place. Then the trial goes on, its judgement
  stands, and it is tried again: nothing is said to be live no more that still is.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hotglm.errors import ConflictError, DrainTimeoutError, HotglmError, StoreConflictError
from hotglm.problem import describe_exception, escape_text
from hotglm.release.services import RunningTrial
from hotglm.slot.slot import ModuleSlot
from hotglm.watching.journal import Journal, first_line
from hotglm.watching.loading import Loader, fail_trial
from hotglm.watching.policy import Clock
from hotglm.watching.refusals import Refusals
from hotglm.watching.scanning import Target
from hotglm.watching.status import WatchState

__all__ = ["Judge", "OnTrial", "Return", "TrialEnd", "Trials"]


class Judge(enum.Enum):
    """Who said that a trial ended badly."""

    SELF = "self"
    """This process: the release is refused, with the reason."""
    ANOTHER = "another"
    """Another process, which has refused the release already."""
    NOBODY = "nobody"
    """No one: the release may be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    """A way back that could not be gone yet.

    Attributes:
        reason: why it is to be gone, in words.
        judge: who said so.
        attempt: how often it was tried.
        at_s: when it is tried again, of the monotonic clock.
    """

    reason: str
    judge: Judge
    attempt: int
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OnTrial:
    """A release that is live on trial.

    Attributes:
        target: the release.
        number: its generation.
        before: what the watcher had made live before; None where that was not its doing.
        before_number: the generation before, to which a failed trial goes back.
        began_s: when it went live, of the monotonic clock.
        running: the trial as the service's record has it; None without a service.
        pending: the way back that it waits for; None where it is not judged yet.
    """

    target: Target
    number: int
    before: Target | None
    before_number: int
    began_s: float
    running: RunningTrial | None = field(default=None, repr=False)
    pending: Return | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnd:
    """How a trial ended that did not end well.

    Attributes:
        applied: what counts as applied from now on.
        held: the release that was on trial and its generation, which may be held; None where it is not known.
        restore: what has to be loaded, because it is not held any more.
    """

    applied: Target | None
    held: tuple[Target, int] | None = None
    restore: Target | None = None


@dataclass(slots=True, kw_only=True)
class Trials:
    """The trials of one watcher, of which one runs at a time.

    Attributes:
        slot: the slot.
        journal: where it is said.
        refusals: where it is remembered.
        loader: what withdraws trials.
        length_s: how long a trial lasts.
        probe: what judges it meanwhile; None for nothing.
        clock: the time.
        plan_pause: returns how long to wait behind the nth try to go back, in seconds.
        running: the one that runs.
    """

    slot: ModuleSlot
    journal: Journal
    refusals: Refusals
    loader: Loader
    length_s: float
    probe: Callable[[Any], object] | None
    clock: Clock
    plan_pause: Callable[[int], float]
    running: OnTrial | None = None

    def left_s(self, now_s: float) -> float:
        """Return how long the one that runs still lasts; infinite where none does, or somebody has to end it."""
        trial = self.running
        if trial is None:
            return math.inf
        end_s = trial.began_s + self.length_s if trial.pending is None else trial.pending.at_s
        return max(0.0, end_s - now_s)

    def settle(self, *, now_s: float, failure: str, confirmed: int) -> TrialEnd | None:
        """End the trial that runs, if it is time to, or somebody said so.

        Args:
            now_s: the time.
            failure: why somebody said that it must go; empty where nobody did.
            confirmed: the generation that somebody confirmed last.

        Returns:
            What the watcher has to know; None where the trial goes on, ended well, or there is none.
        """
        trial = self.running
        if trial is None:
            return None
        live, is_confirmed = self.slot.live.number, confirmed == trial.number
        if live != trial.number:
            return self._note_change(trial, is_back=live == trial.before_number)
        if trial.pending is not None:
            return self.go_back(trial, trial.pending.reason, judge=trial.pending.judge)
        refused = self.refusals.find(trial.target)
        if refused is not None:
            return self.go_back(trial, refused.reason, judge=Judge.ANOTHER)
        reason = failure or ("" if is_confirmed else self._ask_probe())
        if reason:
            return self.go_back(trial, reason, judge=Judge.SELF)
        return self.confirm(trial) if is_confirmed or now_s - trial.began_s >= self.length_s else None

    def confirm(self, trial: OnTrial) -> TrialEnd | None:
        """End a trial well; where another process refused the release meanwhile, go back."""
        try:
            if trial.running is not None:
                trial.running.confirm()
        except StoreConflictError as error:
            reasons = [problem.message for problem in error.problems]
            return self.go_back(trial, "; ".join(reasons), judge=Judge.ANOTHER)
        except HotglmError as error:  # it stays on trial, and is confirmed when the record can be written
            self.journal.stand(WatchState.ON_TRIAL, "it cannot be confirmed", error=error)
            return None
        self.running = replace(trial, running=None)  # what is on disk is settled
        try:
            self.slot.confirm(expected=trial.number)
        except ConflictError:  # somebody changed the slot just now, and that counts
            pass
        except HotglmError as error:  # the trust of the slot cannot remember it: asked again in the next round
            self.journal.stand(WatchState.ON_TRIAL, "it cannot be confirmed", error=error)
            return None
        self.running = None
        return None

    def go_back(self, trial: OnTrial, reason: str, *, judge: Judge) -> TrialEnd | None:
        """Make the version before the trial live again; then note why. None where it has to wait for passes."""
        if trial.pending is not None and self.clock.now_s() < trial.pending.at_s:
            return None
        restore = None
        try:
            self.slot.rollback(to=trial.before_number, expected=trial.number)
        except DrainTimeoutError as error:
            self._wait_to_go_back(trial, reason, judge=judge, error=error)
            return None
        except HotglmError as error:
            self.journal.say(logging.ERROR, f"cannot go back from {trial.target.version}: {error.message}")
            restore = trial.before
        self._end(trial, reason, judge=judge)
        return TrialEnd(applied=trial.before, held=(trial.target, trial.number), restore=restore)

    def _wait_to_go_back(self, trial: OnTrial, reason: str, *, judge: Judge, error: HotglmError) -> None:
        attempt = 1 if trial.pending is None else trial.pending.attempt + 1
        at_s = self.clock.now_s() + self.plan_pause(attempt)
        self.running = replace(trial, pending=Return(reason=reason, judge=judge, attempt=attempt, at_s=at_s))
        self.journal.stand(WatchState.ON_TRIAL, f"it has to go: {first_line(reason)}", error=error)

    def close(self, judgement: str) -> None:
        """End the trial that runs, without a judgement where `judgement` is empty; what is live stays live."""
        trial, self.running = self.running, None
        if trial is not None and trial.running is not None:
            if judgement:
                fail_trial(trial.running, judgement)
            else:
                self.loader.withdraw(trial.running)

    def forget(self) -> None:
        """Let go of the trial's record, which is that of the process that this one was forked from.

        What is live here was forked with it, so it stays on trial: it goes back where the release is refused.
        """
        trial = self.running
        if trial is not None and trial.running is not None:
            trial.running.close()  # this process's hold on the lock alone; the parent's stays
            self.running = replace(trial, running=None)

    def _note_change(self, trial: OnTrial, *, is_back: bool) -> TrialEnd:
        """Somebody else changed the slot while a trial ran: back is a judgement, anything else is none."""
        self._end(trial, "the host changed the slot", judge=Judge.SELF if is_back else Judge.NOBODY)
        return TrialEnd(applied=trial.before if is_back else trial.target)

    def _end(self, trial: OnTrial, reason: str, *, judge: Judge) -> None:
        self.running = None
        self.journal.count(rollbacks=1)
        self.journal.say(logging.WARNING, f"{trial.target.version} is live no more: {first_line(reason)}")
        if trial.running is not None and judge is Judge.SELF:
            fail_trial(trial.running, reason)
        elif trial.running is not None:
            self.loader.withdraw(trial.running)
        if judge is Judge.SELF:
            self.refusals.add(trial.target, reason)
        if judge is not Judge.NOBODY:
            self.journal.note_refusal(trial.target, reason, code="TRIAL_FAILED")

    def _ask_probe(self) -> str:
        """Return why the release must go, in words; empty where the probe is content, or there is none."""
        if self.probe is None:
            return ""
        try:
            answer = self.probe(self.slot)
            if answer is None or answer is True:
                return ""
            is_text = isinstance(answer, str) and answer
            return escape_text(str(answer), limit=400) if is_text else f"the probe answered {answer!a:.80}"
        except Exception as error:  # noqa: BLE001 - a probe is the host's code and may raise anything
            return f"the probe raised {describe_exception(error)}"
