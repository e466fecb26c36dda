"""The files of trust on disk: envelopes beside releases, signed roots, and the memory of a host.

Rules this module keeps:

- Each file is read once, whole, under a cap, and what is judged is what was read.
- The memory is replaced whole, under a lock, and only after it was read again: two processes never lose what the other
  has accepted. What cannot be read or written refuses everything (T9, B28); a missing one is never a new one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from hotglm import seam
from hotglm.envelope import (
    ENVELOPE_NAME,
    MANIFEST_TYPE,
    MAX_ENVELOPE_NBYTES,
    Envelope,
    parse_envelope,
)
from hotglm.errors import (
    Problem,
    SignatureError,
    SourceError,
    SourceReadError,
    StoreBusyError,
    StoreWriteError,
    TrustStateError,
    shorten_repr,
)
from hotglm.release.directory import Release
from hotglm.release.locks import hold_exclusively
from hotglm.release.reading import read_document, read_status
from hotglm.release.writing import flush_directory, replace_whole, writing
from hotglm.roots import MAX_ROOTS_NBYTES
from hotglm.trust.state import MAX_STATE_NBYTES, TrustState, format_state, parse_state, refuse_state

__all__ = [
    "change_state",
    "locked_state",
    "move_aside",
    "read_envelope",
    "read_roots",
    "read_state",
    "refuse_existing",
    "write_roots_text",
    "write_state",
]

_CLOCK_TOLERANCE = timedelta(hours=1)
"""How far the clock may have gone back since the memory was written, before expiry cannot be judged by it."""

_MAX_SIGNED_ROOTS_NBYTES = 2 * MAX_ROOTS_NBYTES
_WRITABLE = "make the file and its directory writable for this user, with free space, and try again."


def read_envelope(release: Release) -> Envelope:
    """Return the signatures of an open release, whose payload is the very manifest that the release was opened with.

    Raises:
        SignatureError: there are none (UNSIGNED), they break the format, or they are over other bytes (BAD_SIGNATURE).
        SourceError: the system refused to read them, or they changed meanwhile.
    """
    path = os.path.join(release.path, ENVELOPE_NAME)
    try:
        if not stat.S_ISREG(read_status(path).st_mode):
            raise _unsigned(path, "Expected a regular file with signatures, got a link or something else.")
        text = read_document(path, limit=MAX_ENVELOPE_NBYTES, error=SourceError, code="ENVELOPE_TOO_LARGE")
    except SourceReadError as error:
        if error.code != "NOT_FOUND":
            raise
        raise _unsigned(path, f"Expected signatures in {ENVELOPE_NAME!r}, got no such file.") from error
    envelope = parse_envelope(text, payload_type=MANIFEST_TYPE, file=path)
    if not envelope.signatures:
        raise _unsigned(path, "Expected at least one signature, got none.")
    if envelope.payload != release.manifest_bytes:
        raise SignatureError(
            "The signatures are not over this manifest.",
            problems=[Problem(code="BAD_SIGNATURE", message="Expected its bytes as payload, got others.", file=path)],
            remedy="fetch the release again; if it stays, find out who changed it.",
        )
    return envelope


def _unsigned(path: str, message: str) -> SignatureError:
    return SignatureError(
        "The release is not signed.",
        problems=[Problem(code="UNSIGNED", message=message, file=path)],
        remedy="sign it: `hotglm sign RELEASE --key KEY`.",
    )


def read_roots(path: str) -> bytes:
    """Return the bytes of the roots in a file.

    Raises:
        TrustStateError: they cannot be read (ROOTS_UNREADABLE).
    """
    try:
        return read_document(path, limit=_MAX_SIGNED_ROOTS_NBYTES, error=SourceError, code="ROOTS_TOO_LARGE")
    except SourceError as error:
        remedy = "check the path; nothing is accepted without roots of trust."
        raise refuse_state("ROOTS_UNREADABLE", str(error), file=path, remedy=remedy) from error


def write_roots_text(path: str, text: bytes) -> None:
    """Put the envelope of roots in the place of the file `path`, whole or not at all.

    Raises:
        TrustStateError: it cannot be written (TRUST_STATE_UNWRITABLE); the old one is there.
    """
    try:
        replace_whole(os.path.realpath(path), text)
    except StoreWriteError as error:
        raise refuse_state("TRUST_STATE_UNWRITABLE", str(error), file=path, remedy=_WRITABLE) from error


def read_state(path: str, *, now: datetime) -> TrustState:
    """Return what is remembered.

    Raises:
        TrustStateError: nothing is there (TRUST_STATE_MISSING), it is damaged, cannot be read, or was written later
            than `now` (TRUST_STATE_FUTURE).
    """
    try:
        text = read_document(path, limit=MAX_STATE_NBYTES, error=SourceError, code="TRUST_STATE_TOO_LARGE")
    except SourceError as error:
        code = "TRUST_STATE_MISSING" if error.code == "NOT_FOUND" else "TRUST_STATE_UNREADABLE"
        message = "Expected what is remembered of accepted releases, got nothing that can be read"
        raise refuse_state(code, f"{message} ({error.code}).", file=path) from error
    state = parse_state(text, file=path)
    written_at = datetime.fromisoformat(state.written_at)
    if written_at > now + _CLOCK_TOLERANCE:
        message = f"Expected a time after {written_at}, when this was written, got {now}: the clock went back."
        raise refuse_state("TRUST_STATE_FUTURE", message, file=path, remedy="set the clock; expiry is judged by it.")
    return state


def write_state(path: str, state: TrustState) -> None:
    """Put a memory in the place of the one at `path`, whole or not at all.

    Raises:
        TrustStateError: it cannot be written (TRUST_STATE_UNWRITABLE); the old one is there.
    """
    text = format_state(state)
    if len(text) > MAX_STATE_NBYTES:
        message = f"Expected at most {MAX_STATE_NBYTES} bytes to remember, got {len(text)}."
        raise refuse_state("TRUST_STATE_TOO_LARGE", message, file=path, remedy="give slots and models fewer names.")
    try:
        replace_whole(path, text)
    except StoreWriteError as error:
        raise refuse_state("TRUST_STATE_UNWRITABLE", str(error), file=path, remedy=_WRITABLE) from error


def change_state(
    path: str, settle: Callable[[TrustState], TrustState], *, now: datetime, timeout_s: float
) -> TrustState:
    """Apply `settle` to what is remembered, under the lock, write it if it differs, and return it.

    Raises:
        TrustStateError: it cannot be read, locked (TRUST_STATE_BUSY) or written; the old one is there.
        HotglmError: what `settle` raises.
    """
    with locked_state(path, timeout_s=timeout_s):
        before = read_state(path, now=now)
        after = settle(before)
        if after != before:
            write_state(path, after)
        return after


@contextlib.contextmanager
def locked_state(path: str, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a memory for the body of a `with`.

    Raises:
        TrustStateError: another process holds it for too long (TRUST_STATE_BUSY), or it cannot be made.
    """
    lock = f"{path}.lock"
    with contextlib.ExitStack() as stack:
        try:
            with writing(lock):
                stack.enter_context(hold_exclusively(lock, timeout_s=timeout_s))
        except (StoreBusyError, StoreWriteError) as error:
            code = "TRUST_STATE_BUSY" if isinstance(error, StoreBusyError) else "TRUST_STATE_UNWRITABLE"
            remedy = "try again." if isinstance(error, StoreBusyError) else _WRITABLE
            raise refuse_state(code, str(error), file=path, remedy=remedy) from error
        yield


def move_aside(path: str) -> str | None:
    """Give what stands at `path` another name beside it, and return that; None where nothing is there.

    Raises:
        TrustStateError: it cannot be moved.
    """
    aside = f"{path}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    try:
        with writing(path):
            seam.active.rename(path, aside)
            flush_directory(os.path.dirname(path))
    except StoreWriteError as error:
        if error.code == "NOT_FOUND":
            return None
        raise refuse_state("TRUST_STATE_UNWRITABLE", str(error), file=path, remedy=_WRITABLE) from error
    return aside


def refuse_existing(path: str) -> TrustStateError:
    """Return the refusal of a first use where something is remembered already."""
    message = "Expected a first use, got a memory of an earlier one, which would be forgotten."
    remedy = "go on with it; or, to begin again, `hotglm trust init --replace`, which keeps it under another name."
    return TrustStateError(
        f"{shorten_repr(path)} is there already.",
        problems=[Problem(code="TRUST_STATE_EXISTS", message=message, file=path)],
        remedy=remedy,
    )
