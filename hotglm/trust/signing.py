"""Signing what stands on disk: releases and roots of trust, by several keys at different times.

Rules this module keeps:

- Nothing is signed that was not verified: every byte of a release is read and compared first, and what is signed are
  the bytes of the manifest that this was done with.
- A signature is added to those that are there; the file is replaced whole, under a lock, so none is lost (T1).
- Signatures of an envelope over other bytes than the manifest's are dropped: they would never hold again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from hotglm.envelope import ENVELOPE_NAME, MANIFEST_TYPE, ROOTS_TYPE, Envelope, format_envelope, parse_envelope
from hotglm.errors import Problem, SignatureError, SourceError, StoreBusyError, shorten_repr
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.progress import Progress
from hotglm.release.directory import open_release
from hotglm.release.locks import try_exclusively
from hotglm.release.reading import close_quietly, read_document
from hotglm.release.writing import replace_whole, write_file, writing
from hotglm.roots import MAX_ROOTS_NBYTES, Roots, format_roots, parse_roots
from hotglm.trust.files import read_envelope
from hotglm.trust.keys import SigningKey

__all__ = ["sign_release", "sign_roots", "write_roots"]

_LOCK_TIMEOUT_S = 30.0
_PAUSE_S = 0.005


def sign_release(
    path: str | os.PathLike[str],
    key: SigningKey,
    *,
    progress: Callable[[Progress], object] | None = None,
) -> int:
    """Sign a release, having read every byte of it; return how many signatures it has then.

    Signing again with the same key takes the place of the older signature. Readers that have it open are not disturbed.

    Args:
        path: its directory.
        key: the private key.
        progress: told how far verifying is.

    Raises:
        SourceError: the release is not what its manifest says; it was not signed.
        SignatureError: what stands in place of its signatures is no envelope, or they are too many.
        StoreBusyError: another process signs it. StoreWriteError: it cannot be written.
    """
    with open_release(path) as release:
        release.verify(progress=progress)
        target = os.path.join(release.path, ENVELOPE_NAME)
        with _alone(os.path.join(release.path, MANIFEST_NAME)):
            try:
                envelope = read_envelope(release)
            except SignatureError as error:
                if error.code not in ("UNSIGNED", "BAD_SIGNATURE"):
                    raise
                envelope = Envelope(payload_type=MANIFEST_TYPE, payload=release.manifest_bytes)
            return _write(target, key.sign(envelope))


def write_roots(path: str | os.PathLike[str], roots: Roots, *, keys: tuple[SigningKey, ...] = ()) -> None:
    """Write roots of trust to the file `path`, which must not exist, signed by `keys`.

    Raises:
        TrustError: they break their format. StoreWriteError: the file cannot be written.
    """
    envelope = Envelope(payload_type=ROOTS_TYPE, payload=format_roots(roots))
    for key in keys:
        envelope = key.sign(envelope)
    at = os.path.abspath(os.fspath(path))
    with writing(at):
        write_file(at, format_envelope(envelope))


def sign_roots(path: str | os.PathLike[str], key: SigningKey) -> int:
    """Add a signature to roots of trust in a file; return how many it has then.

    Raises:
        SignatureError, TrustError: the file does not hold roots. SourceError: it cannot be read.
        StoreBusyError: another process signs it. StoreWriteError: it cannot be written.
    """
    at = os.path.realpath(os.fspath(path))
    with _alone(at):
        text = read_document(at, limit=2 * MAX_ROOTS_NBYTES, error=SourceError, code="ROOTS_TOO_LARGE")
        envelope = parse_envelope(text, payload_type=ROOTS_TYPE, file=at)
        parse_roots(envelope.payload, file=at)
        return _write(at, key.sign(envelope))


def _write(path: str, envelope: Envelope) -> int:
    text = format_envelope(envelope)
    parse_envelope(text, payload_type=envelope.payload_type, file=path)  # what would be refused is not written
    replace_whole(path, text)
    return len(envelope.signatures)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Hold the lock of the file that is signed, so that two who sign at once do not lose a signature.

    Raises:
        StoreBusyError: another process holds it for too long.
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with writing(path):
        while (fd := try_exclusively(path)) is None:
            if time.monotonic() >= deadline or not os.path.lexists(path):
                raise StoreBusyError(
                    f"Somebody else signs {shorten_repr(path)}.",
                    problems=[Problem(code="STORE_BUSY", message="Expected its lock, got none.", file=path)],
                    remedy="try again.",
                )
            time.sleep(_PAUSE_S)
    try:
        yield
    finally:
        close_quietly(fd)
