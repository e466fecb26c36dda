"""What a service has on disk: the release it confirmed last, those it is trying, and those it must not try again.

Rules this module keeps (S10, S11):

- A trial is on disk before the release is live, with the name of a lock that its process holds. The kernel gives the
  lock up with the process, so a trial whose lock is free belongs to a process that died on it.
- A release that a process died on, or that failed, is refused from then on, by the digest of its manifest: the same
  bytes are not tried again, whatever label leads to them.
- One process of a pool that dies on trial refuses the release for all; the others can no longer confirm it.
- A new process starts on what was confirmed last, never on a trial.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hotglm import seam
from hotglm.errors import HotglmError, Problem, StoreConflictError, shorten_repr
from hotglm.release.closing import Closing
from hotglm.release.directory import Release
from hotglm.release.ledger import Refusal, ReleaseId, ServiceState, Trial, now_text, read_record, write_ledger
from hotglm.release.locks import lock_holder, try_exclusively
from hotglm.release.reading import close_quietly, list_directory
from hotglm.release.store_reading import StoreReader
from hotglm.release.writing import writing

__all__ = ["RunningTrial", "Service", "sweep_holders"]

_HOLDER_SUFFIX = ".holder"
_MAX_REFUSED = 256
_MAX_REASON = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningTrial(Closing):
    """A trial of this process. It ends by `confirm`, `fail` or `withdraw`; or with the process: then it is refused.

    As a context manager it is given up at the end of the body, unless it has ended before.

    Attributes:
        release: what is tried.
    """

    release: ReleaseId
    _service: Service = field(repr=False)
    _holder: str = field(repr=False)
    _lock: ExitStack = field(repr=False)

    def confirm(self) -> None:
        """Make the release the one that every new process of the service starts on.

        Raises:
            StoreConflictError: the trial has ended, or another process died on the release or refused it (REFUSED).
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be changed; the trial goes
                on.
        """

        def settle(state: ServiceState) -> ServiceState:
            self._verify_running(state)
            for refusal in state.refused:
                if refusal.release.digest == self.release.digest:
                    raise _refused(refusal)
            return replace(state, confirmed=self.release, trials=self._others(state))

        self._service.change(settle)
        self._end()

    def fail(self, reason: str) -> None:
        """Refuse the release, with the reason, from now on; what was confirmed before stays confirmed.

        Raises:
            StoreConflictError: the trial has ended.
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be changed; the trial goes
                on.
        """

        def settle(state: ServiceState) -> ServiceState:
            self._verify_running(state)
            return _refuse(replace(state, trials=self._others(state)), self.release, reason)

        self._service.change(settle)
        self._end()

    def withdraw(self) -> None:
        """End the trial without a judgement: nothing is confirmed, and the release may be tried again.

        For a process that ends in good order, or goes on to a newer release before it knows.

        Raises:
            StoreConflictError: the trial has ended.
            StoreBusyError, StoreWriteError, StoreError: the record cannot be changed; the trial goes on.
        """

        def settle(state: ServiceState) -> ServiceState:
            self._verify_running(state)
            return replace(state, trials=self._others(state))

        self._service.change(settle)
        self._end()

    def close(self) -> None:
        """Give the trial up, as if the process had died on it. Again does nothing."""
        self._lock.close()

    def _others(self, state: ServiceState) -> tuple[Trial, ...]:
        return tuple(trial for trial in state.trials if trial.holder != self._holder)

    def _verify_running(self, state: ServiceState) -> None:
        if all(trial.holder != self._holder for trial in state.trials):
            message = f"Expected a trial of {self.release.version} that runs, got one that has ended."
            raise StoreConflictError(
                "The trial has ended.",
                problems=[Problem(code="NO_TRIAL", message=message)],
                remedy="begin another one.",
            )

    def _end(self) -> None:
        with contextlib.suppress(OSError):  # it is debris then, for the next one who starts or collects
            seam.active.unlink(self._service.find_holder(self._holder))
        self._lock.close()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Service:
    """One service of a store, as all of its processes see it.

    Attributes:
        store: the store.
        name: of the service.
    """

    store: StoreReader = field(repr=False)
    name: str

    def read(self) -> ServiceState:
        """Return what is on disk.

        Raises:
            StoreError: it is damaged.
            SourceReadError: it cannot be read now.
        """
        path = self.store.find_ledger("services", self.name)
        return read_record(path, ServiceState) or ServiceState(name=self.name)

    def start(self) -> ReleaseId | None:
        """Return the release to start on: the last one that was confirmed; None before the first.

        Trials of processes that died are refused now.

        Raises:
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be read or changed.
        """
        return self.change(lambda state: state).confirmed

    def begin(self, release: Release) -> RunningTrial:
        """Note that this process is going to try an open release, before it does.

        Raises:
            StoreConflictError: the release was refused before (REFUSED).
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be changed; nothing has
                begun.
        """
        manifest = release.manifest
        wanted = ReleaseId(sequence=manifest.sequence, version=str(manifest.version), digest=release.digest)
        holder = f"{self.name}.{secrets.token_hex(8)}{_HOLDER_SUFFIX}"
        path = self.find_holder(holder)
        has_lock = False

        def settle(state: ServiceState) -> ServiceState:
            nonlocal has_lock
            for refusal in state.refused:
                if refusal.release.digest == wanted.digest:
                    raise _refused(refusal)
            with writing(path):  # under the store's lock, so that nobody takes it for debris before it is locked
                stack.callback(close_quietly, lock_holder(path))
            has_lock = True
            trial = Trial(release=wanted, holder=holder, began_at=now_text())
            return replace(state, trials=(*state.trials, trial))

        with ExitStack() as stack:
            try:
                self.change(settle)
            except BaseException:
                if has_lock:
                    self._withdraw(holder)
                with contextlib.suppress(OSError):
                    seam.active.unlink(path)
                raise
            return RunningTrial(release=wanted, _service=self, _holder=holder, _lock=stack.pop_all())

    def refuse(self, release: ReleaseId, reason: str) -> None:
        """Refuse a release that was never tried, for example one that did not verify.

        Raises:
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be changed.
        """
        self.change(lambda state: _refuse(state, release, reason))

    def forgive(self, digest: str) -> None:
        """Let a refused release be tried again, by the digest of its manifest.

        Raises:
            StoreBusyError, StoreWriteError, StoreError, SourceReadError: the record cannot be changed.
        """
        self.change(
            lambda state: replace(state, refused=tuple(one for one in state.refused if one.release.digest != digest))
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def find_holder(self, holder: str) -> str:
        """Return the path of the lock that shows that the process of a trial lives."""
        return self.store.join("services", holder)

    def change(self, settle: Callable[[ServiceState], ServiceState]) -> ServiceState:
        """Settle trials of dead processes, then apply `settle`, under the store's lock; write what changed."""
        with self.store.locked():
            before = self.read()
            state = before
            dead = [trial for trial in before.trials if self._is_dead(trial)]
            for trial in dead:
                others = tuple(other for other in state.trials if other != trial)
                reason = f"a process died while it tried it, since {trial.began_at}"
                state = _refuse(replace(state, trials=others), trial.release, reason)
            try:
                state = settle(state)
            finally:  # what is known of the dead is written even where `settle` refuses
                if state != before:
                    write_ledger(self.store.find_ledger("services", self.name), state)
            for trial in dead:
                with contextlib.suppress(OSError):
                    seam.active.unlink(self.find_holder(trial.holder))
            return state

    def _withdraw(self, holder: str) -> None:
        """Take back a trial that was noted though noting it failed: nobody has died on it.

        Where that fails as well the release is refused by whoever comes next, which errs on the safe side.
        """
        with contextlib.suppress(HotglmError):
            self.change(lambda state: replace(state, trials=tuple(t for t in state.trials if t.holder != holder)))

    def _is_dead(self, trial: Trial) -> bool:
        if os.path.basename(trial.holder) != trial.holder:
            return True  # nobody wrote that here
        path = self.find_holder(trial.holder)
        with writing(path):
            fd = try_exclusively(path)
        if fd is not None:
            close_quietly(fd)
            return True
        return not os.path.lexists(path)


def sweep_holders(store: StoreReader) -> list[str]:
    """Remove locks that no trial names and no process holds, under the store's lock; return their names.

    Raises:
        OSError: the system refused.
    """
    named = {trial.holder for state in store.read_services().values() for trial in state.trials}
    swept = []
    for name in list_directory(store.join("services")):
        if name.endswith(_HOLDER_SUFFIX) and name not in named:
            path = store.join("services", name)
            fd = try_exclusively(path)
            if fd is not None:
                try:
                    seam.active.unlink(path)
                    swept.append(name)
                finally:
                    close_quietly(fd)
    return swept


def _refuse(state: ServiceState, release: ReleaseId, reason: str) -> ServiceState:
    # In ASCII, so that what is written is as long as it looks, and the record stays within what is read.
    reason = reason.encode("ascii", "backslashreplace").decode("ascii")[:_MAX_REASON]
    refusal = Refusal(release=release, reason=reason, refused_at=now_text())
    others = tuple(one for one in state.refused if one.release.digest != release.digest)
    return replace(state, refused=(refusal, *others)[:_MAX_REFUSED])


def _refused(refusal: Refusal) -> StoreConflictError:
    message = (
        f"Expected a release that was not refused, got {refusal.release.version}, refused at {refusal.refused_at}: "
        f"{shorten_repr(refusal.reason)}."
    )
    return StoreConflictError(
        f"Release {refusal.release.version} must not be tried again.",
        problems=[Problem(code="REFUSED", message=message)],
        remedy="publish another version; or, where the release was not to blame, `Service.forgive`.",
    )
