"""The gate of a slot whose weights are written in place: passes go in and out, and a commit runs while none is inside.

The other hard file where threads meet; what it claims is C14 to C20 in docs/concurrency.md.

[Note: gate]
**A pass is inside for as long as its ticket lives.** The ticket is a local variable of the call, and the gate holds a
weak reference to it in the set `_inside`. When the ticket goes, by `del`, by an exception, with a thread or a dropped
session, CPython calls the reference's callback, `set.discard`, which is C. So there is no count that an interrupt could
leave one too high (tests/test_in_place_faults.py interrupts at every point of a pass).

**Who goes first.** A pass adds its mark, then looks whether the gate is closing. A commit closes the gate, then looks
whether any mark is there. Both orders are those of the program, so at least one of the two sees the other: either the
commit waits for the pass, or the pass takes its mark back and waits for the commit. This needs more than R1: that
stores and loads of different objects are seen in one order by all threads. With the GIL they are.

**Nobody starves.** From the moment the gate is closing, no new pass is let in, but for those that a pass inside is
waiting for (below). What the commit waits for is therefore what was inside when it came (P4), and a pass waits for
those and for the copying.

**Passes inside passes.** A thread that is inside is let in again, whatever the gate does: holding it back would make
it wait for itself (F16). So is a task whose context has an open session, in whatever thread it runs, because
`asyncio.to_thread` carries the context over. The new mark is added before the question whether the older one is still
there, so at no time is neither of the two there.

**Tasks of one event loop** share a thread, but do not wait for each other. What can wait without its thread (a
coroutine, an asynchronous session) is let in only if its own task is inside, or a call that its thread is in the midst
of; otherwise sessions that overlap in one loop would hold a commit off without end. What cannot, a plain call of the
slot, is let in if anything of its thread is, because the tasks that are inside need that thread to come out.

**The last to leave wakes the commit,** which has its thread and everything it needs ready. It does not run in the
leaving thread, because that may be the main thread, where Ctrl-C would cut a copy in two; see
docs/adr/0011-gate.md. A wake-up that an interrupt swallows is made up for by a short poll.

Rejected: a reader-writer lock of `threading` primitives (an interrupt between `acquire` and `try` leaves it locked);
a count under a lock (the same, and every pass would take it twice).
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

from hotglm.errors import ReentrantError, SlotStateError
from hotglm.slot.closing import Closing
from hotglm.weights.workers import find_owner

__all__ = ["Gate", "Mark", "Ticket"]

_sessions: contextvars.ContextVar[tuple[Mark, ...]] = contextvars.ContextVar("hotglm_sessions", default=())
"""The marks of the sessions, generators and coroutines that the running task or thread is in, of whatever slot."""


class Ticket:
    """Keeps one pass or session inside a gate, for as long as it lives."""

    __slots__ = ("__weakref__", "mark")
    mark: Mark


class Mark(weakref.ref[Ticket]):
    """What a gate knows of a ticket: the thread it was given to, since when, what it is for, and how long.

    `is_call` says that it ends with the call that it was made in, which is on the stack of its thread until then.
    """

    __slots__ = ("is_call", "since_s", "thread", "what")
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    thread: int
    since_s: float
    what: str
    is_call: bool


class Gate:
    """Who is inside, and whether a commit holds newcomers back. Any thread may call any method."""

    __slots__ = ("_inside", "closing")

    def __init__(self) -> None:
        """Start open and empty."""
        self._inside: set[Mark] = set()
        self.closing: Closing | None = None

    # -- passes --------------------------------------------------------------------------------------------------------

    def enter(self) -> Ticket:
        """Return the ticket of a pass, once no commit holds it back; it is inside until the ticket is dropped.

        Raises:
            SlotStateError: a commit failed and could not be undone, so that there is nothing whole to run.
            ReentrantError: a finaliser that runs in a commit's own thread asks for it.
        """
        while True:
            try:
                ticket = self._try_enter(self._has_older)
                if ticket is not None:
                    return ticket
                self._wait_until_open()
            except BaseException:
                ticket = None  # a kept traceback must not keep it inside
                raise

    async def enter_async(self, what: str) -> Ticket:
        """Return the ticket of `what`, which its task is in; while a commit holds it back, its event loop goes on.

        Raises:
            SlotStateError, ReentrantError: as `enter`.
        """
        while True:
            try:
                ticket = self._try_enter(self._has_older_in_task)
                if ticket is not None:
                    self.extend(ticket.mark, what)
                    return ticket
                closing = self.closing
                if closing is not None:
                    self._knock(closing)
                    while self._is_shut(closing, is_over=await closing.wait_opened_async()):
                        pass
            except BaseException:
                ticket = None
                raise

    def _try_enter(self, has_older: Callable[[Mark], bool]) -> Ticket | None:
        ticket = Ticket()
        mark = ticket.mark = Mark(ticket, self._inside.discard)
        mark.thread, mark.since_s, mark.what = threading.get_ident(), time.monotonic(), "pass"
        mark.is_call = True
        try:
            if self.closing is None or has_older(mark):
                self._inside.add(mark)
                # Asked after the mark is there: see [Note: gate].
                if self.closing is None or has_older(mark):
                    return ticket
        except BaseException:
            ticket = mark = None  # type: ignore[assignment]  # a kept traceback must not keep it inside
            raise
        return None

    def enter_extended(self, what: str) -> Ticket:
        """Return the ticket of `what`, which goes on behind the call that it is made in."""
        ticket: Ticket | None = None
        try:
            ticket = self.enter()
            self.extend(ticket.mark, what)
        except BaseException:
            ticket = None
            raise
        return ticket

    def extend(self, mark: Mark, what: str | None = None) -> None:
        """Let a pass go on behind the call that it is: whatever the running task does until it has ended, is inside.

        Args:
            mark: of its ticket, which the traceback of an interrupt in here must not keep.
            what: what it is for from now on; as before where None.
        """
        mark.is_call = False
        mark.what = what or mark.what
        mine = _sessions.get()
        if mark not in mine:
            _sessions.set((*(older for older in mine if older() is not None), mark))

    def leave(self) -> None:
        """Tell a commit that waits that a ticket was dropped just now."""
        closing = self.closing
        if closing is not None:
            closing.wake()

    def is_inside(self) -> bool:
        """Whether the calling thread or task is inside, so that a commit would wait for it for ever."""
        return self._has_older(None)

    def is_committing(self) -> bool:
        """Whether the calling thread works for a commit: whatever waits for that one would wait for itself."""
        return find_owner() is self

    def verify_not_committing(self) -> None:
        """Refuse what a finaliser asks for that the garbage collector happens to run in a commit's own thread.

        Raises:
            ReentrantError: it is asked for there.
        """
        if self.is_committing():
            raise ReentrantError(
                "Expected passes and updates from outside a commit in place, got one from a finaliser in its thread.",
                remedy="let the finaliser set an event, and use the slot in a thread that waits for it.",
            )

    def _has_older(self, own: Mark | None) -> bool:
        thread, sessions = threading.get_ident(), _sessions.get()
        marks = self._inside.copy()
        return any(m is not own and (m.thread == thread or m in sessions) and m() is not None for m in marks)

    def _has_older_in_task(self, own: Mark) -> bool:
        thread, sessions = threading.get_ident(), _sessions.get()
        marks = self._inside.copy()
        return any(
            m is not own and ((m.thread == thread and m.is_call) or m in sessions) and m() is not None for m in marks
        )

    def _wait_until_open(self) -> None:
        closing = self.closing
        if closing is not None:
            self._knock(closing)
            while self._is_shut(closing, is_over=closing.wait_opened()):
                pass

    def _knock(self, closing: Closing) -> None:
        """Say that a pass has taken its mark back, and will wait."""
        self.verify_not_committing()
        closing.wake()

    def _is_shut(self, closing: Closing, *, is_over: bool) -> bool:
        """Whether there still is somebody to wait for, who holds the gate shut."""
        if self.closing is closing and (is_over or not closing.worker.is_alive()):
            self.open(closing)  # again, if need be: its thread may have died on the way
            if self.closing is closing:
                _refuse_torn()
        return self.closing is closing

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Be inside for the length of a block, as a pass is."""
        ticket = self.enter()
        try:
            yield
        finally:
            del ticket
            self.leave()

    # -- commits -------------------------------------------------------------------------------------------------------

    def close(self, closing: Closing) -> None:
        """Hold newcomers back from now on."""
        self.closing = closing

    def open(self, closing: Closing) -> None:
        """Let everybody in again, unless what they would meet is half written."""
        if not closing.is_torn and self.closing is closing:
            self.closing = None
        closing.end()

    def verify_whole(self) -> None:
        """Refuse when a commit has left live weights half written; nobody is let in, and nothing is written on top.

        Raises:
            SlotStateError: one has.
        """
        if self.closing is not None and self.closing.is_torn:
            _refuse_torn()

    def is_torn(self) -> bool:
        """Return whether a commit has left live weights half written, and nobody is there who could mend them."""
        closing = self.closing
        return closing is not None and closing.is_torn and not closing.worker.is_alive()

    def count_inside(self) -> int:
        """Return how many passes and sessions are inside."""
        return len(self._inside)

    def wait_empty(self, closing: Closing, *, timeout_s: float, give_up: Callable[[], bool]) -> bool:
        """Wait until nobody is inside; return whether that came to be. Newcomers are held back already.

        Args:
            closing: the turn of the commit that waits.
            timeout_s: how long, in seconds.
            give_up: asked now and then whether there is still a reason to wait.
        """
        deadline = time.monotonic() + timeout_s
        while self._inside:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or give_up():
                return False
            closing.wait_for_wake(left_s)
        return True

    def describe_inside(self) -> tuple[str, ...]:
        """Return one text for each pass or session inside, with the stack of its thread."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        marks = sorted(self._inside.copy(), key=lambda mark: mark.since_s)
        now = time.monotonic()
        frames = sys._current_frames()
        try:
            return tuple(_describe(mark, names.get(mark.thread), frames.get(mark.thread), now) for mark in marks)
        finally:
            frames.clear()

    def reset_after_fork(self) -> None:
        """Forget the passes of threads that do not exist in a forked child, and any commit."""
        thread = threading.get_ident()
        self._inside.difference_update({mark for mark in self._inside.copy() if mark.thread != thread})
        if self.closing is not None and not self.closing.is_torn:
            self.closing = None


def _describe(mark: Mark, name: str | None, frame: types.FrameType | None, now: float) -> str:
    where = f"thread {name!r}" if name is not None else "a thread that has ended"
    stack = "" if frame is None else "\n" + "".join(traceback.format_stack(frame, limit=12))
    return f"{mark.what} of {where}, inside for {now - mark.since_s:.1f} s{stack}"


def _refuse_torn() -> NoReturn:
    raise SlotStateError(
        "Expected weights of one version, got a commit that failed and could not be undone.",
        remedy="end this process; what is on disk is as it was.",
    )
