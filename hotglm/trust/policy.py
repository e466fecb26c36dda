"""A host's trust: which releases it accepts, and what it remembers of those that it accepted.

Rules this module keeps (clauses T in docs/release-format.md):

- The order is: memory, roots, signatures, old news, expiry. The first that refuses is the answer; nothing laxer is
  tried (T11, B27). Nothing is kept in memory between two questions: a revoked key counts no more at once (B25).
- One instant decides about a release: that of the beginning (T10, B14).
- What is judged is what the release was opened with: its manifest's bytes in memory (T1).
- Judging changes nothing. A floor is raised by `accept`, once the release stands proved; `confirm` notes the one that a
  restart may always come back to (T8).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from hotglm.errors import ArgumentError, HotglmError, shorten_repr
from hotglm.release.directory import Release
from hotglm.roots import Roots
from hotglm.trust.files import change_state, read_envelope, read_roots, read_state, write_roots_text
from hotglm.trust.judging import judge_expiry, judge_replay, judge_signers
from hotglm.trust.keys import find_signers
from hotglm.trust.rotation import apply_roots, parse_any_roots, parse_pinned_roots
from hotglm.trust.state import AcceptedRelease, JournalEntry, SlotRecord, TrustState
from hotglm.version import Version

__all__ = ["DEFAULT_MAX_JUMP", "Accepted", "Trust", "read_clock"]

DEFAULT_MAX_JUMP = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The proof that a release was accepted, and why.

    Attributes:
        model: name of the model.
        version: its version.
        sequence: its number.
        digest: its result digest (D5), the same for its full form and its deltas.
        slot: the slot that it was accepted for; None for none.
        roles: the roles that say so.
        key_ids: the keys of the roots that had signed it.
        roots_version: version of the roots it was judged by.
        at: the instant that it was judged at.
        is_confirmed: whether it is the one that was confirmed last, which neither floors nor expiry can refuse.
    """

    model: str
    version: Version
    sequence: int
    digest: str
    slot: str | None
    roles: tuple[str, ...]
    key_ids: tuple[str, ...]
    roots_version: int
    at: datetime
    is_confirmed: bool

    @property
    def entry(self) -> AcceptedRelease:
        """It, as it is remembered."""
        return AcceptedRelease(
            version=str(self.version),
            sequence=self.sequence,
            digest=self.digest,
            key_ids=self.key_ids,
            at=self.at.isoformat(timespec="seconds"),
        )


def read_clock() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a host believes in, and what it remembers. Any thread or process may call any method.

    Attributes:
        roots_path: the file of its roots.
        state_path: the file of what it remembers.
        slot: the slot that is asked for; None for none.
        max_jump: by how much sequence, epoch and major number of a release may grow at once.
        clock: tells the time, in UTC.
        lock_timeout_s: how long to wait for another process that changes the memory, in seconds.
    """

    roots_path: str
    state_path: str
    slot: str | None = None
    max_jump: int = DEFAULT_MAX_JUMP
    clock: Callable[[], datetime] = read_clock
    lock_timeout_s: float = 30.0

    def for_slot(self, name: str) -> Trust:
        """Return the same trust for one slot: with its own memory, and the roles that may sign for it."""
        return replace(self, slot=name)

    def verify(self, release: Release, *, now: datetime | None = None) -> Accepted:
        """Judge an open release by its signatures, by what was accepted before, and by the time. Changes nothing.

        Args:
            release: from `hotglm.open_release` or a store; what is judged are the bytes that it was opened with.
            now: the instant that decides about expiry, with its time zone; that of the clock if None.

        Raises:
            SignatureError: the keys that the roots ask for have not signed it. Alert somebody.
            ReplayedError: it is old news, reuses a version, or leaps too far.
            ExpiredError: it, or the roots, expired.
            TrustStateError: roots or memory cannot be read; nothing is accepted.
            TrustError: the roots break their format. MissingExtraError: `cryptography` is not installed.
            SourceError: the signatures cannot be read.
        """
        instant = self._instant(now)
        state, roots = self._load(instant)
        manifest = release.manifest
        envelope = read_envelope(release)
        key_ids = tuple(sorted(find_signers(envelope, roots)))
        roles = judge_signers(roots, key_ids, model=manifest.name, slot=self.slot, file=release.path)
        record = state.find_record(slot=self.slot, model=manifest.name)
        accepted = Accepted(
            model=manifest.name,
            version=manifest.version,
            sequence=manifest.sequence,
            digest=release.result_digest,
            slot=self.slot,
            roles=roles,
            key_ids=key_ids,
            roots_version=roots.version,
            at=instant,
            is_confirmed=_is_confirmed(record, release.result_digest),
        )
        if not accepted.is_confirmed:
            judge_replay(record, accepted.entry, max_jump=self.max_jump, file=release.path)
            judge_expiry(manifest, roots, now=instant, file=release.path)
        return accepted

    def accept(self, accepted: Accepted) -> None:
        """Remember an accepted release, so that nothing older is accepted from now on. The newest one again is fine.

        It is judged once more by what another process may have accepted meanwhile.

        Raises:
            ReplayedError: it is old news by now. SignatureError: its keys were revoked meanwhile.
            TrustStateError: it cannot be remembered; then it must not be used.
        """

        def settle(state: TrustState) -> TrustState:
            roots = parse_pinned_roots(state)
            judge_signers(roots, accepted.key_ids, model=accepted.model, slot=accepted.slot, file=self.state_path)
            record = state.find_record(slot=accepted.slot, model=accepted.model)
            if _is_confirmed(record, accepted.digest) and record.accepted:
                return state  # older than the floor, most likely, and no reason to lower it
            if judge_replay(record, accepted.entry, max_jump=self.max_jump, file=self.state_path):
                signed = record.with_signers(accepted.key_ids)
                return state if signed == record else self._stamp(state.with_record(signed))
            return self._stamp(state.with_record(record.with_accepted(accepted.entry)))

        self._change(settle)

    def confirm(self, accepted: Accepted) -> None:
        """Note an accepted release as the one that a restart may always come back to.

        From now on neither floors nor expiry refuse it; its signatures must still hold. Again does nothing.

        Raises:
            TrustStateError: it cannot be remembered.
        """

        def settle(state: TrustState) -> TrustState:
            record = state.find_record(slot=accepted.slot, model=accepted.model)
            if _is_confirmed(record, accepted.digest):
                return state
            return self._stamp(state.with_record(replace(record, confirmed=accepted.entry)))

        self._change(settle)

    def lower(self, model: str, to: str | Version | None, *, reason: str) -> int:
        """Forget accepted releases above a version, so that older ones are accepted again; noted in the journal.

        Args:
            model: name of the model; of this slot, or of none where the trust is for none.
            to: the highest version that is still remembered; None to forget all.
            reason: for the journal.

        Returns:
            How many were forgotten.

        Raises:
            ArgumentError: no reason is given, or `to` is no version. TrustStateError: it cannot be changed.
        """
        if not reason.strip():
            raise ArgumentError("Expected a reason for lowering a floor, got none.", remedy="say why; it is kept.")
        floor, num = None if to is None else Version(to), 0

        def is_kept(record: SlotRecord, one: AcceptedRelease) -> bool:
            is_meant = (record.slot, record.model) == (self.slot or "", model)
            return not is_meant or (floor is not None and Version(one.version) <= floor)

        def settle(state: TrustState) -> TrustState:
            nonlocal num
            after, num = state.forget(is_kept)
            where = "" if self.slot is None else f" in slot {shorten_repr(self.slot)}"
            what = f"lowered {shorten_repr(model)}{where} to {floor or 'nothing'}, {num} forgotten"
            return self._stamp(after, what=what, reason=reason)

        self._change(settle)
        return num

    def rotate(self, *paths: str | os.PathLike[str]) -> Roots:
        """Take newer roots, one after the other, and put the last in the place of the roots file.

        Each must be signed by the `root` role before it and by its own, and have the next version. What keys had
        signed that may no more is forgotten, so that floors that an attacker raised fall (B12).

        Raises:
            SignatureError: not signed as it must be. ReplayedError: not the next version.
            TrustError: they break their format. TrustStateError: a file cannot be read or written.
        """
        for path in paths:
            at = os.fspath(path)
            text = read_roots(at)

            def settle(state: TrustState, text: bytes = text, at: str = at) -> TrustState:
                after = self._apply(state, text, file=at)
                # The file first: if this ends in between, the file's roots are the next ones, and are taken then.
                if not self._stands_newer(text):
                    write_roots_text(self.roots_path, text)
                return after

            self._change(settle)
        return self.read()[1]

    def read(self) -> tuple[TrustState, Roots]:
        """Return what is remembered, and the roots that are believed in, for looking.

        Raises:
            TrustStateError: roots or memory cannot be read. SignatureError, ReplayedError, TrustError: the roots file
            holds others that cannot be taken.
        """
        return self._load(self._instant(None))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _stands_newer(self, text: bytes) -> bool:
        """Tell whether the roots file holds a later version already: another memory that shares it is further on."""
        try:
            standing = parse_any_roots(read_roots(self.roots_path), file=self.roots_path)
        except HotglmError:  # what cannot be read is replaced
            return False
        return standing.version > parse_any_roots(text, file=self.roots_path).version

    def _load(self, now: datetime) -> tuple[TrustState, Roots]:
        """Return memory and roots; the next roots are taken here, if that is what the file holds."""
        state, text = read_state(self.state_path, now=now), read_roots(self.roots_path)
        if text != state.roots:
            state = self._change(lambda state: self._apply(state, text, file=self.roots_path), now=now)
        return state, parse_pinned_roots(state)

    def _apply(self, state: TrustState, text: bytes, *, file: str) -> TrustState:
        at = self._instant(None).isoformat(timespec="seconds")
        return apply_roots(state, text, at=at, reason=f"found in {file}", file=file)

    def _change(self, settle: Callable[[TrustState], TrustState], *, now: datetime | None = None) -> TrustState:
        return change_state(self.state_path, settle, now=now or self._instant(None), timeout_s=self.lock_timeout_s)

    def _stamp(self, state: TrustState, *, what: str | None = None, reason: str = "") -> TrustState:
        at = self._instant(None).isoformat(timespec="seconds")
        stamped = replace(state, written_at=at)
        return stamped if what is None else stamped.with_entry(JournalEntry(at=at, what=what, reason=reason[:1000]))

    def _instant(self, now: datetime | None) -> datetime:
        instant = self.clock() if now is None else now
        if not isinstance(instant, datetime) or instant.tzinfo is None:
            raise ArgumentError(
                f"Expected a time with its time zone, got {shorten_repr(instant)}.", remedy="use datetime.now(UTC)."
            )
        return instant


def _is_confirmed(record: SlotRecord, digest: str) -> bool:
    return record.confirmed is not None and record.confirmed.digest == digest
