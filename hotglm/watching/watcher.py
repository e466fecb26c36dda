"""`Watcher`: follows a store or a directory of releases in a thread of its own, and keeps a slot up to date.

Rules this module keeps:

- One thread, started by `start()` and never by the constructor. It is supervised: whatever a round raises, the next one
  starts from what is on disk, after a pause, and the status says so (E12).
- Closing ends in bounded time also while a load runs, and from inside a callback (E13). At the end of the interpreter
  every watcher is closed; a trial that runs then is withdrawn, unless the process ends by an exception.
- A forked child has no thread and no trial: its watcher is idle until the child starts it again (K01).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from hotglm.errors import ArgumentError, HotglmError, SlotStateError, shorten_repr
from hotglm.events import ClosedEvent, ConfirmedEvent, Event, RolledBackEvent
from hotglm.model.grad_mode import GradMode
from hotglm.problem import describe_exception
from hotglm.release.ledger import verify_word
from hotglm.release.store import Store
from hotglm.slot.observer import attach_watcher
from hotglm.slot.slot import ModuleSlot
from hotglm.version import Version
from hotglm.watching.backoff import plan_pause_s
from hotglm.watching.engine import Engine
from hotglm.watching.follow import parse_follow
from hotglm.watching.hints import Hints, find_watch
from hotglm.watching.journal import Journal
from hotglm.watching.loading import Loader
from hotglm.watching.policy import DEFAULT_TRIAL_S, Clock, WatchPolicy
from hotglm.watching.refusals import Refusals
from hotglm.watching.requests import Requests
from hotglm.watching.retries import Retries
from hotglm.watching.scanning import Scanner
from hotglm.watching.status import WatchState, WatchStatus
from hotglm.watching.trial import Trials
from hotglm.weights.workers import start_thread

__all__ = ["Watcher", "watch"]

_CLOSE_S = 10.0
_MAX_WAIT_S = 3600.0
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


class Watcher:
    """Keeps a slot at the release that a label or a constraint leads to. Any thread may call any method.

    Example:
        >>> slot = ModuleSlot(__import__("torch").nn.Linear(1, 1), name="ranker", version="1.0.0")
        >>> watcher = Watcher(slot, "no-such-directory", follow=">=1,<2")
        >>> watcher.status().state
        <WatchState.IDLE: 'idle'>
    """

    def __init__(
        self,
        slot: ModuleSlot,
        store: Store | str | os.PathLike[str],
        *,
        follow: str = "stable",
        service: str | None = None,
        policy: WatchPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Settle what is followed and how; nothing is read, and no thread starts. See `hotglm.watch`.

        Raises:
            ArgumentError: something cannot be meant. MissingExtraError: events are wanted, and watchfiles is not there.
        """
        if not isinstance(slot, ModuleSlot):
            raise ArgumentError(f"Expected a slot, got {shorten_repr(slot)}.", remedy="pass a hotglm.ModuleSlot.")
        policy = policy or WatchPolicy()
        followed = parse_follow(follow, prereleases=policy.prereleases)
        place = store if isinstance(store, Store) else _read_path(store)
        self._slot = slot
        self._policy = policy
        self._follow = follow
        self._requests = Requests()
        self._thread: threading.Thread | None = None
        self._hints: Hints | None = None
        self._failed_by = ""
        self._unsubscribe: Callable[[], None] = _nothing
        self._detach: Callable[[], None] = _nothing
        self._listen = find_watch() if policy.uses_events else None
        self._reset_locks()
        clock, seed = clock or Clock(), f"{slot.name}/{os.getpid()}"
        scanner = Scanner(place, followed)
        journal = Journal(slot=slot, show=self._tell)
        directory = None if policy.quarantine is None else os.path.abspath(os.fsdecode(policy.quarantine))
        refusals = Refusals(has_service=service is not None, directory=directory)
        loader = Loader(slot=slot, policy=policy.stage, mode=GradMode.current())
        trial_s = policy.trial_s if policy.trial_s is not None else DEFAULT_TRIAL_S if service else 0.0
        self._engine = Engine(
            scanner=scanner,
            refusals=refusals,
            loader=loader,
            trials=Trials(
                slot=slot,
                journal=journal,
                refusals=refusals,
                loader=loader,
                length_s=trial_s,
                probe=policy.probe,
                clock=clock,
                plan_pause=functools.partial(
                    plan_pause_s, first_s=policy.retry_s, limit_s=policy.max_retry_s, seed=f"{seed}/back"
                ),
            ),
            journal=journal,
            policy=policy,
            clock=clock,
            service=None if service is None else verify_word(service, what="service"),
            is_label=followed.label is not None,
            requests=self._requests,
            retries=Retries(is_label=followed.label is not None),
            seed=seed,
        )

    def _reset_locks(self) -> None:
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._gate = threading.Lock()

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Load what the service confirmed last, if there is a service, and begin to follow; return the watcher.

        The first part happens in the calling thread, so that a process serves what was confirmed as soon as this
        returns. What fails is tried again in the watcher's thread. Started again, it does nothing, unless this is a
        forked child, whose watcher starts anew.

        Raises:
            SlotStateError: it was closed. ThreadStartError: the system has no thread to give.
        """
        with self._gate:
            if self._requests.is_closed:
                raise SlotStateError("Expected an open watcher, got a closed one.", remedy="make a new one.")
            if self._thread is not None and self._thread.is_alive():
                return self
            self._engine.begin()
            self._unsubscribe = self._slot.subscribe(self._hear)
            self._detach = attach_watcher(self._slot._core, self.status)
            try:
                self._start_threads()
            except BaseException:
                self._unsubscribe()
                self._detach()
                raise
            _watchers.add(self)
        return self

    def _start_threads(self) -> None:
        hints = None
        if self._listen is not None:
            find_watched, debounce_s = self._engine.scanner.find_watched, self._policy.debounce_s
            hints = Hints(find_watched, self._hint, debounce_s=debounce_s, watch=self._listen)
            hints.start()
        try:
            self._thread = start_thread(self._run, name=f"hotglm-watch-{self._slot.name}")
        except BaseException:
            if hints is not None:
                hints.stop(timeout_s=_CLOSE_S)
            raise
        self._hints = hints

    def close(self, *, timeout_s: float = _CLOSE_S) -> None:
        """Stop following; what is live stays live. May be called twice, and from inside a callback.

        A load is broken off at its next chunk. A trial that runs ends without a judgement: its release is neither
        confirmed nor refused.

        Args:
            timeout_s: how long to wait for the thread, in seconds. One that is in the middle of the host's own code is
                left to end by itself; nothing that it stages goes live any more.
        """
        self._requests.is_closed = True
        self._wake.set()
        thread, hints = self._thread, self._hints
        if hints is not None:
            hints.stop(timeout_s=timeout_s)
        if thread is None:
            self._engine.journal.stand(WatchState.CLOSED)
        elif thread is not threading.current_thread():
            thread.join(timeout_s)

    def __enter__(self) -> Self:
        """Return itself, started."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it. A trial that runs while the body raises has failed, whoever is to blame."""
        if isinstance(error, Exception):
            self._failed_by = f"the host raised {describe_exception(error)} while it was on trial"
        self.close()

    # -- asking --------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Leave everything as it is until `resume`; a load in flight is broken off, a trial goes on."""
        self._requests.is_paused = True
        self._wake.set()

    def resume(self) -> None:
        """Go on after `pause`, with a look at once."""
        self._requests.is_paused = False
        self._wake.set()

    def scan_now(self) -> None:
        """Ask for a look at once, and for another try of what failed for a reason that may pass; returns at once."""
        self._requests.is_asked = True
        self._wake.set()

    def confirm(self) -> bool:
        """End the trial of what is live well; return whether it was on trial. The same as `slot.confirm()`."""
        return self._slot.confirm()

    def fail(self, reason: str) -> None:
        """Say that what is on trial is bad: the watcher goes back and refuses it. Without a trial nothing happens."""
        self._requests.failure = (self._slot.live.number, reason or "the host said so")
        self._wake.set()

    def status(self) -> WatchStatus:
        """Return what it is doing. Costs nothing and waits for nobody."""
        engine, thread = self._engine, self._thread
        journal, error = engine.journal, engine.journal.error
        return WatchStatus(
            state=journal.state,
            place=engine.scanner.path,
            follow=self._follow,
            applied=None if engine.applied is None else str(engine.applied.version),
            target=None if journal.target is None else str(journal.target.version),
            reasons=journal.reasons,
            code="" if error is None else error.code,
            error="" if error is None else str(error),
            last_scan_s=journal.last_scan_s,
            next_try_s=engine.retries.find_next_s(),
            refused=engine.refusals.list_all(),
            events="off" if self._hints is None else self._hints.state,
            is_alive=thread is not None and thread.is_alive(),
            counts=journal.counts,
        )

    def wait_until(self, *, version: str | Version, timeout_s: float | None = None) -> bool:
        """Wait until a version is live; return whether it is.

        Args:
            version: which.
            timeout_s: how long to wait, in seconds; None for as long as it takes.
        """
        wanted = Version(version)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._slot.version != wanted:
                left_s = _MAX_WAIT_S if deadline_s is None else deadline_s - time.monotonic()
                if left_s <= 0 or self._engine.journal.state is WatchState.CLOSED:
                    return False
                self._changed.wait(min(left_s, 0.25))  # the slot may change without the watcher
            return True

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._requests.is_closed:
            self._wake.clear()
            try:
                wait_s = self._engine.step()
            except BaseException as failure:  # noqa: BLE001 - supervised: whatever it was, the next round starts anew
                wait_s = self._engine.note_crash(failure)
            self._tell()
            if wait_s > 0 and not self._requests.is_closed:
                self._wake.wait(min(wait_s, _MAX_WAIT_S))
        self._unsubscribe()
        self._detach()
        self._engine.close(judgement=self._failed_by)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _hint(self) -> None:
        self._requests.is_hinted = True
        self._wake.set()

    def _hear(self, event: Event) -> None:
        """Take note of what others do to the slot."""
        if isinstance(event, ConfirmedEvent):
            self._requests.confirmed = event.number
        elif isinstance(event, ClosedEvent):
            self._requests.is_closed = True
        elif not isinstance(event, RolledBackEvent):
            return
        if threading.current_thread() is not self._thread:
            self._wake.set()

    def reset_after_fork(self) -> None:
        """Make it idle, in a forked child, where its thread does not exist."""
        self._reset_locks()
        if self._thread is not None:
            self._unsubscribe()
            self._detach()
        self._thread = self._hints = None
        self._requests.failure = None
        self._engine.forget_parent()
        if not self._requests.is_closed:
            self._engine.journal.state = WatchState.IDLE

    def end(self, *, judgement: str) -> None:
        """Close it at the end of the interpreter; a process that ends by an exception judges what is on trial."""
        self._failed_by = self._failed_by or judgement
        with contextlib.suppress(HotglmError):
            self.close()


def watch(
    slot: ModuleSlot,
    store: Store | str | os.PathLike[str],
    *,
    follow: str = "stable",
    service: str | None = None,
    policy: WatchPolicy | None = None,
) -> Watcher:
    """Keep a slot at the newest release that is eligible in a store, from now on; return the watcher.

    The calling thread loads what the service confirmed last, if a service is named; everything else happens in a
    thread of the watcher's own. What fails leaves the live version serving. Close it, or use it in a `with`.

    Args:
        slot: what is kept up to date.
        store: a store; or the path of one; or a directory of releases, each of which is called by its version, or by
            the label that is followed (a link, or a directory that is replaced).
        follow: a label, whose moves are followed, also backwards; or a constraint such as `">=1.4,<2"`, whose highest
            version is followed upwards.
        service: name of the service whose trials and refusals are noted in the store; all processes of a pool give
            the same.
        policy: how it looks, waits, tries and gives up.

    Raises:
        ArgumentError: something cannot be meant. MissingExtraError: events are wanted, and watchfiles is not there.
        ThreadStartError: the system has no thread to give.
    """
    return Watcher(slot, store, follow=follow, service=service, policy=policy).start()


def _read_path(path: object) -> str:
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.path.abspath(os.fsdecode(path))
    raise ArgumentError(
        f"Expected a store or a path, got {shorten_repr(path)}.", remedy="pass hotglm.open_store(path), or the path."
    )


def _nothing() -> None:
    """Undo nothing: the watcher was not started."""


def _close_all() -> None:
    """Close every watcher before the interpreter takes its threads away."""
    failure = getattr(sys, "last_value", None)
    judgement = f"the process ended by {describe_exception(failure)}" if isinstance(failure, Exception) else ""
    for watcher in list(_watchers):
        watcher.end(judgement=judgement)


def _after_fork_in_child() -> None:
    for watcher in list(_watchers):
        watcher.reset_after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
