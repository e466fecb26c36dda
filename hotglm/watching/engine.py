"""One round of a watcher after the other: settle the trial, look, decide, act. Used by one thread at a time.

Rules this module keeps:

- A round starts from what is on disk and what is live; what it remembers is only what it did itself.
- Whatever fails, the live version serves on (P2). What fails is judged once and said once (E07).
- No lock of a pass is taken (P3), and no lock of this module is held while anything is read, loaded or announced.
- Time comes from the clock that it was given, and only differences count (K08).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from hotglm.errors import HotglmError, StoreBusyError, StoreError, StoreWriteError
from hotglm.problem import describe_exception
from hotglm.release.ledger import ReleaseId
from hotglm.release.services import Service
from hotglm.release.store_reading import release_name
from hotglm.watching.backoff import plan_pause_s
from hotglm.watching.deciding import RETRY_REASON, Decision, Situation, Task, decide, select_target
from hotglm.watching.journal import Journal, first_line
from hotglm.watching.judging import Fault, judge
from hotglm.watching.loading import LoadEndedError, Loader, Went
from hotglm.watching.policy import Clock, WatchPolicy
from hotglm.watching.preconditions import ask_all
from hotglm.watching.refusals import Refusals, Scope
from hotglm.watching.requests import Requests
from hotglm.watching.retries import Retries
from hotglm.watching.scanning import Found, Scanner, Target
from hotglm.watching.status import WatchState
from hotglm.watching.trial import Judge, OnTrial, TrialEnd, Trials

__all__ = ["Engine"]

_MAX_RESTORES = 5
"""How often what was confirmed is tried at the start before the watcher goes on without it."""

_MAX_BROKEN_OFF = 3
"""How many loads in a row give way to a newer release; then one is finished, however fast somebody publishes."""

_STATES = {
    Task.REST: WatchState.FOLLOWING,
    Task.NOTHING: WatchState.WAITING,
    Task.AWAIT_TRIAL: WatchState.ON_TRIAL,
    Task.AWAIT_RETRY: WatchState.RETRYING,
    Task.LEAVE: WatchState.REFUSED,
}


@dataclass(slots=True, kw_only=True)
class Engine:
    """What a watcher does, without its thread.

    Attributes:
        scanner: what looks.
        refusals: what must not be tried.
        loader: what stages and commits.
        trials: what judges.
        journal: where it is said.
        policy: how.
        clock: the time.
        service: name of the service; None for none.
        is_label: whether a label is followed.
        requests: what other threads ask.
        seed: what tells this watcher from others that should not try again at the same moment.
        applied: what it made live last.
        retries: what failed for a reason that may pass.
    """

    scanner: Scanner
    refusals: Refusals
    loader: Loader
    trials: Trials
    journal: Journal
    policy: WatchPolicy
    clock: Clock
    service: str | None
    is_label: bool
    requests: Requests
    seed: str
    retries: Retries
    applied: Target | None = None
    _held: tuple[Target, int] | None = None
    _restore: Target | None = None
    _num_restores: int = 0
    _num_broken_off: int = 0
    _has_begun: bool = False
    _position: int = 0

    # -- a round -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Find out what the service confirmed, and make it live; what fails is tried again in the rounds."""
        try:
            self._find_confirmed()
        except HotglmError as error:
            self.journal.stand(WatchState.WAITING, error=error)
        if self._restore is not None:
            self._try_restore(self._restore)

    def step(self) -> float:
        """Run one round and return in how many seconds the next one is due; 0 for at once.

        Raises:
            BaseException: what the host's own code raised, or a fault of ours; the next round starts from the disk.
        """
        requests = self.requests
        if requests.is_asked:
            self.retries.clear()
        requests.is_hinted = requests.is_asked = False
        self.loader.end_unended()
        failure = self._read_records()
        self._settle_trial()
        if requests.is_paused:
            self.journal.stand(WatchState.PAUSED)
            return self.policy.interval_s
        if self._restore is not None:
            return self._try_restore(self._restore)
        if failure is not None:
            self._stand_on_error(failure)
            return self._plan_wait()
        now_s = self.clock.now_s()
        try:
            found = self._look(lambda target: self.retries.is_waiting(target, now_s))
        except HotglmError as error:
            self._stand_on_error(error)
            return self._plan_wait()
        self.retries.forget_gone(found.target, now_s=now_s)
        found = select_target(found, applied=self.applied, live=self.loader.slot.version)
        self.journal.target = found.target
        return self._act(self._decide(found), found)

    def close(self, *, judgement: str = "") -> None:
        """End a trial that runs, without a judgement or with one; no round may be running."""
        self.trials.close(judgement)
        self.loader.end_unended()
        self.journal.stand(WatchState.CLOSED)

    def forget_parent(self) -> None:
        """Let go of what is the business of the process that this one was forked from."""
        self.trials.forget()
        self.loader.forget()

    def note_crash(self, failure: BaseException) -> float:
        """Note that a round raised, and return how long to wait before the next one."""
        self.journal.count(crashes=1)
        text = describe_exception(failure)
        self.journal.say(logging.ERROR, f"the watcher starts again after {text}")
        self.journal.stand(WatchState.FAILED, text)
        return self._plan_pause(min(self.journal.counts.crashes, 10), "crash")

    # -- looking -------------------------------------------------------------------------------------------------------

    def find_service(self) -> Service | None:
        """Return the service's record; None without a service.

        Raises:
            StoreError, SourceError: the place is no store, or cannot be read.
        """
        if self.service is None:
            return None
        store = self.scanner.find_store()
        if store is None:
            raise StoreError(
                f"Expected a store, which a service needs, got none at {self.scanner.path!a}.",
                remedy="make it with `hotglm.open_store(path, creates=True)`, or watch without a service.",
            )
        return store.service(self.service)

    def _read_records(self) -> HotglmError | None:
        """Take in what services and reason files say; return why that is impossible, if it is."""
        try:
            self._find_confirmed()
            self.refusals.read(self.find_service())
        except HotglmError as error:
            return error
        return None

    def _find_confirmed(self) -> None:
        """Find out what to start on; trials of dead processes are refused by that, before anything is tried."""
        service = None if self._has_begun else self.find_service()
        if service is not None:
            try:
                confirmed = service.start()
            except (StoreBusyError, StoreWriteError):  # it serves what was confirmed all the same
                self._plan_restore(service, service.read().confirmed)
                raise
            self._plan_restore(service, confirmed)
        self._has_begun = True

    def _plan_restore(self, service: Service, confirmed: ReleaseId | None) -> None:
        if confirmed is None or (self.applied and self.applied.digest == confirmed.digest):
            return
        path = service.store.join("releases", release_name(confirmed.sequence, confirmed.version))
        target = self.scanner.read_target(path, confirmed)
        if target is not None and target.digest == confirmed.digest:
            self._restore = target
        else:
            self.journal.say(logging.ERROR, f"the confirmed release {confirmed.version} is not in the store")

    def _look(self, is_waiting: Callable[[Target], bool]) -> Found:
        self.journal.last_scan_s = self.clock.now_s()
        self.journal.count(scans=1)
        return self.scanner.scan(lambda target: self.refusals.find(target) is not None, is_waiting=is_waiting)

    def _decide(self, found: Found) -> Decision:
        target, trial = found.target, self.trials.running
        situation = Situation(
            now_s=self.clock.now_s(),
            found=found,
            applied=self.applied,
            before=None if trial is None else trial.before,
            is_on_trial=trial is not None,
            is_refused=target is not None and self.refusals.find(target) is not None,
            is_label=self.is_label,
            retry=None if target is None else self.retries.find(target),
        )
        return decide(situation)

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision, found: Found) -> float:
        target, trial = decision.target, self.trials.running
        if decision.task is Task.GO_BACK and trial is not None:
            self._take(self.trials.go_back(trial, "the label went back", judge=Judge.NOBODY))
            return 0.0 if self.trials.running is None else self._plan_wait()
        if decision.task is not Task.TRY or target is None:
            self._rest(decision)
            return self._plan_wait()
        waits = ask_all(self.policy.preconditions)
        if waits.reasons:
            self.journal.note_delay(target, waits.reasons, error=waits.error)
            return self._plan_wait()
        return self._try(target, position=found.position)

    def _rest(self, decision: Decision) -> None:
        task, target = decision.task, decision.target
        refused = self.refusals.find(target) if task is Task.LEAVE and target is not None else None
        reason = decision.reason if refused is None else first_line(refused.reason)
        error = self.journal.error if task is Task.AWAIT_TRIAL else None
        retry = self.retries.find(target) if task is Task.AWAIT_RETRY and target is not None else None
        if retry is not None:
            error = retry.error
        was_said = error is not None and task is Task.AWAIT_TRIAL  # when it came (E07)
        self.journal.stand(_STATES[task], *(self.journal.reasons if was_said else (reason,)), error=error)

    def _try(self, target: Target, *, position: int) -> float:
        self.journal.count(loads=1)
        self.journal.stand(WatchState.LOADING)
        is_new = not self.refusals.is_confirmed(target)
        held = self._held[1] if self._held is not None and self._held[0].digest == target.digest else None
        try:
            service = self.find_service() if is_new else None
            went = self.loader.load(target, service=service, held=held, should_end=lambda: self._should_end(target))
        except LoadEndedError as ended:
            self._num_broken_off += 1
            self.journal.count(superseded=1)
            self.journal.say(logging.INFO, f"load of {target.version} broken off: {ended}")
            return 0.0
        except HotglmError as error:
            return self._fail(target, error)
        self.journal.count(commits=1, skipped=max(0, position - self._position - 1) if self._position else 0)
        self._position = position
        self._go_on(target, went, is_new=is_new)
        return 0.0

    def _try_restore(self, target: Target) -> float:
        """Load what was confirmed, or what was live before a trial and is held no more; it needs no trial."""
        self.journal.stand(WatchState.LOADING, "it was live before")
        self._num_restores += 1
        try:
            went = self.loader.load(target, service=None, held=None, should_end=self._find_stop)
        except LoadEndedError:
            return 0.0
        except HotglmError as error:
            is_over = judge(error) is not Fault.TIME or self._num_restores >= _MAX_RESTORES
            self._restore = None if is_over else target
            self.journal.stand(WatchState.RETRYING, "what was confirmed cannot be loaded", error=error)
            return self._plan_pause(self._num_restores, target.key)
        self._restore, self._num_restores = None, 0
        self.journal.count(commits=1)
        self._go_on(target, went, is_new=False)
        return 0.0

    def _should_end(self, target: Target) -> str | None:
        """Return why the load in flight is to be broken off; looks again when a look is due."""
        stop, last_s = self._find_stop(), self.journal.last_scan_s
        is_due = last_s is None or self.clock.now_s() - last_s >= self.policy.interval_s
        if stop is not None or not (is_due or self.requests.is_hinted) or self._num_broken_off >= _MAX_BROKEN_OFF:
            return stop
        self.requests.is_hinted = False
        try:
            # What failed before is tried when this is live: it may fail again, and nothing would be loaded to its end.
            found = self._look(lambda one: self.retries.find(one) is not None).target
        except HotglmError:  # what is being loaded is open, and a look that fails says nothing about it
            return None
        if found is None or found.digest == target.digest or not (self.is_label or target.version < found.version):
            return None
        return f"superseded by {found.version}"

    def _find_stop(self) -> str | None:
        if self.requests.is_closed:
            return "closed"
        return "paused" if self.requests.is_paused else None

    def _go_on(self, target: Target, went: Went, *, is_new: bool) -> None:
        """Note that a release went live, and begin its trial, or end it at once."""
        before, self.applied, self._num_broken_off = self.applied, target, 0
        self.retries.forget_up_to(target)
        self._held = None if before is None else (before, went.before_number)
        self.refusals.forget_host()
        self.journal.say(logging.INFO, f"{target.version} is live")
        trial = OnTrial(
            target=target,
            number=went.number,
            before=before,
            before_number=went.before_number,
            began_s=self.clock.now_s(),
            running=went.running,
        )
        self.trials.running = trial
        if not is_new or self.trials.length_s == 0:
            self.journal.stand(WatchState.FOLLOWING)
            self._take(self.trials.confirm(trial))
        else:
            self.journal.stand(WatchState.ON_TRIAL)

    def _settle_trial(self) -> None:
        asked, trial, failure = self.requests.failure, self.trials.running, ""
        if asked is not None:
            self.requests.failure = None  # what was bad while this release was being loaded was the one before it
            failure = asked[1] if trial is not None and asked[0] == trial.number else ""
        end = self.trials.settle(now_s=self.clock.now_s(), failure=failure, confirmed=self.requests.confirmed)
        self._take(end)

    def _take(self, end: TrialEnd | None) -> None:
        if end is not None:
            self.applied, self._held, self._restore = end.applied, end.held, end.restore

    def _fail(self, target: Target, error: HotglmError) -> float:
        """Judge what failed; return in how many seconds the next round is due."""
        fault = judge(error)
        if fault is Fault.CLOSED:
            self.requests.is_closed = True
            return 0.0
        if fault is Fault.TIME:
            return self._plan_retry(target, error)
        self.retries.forget(target)
        scope = Scope.BYTES if fault is Fault.BYTES else Scope.HOST
        reason = f"{error.code}: {error}"
        self.refusals.add(target, reason, scope=scope)
        self.journal.note_refusal(target, reason, code=error.code)
        return 0.0  # with a constraint the next lower one is eligible now

    def _plan_retry(self, target: Target, error: HotglmError) -> float:
        before = self.retries.find(target)
        attempt = 1 if before is None else before.attempt + 1
        at_s = self.clock.now_s() + self._plan_pause(attempt, target.key)
        self.retries.add(target, attempt=attempt, at_s=at_s, error=error)
        self.journal.count(retries=1)
        if self.is_label or attempt == 1:
            self.journal.stand(WatchState.RETRYING, RETRY_REASON, error=error)
        # With a constraint the next lower one is eligible now. What failed only once is given a moment first.
        return self._plan_wait() if self.is_label or attempt == 1 else 0.0

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _stand_on_error(self, error: HotglmError) -> None:
        state = WatchState.WAITING if self.trials.running is None else WatchState.ON_TRIAL
        self.journal.stand(state, error=error)

    def _plan_pause(self, attempt: int, key: str) -> float:
        first_s, limit_s = self.policy.retry_s, self.policy.max_retry_s
        return plan_pause_s(attempt, first_s=first_s, limit_s=limit_s, seed=f"{self.seed}/{key}")

    def _plan_wait(self) -> float:
        now_s, interval_s, last_s = self.clock.now_s(), self.policy.interval_s, self.journal.last_scan_s
        # From look to look, not from the end of one to the next: what is new is found within one interval.
        look_s = interval_s if last_s is None else max(interval_s / 10, last_s + interval_s - now_s)
        # What is overdue could not be done just now: it is done with the next look.
        left_s = self.trials.left_s(now_s)
        return min(look_s, self.retries.left_s(now_s), left_s if left_s > 0 else look_s)
