"""Faults on demand: make the Nth read, allocation, migration step or warm-up pass of an update fail.

Rules this module keeps:

- A fault is planted at the seam (`hotglm.seam`), through which staging asks for everything that can fail; nothing of
  the standard library, of torch or of the model is patched.
- A fault that was planned and never came is an error of the test: it would otherwise pass without having tested
  anything.
- One plan is active at a time in a process, because the seam is one for the process. No torch is needed to make one.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from hotglm.testing.seams import fail_with, hooked

__all__ = ["FAULT_KINDS", "FaultPlan", "InjectedFaultError"]


class InjectedFaultError(RuntimeError):
    """What is raised where no error of the operating system would be: in a migration step, a warm-up, a stage."""


_CALLS: Mapping[str, tuple[str, ...]] = {
    "map": ("map_anonymous",),
    "populate": ("populate",),
    "start_thread": ("start_thread",),
    "listdir": ("listdir",),
    "open": ("open",),
    "fstat": ("fstat", "lstat"),
    "read": ("pread", "preadv"),
    "close": ("close",),
}
"""Kinds of fault that are calls to the operating system: the seam's own names for each. Memory comes first, because a
slot maps it in its first updates only."""

_PARTS = ("open", "decide", "plan", "memory", "copy", "load", "refresh", "check")
_PLACES = ("migration_step", "migration_unit", "warm_up", *(f"stage.{part}" for part in _PARTS))

FAULT_KINDS = (*_CALLS, *_PLACES)
"""Every kind of fault: calls to the operating system, then places that a stage comes to."""

_KIND_OF = {call: kind for kind, calls in _CALLS.items() for call in calls}


@dataclass(slots=True, kw_only=True)
class _Fault:
    kind: str
    nth: int
    error: Callable[[], BaseException]
    has_fired: bool = field(default=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.nth}"


class FaultPlan:
    """Which calls and places of the updates in a `with` fail, and how often each kind was come to.

    Calls are counted from 1 for each kind since the plan was entered, over all threads and slots of the process.

    Example:
        >>> with FaultPlan().inject("map", 1) as faults:
        ...     pass  # slot.update(...) raises MemoryPlanError here, and the old version serves
        Traceback (most recent call last):
        ...
        AssertionError: Expected every planned fault to come, got none of: map 1. ...
    """

    def __init__(self) -> None:
        """Plan nothing yet."""
        self._faults: list[_Fault] = []
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._active = ExitStack()

    def inject(self, kind: str, nth: int = 1, *, error: Callable[[], BaseException] | None = None) -> Self:
        """Make the `nth` call or place of `kind` fail, and return the plan, for the next one.

        May be called before the plan is entered and while it is active; the count goes on.

        Args:
            kind: one of `FAULT_KINDS`.
            nth: which one, from 1, counted since the plan was entered.
            error: makes what is raised; by default what the operating system would say (EIO, ENOMEM, no more threads),
                or `InjectedFaultError` for a place.

        Raises:
            ValueError: there is no such kind, or `nth` is not a number from 1.
        """
        if kind not in FAULT_KINDS:
            raise ValueError(f"Expected one of {', '.join(FAULT_KINDS)}, got {kind!r}.")
        if not isinstance(nth, int) or nth < 1:
            raise ValueError(f"Expected a number from 1, got {nth!r}.")
        with self._lock:
            self._faults.append(_Fault(kind=kind, nth=nth, error=error or _usual_error(kind, nth)))
        return self

    def clear(self) -> None:
        """Forget what was planned and start counting anew."""
        with self._lock:
            self._faults.clear()
            self._counts.clear()

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each kind was come to."""
        with self._lock:
            return MappingProxyType(dict(self._counts))

    @property
    def fired(self) -> tuple[str, ...]:
        """The faults that came, as `kind nth`, in the order they were planned."""
        with self._lock:
            return tuple(str(fault) for fault in self._faults if fault.has_fired)

    def verify_fired(self) -> None:
        """Return if every planned fault has come.

        Raises:
            AssertionError: some have not; the text says how often their kinds were come to.
        """
        with self._lock:
            missing = [fault for fault in self._faults if not fault.has_fired]
            counts = {fault.kind: self._counts[fault.kind] for fault in missing}
        if missing:
            raise AssertionError(
                f"Expected every planned fault to come, got none of: {', '.join(map(str, missing))}. "
                f"Counted: {', '.join(f'{kind} {count} times' for kind, count in counts.items())}. "
                "Remedy: run the update inside of the plan, or plan a smaller number."
            )

    def __enter__(self) -> Self:
        """Put the plan in place of the real operating system, for every slot of this process."""
        with self._lock:
            self._counts.clear()
        self._active.enter_context(hooked(self._ask))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Put the real one back.

        Raises:
            AssertionError: the body ended well, and a planned fault never came.
        """
        self._active.close()
        if kind is None:
            self.verify_fired()

    def _ask(self, call: str, _: int, args: tuple[Any, ...]) -> object:
        kind = args[0] if call == "reach" else _KIND_OF.get(call, call)
        with self._lock:
            self._counts[kind] += 1
            due = [fault for fault in self._faults if (fault.kind, fault.nth) == (kind, self._counts[kind])]
            for fault in due:
                fault.has_fired = True
        return fail_with(call, due[0].error)(args) if due else None


def _usual_error(kind: str, nth: int) -> Callable[[], BaseException]:
    text = f"injected fault: {kind} {nth}"
    if kind not in _CALLS:
        return lambda: InjectedFaultError(text)
    if kind == "start_thread":
        return lambda: RuntimeError(f"can't start new thread ({text})")
    number = errno.ENOMEM if kind in ("map", "populate") else errno.EIO
    return lambda: OSError(number, f"{os.strerror(number)} ({text})")
