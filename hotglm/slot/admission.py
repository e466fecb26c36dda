"""Where threads meet: admitting passes, and publishing the generation that new ones see.

This is the hard file of the slot; the argument is below and in docs/concurrency.md, and each claim names its test.

[Note: admission]
**A pass takes no lock and no count.** `ModuleSlot.__call__` evaluates `self._admission.live.call(*args, **kwargs)`. One
attribute load, `live`, decides which generation the pass belongs to (P1, P3). `call` is a bound method of that
generation's module; the interpreter keeps it alive until the call returns, it keeps the module alive, the module its
parameters, the parameters their storages, and each storage the arena's lease. So "this pass runs in that generation"
and "that memory is taken" are one fact. A pass cannot be forgotten, by a raised exception, a killed thread or a
cancelled task, because nothing has to be undone at its end (tests/test_torn_passes.py; the planted bug there is a
slot that reuses without asking).

**One store publishes.** All that a commit changes, the live generation, what is held for rollback, trial and history,
is in one immutable `Publication`; `live = publication` is the commit. Before it nothing has changed; after it nothing
that can fail is left to do. An asynchronous exception (KeyboardInterrupt) arrives before the store or after it
(tests/test_commit_faults.py interrupts at every point).

**What the store relies on.** That loading and storing an attribute of an object are atomic with respect to each
other: a reader gets the old reference or the new one, and owns it before the old one can be freed. CPython guarantees
it with the GIL and, for slots and instance dictionaries, in free-threaded builds as well. Nothing else relies on the
GIL.

**Writers** (commit, rollback, confirm, retire) take `_writer`, which is held for a few attribute stores, never while
reading, hashing, copying, waiting, running user code or announcing. So writers finish in bounded time under any load
(P4), and a pass that commits from inside itself (a hook, a callback) cannot deadlock: readers hold nothing that a
writer waits for.

**Old memory** is reused by asking the arena whether its lease is dead (weights/arena.py), after the slot's own
references to the generation are gone. The order matters: first no `Publication` names the generation, then the
question. A thread that loaded `live` before that still holds the *bound method* it took from it, so the lease lives;
a thread that loads later gets a publication that does not name it. A thread between the two loads, of `live` and of
`.call`, holds the old `Publication`, which holds the generation, so the lease lives too.

Rejected: a reader-writer lock (a reader-preferring one starved the writer for 3 s, a fair one makes readers wait); a
count per generation (two more atomic operations per pass, and one forgotten decrement is a leak or a tear); epochs
and hazard pointers (they rebuild in Python what reference counts already do in C); two buffers without a grace period
(0.055 % torn).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from hotglm.errors import ReentrantError, SlotClosedError
from hotglm.slot.claim import Claim
from hotglm.slot.generation import Generation
from hotglm.slot.publication import (
    Expected,
    Publication,
    choose_call,
    find_target,
    first_publication,
    verify_expected,
)
from hotglm.weights.exchange import Pair

__all__ = ["Admission"]


class Admission:
    """The live publication of one slot and the writers' lock around changing it."""

    is_in_place = False
    __hotglm_slot__ = True  # a copy of a module that refers to it goes on referring to it, whatever is live there
    __slots__ = ("_closed", "_writer", "_writer_thread", "live", "name")

    def __init__(self, generation: Generation, *, name: str) -> None:
        """Publish the first generation; it is confirmed, having nothing to go back to."""
        self.name = name
        self._writer = threading.Lock()
        self._writer_thread = 0
        self._closed = False
        self.live = first_publication(generation)

    def find_serving(self) -> Generation | None:
        """Return the live generation, if passes go through to it."""
        return self.live.generation

    def commit(self, generation: Generation, *, expected: Expected, claim: Claim) -> tuple[Publication, Publication]:
        """Make `generation` the one that new passes see; return the publications before and after.

        Args:
            generation: staged and proved.
            expected: the live generation the caller has in mind.
            claim: taken under the lock right before the store; given back where that is not made.

        Raises:
            ConflictError: another generation is live.
            SlotClosedError: the slot was closed.
        """
        call = choose_call(generation.module)
        with self._writing():
            old = self.live
            self._verify_open()
            verify_expected(old.generation, expected)
            new = old.after_commit(generation, displaced=old.generation, call=call)
            try:
                claim.take()
                self.live = new  # the point of no return
            finally:
                if self.live is not new:
                    claim.give_back()
            return old, new

    def rollback(self, target: Expected | None, *, expected: Expected | None) -> tuple[Publication, Publication]:
        """Make a held generation live again; return the publications before and after.

        Args:
            target: number or version of a held generation; None means the one before the live one.
            expected: the live generation the caller has in mind; None means any.

        Raises:
            NoRollbackError: that generation is not held.
            ConflictError: another generation is live.
            SlotClosedError: the slot was closed.
        """
        with self._writing():
            old = self.live
            self._verify_open()
            if expected is not None:
                verify_expected(old.generation, expected)
            generation = find_target(old, target)
            call = choose_call(generation.module)
            new = old.after_rollback(generation, target=generation, displaced=old.generation, call=call)
            self.live = new
            return old, new

    def confirm(self, *, expected: Expected | None) -> Publication | None:
        """End the trial; return the publication, or None if it had ended before.

        Raises:
            ConflictError: another generation is live than the expected one.
        """
        with self._writing():
            old = self.live
            if expected is not None:
                verify_expected(old.generation, expected)
            if not old.trial:
                return None
            self.live = replace(old, trial=False)
            return self.live

    def retire(self, generation: Generation) -> bool:
        """Stop holding `generation` for rollback; return whether it was held."""
        with self._writing():
            old = self.live
            if all(held is not generation for held in old.held):
                return False
            held = tuple(other for other in old.held if other is not generation)
            before = None if old.before is generation else old.before
            self.live = replace(old, before=before, held=held)
            return True

    def refresh_call(self) -> None:
        """Choose the call of the live generation anew, after its module was compiled in place."""
        with self._writing():
            self.live = replace(self.live, call=choose_call(self.live.generation.module))

    def close(self) -> bool:
        """Refuse commits and rollbacks from now on; return whether that is new. Passes go on."""
        with self._writing():
            was_open, self._closed = not self._closed, True
            return was_open

    # What in-place swaps do otherwise (slot/in_place.py); here no pass has to be let in, and any module may be live.

    def enter(self, place: str) -> tuple[object, Generation]:
        """Return what keeps a session, asked for at `place`, in its generation, and the generation."""
        del place
        return None, self.live.generation

    async def enter_async(self, place: str) -> tuple[object, Generation]:
        """Do as `enter`, without holding up the event loop."""
        return self.enter(place)

    def leave(self) -> None:
        """Note that a session has ended."""

    @property
    def image(self) -> str:
        """Where the image of what is on a device is staged; see `InPlace.image`."""
        return "device"

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return what a stage holds while it reads the tensors of the live module."""
        return contextlib.nullcontext()

    def admit(self, value: Any) -> Any:
        """Return what stands for an attribute of the live module outside of it."""
        return value

    def verify_code(self, module: nn.Module) -> None:
        """Return when code like `module` may become live, before its weights are read."""
        del module

    def pair(self, module: nn.Module, *, was_refreshed: bool) -> tuple[Pair, ...]:
        """Return what is exchanged to make a staged module live."""
        del module, was_refreshed
        return ()

    def is_committing(self) -> bool:
        """Whether the calling thread works for a commit, so that waiting for its end would never end."""
        return False

    def wait_settled(self) -> None:
        """Wait until no commit is under way."""

    def count_writes(self) -> int:
        """Return how often live weights began or ended to be written; odd while they are."""
        return 0

    def begin_fork(self) -> None:
        """Bring the live weights into a state in which the process can fork."""

    def end_fork(self) -> None:
        """Note that the process has forked; called in the one that goes on."""

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def reset_lock_after_fork(self) -> None:
        """Replace the lock in a forked child, where the thread that may have held it does not exist."""
        self._writer = threading.Lock()
        self._writer_thread = 0

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writers' lock; refuse a finaliser or signal handler inside the thread that holds it."""
        thread = threading.get_ident()
        if self._writer_thread == thread:
            raise ReentrantError(
                "Expected a commit from outside another one, got one from a finaliser or signal handler inside it.",
                remedy="let the handler set an event, and commit from a thread that waits for it.",
            )
        with self._writer:
            self._writer_thread = thread  # no call since the lock was taken, so nothing can have come in between
            try:
                yield
            finally:
                self._writer_thread = 0

    def _verify_open(self) -> None:
        if self._closed:
            raise SlotClosedError(
                "Expected an open slot, got one that was closed.",
                remedy="make a new ModuleSlot around slot.live.module.",
            )
