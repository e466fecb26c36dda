"""Sessions: several passes of one generation, each session with the place it was asked for at.

Rules this module keeps: a session that is dropped without exiting ends with its last reference; adding and removing
take no lock.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from hotglm.errors import SlotStateError
from hotglm.slot.generation import Generation
from hotglm.slot.holders import Holder

if TYPE_CHECKING:
    from hotglm.slot.admission import Admission

__all__ = ["AsyncSession", "Session", "Sessions", "find_place"]


class Session:
    """A context manager around several passes of one generation; see `ModuleSlot.acquire`."""

    __slots__ = ("__weakref__", "_admission", "_generation", "_sessions", "_ticket", "number", "place", "thread")

    def __init__(self, admission: Admission, *, sessions: Sessions, place: str) -> None:
        """Note what is asked for; nothing is held before `open` or `open_async`."""
        self.place = place
        self.thread = threading.current_thread().name
        self.number = 0
        self._admission = admission
        self._sessions = sessions
        self._ticket: object = None
        self._generation: Generation | None = None

    def open(self) -> Self:
        """Hold the live generation from now on, once no commit in place holds this back."""
        try:
            self._ticket, self._generation = self._admission.enter(self.place)
            self._note(self._generation)
        except BaseException:
            self._ticket = None  # a kept traceback must not keep it inside
            raise
        return self

    async def open_async(self) -> Self:
        """Do as `open`, while the event loop goes on."""
        try:
            self._ticket, self._generation = await self._admission.enter_async(self.place)
            self._note(self._generation)
        except BaseException:
            self._ticket = None
            raise
        return self

    def _note(self, generation: Generation) -> None:
        self.number = generation.number
        self._sessions.add(self)

    def __enter__(self) -> Generation:
        """Return the generation that this session holds until it exits."""
        if self._generation is None:
            raise SlotStateError(
                "Expected a session to be entered once, got a second time.", remedy="call slot.acquire()."
            )
        return self._generation

    def __exit__(self, *_: object) -> None:
        """Let the generation go."""
        self._generation = self._ticket = None
        self._sessions.remove(self)
        self._admission.leave()


class AsyncSession:
    """What `async with` makes a session of; see `ModuleSlot.acquire_async`."""

    __slots__ = ("_admission", "_session", "_sessions", "place")

    def __init__(self, admission: Admission, *, sessions: Sessions, place: str) -> None:
        """Note what is asked for; nothing is held before it is entered."""
        self.place = place
        self._admission = admission
        self._sessions = sessions
        self._session: Session | None = None

    async def __aenter__(self) -> Generation:
        """Return the generation that this session holds until it exits."""
        if self._session is not None:
            raise SlotStateError(
                "Expected a session to be entered once, got a second time.", remedy="call slot.acquire_async()."
            )
        # Noted before it waits: another task must not enter it meanwhile, and drop what this one holds.
        session = self._session = Session(self._admission, sessions=self._sessions, place=self.place)
        try:
            return (await session.open_async()).__enter__()
        except BaseException:
            self._session = None
            raise

    async def __aexit__(self, *_: object) -> None:
        """Let the generation go."""
        if self._session is not None:
            self._session.__exit__()


class Sessions:
    """The open sessions of one slot. Adding and removing are single dictionary operations and take no lock."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        """Start with none."""
        self._open: dict[int, weakref.ref[Session]] = {}

    def add(self, session: Session) -> None:
        """Note an open session; a session that is dropped without exiting ends with its last reference."""
        self._open[id(session)] = weakref.ref(session)

    def remove(self, session: Session) -> None:
        """Forget a session."""
        self._open.pop(id(session), None)

    def find(self, number: int) -> Iterator[Holder]:
        """Yield the open sessions on generation `number`."""
        for key, reference in list(self._open.items()):
            session = reference()
            if session is None:
                if self._open.get(key) is reference:  # not that of a new session at the same address
                    self._open.pop(key, None)
            elif session.number == number:
                description = f"session of thread {session.thread!r}, acquired at {session.place}"
                yield Holder(kind="session", number=number, description=description)


def find_place() -> str:
    """Return file and line of what has called the caller."""
    frame: types.FrameType | None = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"
