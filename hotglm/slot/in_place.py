"""Commits that write the live weights where they are: by whom, when, and what happens if it fails.

Rules this module keeps:

- Everything that can be refused is refused before the gate closes, and everything that is needed is made by then:
  pairs, views, buffers, the thread. While it is closed only copies are made, and compared.
- A commit runs in a thread of its own, which no signal reaches. Its caller waits, and may stop waiting; a commit that
  has begun to write then still ends.
- The order is: close, wait until empty, claim, exchange, compare, publish, open. A failure before the exchange changes
  nothing. A failure in it is undone, before the gate opens; a failure to undo leaves the gate shut for ever, because
  nothing is served rather than a mixture (`Closing.is_torn`).
- The exchange leaves the old weights where the staged ones were, so a rollback is the same exchange, with no other
  memory (P8, P9).
- Commits and rollbacks come one after the other; what a stage takes for its spare is never what one of them is using.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from hotglm.errors import DrainTimeoutError, Problem, ReentrantError, StageFailedError, UnswappableError
from hotglm.model.compilations import forget_compiled
from hotglm.model.compiled import find_calls
from hotglm.model.derived import Marks
from hotglm.model.pairing import find_moved, pair_states, read_addresses
from hotglm.model.twin import find_loose_tensors
from hotglm.problem import HotglmError, describe_exception
from hotglm.slot.admission import Admission
from hotglm.slot.change import Change, Publications, Ready, digest_where_it_is
from hotglm.slot.claim import Claim, NoClaim
from hotglm.slot.closing import Closing
from hotglm.slot.gate import Gate, Ticket
from hotglm.slot.generation import Generation
from hotglm.slot.passage import admit, runs_module
from hotglm.slot.policies import InPlace, InPlaceRecord
from hotglm.slot.publication import Expected, Publication, choose_call, find_target, verify_expected
from hotglm.weights import places
from hotglm.weights.exchange import Pair
from hotglm.weights.exchanges import make_exchanges
from hotglm.weights.workers import start_thread

__all__ = ["InPlaceAdmission"]

_SIGNAL_S = 0.25
"""How long a caller waits at a time, so that a Ctrl-C is not late (as in slot/stager.py)."""


class InPlaceAdmission(Admission):
    """The publication of a slot whose live module never changes, and the gate in front of it."""

    is_in_place = True
    __slots__ = ("_addresses", "_changing", "_num_writes", "_policy", "_writing_bytes", "gate")

    def __init__(self, generation: Generation, *, name: str, policy: InPlace) -> None:
        """Publish the first generation; where its tensors lie is noted."""
        super().__init__(generation, name=name)
        self.gate = Gate()
        self._policy = policy
        self._changing = threading.Lock()
        self._writing_bytes = threading.Lock()
        self._num_writes = 0
        self._addresses = read_addresses(generation.module)
        self.live = replace(self.live, call=self._admit_module(generation.module))

    # -- passes and stages ---------------------------------------------------------------------------------------------

    def find_serving(self) -> Generation | None:
        """Return the live generation, unless weights were left half written: then nothing is served any more."""
        return None if self.gate.is_torn() else super().find_serving()

    def enter(self, place: str) -> tuple[Ticket, Generation]:
        """Let a session in; see `Admission.enter`."""
        return self.gate.enter_extended(f"session acquired at {place}"), self.live.generation

    async def enter_async(self, place: str) -> tuple[Ticket, Generation]:
        """Let a session in, while the event loop goes on."""
        return await self.gate.enter_async(f"session acquired at {place}"), self.live.generation

    def leave(self) -> None:
        """Wake a commit that waits for the last session."""
        self.gate.leave()

    @property
    def image(self) -> str:
        """Where the image of what is on a device is staged."""
        return self._policy.image

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Be inside, as a pass is, while a stage reads the live tensors."""
        return self.gate.reading()

    def admit(self, value: Any) -> Any:
        """Return a method of the live module with a pass around it, and anything else as it is."""
        return admit(self.gate, value) if runs_module(value) else value

    def refresh_call(self) -> None:
        """Choose the call of the live module anew, after it was compiled in place."""
        with self._writing():
            self.live = replace(self.live, call=self._admit_module(self.live.generation.module))

    def _admit_module(self, module: nn.Module) -> Callable[..., Any]:
        return admit(self.gate, choose_call(module), like=module.forward)

    def verify_code(self, module: nn.Module) -> None:
        """Refuse other code than that of the live module.

        Raises:
            UnswappableError: it is another module, or live tensors are not where they were.
        """
        live = self.live.generation.module
        if module is not live:
            raise UnswappableError(
                f"Expected weights for the code that is live, got {type(module).__name__} as new code or config.",
                remedy="pass a module's state_dict() for its weights alone; new code needs swap=hotglm.Flip().",
            )
        self._verify_addresses(live)

    def pair(self, module: nn.Module, *, was_refreshed: bool) -> tuple[Pair, ...]:
        """Return what is exchanged between the live module and a staged twin of it.

        Raises:
            UnswappableError: it differs in more than the bytes of its tensors.
        """
        live = self.live.generation.module
        loose = find_loose_tensors(live) if was_refreshed else ()
        return pair_states(live, module, was_refreshed=was_refreshed, loose=loose)

    def is_committing(self) -> bool:
        """Whether the calling thread works for a commit; see `Admission.is_committing`."""
        return self.gate.is_committing()

    def wait_settled(self) -> None:
        """Wait until no commit is under way: what it uses is in nobody's list until it has ended."""
        self.gate.verify_not_committing()
        if not self.gate.is_inside():  # where none can write, and one that waits would wait for this thread
            with self._changing:
                pass

    def count_writes(self) -> int:
        """Return a number that grows when an exchange begins, to an odd one, and when it ends."""
        return self._num_writes

    # -- commits -------------------------------------------------------------------------------------------------------

    def commit(self, generation: Generation, *, expected: Expected, claim: Claim) -> Publications:
        """Exchange the weights between two passes; see `Admission.commit`.

        Raises:
            ConflictError: another generation is live. SlotClosedError: the slot was closed.
            ReentrantError: the calling thread or task is inside a pass or session of this slot.
            DrainTimeoutError: passes did not end in time. UnswappableError: live tensors are not where they were.
        """

        def choose(old: Publication) -> Generation:
            verify_expected(old.generation, expected)
            return generation

        def follow(old: Publication, new: Generation, displaced: Generation) -> Publication:
            return old.after_commit(new, displaced=displaced, call=old.call)

        return self._change(Change(choose=choose, claim=claim, follow=follow))

    def rollback(self, target: Expected | None, *, expected: Expected | None) -> Publications:
        """Exchange the weights back; see `Admission.rollback`.

        Raises:
            NoRollbackError: that generation is not held. Others as `commit`.
        """
        held: list[Generation] = []

        def choose(old: Publication) -> Generation:
            if expected is not None:
                verify_expected(old.generation, expected)
            held[:] = [find_target(old, target)]
            return held[0]

        def follow(old: Publication, new: Generation, displaced: Generation) -> Publication:
            return old.after_rollback(new, target=held[0], displaced=displaced, call=old.call)

        return self._change(Change(choose=choose, claim=NoClaim(), follow=follow))

    def retire(self, generation: Generation) -> bool:
        """Stop holding `generation`, once no rollback to it is under way; return whether it was held.

        Raises:
            ReentrantError: the calling thread or task is inside, and a commit waits for it.
        """
        with self._between_changes():
            return super().retire(generation)

    def close(self) -> bool:
        """Refuse commits from now on, once one that is under way has ended; return whether that is new.

        Raises:
            ReentrantError: the calling thread or task is inside, and a commit waits for it.
        """
        with self._between_changes():
            return super().close()

    @contextlib.contextmanager
    def _between_changes(self) -> Iterator[None]:
        """Hold commits off; whoever one of them waits for does not wait for it."""
        self.gate.verify_not_committing()
        if not self._changing.acquire(blocking=not self.gate.is_inside()):
            raise ReentrantError(
                "Expected this from outside the slot's passes, got it in a pass or session that a commit waits for.",
                remedy="let the pass or session end, and do it afterwards or from another thread.",
            )
        try:
            yield
        finally:
            self._changing.release()

    def begin_fork(self) -> None:
        """Wait until no byte is being written, so that no child gets half a version; until `end_fork` none is."""
        self._writing_bytes.acquire()

    def end_fork(self) -> None:
        """Let commits go on in the process that has forked."""
        self._writing_bytes.release()

    def reset_lock_after_fork(self) -> None:
        """Replace the locks in a forked child, and forget the passes of threads that do not exist there."""
        super().reset_lock_after_fork()
        self._changing = threading.Lock()
        self._writing_bytes = threading.Lock()
        self.gate.reset_after_fork()

    # -- one change ----------------------------------------------------------------------------------------------------

    def _change(self, change: Change) -> Publications:
        self.gate.verify_not_committing()
        if self.gate.is_inside():
            raise ReentrantError(
                "Expected a commit in place from outside the slot's passes, got one from inside a pass or session.",
                remedy="let the pass or session end, and commit afterwards or from another thread.",
            )
        failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        unwanted = threading.Event()
        work = functools.partial(self._work, change, unwanted, failures)
        try:
            thread = start_thread(work, name=f"hotglm-commit-{self.name}", owner=self.gate)
            while thread.is_alive():
                thread.join(_SIGNAL_S)
        except BaseException:
            unwanted.set()
            self.wait_settled()  # what has begun to write goes on to its end; what has not stops at once
            raise
        if change.outcome is not None and self.live.epoch >= change.outcome[1].epoch:
            return change.outcome
        with contextlib.suppress(queue.Empty):
            raise failures.get_nowait()
        text = "Expected weights to be exchanged, got a thread that died."
        raise StageFailedError(text, code="EXCHANGE_FAILED", remedy=_AGAIN)

    def _work(self, change: Change, unwanted: threading.Event, failures: queue.SimpleQueue[BaseException]) -> None:
        try:
            with self._changing, places.active.aside():
                if not unwanted.is_set():
                    self._settle(self._change_now(change, unwanted), change)
        except HotglmError as failure:
            failures.put(failure)
        except BaseException as failure:  # noqa: BLE001 - raised again in the thread that waits
            text = f"Expected weights to be exchanged, got {describe_exception(failure)}."
            typed = StageFailedError(text, code="EXCHANGE_FAILED", remedy=_AGAIN)
            typed.__cause__ = failure
            failures.put(typed)

    def _change_now(self, change: Change, unwanted: threading.Event) -> Ready:
        with self._writing():
            self._verify_open()
            self.gate.verify_whole()
            generation = change.choose(self.live)
        ready = self._prepare(generation)
        closing, epoch = Closing(threading.current_thread()), self.live.epoch
        started = time.perf_counter()
        try:
            self.gate.close(closing)
            num_inside = self.gate.count_inside()
            self._wait_until_empty(closing, unwanted)
            self._wait_for_work(ready, timeout_s=self._policy.timeout_s + started - time.perf_counter())
            waited = time.perf_counter()
            change.claim.take()
            self._exchange(change, ready, closing, started=started, waited=waited, num_inside=num_inside)
        finally:
            if self.live.epoch == epoch and not closing.is_torn:
                change.claim.give_back()  # here, and not in the thread that waits, which may wait no more
            self.gate.open(closing)
        return ready

    def _settle(self, ready: Ready, change: Change) -> None:
        """Bring the old bytes home while passes run again; where that fails, nobody can go back to them."""
        for _ in range(2):
            with contextlib.suppress(Exception):  # the version is live, and nothing may be raised any more
                ready.exchange.settle()
                return
        if change.outcome is not None:
            super().retire(change.outcome[1].held[0])

    def _prepare(self, generation: Generation) -> Ready:
        module = self.live.generation.module
        self._verify_addresses(module)
        return Ready(
            generation=generation,
            exchange=make_exchanges(generation.pairs, arena=generation.arena, num_threads=self._policy.num_threads),
            digests={pair.name: digest_where_it_is(pair.image) for pair in generation.pairs if pair.is_derived},
            loose=find_loose_tensors(module),
            calls=tuple(call for _, call in find_calls(module)),
        )

    def _wait_until_empty(self, closing: Closing, unwanted: threading.Event) -> None:
        timeout_s = self._policy.timeout_s
        if self.gate.wait_empty(closing, timeout_s=timeout_s, give_up=unwanted.is_set) and not unwanted.is_set():
            return
        inside = self.gate.describe_inside()
        raise DrainTimeoutError(
            f"Expected passes and sessions to end within {timeout_s} s of a commit in place, got {len(inside)} that "
            f"did not.\n" + "\n".join(inside).rstrip(),
            remedy="commit again when they have ended, or raise InPlace.timeout_s; nothing has changed.",
        )

    def _wait_for_work(self, ready: Ready, *, timeout_s: float) -> None:
        try:
            ready.exchange.wait_for_work(timeout_s=max(0.0, timeout_s))
        except StageFailedError as failure:
            raise DrainTimeoutError(
                f"Expected what devices were given to end within {self._policy.timeout_s} s of a commit in place, got "
                f"some that did not. {failure.message}",
                remedy="commit again when it has ended, or raise InPlace.timeout_s; nothing has changed.",
            ) from failure

    def _exchange(
        self, change: Change, ready: Ready, closing: Closing, *, started: float, waited: float, num_inside: int
    ) -> None:
        """Write, compare and publish; whatever fails before the store is undone."""
        epoch = self.live.epoch
        with self._writing_bytes:
            self._num_writes += 1
            closing.is_torn = True  # until one version is whole again: the new one, or the old one
            try:
                ready.exchange.run()
                copied = time.perf_counter()
                record = self._record(ready, num_inside=num_inside, waited_s=waited - started, copied_s=copied - waited)
                self._publish(change, ready, replace(record, closed_s=copied - started))
            finally:
                if self.live.epoch == epoch:
                    ready.exchange.undo()
                self._num_writes += 1
                closing.is_torn = False

    def _publish(self, change: Change, ready: Ready, record: InPlaceRecord) -> None:
        before = self.live.generation
        live = ready.generation.housed_in(before, marks=Marks(ready.loose))
        displaced = before.housed_in(ready.generation, marks=Marks(()))
        with self._writing():
            old = self.live  # confirmed since, or with a rollback target less; no other generation
            new = replace(change.follow(old, live, displaced), record=record)
            change.outcome = (old, new)
            self.live = new  # the point of no return
            forget_compiled(ready.calls)  # of a module that does not change

    def _record(self, ready: Ready, *, num_inside: int, waited_s: float, copied_s: float) -> InPlaceRecord:
        pairs = ready.generation.pairs
        module = self.live.generation.module
        addresses = read_addresses(module)
        derived = [pair for pair in pairs if pair.is_derived]
        return InPlaceRecord(
            num_tensors=len(pairs),
            nbytes=ready.exchange.nbytes,
            buffer_nbytes=ready.exchange.buffer_nbytes,
            num_waited_for=num_inside,
            waited_s=waited_s,
            closed_s=0.0,
            copied_s=copied_s,
            num_storages=len({storage for _, storage, nbytes in addresses.values() if nbytes}),
            moved=find_moved(self._addresses, addresses),
            derived=tuple(pair.name for pair in derived),
            stale=tuple(pair.name for pair in derived if digest_where_it_is(pair.live) != ready.digests[pair.name]),
        )

    def _verify_addresses(self, module: nn.Module) -> None:
        moved = find_moved(self._addresses, read_addresses(module))
        if moved:
            raise UnswappableError(
                "Expected the tensors of the live module to be where they were when the slot was made.",
                problems=[Problem(code="CANNOT_SWAP", message="Moved, replaced, new or gone", tensor=n) for n in moved],
                remedy="write parameters and buffers in place instead of assigning new ones, or make a new slot.",
            )


_AGAIN = "commit again; if the slot answers, nothing has changed."
