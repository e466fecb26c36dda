"""What a slot has published: the live generation, what is held behind it, and how it came there.

Rules this module keeps: a publication is never changed; the next one is made of it, and one store puts it in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hotglm.errors import ConflictError, NoRollbackError
from hotglm.slot.generation import Generation
from hotglm.slot.policies import InPlaceRecord
from hotglm.version import Version

__all__ = [
    "Expected",
    "HistoryEntry",
    "Publication",
    "choose_call",
    "find_target",
    "first_publication",
    "verify_expected",
]

Expected = int | str | Version
"""What a compare-and-set may name: a generation's number, or a version."""

_MAX_HISTORY = 1000
"""Entries of history kept; the oldest are dropped, so that a slot that is updated for years stays bounded (P9)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One change of the live generation.

    Attributes:
        action: `"created"`, `"committed"` or `"rolled back"`.
        epoch: counts the changes of the live generation; 0 for the first.
        number: the generation that became live.
        version: its version.
        digest: digest of its weights, where known.
        at_s: wall-clock time, seconds since 1970.
    """

    action: str
    epoch: int
    number: int
    version: Version
    digest: str | None
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Everything about a slot that a commit changes, in one object.

    Attributes:
        call: what a pass calls.
        generation: the live generation.
        before: the one that was live before it, the target of `rollback()`, while it is held.
        held: every generation kept for rollback, the most recently live first.
        trial: whether the live generation still awaits `confirm()`.
        epoch: counts commits and rollbacks.
        history: the latest changes, oldest first.
        record: how the live generation came there, where weights are swapped in place.
    """

    call: Callable[..., Any]
    generation: Generation
    before: Generation | None
    held: tuple[Generation, ...]
    trial: bool
    epoch: int
    history: tuple[HistoryEntry, ...]
    record: InPlaceRecord | None = None

    def after_commit(self, generation: Generation, *, displaced: Generation, call: Callable[..., Any]) -> Publication:
        """Return what follows when `generation` is committed; `displaced` is the live one as it is held then."""
        return Publication(
            call=call,
            generation=generation,
            before=displaced,
            held=(displaced, *self.held),
            trial=True,
            epoch=self.epoch + 1,
            history=_append(self.history, _record("committed", self.epoch + 1, generation)),
        )

    def after_rollback(
        self, generation: Generation, *, target: Generation, displaced: Generation, call: Callable[..., Any]
    ) -> Publication:
        """Return what follows when `target`, which is held, becomes live as `generation`."""
        remaining = tuple(held for held in self.held if held is not target)
        older = [held for held in (displaced, *remaining) if held.number < target.number]
        return Publication(
            call=call,
            generation=generation,
            before=max(older, key=lambda held: held.number, default=None),
            held=(displaced, *remaining),
            trial=False,
            epoch=self.epoch + 1,
            history=_append(self.history, _record("rolled back", self.epoch + 1, generation)),
        )


def first_publication(generation: Generation) -> Publication:
    """Return that of a slot's first generation; it is confirmed, having nothing to go back to."""
    return Publication(
        call=choose_call(generation.module),
        generation=generation,
        before=None,
        held=(),
        trial=False,
        epoch=0,
        history=(_record("created", 0, generation),),
    )


def choose_call(module: nn.Module) -> Callable[..., Any]:
    """Return the callable that is `module(...)`, with the layers that add nothing left out.

    `nn.Module.__call__` only chooses between the compiled and the plain call. Making that choice once per generation
    saves a Python frame per pass, which is what the slot's own frame costs; a class with a `__call__` of its own
    keeps it.
    """
    if type(module).__call__ is not nn.Module.__call__ or "_call_impl" in vars(module):
        return module
    if module._compiled_call_impl is not None:
        return module
    call: Callable[..., Any] = module._call_impl
    return call


def verify_expected(live: Generation, expected: Expected) -> None:
    """Return when `expected` is the live generation.

    Raises:
        ConflictError: another one is.
    """
    matches = live.number == expected if isinstance(expected, int) else live.version == Version(expected)
    if not matches:
        what = f"generation {expected}" if isinstance(expected, int) else f"version {expected}"
        raise ConflictError(
            f"Expected {what} to be live, got generation {live.number}, version {live.version}.",
            remedy="look at slot.history, then stage again on top of what is live now.",
        )


def find_target(publication: Publication, target: Expected | None) -> Generation:
    """Return the held generation that a rollback means.

    Raises:
        NoRollbackError: it is not held.
    """
    if target is None:
        if publication.before is not None:
            return publication.before
        raise _no_rollback(publication, "Expected an earlier generation to be held, got none.")
    for generation in publication.held:
        if generation.number == target if isinstance(target, int) else generation.version == Version(target):
            return generation
    raise _no_rollback(publication, f"Expected {target!r} to be a held generation, got none of that number or version.")


def _no_rollback(publication: Publication, message: str) -> NoRollbackError:
    held = ", ".join(f"{generation.number} ({generation.version})" for generation in publication.held) or "none"
    return NoRollbackError(
        f"{message} Held: {held}.",
        remedy="stage that version again; MemoryPolicy(max_copies=3) keeps it through later stages.",
    )


def _record(action: str, epoch: int, generation: Generation) -> HistoryEntry:
    return HistoryEntry(
        action=action,
        epoch=epoch,
        number=generation.number,
        version=generation.version,
        digest=generation.digest,
        at_s=time.time(),
    )


def _append(history: tuple[HistoryEntry, ...], entry: HistoryEntry) -> tuple[HistoryEntry, ...]:
    return (*history[-(_MAX_HISTORY - 1) :], entry)
