"""Small records of a store on disk: labels, and what each service has confirmed, tries and refuses.

Rules this module keeps:

- One record is one JSON file, replaced whole: it holds the old state or the new one (S3, P11).
- Reading is strict: a record that somebody damaged is refused by name, never taken for an empty one (B28).
- Records are values; who may change them, and when, is decided by `store.py` and `services.py`, under the store's lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from hotglm.document import Report, parse_json
from hotglm.errors import (
    ArgumentError,
    Problem,
    SourceError,
    SourceReadError,
    StoreError,
    VersionSyntaxError,
    shorten_repr,
)
from hotglm.record import RecordReader, write_record
from hotglm.release.reading import read_document
from hotglm.release.writing import replace_whole
from hotglm.version import Version

__all__ = [
    "Label",
    "LabelMove",
    "Refusal",
    "ReleaseId",
    "ServiceState",
    "Trial",
    "now_text",
    "read_record",
    "verify_word",
    "write_ledger",
]

_FORMAT = "hotglm.ledger/1"
_MAX_NBYTES = 2**20
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLAIN = re.compile(r"[ -~]*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseId:
    """Which release is meant: its numbers, and the digest of its manifest, which binds every byte of it."""

    sequence: int
    version: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMove:
    """One move of a label: where to, and when (UTC, ISO 8601)."""

    release: ReleaseId
    moved_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name that leads to a release, and where it led before.

    Attributes:
        name: the label.
        revision: how often it was moved.
        moves: the latest moves, newest first; the first is where it leads now.
    """

    name: str
    revision: int
    moves: tuple[LabelMove, ...]

    @property
    def release(self) -> ReleaseId:
        """Where it leads."""
        return self.moves[0].release


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A release that a process is trying: the process is alive as long as it holds the lock of `holder`."""

    release: ReleaseId
    holder: str
    began_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A release that must not be tried again, and why."""

    release: ReleaseId
    reason: str
    refused_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """What a service has on disk.

    Attributes:
        name: of the service.
        confirmed: the last release that it confirmed; None before the first.
        trials: what its processes are trying.
        refused: what it must not try again, newest first.
    """

    name: str
    confirmed: ReleaseId | None = None
    trials: tuple[Trial, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def find_ids(self) -> Iterator[ReleaseId]:
        """Yield the releases that must stay: confirmed and on trial."""
        if self.confirmed is not None:
            yield self.confirmed
        yield from (trial.release for trial in self.trials)


def now_text() -> str:
    """Return the time, in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def verify_word(word: object, *, what: str) -> str:
    """Return a name of a label or a service, which is a file name and cannot be taken for a version (S4).

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(word, str) and _WORD.fullmatch(word):
        try:
            Version(word)
        except VersionSyntaxError:
            return word
    raise ArgumentError(
        f"Expected the name of a {what}, got {shorten_repr(word)}.",
        remedy="use 1 to 64 lower-case letters, digits, '-' and '_', beginning with a letter; no version such as 'v1'.",
    )


def write_ledger(path: str, record: object) -> None:
    """Put a record in the place of the file `path`, whole or not at all.

    Raises:
        StoreWriteError: it cannot be written.
    """
    document = {"format": _FORMAT, "record": write_record(record)}
    replace_whole(path, json.dumps(document, indent=1, ensure_ascii=True).encode() + b"\n")


def read_record(path: str, kind: type[T]) -> T | None:
    """Return the record in the file `path`; None where there is none.

    Raises:
        StoreError: it is there and is not what was written.
        SourceReadError: it cannot be read now; it may be whole.
    """
    try:
        text = read_document(path, limit=_MAX_NBYTES, error=SourceError, code="TOO_LARGE")
        report = Report(SourceError, headline="Refused", remedy="", prefix="LEDGER", file=path)
        document = parse_json(text, report=report)
    except SourceReadError as error:
        if error.code == "NOT_FOUND":
            return None
        if error.code != "NOT_REGULAR":
            raise
        raise _damaged(path, list(error.problems)) from error
    except (SourceError, UnicodeDecodeError) as error:
        problems = list(error.problems) if isinstance(error, SourceError) else []
        raise _damaged(path, problems) from error
    reader = RecordReader(code="BAD_LEDGER")
    members: dict[str, Any] = reader.read_members(document, ("format", "record"), where="ledger")
    if members["format"] != _FORMAT:
        reader.add(repr(_FORMAT), members["format"], where="format")
    records = reader.read_all(kind, [members["record"]], where="record")
    if reader.problems or not _is_sound(records[0]):
        raise _damaged(path, reader.problems)
    return records[0]


def _is_sound(record: object) -> bool:
    """Tell whether a record says only what a store writes: whoever prints it, reasons excepted, prints plain text."""
    if isinstance(record, Label):
        texts = [move.moved_at for move in record.moves]
        ids = [move.release for move in record.moves]
        return bool(ids) and _is_word(record.name) and all(map(_PLAIN.fullmatch, texts)) and all(map(_is_id, ids))
    if isinstance(record, ServiceState):
        texts = [text for trial in record.trials for text in (trial.holder, trial.began_at)]
        texts += [one.refused_at for one in record.refused]
        ids = [*record.find_ids(), *(one.release for one in record.refused)]
        return _is_word(record.name) and all(map(_PLAIN.fullmatch, texts)) and all(map(_is_id, ids))
    return True


def _is_word(word: str) -> bool:
    return _WORD.fullmatch(word) is not None


def _is_id(release: ReleaseId) -> bool:
    try:
        Version(release.version)
    except VersionSyntaxError:
        return False
    return release.sequence >= 1 and _DIGEST.fullmatch(release.digest) is not None


def _damaged(path: str, problems: list[Problem]) -> StoreError:
    return StoreError(
        f"Expected {shorten_repr(path)} as this store wrote it; it was damaged.",
        problems=problems or [Problem(code="BAD_LEDGER", message="Expected a record, got none.", file=path)],
        remedy="put it back from a backup; or remove it, and set anew what it said.",
    )
