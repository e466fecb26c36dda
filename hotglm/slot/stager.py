"""One stage at a time: turns, superseding, timeouts, and the thread that a stage runs in.

Rules this module keeps:

- Stages of one slot take turns, because there is one spare. `update` keeps its turn until it has committed, so that
  updates from many threads all succeed, one after the other.
- A newer stage supersedes an older `stage` that has not been committed: one in flight stops at its next chunk, one that
  stands ready is discarded. An `update` is never superseded.
- The caller's thread waits and can be interrupted; the stage's thread then stops at its next chunk.
- A stage asked for from inside a stage of the same slot (a check, a refresh, a progress callback) is refused: it
  would wait for itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

from hotglm.errors import (
    HotglmError,
    MemoryPlanError,
    ReentrantError,
    StageFailedError,
    StageTimeoutError,
    SupersededError,
)
from hotglm.problem import describe_exception
from hotglm.progress import Progress
from hotglm.slot.memory import verify_room
from hotglm.slot.spare import Spares
from hotglm.slot.stage_request import StageRequest
from hotglm.slot.staged import Staged, StageRecord
from hotglm.slot.staging import stage_version
from hotglm.weights.exhaustion import is_out_of_memory
from hotglm.weights.workers import Cancellation, find_owner, start_thread

__all__ = ["Stager", "clear_frames"]

_STOP_GRACE_S = 1.0
"""How long an interrupted or timed-out stage may take to reach its next chunk before its thread is left to itself."""

_SIGNAL_S = 0.25
"""How long a caller waits at a time. A signal that arrives after Python has looked for one and before the system begins
to wait does not end that wait (CPython's locks have that gap); this bounds how late a Ctrl-C is then."""


class Stager:
    """The stages of one slot."""

    def __init__(self, spares: Spares, *, name: str) -> None:
        """Start with nothing staged."""
        self._spares = spares
        self._name = name
        self._latest: weakref.ref[Staged] | None = None
        self._threads: set[int] = set()
        self.reset_locks()

    def reset_locks(self) -> None:
        """Forget any stage in flight: at the start, and in a forked child, where its thread does not exist."""
        self._turn = threading.Lock()
        self._gate = threading.Lock()
        self._supersedable: list[Cancellation] = []  # stages that run, or wait for their turn
        self._threads = set()
        self._spares.reset_lock_after_fork()

    @property
    def staged(self) -> Staged | None:
        """The stage that waits for its commit, if somebody still refers to it."""
        return self._latest() if self._latest is not None else None

    @contextlib.contextmanager
    def turn(self, *, what: str, can_be_superseded: bool) -> Iterator[Cancellation]:
        """Take the slot's turn at staging; older stages that are not committed are superseded.

        Raises:
            ReentrantError: the calling thread is inside a stage of this slot.
        """
        self._verify_not_inside()
        cancellation, thread = Cancellation(), threading.get_ident()
        try:
            # Before the first lock: a finaliser that the garbage collector runs in this thread from here on, and that
            # asks for an update, is refused instead of waiting for the thread it interrupts. Inside the `try`: an
            # interrupt may come as soon as `add` returns (tests/test_commit_faults.py).
            self._threads.add(thread)
            with self._gate:
                for older in self._supersedable:
                    older.cancel(self._superseded(what))
                self._supersedable = [cancellation] if can_be_superseded else []
            with self._turn:
                try:
                    cancellation.raise_if_cancelled()  # a newer one came while this one waited
                    yield cancellation
                finally:
                    # A caller that was interrupted while its stage's thread started leaves that thread behind; whoever
                    # has the next turn must not meet it.
                    cancellation.cancel(self._superseded("the next one, because nobody waits for this one"))
        finally:
            self._threads.discard(thread)

    def discard_latest(self, *, by: str) -> Staged | None:
        """Supersede the stage that waits for its commit; return it if there was one."""
        staged = self.staged
        return staged if staged is not None and staged.supersede(by=by) else None

    def run(
        self, request: StageRequest, record: StageRecord, *, progress: Callable[[Progress], object] | None
    ) -> Staged:
        """Run one stage in a thread of its own and wait for it; `progress` is called in this thread.

        Raises:
            HotglmError: the stage failed; whatever it was, it is typed.
        """
        verify_room()
        outcomes: queue.SimpleQueue[Progress | Staged | BaseException] = queue.SimpleQueue()
        # In a list, which the thread empties, or its caller when it does not wait any more: `threading` keeps a thread
        # for ever whose start was interrupted, and that must keep no generation. A partial and no closure:
        # `clear_frames` cannot reach what the function of a frame has captured.
        todo = [replace(request, report=outcomes.put)]
        thread: threading.Thread | None = None
        try:
            # In the context of the caller: settings of torch, among others, are of a context.
            work = functools.partial(contextvars.copy_context().run, self._work, todo, record, outcomes)
            thread = start_thread(work, name=f"hotglm-stage-{self._name}", owner=self)
            staged = self._wait(outcomes, request, progress)
        except BaseException as failure:
            todo.clear()
            request.cancellation.cancel(failure)
            if thread is not None:
                thread.join(_STOP_GRACE_S)
            clear_frames(failure)
            raise
        thread.join()
        self._latest = weakref.ref(staged)
        return staged

    def _work(
        self,
        todo: list[StageRequest],
        record: StageRecord,
        outcomes: queue.SimpleQueue[Progress | Staged | BaseException],
    ) -> None:
        try:
            self._threads.add(threading.get_ident())
            outcomes.put(stage_version(todo.pop(), self._spares, record))
        except BaseException as failure:  # noqa: BLE001 - raised again in the thread that waits
            clear_frames(failure)  # here, because a caller that was interrupted does not wait any more
            outcomes.put(failure)
        finally:
            self._threads.discard(threading.get_ident())

    def _wait(
        self,
        outcomes: queue.SimpleQueue[Progress | Staged | BaseException],
        request: StageRequest,
        progress: Callable[[Progress], object] | None,
    ) -> Staged:
        timeout_s = request.policy.timeout_s
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = _SIGNAL_S if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                outcome = outcomes.get(timeout=min(_SIGNAL_S, left_s))
            except queue.Empty:
                if left_s >= _SIGNAL_S:
                    continue
                raise StageTimeoutError(
                    f"Expected the stage to end within {timeout_s} s, got no end.",
                    remedy="look for a loop or a wait in the new version's code, or raise StagePolicy.timeout_s.",
                ) from None
            if isinstance(outcome, Staged):
                return outcome
            if isinstance(outcome, BaseException):
                raise _as_typed(outcome)
            if progress is not None:
                progress(outcome)

    def _verify_not_inside(self) -> None:
        if threading.get_ident() in self._threads or find_owner() is self or self._spares.admission.is_committing():
            error = ReentrantError(
                "Expected an update from outside the slot's own staging, got one from inside it.",
                remedy="let the check, refresh, quantize or progress callback return, and update afterwards.",
            )
            raise error.with_slot(slot=self._name, version=None, serving=None)

    def _superseded(self, what: str) -> HotglmError:
        error = SupersededError(
            f"Expected to be the newest stage, got a newer one: {what}.", remedy="nothing; the newer stage goes on."
        )
        return error.with_slot(slot=self._name, version=None, serving=None)


def _as_typed(failure: BaseException) -> BaseException:
    """Return `failure` as one of our errors; those that are not `Exception` stay what they are."""
    if isinstance(failure, HotglmError) or not isinstance(failure, Exception):
        return failure
    text = describe_exception(failure)
    typed: HotglmError
    if is_out_of_memory(failure):
        typed = MemoryPlanError(f"Expected memory for the stage, got {text}.", remedy="free memory and stage again.")
    else:
        typed = StageFailedError(
            f"Expected the stage to run, got {text}.",
            remedy="see the cause; it was raised by the new version's own code, or by torch while running it.",
        )
    typed.__cause__ = failure
    return typed


def clear_frames(failure: BaseException) -> None:
    """Clear the local variables of every dead frame in the error and its causes, so that it keeps no spare alive."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [failure]
    while todo:
        error = todo.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        todo += [error.__cause__, error.__context__]
