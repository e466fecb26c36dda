"""What a slot announces, put in words and records.

Rules this module keeps: a refusal that calls for something else than another try has a kind of its own, by its error.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from hotglm.errors import DigestMismatchError, ExpiredError, HotglmError, ReplayedError, SignatureError, shorten_repr
from hotglm.events import (
    DigestMismatchEvent,
    Event,
    ExpiredEvent,
    HeldEvent,
    RefusedEvent,
    ReplayedEvent,
    SignatureRefusedEvent,
)
from hotglm.slot.generation import Generation, Retired
from hotglm.slot.holders import Holder
from hotglm.version import Version

__all__ = ["describe_stage", "name_change", "note_held", "refused_event"]

_KINDS: tuple[tuple[type[HotglmError], type[RefusedEvent]], ...] = (
    (SignatureError, SignatureRefusedEvent),
    (DigestMismatchError, DigestMismatchEvent),
    (ExpiredError, ExpiredEvent),
    (ReplayedError, ReplayedEvent),
)


def refused_event(error: HotglmError, *, slot: str, version: Version | None) -> RefusedEvent:
    """Return the event of a refusal, of the kind that its error calls for."""
    kind = next((event for cause, event in _KINDS if isinstance(error, cause)), RefusedEvent)
    text = None if version is None else str(version)
    return kind(slot=slot, version=text, code=error.code, message=str(error))


def name_change(new: Generation, old: Generation) -> dict[str, Any]:
    """Return what an event says about a change of the live generation."""
    versions = {"version": str(new.version), "previous_version": str(old.version)}
    return {**versions, "number": new.number, "previous_number": old.number}


def note_held(late: deque[Event], retired: Retired, holders: tuple[Holder, ...], *, slot: str, limit_s: float) -> None:
    """Put an event into `late` that says who holds an old generation for too long."""
    texts = tuple(map(str, holders)) or ("references kept outside the slot; slot.find_holders() names them",)
    version = str(retired.version)
    late.append(HeldEvent(slot=slot, version=version, number=retired.number, limit_s=limit_s, holders=texts))


def describe_stage(source: object, version: object) -> str:
    """Return what a stage is called in the texts of those that it supersedes."""
    what = shorten_repr(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
    return f"a stage of {what}" + (f" as version {version}" if version else "")
