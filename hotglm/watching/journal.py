"""What a watcher is doing, kept for whoever asks, logged when it changes, and announced where it matters.

Rules this module keeps: one line in the log for one change of state, however often it is looked at (E07). Texts that
come from files or from the host's own code are escaped before they get here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hotglm.errors import HotglmError
from hotglm.events import DelayedEvent, Event, QuarantinedEvent
from hotglm.slot.slot import ModuleSlot
from hotglm.watching.scanning import Target
from hotglm.watching.status import Counts, WatchState

__all__ = ["Journal", "first_line"]

_SAID_ELSEWHERE = (WatchState.LOADING, WatchState.REFUSED)
"""States whose line in the log is that of what led to them, or follows from them."""

_log = logging.getLogger("hotglm.watch")


@dataclass(slots=True, kw_only=True)
class Journal:
    """What a watcher is doing. Written by its thread alone; each attribute is stored whole.

    Attributes:
        slot: the slot that it updates.
        show: called after every change.
        state: what it is doing.
        reasons: why it waits, in words.
        error: the latest error that still stands.
        target: what is to be live.
        last_scan_s: when it looked last.
        counts: how often what happened.
    """

    slot: ModuleSlot
    show: Callable[[], object]
    state: WatchState = WatchState.IDLE
    reasons: tuple[str, ...] = ()
    error: HotglmError | None = None
    target: Target | None = None
    last_scan_s: float | None = None
    counts: Counts = field(default_factory=Counts)
    _said: object = None
    _delayed: str = ""

    def count(self, **more: int) -> None:
        """Count what happened."""
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + num for name, num in more.items()})

    def stand(self, state: WatchState, *reasons: str, error: HotglmError | None = None) -> None:
        """Note what the watcher is doing; one line in the log when that is something else than before."""
        self.state, self.error = state, error
        self.reasons = tuple(reason for reason in reasons if reason)
        said = (state, self.target and self.target.digest, self.reasons, error and error.code)
        if said != self._said and state not in _SAID_ELSEWHERE:
            self._said = said
            what = [] if error is None else [f"{error.code}: {first_line(error.message)}"]
            text = "; ".join([self._name(), *self.reasons, *what])
            _log.log(logging.INFO if error is None else logging.WARNING, "%s", text)
        self.show()

    def say(self, level: int, text: str) -> None:
        """Write one line to the log."""
        _log.log(level, "%s: %s", self.slot.name, text)

    def note_delay(self, target: Target, waits: tuple[str, ...], *, error: HotglmError | None = None) -> None:
        """Say that an update is delayed: in the status always, as an event once for each release."""
        self.stand(WatchState.DELAYED, *waits, error=error)
        if self._delayed != target.key:
            self._delayed = target.key
            self.announce(DelayedEvent(slot=self.slot.name, version=str(target.version), reasons=waits))

    def note_refusal(self, target: Target, reason: str, *, code: str) -> None:
        """Say once that a release is refused from now on."""
        self.count(refused=1)
        self.say(logging.WARNING, f"{target.version} is refused: {first_line(reason)}")
        name, version, digest = self.slot.name, str(target.version), target.digest
        self.announce(QuarantinedEvent(slot=name, version=version, digest=digest, code=code, reason=reason))

    def announce(self, event: Event) -> None:
        """Tell the slot's subscribers."""
        self.slot._core.publish(event)

    def _name(self) -> str:
        return f"{self.slot.name}: {self.state.value}{'' if self.target is None else f' ({self.target.version})'}"


def first_line(text: str) -> str:
    """Return the first line of a text; empty for none."""
    return text.splitlines()[0] if text else ""
