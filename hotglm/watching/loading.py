"""One try of one release: open, note the trial, stage, commit; whatever fails, nothing has changed.

Rules this module keeps:

- The trial is on disk before a byte is loaded: what a process dies on while it stages, by a full memory or a fault in
  native code, is not tried again either (S10, I04).
- A try that is broken off, or fails for a reason that may pass, is withdrawn: the release is not to blame.
- What is loaded is what the scan saw: the digest of the manifest is compared again once the release is open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hotglm.errors import HotglmError, Problem, ReleaseError, SourceChangedError, shorten_repr
from hotglm.model.grad_mode import GradMode
from hotglm.progress import Progress
from hotglm.release.directory import Release, open_release
from hotglm.release.services import RunningTrial, Service
from hotglm.slot.checks import StagePolicy
from hotglm.slot.slot import ModuleSlot
from hotglm.watching.judging import Fault, judge
from hotglm.watching.scanning import Target

__all__ = ["LoadEndedError", "Loader", "Went"]


class LoadEndedError(Exception):
    """A load was broken off by the watcher itself; not an error of anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Went:
    """A release that went live.

    Attributes:
        number: its generation.
        before_number: the one before it.
        running: its trial as the service's record has it; None where none is noted.
    """

    number: int
    before_number: int
    running: RunningTrial | None


@dataclass(slots=True, kw_only=True)
class Loader:
    """Stages and commits releases in one slot, in the thread of its watcher.

    Attributes:
        slot: the slot.
        policy: what a version must prove; None for the slot's own.
        mode: the autograd modes in which proofs run: those of whoever made the watcher, as new threads have none.
        unended: trials that could not be withdrawn yet, because their record cannot be written.
        noted: the trial of what is being loaded; None for none.
    """

    slot: ModuleSlot
    policy: StagePolicy | None
    mode: GradMode
    unended: list[RunningTrial] = field(default_factory=list)
    noted: RunningTrial | None = None

    def load(
        self, target: Target, *, service: Service | None, held: int | None, should_end: Callable[[], str | None]
    ) -> Went:
        """Make a release live.

        Args:
            target: which.
            service: where the trial is noted; None for none.
            held: the generation that is this release and may still be held, so that nothing needs to be loaded.
            should_end: asked while bytes arrive: why to break off, or None.

        Raises:
            LoadEndedError: it was broken off. HotglmError: it failed; what was live serves on.
        """
        with _open(target) as release:
            running = self.noted = None if service is None else service.begin(release)
            try:
                number, before = self._go(release.path, held=held, should_end=should_end)
            except BaseException as error:
                self._end(running, error)
                raise
            finally:
                self.noted = None
        return Went(number=number, before_number=before, running=running)

    def end_unended(self) -> None:
        """Withdraw the trials that could not be withdrawn before; never raises."""
        todo, self.unended = self.unended, []
        for running in todo:
            self.withdraw(running)

    def forget(self) -> None:
        """Let go of the locks of all trials: they are those of the process that this one was forked from."""
        unended, self.unended = self.unended, []
        for running in (*unended, *(() if self.noted is None else (self.noted,))):
            running.close()
        self.noted = None

    def withdraw(self, running: RunningTrial) -> None:
        """End a trial without a judgement, now or as soon as its record can be written; never raises."""
        try:
            running.withdraw()
        except HotglmError as error:
            if error.code == "NO_TRIAL":  # somebody ended it already
                running.close()
            else:
                self.unended.append(running)

    def _go(self, path: str, *, held: int | None, should_end: Callable[[], str | None]) -> tuple[int, int]:
        if held is not None:
            try:
                receipt = self.slot.rollback(to=held)
            except HotglmError:  # its memory was needed meanwhile: load it
                pass
            else:
                return receipt.new_number, receipt.old_number

        def look_up(_: Progress | None) -> None:
            reason = should_end()
            if reason is not None:
                raise LoadEndedError(reason)

        with self.mode.applied(), self.slot.stage(path, policy=self.policy, progress=look_up) as staged:
            look_up(None)
            receipt = self.slot.commit(staged)
        return receipt.new_number, receipt.old_number

    def _end(self, running: RunningTrial | None, error: BaseException) -> None:
        if running is None:
            return
        if isinstance(error, HotglmError) and judge(error) is Fault.BYTES:
            fail_trial(running, str(error))
        else:
            self.withdraw(running)


def fail_trial(running: RunningTrial, reason: str) -> None:
    """Note that a trial failed; never raises. One that cannot be noted is given up, which refuses the release too."""
    try:
        running.fail(reason)
    except HotglmError:
        running.close()


def _open(target: Target) -> Release:
    release = open_release(target.path)
    try:
        _verify_same(release, target)
    except BaseException:
        release.close()
        raise
    return release


def _verify_same(release: Release, target: Target) -> None:
    """Refuse another release than the scan saw, and one that is not what its name says.

    Raises:
        SourceChangedError: it was replaced since. ReleaseError: its manifest names another version than its directory.
    """
    if release.digest != target.digest:
        message = f"Expected the manifest of digest {target.digest}, got {release.digest}."
        raise SourceChangedError(
            f"{shorten_repr(target.path)} was replaced since it was found.",
            problems=[Problem(code="SOURCE_CHANGED", message=message, file=target.path)],
            remedy="nothing; the next look finds the new one.",
        )
    if release.manifest.version != target.version:
        message = f"Expected version {target.version}, as the directory is called, got {release.manifest.version}."
        raise ReleaseError(
            f"The release {shorten_repr(target.path)} is not what its name says.",
            problems=[Problem(code="VERSION_MISMATCH", message=message, file=target.path)],
            remedy="call the directory as the manifest says, or pack it again.",
        )
