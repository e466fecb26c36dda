"""`ModuleSlot`: what an application holds and calls; stable across versions of the model behind it.

Rules this module keeps:

- A slot is an `nn.Module` and stands for its live one: traversals, `state_dict`, attributes and methods are those of the
  live generation, each call in one generation from its start to its end.
- The way of a pass through this file is one line, `__call__`; the argument for it is in slot/admission.py.
- Whatever would write the live weights in place, or replace them one by one, is refused with the way to do it instead.
- Announcements are made when nothing is locked any more, and after the point of no return.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hotglm.errors import (
    ArgumentError,
    DrainTimeoutError,
    HotglmError,
    SlotClosedError,
    SlotStateError,
    shorten_repr,
)
from hotglm.events import (
    ClosedEvent,
    CommittedEvent,
    ConfirmedEvent,
    DiscardedEvent,
    DrainedEvent,
    Event,
    HeldEvent,
    RefusedEvent,
    RolledBackEvent,
    StagedEvent,
    Subscribers,
    SupersededEvent,
)
from hotglm.model.inspection import contract_of
from hotglm.model.registry import find_definition
from hotglm.slot.admission import Admission, Expected, HistoryEntry, Publication
from hotglm.slot.checks import GradMode, StagePolicy
from hotglm.slot.facade import ModuleFacade
from hotglm.slot.generation import Generation, Retired
from hotglm.slot.holders import Holder, Session, Sessions, find_passes, find_references
from hotglm.slot.memory import MemoryPolicy
from hotglm.slot.receipt import Progress, Receipt
from hotglm.slot.source import Source
from hotglm.slot.spare import Spares, weights_nbytes
from hotglm.slot.staging import Staged, StageRecord, StageRequest
from hotglm.slot.stager import Stager
from hotglm.slot.status import GenerationStatus, Status
from hotglm.version import Bump, Version
from hotglm.weights.workers import Cancellation

__all__ = ["ModuleSlot"]

_MAX_REFUSALS = 100


class ModuleSlot(ModuleFacade):
    """Holds the live version of a model, and changes it between two passes.

    The module given to a slot is the slot's from then on: its tensors are the first of the two copies. Any thread may
    call any method; passes take no lock and never wait for an update.

    Example:
        >>> slot = ModuleSlot(nn.Linear(2, 2), name="ranker", version="1.0.0")
        >>> receipt = slot.update({"weight": torch.eye(2), "bias": torch.zeros(2)}, version="1.0.1")
        >>> slot(torch.ones(2)).tolist(), str(slot.version)
        ([1.0, 1.0], '1.0.1')
        >>> str(slot.rollback().new_version)
        '1.0.0'
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        version: str | Version | None = None,
        accept: Bump | str = Bump.MINOR,
        policy: StagePolicy | None = None,
        memory: MemoryPolicy | None = None,
        constants: Sequence[str] = (),
        refresh: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Take `module` over and make it the first generation.

        Args:
            module: any `nn.Module` with its tensors on the CPU; owned by the slot from now on.
            name: name of the slot and the model; what `@versioned` declared, else the class's name.
            version: version of `module`; what `@versioned` declared, else `0.0.0`.
            accept: the largest step of versions that is taken; `"major"` lets callers notice.
            policy: what every stage must prove, unless `stage` is given another one.
            memory: how much memory updates may use.
            constants: patterns of names of derived state that does not depend on the weights (see `hotglm.refresh`).
            refresh: recomputes derived state of somebody else's model; called with the staged module.

        Raises:
            ModuleError: the module holds something no slot can hold; everything is named.
            ArgumentError: `version` or `accept` cannot be meant.
        """
        contract = contract_of(module)
        definition = find_definition(type(module))
        label = name or (definition.name if definition else type(module).__name__)
        number = Version(version) if version is not None else definition.version if definition else Version("0.0.0")
        first = Generation(module, number=1, name=label, version=number, contract=contract)
        own = object.__setattr__  # not nn.Module's, which would register parts; see ModuleFacade
        own(self, "_admission", Admission(first, name=label))
        own(self, "_sessions", Sessions())
        own(self, "_subscribers", Subscribers())
        own(self, "_accept", Bump.parse(accept))
        own(self, "_policy", policy or StagePolicy())
        own(self, "_constants", tuple([constants] if isinstance(constants, str) else constants))
        own(self, "_refresh", refresh)
        own(self, "_numbers", itertools.count(2))
        own(self, "_refusals", deque(maxlen=_MAX_REFUSALS))
        own(self, "_num_refused", 0)
        own(
            self,
            "_spares",
            Spares(
                admission=self._admission,
                sessions=self._sessions,
                policy=memory or MemoryPolicy(),
                on_held=self._announce_held,
            ),
        )
        own(self, "_stager", Stager(self._spares, name=label))
        _slots.add(self)

    _admission: Admission
    _sessions: Sessions
    _subscribers: Subscribers
    _accept: Bump
    _policy: StagePolicy
    _constants: tuple[str, ...]
    _refresh: Callable[[nn.Module], object] | None
    _numbers: itertools.count[int]
    _refusals: deque[str]
    _num_refused: int
    _spares: Spares
    _stager: Stager

    # -- passes --------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass in the generation that is live now. Takes no lock; see slot/admission.py."""
        return self._admission.live.call(*args, **kwargs)

    def acquire(self) -> Session:
        """Return a session: `with slot.acquire() as generation:` holds one generation for several passes.

        Enter it once. Its memory is not reused until the session exits and everything taken from it is gone; use the
        generation's number in the key of anything cached from it.
        """
        return Session(self._admission.live.generation, sessions=self._sessions)

    @property
    def live(self) -> Generation:
        """The live generation. Keeping it keeps its memory; use `acquire` for work of any length."""
        return self._admission.live.generation

    @property
    def version(self) -> Version:
        """The live version."""
        return self._admission.live.generation.version

    @property
    def name(self) -> str:
        """Name of the slot."""
        return self._admission.name

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """The latest changes of the live generation, oldest first; refusals change nothing and are not in it."""
        return self._admission.live.history

    # -- updates -------------------------------------------------------------------------------------------------------

    def stage(
        self,
        source: Source,
        version: str | Version | None = None,
        *,
        policy: StagePolicy | None = None,
        digests: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Staged:
        """Load and prove a new version beside the live one; return it, ready to be committed.

        The live version serves throughout and is not touched, whatever happens. Blocks the calling thread; from asyncio
        use `await asyncio.to_thread(slot.stage, ...)`. A newer stage supersedes one that is not committed.

        Args:
            source: a `.safetensors` file, a `*.safetensors.index.json`, a directory of either, a mapping of names to
                tensors, or a module, whose code and weights are then copied.
            version: its version; else the one it carries; else the live one with a label made from its digest.
            policy: what it must prove, in place of the slot's own policy.
            digests: digests its tensors must have, by name (`sha256:...`), beside those the source carries.
            config: fields of the config to build a registered class from, in place of the one the source carries.
            progress: called in this thread as bytes arrive.

        Raises:
            SourceError: the bytes cannot be used. IncompatibleError: the verdict says no. CheckError: a proof failed.
            ModuleError: the structure cannot be carried over. MemoryPlanError: no room.
            SlotStateError: superseded, closed, or called from inside a stage. StageTimeoutError, StageFailedError,
            ThreadStartError, ArgumentError: as they say.
        """
        with self._stager.turn(what=self._describe(source, version), can_be_superseded=True) as cancellation:
            staged, events = self._stage(source, version, policy, digests, config, progress, cancellation)
        self._publish(*events)
        return staged

    def commit(self, staged: Staged, *, expected: Expected | None = None) -> Receipt:
        """Make a staged version the live one, between two passes; return the receipt.

        Passes that run keep the old version to their end; passes that begin after this returned see the new one.

        Args:
            staged: from `stage` of this slot.
            expected: number or version that must be live; by default the generation that was live when it was staged.

        Raises:
            ConflictError: another generation is live. DiscardedError, SupersededError: it is no longer staged.
            SlotClosedError: the slot was closed. ArgumentError: it belongs to another slot.
        """
        receipt, events = self._commit(staged, expected)
        self._publish(*events)
        return receipt

    def update(
        self,
        source: Source,
        version: str | Version | None = None,
        *,
        expected: Expected | None = None,
        policy: StagePolicy | None = None,
        digests: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Receipt:
        """Stage and commit in one turn; updates from several threads are made one after the other.

        Args and errors are those of `stage` and `commit`.
        """
        with self._stager.turn(what=self._describe(source, version), can_be_superseded=False) as cancellation:
            staged, events = self._stage(source, version, policy, digests, config, progress, cancellation)
            with staged:
                receipt, more = self._commit(staged, expected)
        self._publish(*events, *more)
        return receipt

    def rollback(self, to: Expected | None = None, *, expected: Expected | None = None) -> Receipt:
        """Make a held generation live again, by default the one before the live one; return the receipt.

        Needs no disk, no network and no loading. The generation that was live stays held.

        Args:
            to: number or version of a held generation.
            expected: number or version that must be live now.

        Raises:
            NoRollbackError: it is not held. ConflictError: another generation is live. SlotClosedError: closed.
        """
        started = time.perf_counter()
        try:
            old, new = self._admission.rollback(to, expected=expected)
        except HotglmError as error:
            raise self._with_slot(error, None)
        commit_s = time.perf_counter() - started
        receipt = self._receipt("rolled back", old, new.generation, commit_s)
        before, after = old.generation, new.generation
        self._publish(
            RolledBackEvent(
                slot=self.name,
                version=str(after.version),
                number=after.number,
                previous_version=str(before.version),
                previous_number=before.number,
            )
        )
        return receipt

    def confirm(self, *, expected: Expected | None = None) -> bool:
        """End the trial of the live generation; return whether it was on trial.

        Args:
            expected: number or version that must be live.

        Raises:
            ConflictError: another generation is live.
        """
        try:
            publication = self._admission.confirm(expected=expected)
        except HotglmError as error:
            raise self._with_slot(error, None)
        if publication is None:
            return False
        generation = publication.generation
        self._publish(ConfirmedEvent(slot=self.name, version=str(generation.version), number=generation.number))
        return True

    # -- looking -------------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with every event from now on; return the function that ends this."""
        return self._subscribers.subscribe(callback)

    def status(self) -> Status:
        """Return what the slot is doing. Costs the caller a look at every thread's stack, and passes nothing."""
        live = self._admission.live
        staged = self._stager.staged
        generations = [_describe_generation(live.generation, "live", ())]
        generations += [_describe_generation(held, "held", tuple(self._find_runners(held))) for held in live.held]
        for retired in self._spares.retired:
            if not retired.is_free:
                generations.append(
                    GenerationStatus(
                        number=retired.number,
                        version=retired.version,
                        state="draining",
                        nbytes=retired.nbytes,
                        holders=tuple(self._spares.find_runners(retired)),
                    )
                )
        return Status(
            name=self.name,
            version=live.generation.version,
            number=live.generation.number,
            trial=live.trial,
            epoch=live.epoch,
            generations=tuple(generations),
            staged=staged.version if staged is not None and staged.state.value == "staged" else None,
            arenas_nbytes=self._spares.pool.nbytes,
            num_refused=self._num_refused,
            last_refusal=self._refusals[-1] if self._refusals else "",
            closed=self._admission.is_closed,
        )

    def find_holders(self) -> tuple[Holder, ...]:
        """Return who still holds a generation that is neither live nor held for rollback: passes with their stacks,
        sessions, and every module, tensor and bound method that is kept, with what keeps it.

        Walks all objects of the process with the GIL held, which may take long; for diagnosis.
        """
        found: list[Holder] = []
        for retired in self._spares.retired:
            if retired.is_free:
                continue
            found += self._spares.find_runners(retired)
            arena = retired.arena
            address, nbytes = (arena.address, arena.nbytes) if arena is not None else (0, 0)
            found += find_references(retired.module, address=address, nbytes=nbytes, number=retired.number)
        return tuple(found)

    def wait_drained(self, *, timeout_s: float | None = None) -> None:
        """Wait until no pass or session runs in any generation but the live one, and the memory of those that are not
        held for rollback is free.

        Args:
            timeout_s: how long to wait, in seconds; None means for ever.

        Raises:
            DrainTimeoutError: it took longer; the text names who holds what, passes with their stacks.
        """
        started = time.monotonic()
        while True:
            busy = [holder for held in self._admission.live.held for holder in self._find_runners(held)]
            self._publish(*self._note_drained())
            if not busy and not self._spares.retired:
                return
            if timeout_s is not None and time.monotonic() - started >= timeout_s:
                raise self._with_slot(self._drain_timeout(timeout_s, busy), None)
            time.sleep(0.001)

    def close(self) -> None:
        """Take no further updates, and let the spare and the rollback targets go; passes go on. May be called twice."""
        if not self._admission.close():
            return
        with self._stager.turn(what="close", can_be_superseded=False):
            self._stager.discard_latest(by="close")
            for held in self._admission.live.held:
                self._spares.retire_now(held)
        self._publish(*self._note_drained(), ClosedEvent(slot=self.name))

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _stage(
        self,
        source: Source,
        version: str | Version | None,
        policy: StagePolicy | None,
        digests: Mapping[str, str] | None,
        config: Mapping[str, Any] | None,
        progress: Callable[[Progress], object] | None,
        cancellation: Cancellation,
    ) -> tuple[Staged, list[Event]]:
        record = StageRecord()
        events: list[Event] = self._note_drained()
        superseded = self._stager.discard_latest(by=self._describe(source, version))
        if superseded is not None:
            events.append(
                SupersededEvent(slot=self.name, version=str(superseded.version), number=superseded.number)
            )
        live = self._admission.live.generation
        try:
            if self._admission.is_closed:
                raise SlotClosedError("Expected an open slot, got a closed one.", remedy="make a new ModuleSlot.")
            request = StageRequest(
                source=source,
                version=None if version is None else Version(version),
                name=self.name,
                accept=self._accept,
                policy=policy or self._policy,
                constants=self._constants,
                digests=digests or {},
                config=config,
                refresh=self._refresh,
                mode=GradMode.current(),
                live=live,
                number=next(self._numbers),
                owner=self._admission,
                cancellation=cancellation,
            )
            staged = self._stager.run(request, record, progress=progress)
        except HotglmError as error:
            self._refuse(error, record, live, events)
            raise
        return staged, [*events, StagedEvent(slot=self.name, version=str(staged.version), number=staged.number)]

    def _refuse(self, error: HotglmError, record: StageRecord, live: Generation, events: list[Event]) -> None:
        version = record.version
        self._with_slot(error, version)
        error.receipt = Receipt(
            action="refused",
            slot=self.name,
            old_version=live.version,
            new_version=version,
            old_number=live.number,
            new_number=live.number,
            source=record.source,
            digest=live.digest,
            verdict=record.verdict,
            plan=record.plan,
            timings=tuple(record.timings),
            at_s=time.time(),
            code=error.code,
        )
        self._refusals.append(str(error))
        object.__setattr__(self, "_num_refused", self._num_refused + 1)
        text = None if version is None else str(version)
        self._publish(*events, RefusedEvent(slot=self.name, version=text, code=error.code, message=str(error)))

    def _commit(self, staged: Staged, expected: Expected | None) -> tuple[Receipt, list[Event]]:
        if not isinstance(staged, Staged) or staged.owner is not self._admission:
            raise ArgumentError(
                f"Expected a stage of slot {self.name!r}, got {shorten_repr(staged)}.",
                remedy="commit what this slot's own stage() returned.",
            )
        started = time.perf_counter()
        try:
            generation = staged.generation
            target = staged.base if expected is None else expected
            old = self._admission.commit(generation, expected=target, claim=staged.claim)
        except HotglmError as error:
            raise self._with_slot(error, staged.version)
        commit_s = time.perf_counter() - started
        staged.release()
        receipt = self._receipt("committed", old, generation, commit_s, staged)
        event = CommittedEvent(
            slot=self.name,
            version=str(generation.version),
            number=generation.number,
            previous_version=str(old.generation.version),
            previous_number=old.generation.number,
        )
        return receipt, [event]

    def _receipt(
        self, action: str, old: Publication, new: Generation, commit_s: float, staged: Staged | None = None
    ) -> Receipt:
        return Receipt(
            action=action,
            slot=self.name,
            old_version=old.generation.version,
            new_version=new.version,
            old_number=old.generation.number,
            new_number=new.number,
            source=staged.source if staged else "",
            digest=new.digest,
            digests=new.digests,
            verdict=staged.verdict if staged else None,
            plan=staged.plan if staged else None,
            timings=staged.timings if staged else (),
            checks=staged.checks if staged else (),
            carried=staged.carried if staged else (),
            refreshed=staged.refreshed if staged else (),
            converted=staged.converted if staged else (),
            commit_s=commit_s,
            at_s=time.time(),
        )

    def _with_slot(self, error: HotglmError, version: Version | None) -> HotglmError:
        text = None if version is None else str(version)
        return error.with_slot(slot=self.name, version=text, serving=str(self.version))

    def _describe(self, source: object, version: object) -> str:
        what = shorten_repr(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
        return f"a stage of {what}" + (f" as version {version}" if version else "")

    def _find_runners(self, generation: Generation) -> list[Holder]:
        passes = find_passes(generation.module, generation.number)
        return [*self._sessions.find(generation.number), *passes]

    def _note_drained(self) -> list[Event]:
        free = self._spares.forget_free()
        return [DrainedEvent(slot=self.name, version=str(r.version), number=r.number) for r in free]

    def _announce_held(self, retired: Retired, holders: tuple[Holder, ...]) -> None:
        texts = tuple(map(str, holders)) or ("references kept outside the slot; slot.find_holders() names them",)
        limit_s = self._spares.policy.drain_timeout_s
        self._publish(
            HeldEvent(
                slot=self.name, version=str(retired.version), number=retired.number, limit_s=limit_s, holders=texts
            )
        )

    def _drain_timeout(self, timeout_s: float, busy: list[Holder]) -> DrainTimeoutError:
        texts = [str(holder) for holder in busy]
        text = f"{self._spares.describe_holders()} {' '.join(texts)}".strip()
        return DrainTimeoutError(
            f"Expected old generations to be free within {timeout_s} s, got them still in use. {text}",
            remedy="end the named passes and sessions; slot.find_holders() names references.",
        )

    def _publish(self, *events: Event) -> None:
        for event in events:
            self._subscribers.publish(event)

    def _reset_after_fork(self) -> None:
        self._admission.reset_lock_after_fork()
        self._stager.reset_locks()
        self._subscribers.reset_lock_after_fork()

    # -- the slot itself as an object ------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": str(self.version),
            "accept": self._accept,
            "policy": self._policy,
            "memory": self._spares.policy,
            "constants": self._constants,
            "refresh": self._refresh,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleSlot:
        """Return an independent slot around a deep copy of the live module, with the same name, version and policies."""
        with self.acquire() as generation:
            copied = ModuleSlot(copy.deepcopy(generation.module, memo), **self._options())
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the live module and the slot's settings; history, subscribers and held generations stay behind."""
        return (_rebuild, (self.live.module, self._options()))


def _rebuild(module: nn.Module, options: dict[str, Any]) -> ModuleSlot:
    return ModuleSlot(module, **options)


def _describe_generation(generation: Generation, state: str, holders: tuple[Holder, ...]) -> GenerationStatus:
    return GenerationStatus(
        number=generation.number,
        version=generation.version,
        state=state,
        nbytes=weights_nbytes(generation),
        holders=holders,
    )


_slots: weakref.WeakSet[ModuleSlot] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Make every slot usable in a forked child: its locks may be held by threads that do not exist here.

    A child of a process that has run torch in parallel hangs in its first matrix product, because OpenMP waits for worker
    threads that were not forked. One thread needs no workers, so the child computes with one; it may raise the number
    again once it knows that the parent had none.
    """
    slots = list(_slots)
    for slot in slots:
        slot._reset_after_fork()
    if slots:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
