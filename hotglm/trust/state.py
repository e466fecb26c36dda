"""What a host remembers of releases that it accepted, as values and as bytes that notice every change.

Rules this module keeps:

- Pure: no IO. `parse_state(format_state(s)) == s`, and nothing else is taken: the document carries its own digest and
  has one spelling, so one flipped bit or a missing end is damage, never another memory (T9, B28).
- Floors are the largest numbers that were accepted, and nothing else; so what is forgotten lowers them by itself (T8).
- The host alone writes this. Its digest is against accidents: who can write the file can write the digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from hotglm.document import Report, parse_json, verify_utf8
from hotglm.envelope import read_base64
from hotglm.errors import TrustStateError, VersionSyntaxError, shorten_repr
from hotglm.record import RecordReader, write_record
from hotglm.version import Version

__all__ = [
    "MAX_STATE_NBYTES",
    "AcceptedRelease",
    "JournalEntry",
    "SlotRecord",
    "TrustState",
    "format_state",
    "parse_state",
    "refuse_state",
]

STATE_FORMAT = "hotglm.trust-state/1"
MAX_STATE_NBYTES = 16 * 2**20
MAX_ACCEPTED = 16
"""How many are remembered of one model and slot: the newest has the floor, the others only name what was reused."""
_MAX_BRACKETS = 2_000_000
_MAX_JOURNAL = 256
RECOVERY = (
    "put it back from a backup; or, if that is lost, `hotglm trust init --replace` and then `hotglm trust accept` of "
    "the release that served last, so that older ones stay refused (docs/trust.md, Recovery)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedRelease:
    """A release that was accepted.

    Attributes:
        version: its version.
        sequence: its number.
        digest: its result digest (D5).
        key_ids: the keys that had signed it.
        at: when, UTC, ISO 8601.
    """

    version: str
    sequence: int
    digest: str
    key_ids: tuple[str, ...]
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRecord:
    """What was accepted of one model for one slot.

    Attributes:
        slot: name of the slot; empty where it was for none.
        model: name of the model.
        accepted: the latest of them, newest first; the first has the largest numbers.
        confirmed: the last one whose trial ended well.
    """

    slot: str
    model: str
    accepted: tuple[AcceptedRelease, ...] = ()
    confirmed: AcceptedRelease | None = None

    @property
    def floor_version(self) -> Version | None:
        """The least version that is not old news; None before the first."""
        return max((Version(one.version) for one in self.accepted), default=None)

    @property
    def floor_sequence(self) -> int:
        """The least number that is not old news; 0 before the first."""
        return max((one.sequence for one in self.accepted), default=0)

    def with_accepted(self, release: AcceptedRelease) -> SlotRecord:
        """Return it with one more, the newest."""
        return replace(self, accepted=(release, *self.accepted)[:MAX_ACCEPTED])

    def with_signers(self, key_ids: Iterable[str]) -> SlotRecord:
        """Return it with keys that have signed the newest one meanwhile, so that roots without the old ones keep it."""
        newest, *others = self.accepted
        signers = tuple(sorted({*newest.key_ids, *key_ids}))
        return replace(self, accepted=(replace(newest, key_ids=signers), *others))


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """What an operator, or new roots, changed: when (UTC, ISO 8601), what, and why."""

    at: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustState:
    """Everything that a host remembers.

    Attributes:
        roots: the envelope of the roots that are believed in, byte for byte.
        written_at: when it was last written, UTC, ISO 8601.
        records: one for each slot and model.
        journal: what was changed by hand or by new roots, newest first.
    """

    roots: bytes
    written_at: str
    records: tuple[SlotRecord, ...] = ()
    journal: tuple[JournalEntry, ...] = ()

    def find_record(self, *, slot: str | None, model: str) -> SlotRecord:
        """Return what is remembered of a model in a slot; an empty record before the first."""
        for record in self.records:
            if (record.slot, record.model) == (slot or "", model):
                return record
        return SlotRecord(slot=slot or "", model=model)

    def with_record(self, record: SlotRecord) -> TrustState:
        """Return it with a record in place of the one of the same slot and model."""
        others = (one for one in self.records if (one.slot, one.model) != (record.slot, record.model))
        return replace(self, records=tuple(sorted((*others, record), key=lambda one: (one.slot, one.model))))

    def with_entry(self, entry: JournalEntry) -> TrustState:
        """Return it with one more line of the journal, the newest."""
        return replace(self, journal=(entry, *self.journal)[:_MAX_JOURNAL])

    def forget(self, is_kept: Callable[[SlotRecord, AcceptedRelease], bool]) -> tuple[TrustState, int]:
        """Return it with only those accepted releases that `is_kept`, and how many went; what is confirmed stays."""
        records = tuple(
            replace(record, accepted=tuple(one for one in record.accepted if is_kept(record, one)))
            for record in self.records
        )
        num = sum(len(record.accepted) for record in self.records) - sum(len(record.accepted) for record in records)
        return replace(self, records=records), num


def format_state(state: TrustState) -> bytes:
    """Return the bytes of a state: canonical JSON with a digest over the rest of itself."""
    inner = {
        "journal": write_record(state.journal),
        "records": write_record(state.records),
        "roots": base64.b64encode(state.roots).decode(),
        "written_at": state.written_at,
    }
    digest = f"sha256:{hashlib.sha256(_dump(inner)).hexdigest()}"
    return _dump({"digest": digest, "format": STATE_FORMAT, "state": inner}) + b"\n"


def parse_state(text: bytes, *, file: str) -> TrustState:
    """Return what the bytes of a state hold, or refuse them.

    Raises:
        TrustStateError: they are not what `format_state` wrote (TRUST_STATE_DAMAGED), or of another format
            (TRUST_STATE_FORMAT).
    """
    report = _report(file)
    verify_utf8(text, report=report)
    document = parse_json(text, report=report, max_brackets=_MAX_BRACKETS)
    if isinstance(document, dict) and isinstance(found := document.get("format"), str) and found != STATE_FORMAT:
        message = (
            f"Expected format {STATE_FORMAT!r}, got {shorten_repr(found)}; a later hotglm wrote it, or it is damaged."
        )
        report.stop("TRUST_STATE_FORMAT", message)
    state = _read(document)
    if state is None or format_state(state) != text:
        report.stop("TRUST_STATE_DAMAGED", "Expected the bytes that were written, got others.")
    return state


def refuse_state(code: str, message: str, *, file: str, remedy: str = RECOVERY) -> TrustStateError:
    """Return the refusal of everything, because a memory cannot be used."""
    report = _report(file, remedy=remedy)
    try:
        report.stop(code, message)
    except TrustStateError as error:
        return error


def _report(file: str, *, remedy: str = RECOVERY) -> Report:
    headline = f"What is remembered in {shorten_repr(file)} cannot be used, so that nothing is accepted"
    return Report(TrustStateError, headline=headline, remedy=remedy, prefix="TRUST_STATE", file=file)


def _dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _read(document: object) -> TrustState | None:
    """Return the state in a document; None where anything is not as it was written."""
    reader = RecordReader(code="TRUST_STATE_DAMAGED")
    outer = reader.read_members(document, ("digest", "format", "state"), where="document")
    inner: dict[str, Any] = reader.read_members(
        outer["state"], ("journal", "records", "roots", "written_at"), where="state"
    )
    roots, written_at = read_base64(inner["roots"]), inner["written_at"]
    records = reader.read_all(SlotRecord, inner["records"], where="records")
    journal = reader.read_all(JournalEntry, inner["journal"], where="journal")
    if reader.problems or roots is None or not _is_time(written_at) or not all(map(_has_versions, records)):
        return None
    return TrustState(roots=roots, written_at=written_at, records=records, journal=journal)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).astimezone(UTC).isoformat() != ""
    except (ValueError, OverflowError):
        return False


def _has_versions(record: SlotRecord) -> bool:
    try:
        return all(Version(one.version) is not None for one in (*record.accepted, *filter(None, [record.confirmed])))
    except VersionSyntaxError:
        return False
