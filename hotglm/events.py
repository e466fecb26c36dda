"""What happened in a slot, as frozen records, and who wants to know.

Rules this module keeps:

- An event is announced after the fact: when a subscriber hears of it, nothing about it can be undone by raising.
- A subscriber runs in the thread that made it happen, and no lock of this module is held meanwhile, so it may call
  anything, even subscribe and unsubscribe. One that raises an `Exception` is logged and the next is called; what is not
  an `Exception` (KeyboardInterrupt, SystemExit) goes on to the publisher once every subscriber has been called.
- Events hold values and text only, never a module, tensor or frame, so keeping one keeps no generation alive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = [
    "ClosedEvent",
    "CommittedEvent",
    "ConfirmedEvent",
    "DelayedEvent",
    "DigestMismatchEvent",
    "DiscardedEvent",
    "DrainedEvent",
    "Event",
    "ExpiredEvent",
    "HeldEvent",
    "QuarantinedEvent",
    "RefusedEvent",
    "ReplayedEvent",
    "RolledBackEvent",
    "SignatureRefusedEvent",
    "StagedEvent",
    "Subscribers",
    "SupersededEvent",
]

_log = logging.getLogger("hotglm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in a slot.

    Attributes:
        slot: name of the slot.
        at_s: when, in seconds of the monotonic clock.
        wall_s: when, in seconds since the epoch; for people, not for arithmetic.
    """

    slot: str
    at_s: float = field(default_factory=time.monotonic)
    wall_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedEvent(Event):
    """A version stands proved beside the live one.

    Attributes:
        version: the version.
        number: number of the generation it will be.
    """

    version: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedEvent(Event):
    """A staged version went live.

    Attributes:
        version: the version that is live now.
        number: number of its generation.
        previous_version: the version that was live before.
        previous_number: number of that generation.
    """

    version: str
    number: int
    previous_version: str
    previous_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBackEvent(Event):
    """A held version went live again.

    Attributes:
        version: the version that is live now.
        number: number of its generation.
        previous_version: the version that was live before.
        previous_number: number of that generation.
    """

    version: str
    number: int
    previous_version: str
    previous_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmedEvent(Event):
    """The trial of the live version ended well.

    Attributes:
        version: the version.
        number: number of its generation.
    """

    version: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedEvent(Event):
    """A watcher refused a release for good: it is not tried again until its bytes change or somebody forgives it.

    Attributes:
        version: the version.
        digest: of the release's manifest.
        code: stable code of the error; `TRIAL_FAILED` for one that was live on trial.
        reason: why, in words.
    """

    version: str
    digest: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedEvent(Event):
    """A version was not staged or not committed; the live one serves on.

    Attributes:
        version: the version; None where the offer failed before it was known.
        code: stable code of the error.
        message: text of the error.
    """

    version: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedEvent(Event):
    """A watcher found a release that should be live, and a precondition delays it; told once for each release.

    Attributes:
        version: the version.
        reasons: why it waits, in words.
    """

    version: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureRefusedEvent(RefusedEvent):
    """A release was not signed by the keys that the host asks for. Alert somebody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestMismatchEvent(RefusedEvent):
    """Some bytes were not the ones that were promised: damage, or worse. Do not try them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredEvent(RefusedEvent):
    """A release, or the roots of trust, must not be taken for new any more. Look whether updates still arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedEvent(RefusedEvent):
    """A release was older than one that was accepted before, reused its version, or leapt too far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardedEvent(Event):
    """A staged version was given up before it was committed.

    Attributes:
        version: the version.
        number: number its generation would have had.
    """

    version: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SupersededEvent(Event):
    """A newer stage took the place of one that had not been committed.

    Attributes:
        version: the version that gave way.
        number: number its generation would have had.
        by_version: the version that took its place; None where that is not known yet.
    """

    version: str
    number: int
    by_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainedEvent(Event):
    """The last pass and the last holder of an old generation left; its memory is free again.

    Attributes:
        version: the version.
        number: number of its generation.
    """

    version: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldEvent(Event):
    """An old generation outlived its drain limit.

    Attributes:
        version: the version.
        number: number of its generation.
        limit_s: the limit, in seconds.
        holders: who holds it, as text.
    """

    version: str
    number: int
    limit_s: float
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedEvent(Event):
    """The slot was closed."""


class Subscribers:
    """Those who want to know. Any thread may call any method at any time."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._lock = threading.RLock()  # re-entrant: a finaliser may subscribe inside a subscribe
        # Replaced as a whole, never changed in place: `publish` reads it once and needs no lock, so a callback may
        # subscribe or unsubscribe while it is being called (tests/test_events.py).
        self._entries: tuple[tuple[object, Callable[[Event], object]], ...] = ()

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with every event from now on; return the function that ends this, which may be called twice.

        The same callback subscribed twice is called twice, and each unsubscribes for itself.
        """
        token = object()
        with self._lock:
            self._entries = (*self._entries, (token, callback))

        def unsubscribe() -> None:
            with self._lock:
                self._entries = tuple(entry for entry in self._entries if entry[0] is not token)

        return unsubscribe

    def reset_lock_after_fork(self) -> None:
        """Replace the lock in a forked child, where the thread that may have held it does not exist."""
        self._lock = threading.RLock()

    def publish(self, event: Event) -> None:
        """Call every subscriber with `event`, in the order they came; those who came or left meanwhile count next time.

        Raises:
            BaseException: the first exception of a subscriber that is not an `Exception`, after all were called.
        """
        interrupt: BaseException | None = None
        for _, callback in self._entries:
            try:
                callback(event)
            except Exception:  # noqa: BLE001 - a subscriber is the user's code and may raise anything
                _log.exception("A subscriber of slot %r raised on %s; the event stands.", event.slot, _name(event))
            except BaseException as error:  # noqa: BLE001 - raised again below, after the others were called
                interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt


def _name(event: Event) -> str:
    return type(event).__name__
