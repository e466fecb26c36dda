"""The updates of a slot: stage, commit, roll back, confirm, close, with their receipts and announcements.

Rules this module keeps:

- Announcements are made when nothing is locked any more, and after the point of no return.
- Whatever fails is typed, names slot, version and what still serves, and has a receipt.
- Nothing here is on the way of a pass.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hotglm.errors import ArgumentError, HotglmError, SlotClosedError, shorten_repr
from hotglm.events import (
    ClosedEvent,
    CommittedEvent,
    ConfirmedEvent,
    DiscardedEvent,
    DrainedEvent,
    Event,
    RolledBackEvent,
    StagedEvent,
    Subscribers,
    SupersededEvent,
)
from hotglm.model.compilations import listen
from hotglm.model.grad_mode import GradMode
from hotglm.model.swappable import verify_swappable
from hotglm.progress import Progress
from hotglm.slot.admission import Admission
from hotglm.slot.announcing import describe_stage, name_change, note_held, refused_event
from hotglm.slot.checks import StagePolicy
from hotglm.slot.generation import Generation
from hotglm.slot.in_place import InPlaceAdmission
from hotglm.slot.policies import InPlace
from hotglm.slot.publication import Expected, Publication
from hotglm.slot.receipt import Receipt
from hotglm.slot.sessions import Sessions
from hotglm.slot.settings import SlotSettings, StageOptions
from hotglm.slot.source import Source
from hotglm.slot.spare import Spares
from hotglm.slot.stage_request import StageRequest
from hotglm.slot.staged import RECEIPT_PARTS, Staged, StageRecord
from hotglm.slot.stager import Stager, clear_frames
from hotglm.version import Version
from hotglm.weights import places
from hotglm.weights.workers import Cancellation, yield_gil

__all__ = ["SlotCore"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_MAX_REFUSALS = 100
"""Texts of refusals kept for `status()`."""


def _keeping_no_memory(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap a method so that an error that somebody keeps keeps no generation alive with its traceback."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except BaseException as failure:
            clear_frames(failure)  # those below this one, which have all returned
            raise

    return call


class SlotCore:
    """Everything of a slot that is not a pass. Any thread may call any method."""

    __hotglm_slot__ = True

    def __init__(self, first: Generation, settings: SlotSettings) -> None:
        """Publish `first`; nothing is staged."""
        self.settings = settings
        self.admission = _make_admission(first, settings)
        self.sessions = Sessions()
        self.subscribers = Subscribers()
        # Found while a stage has its turn, announced when it has ended.
        self._late: deque[Event] = deque()
        self.spares = Spares(
            admission=self.admission,
            sessions=self.sessions,
            policy=settings.memory,
            # No method of this object: a slot that is dropped must be gone without the garbage collector.
            on_held=functools.partial(
                note_held, self._late, slot=settings.name, limit_s=settings.memory.drain_timeout_s
            ),
        )
        self.stager = Stager(self.spares, name=settings.name)
        self.refusals: deque[str] = deque(maxlen=_MAX_REFUSALS)
        self.num_refused = 0
        self._numbers = itertools.count(first.number + 1)

    @_keeping_no_memory
    def stage(self, source: Source, version: str | Version | None, options: StageOptions) -> Staged:
        """Stage `source`; see `ModuleSlot.stage`."""
        events: list[Event] = []
        try:
            with self.stager.turn(what=describe_stage(source, version), can_be_superseded=True) as cancellation:
                return self._stage(source, version, options, cancellation, events)
        finally:
            self._publish_after_turn(events)

    @_keeping_no_memory
    def commit(self, staged: Staged, expected: Expected | None) -> Receipt:
        """Commit `staged`; see `ModuleSlot.commit`."""
        events: list[Event] = []
        try:
            return self._commit(staged, expected, events)
        finally:
            self.publish(*events)

    @_keeping_no_memory
    def update(
        self, source: Source, version: str | Version | None, expected: Expected | None, options: StageOptions
    ) -> Receipt:
        """Stage and commit in one turn; see `ModuleSlot.update`."""
        events: list[Event] = []
        try:
            with self.stager.turn(what=describe_stage(source, version), can_be_superseded=False) as cancellation:
                staged = self._stage(source, version, options, cancellation, events)
                try:
                    return self._commit(staged, expected, events)
                except BaseException:
                    self._settle_interrupted(staged, events)
                    raise
        finally:
            self._publish_after_turn(events)

    def _settle_interrupted(self, staged: Staged, events: list[Event]) -> None:
        """Announce what became of a stage whose commit raised; an interrupt may come after the store."""
        live = self.admission.live
        if staged.drop():
            events.append(self._discarded(staged))
        elif live.generation.number == staged.number and not any(isinstance(e, CommittedEvent) for e in events):
            events.append(self._committed(live.generation, live.before or live.generation))

    @_keeping_no_memory
    def rollback(self, to: Expected | None, expected: Expected | None) -> Receipt:
        """Make a held generation live; see `ModuleSlot.rollback`."""
        started = time.perf_counter()
        try:
            old, new = self.admission.rollback(to, expected=expected)
        except HotglmError as error:
            self.add_context(error)
            raise
        receipt = self._receipt("rolled back", old, new, time.perf_counter() - started)
        self.publish(RolledBackEvent(slot=self.settings.name, **name_change(new.generation, old.generation)))
        yield_gil()  # rollbacks in a tight loop leave passes their turns (F15 in tests/test_concurrent_updates.py)
        return receipt

    @_keeping_no_memory
    def confirm(self, expected: Expected | None) -> bool:
        """End the trial; see `ModuleSlot.confirm`."""
        try:
            publication = self.admission.confirm(expected=expected)
        except HotglmError as error:
            self.add_context(error)
            raise
        live = (publication or self.admission.live).generation
        if publication is not None:
            self.publish(ConfirmedEvent(slot=self.settings.name, version=str(live.version), number=live.number))
        if self.settings.trust is not None and live.accepted is not None:
            self.settings.trust.confirm(live.accepted)  # asked again after it failed, it is tried again
        return publication is not None

    def close(self) -> None:
        """Take no further updates; see `ModuleSlot.close`."""
        with self.stager.turn(what="close", can_be_superseded=False):
            if not self.admission.close():
                return
            self.stager.discard_latest(by="close")
            self.spares.close()
        self.publish(*self.note_drained(), ClosedEvent(slot=self.settings.name))

    def publish(self, *events: Event) -> None:
        """Tell the subscribers, in order."""
        for event in events:
            self.subscribers.publish(event)

    def note_drained(self) -> list[Event]:
        """Forget the retired generations that are free, and return the events that say so."""
        name = self.settings.name
        free = self.spares.forget_free()
        return [DrainedEvent(slot=name, version=str(retired.version), number=retired.number) for retired in free]

    def add_context(self, error: HotglmError, version: Version | None = None) -> None:
        """Note in an error which slot and versions it concerns."""
        serving = self.admission.find_serving()
        error.with_slot(
            slot=self.settings.name,
            version=None if version is None else str(version),
            serving=None if serving is None else str(serving.version),
        )

    def reset_after_fork(self) -> None:
        """Replace every lock, in a forked child, where the threads that may have held them do not exist."""
        self.admission.reset_lock_after_fork()
        self.stager.reset_locks()
        self.subscribers.reset_lock_after_fork()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _stage(
        self,
        source: Source,
        version: str | Version | None,
        options: StageOptions,
        cancellation: Cancellation,
        events: list[Event],
    ) -> Staged:
        record = StageRecord()
        events += [*self.note_drained(), *self._supersede(source, version)]
        self.admission.wait_settled()
        live = self.admission.live.generation
        try:
            request = self._request(source, version, options, live=live, cancellation=cancellation)
            staged = self.stager.run(request, record, progress=options.progress)
        except HotglmError as error:
            events.append(self._refuse(error, record, live))
            raise
        events.append(StagedEvent(slot=self.settings.name, version=str(staged.version), number=staged.number))
        return staged

    def _publish_after_turn(self, events: list[Event]) -> None:
        late = [self._late.popleft() for _ in range(len(self._late))]
        self.publish(*sorted((*late, *events), key=lambda event: event.at_s))

    def _supersede(self, source: Source, version: str | Version | None) -> list[Event]:
        old = self.stager.discard_latest(by=describe_stage(source, version))
        if old is None:
            return []
        by = None if version is None else str(version)
        event = SupersededEvent(slot=self.settings.name, version=str(old.version), number=old.number, by_version=by)
        return [event]

    def _request(
        self,
        source: Source,
        version: str | Version | None,
        options: StageOptions,
        *,
        live: Generation,
        cancellation: Cancellation,
    ) -> StageRequest:
        if self.admission.is_closed:
            raise SlotClosedError("Expected an open slot, got a closed one.", remedy="make a new ModuleSlot.")
        listen()
        # Here, because torch's settings may be of a thread.
        verify_swappable(live.module, is_fixed=self.admission.is_in_place)
        settings = self.settings
        if options.policy is not None and not isinstance(options.policy, StagePolicy):
            raise ArgumentError(
                f"Expected a StagePolicy, got {shorten_repr(options.policy)}.", remedy="pass StagePolicy(...)."
            )
        return StageRequest(
            source=source,
            version=None if version is None else Version(version),
            name=settings.name,
            accept=settings.accept,
            policy=options.policy or settings.policy,
            constants=settings.constants,
            digests=options.digests or {},
            config=options.config,
            refresh=settings.refresh,
            requantize=settings.requantize,
            migrations=settings.migrations,
            trust=settings.trust,
            mode=GradMode.current(),
            streams=places.active.read_streams(),
            live=live,
            number=next(self._numbers),
            owner=self.admission,
            cancellation=cancellation,
            report=_ignore,
            on_discard=self._announce_discarded,
        )

    def _refuse(self, error: HotglmError, record: StageRecord | Staged, live: Generation) -> Event:
        version = record.version
        self.add_context(error, version)
        error.receipt = Receipt(
            action="refused",
            slot=self.settings.name,
            old_version=live.version,
            new_version=version,
            old_number=live.number,
            new_number=live.number,
            source=record.source,
            digest=live.digest,
            verdict=record.verdict,
            plan=record.plan,
            timings=tuple(record.timings),
            migration=record.migration,
            pace=record.pace,
            at_s=time.time(),
            code=error.code,
        )
        self.refusals.append(str(error))
        self.num_refused += 1
        return refused_event(error, slot=self.settings.name, version=version)

    def _commit(self, staged: Staged, expected: Expected | None, events: list[Event]) -> Receipt:
        if not isinstance(staged, Staged) or staged.owner is not self.admission:
            raise ArgumentError(
                f"Expected a stage of slot {self.settings.name!r}, got {shorten_repr(staged)}.",
                remedy="commit what this slot's own stage() returned.",
            )
        started = time.perf_counter()
        try:
            generation = staged.generation
            target = staged.base if expected is None else expected
            old, new = self.admission.commit(generation, expected=target, claim=staged.claim())
        except HotglmError as error:
            events.append(self._refuse(error, staged, self.admission.live.generation))
            raise
        commit_s = time.perf_counter() - started
        staged.release()
        receipt = self._receipt("committed", old, new, commit_s, staged)
        events.append(self._committed(generation, old.generation))
        return receipt

    def _receipt(
        self, action: str, old: Publication, new: Publication, commit_s: float, staged: Staged | None = None
    ) -> Receipt:
        live = new.generation
        parts = {} if staged is None else {name: getattr(staged, name) for name in RECEIPT_PARTS}
        return Receipt(
            action=action,
            slot=self.settings.name,
            old_version=old.generation.version,
            new_version=live.version,
            old_number=old.generation.number,
            new_number=live.number,
            digest=live.digest,
            quantized_from=None if live.origin is None else live.origin.weights,
            digests=dict(live.digests),  # a mapping that can be pickled, like the rest of a receipt
            commit_s=commit_s,
            at_s=time.time(),
            in_place=new.record,
            **parts,
        )

    def _announce_discarded(self, staged: Staged) -> None:
        self.publish(self._discarded(staged))

    def _committed(self, new: Generation, old: Generation) -> Event:
        return CommittedEvent(slot=self.settings.name, **name_change(new, old))

    def _discarded(self, staged: Staged) -> Event:
        return DiscardedEvent(slot=self.settings.name, version=str(staged.version), number=staged.number)


def _make_admission(first: Generation, settings: SlotSettings) -> Admission:
    policy = settings.swap.policy
    if isinstance(policy, InPlace):
        return InPlaceAdmission(first, name=settings.name, policy=policy)
    return Admission(first, name=settings.name)


def _ignore(progress: Progress) -> None:
    """Take progress that nobody asked for; the stager puts its own queue here."""
    del progress
