"""Operating systems that fail on demand: a seam whose Nth call of a kind is somebody else's to decide.

Rules this module keeps: what is not meddled with goes to the real operating system, and every call is counted, from any
thread. `hotglm.testing.faults` is the form for users; here is what it is made of.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hotglm import seam
from hotglm.seam import Seam

__all__ = ["KINDS", "Hook", "HookedSeam", "fail_with", "hooked", "only_nth", "pause", "read_one_byte"]

KINDS = tuple(sorted(name for name, value in vars(Seam).items() if callable(value) and not name.startswith("_")))
"""Every kind of call that the seam knows."""

Hook = Callable[[str, int, tuple[Any, ...]], object]
"""Gets kind, number (from 1, counted per kind) and arguments before the call; may raise; what it returns, other than
None, is the call's answer."""


class HookedSeam(Seam):
    """The real seam, with a hook in front of every call."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def ask(self, kind: str, args: tuple[Any, ...]) -> object:
        """Count one call and ask the hook about it."""
        with self._lock:
            self.counts[kind] += 1
            number = self.counts[kind]
        return self._hook(kind, number, args)


def _make(kind: str) -> Callable[..., object]:
    real: Callable[..., object] = getattr(Seam, kind)

    def call(self: HookedSeam, *args: Any) -> object:
        answer = self.ask(kind, args)
        return real(self, *args) if answer is None else answer

    return call


for _kind in KINDS:
    setattr(HookedSeam, _kind, _make(_kind))


@contextlib.contextmanager
def hooked(hook: Hook) -> Iterator[HookedSeam]:
    """Put a `HookedSeam` in place of the real one, for the body of a `with`."""
    replacement = HookedSeam(hook)
    before, seam.active = seam.active, replacement
    try:
        yield replacement
    finally:
        seam.active = before


def only_nth(kind: str, number: int, hook: Callable[[tuple[Any, ...]], object]) -> Hook:
    """Return a hook that meddles with the `number`th call of `kind` alone."""

    def choose(asked: str, count: int, args: tuple[Any, ...]) -> object:
        return hook(args) if (asked, count) == (kind, number) else None

    return choose


def fail_with(kind: str, error: Callable[[], BaseException]) -> Callable[[tuple[Any, ...]], object]:
    """Return a hook that raises; a `close` that fails has closed all the same, as on Linux."""

    def fail(args: tuple[Any, ...]) -> object:
        if kind == "close":
            os.close(args[0])
        raise error()

    return fail


def pause(reached: threading.Event, go_on: threading.Event) -> Callable[[tuple[Any, ...]], object]:
    """Return a hook that tells that a call has come, and holds it until it may go on, for 30 s at most."""

    def wait(_: tuple[Any, ...]) -> object:
        reached.set()
        go_on.wait(30)
        return None

    return wait


def read_one_byte(args: tuple[Any, ...]) -> object:
    """Answer a `pread` or `preadv` with its first byte only."""
    fd, wanted, offset = args
    if isinstance(wanted, int):
        return os.pread(fd, min(wanted, 1), offset)
    views: Sequence[memoryview] = wanted
    return os.preadv(fd, [views[0][:1]], offset)
