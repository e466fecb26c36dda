"""Roots of trust give way to the next ones: only signed by the old and by the new, one version at a time. Pure.

Rules this module keeps (clauses T4, T7 in docs/release-format.md):

- The first roots are signed by their own `root` role. The next ones are signed by a threshold of the old role and by a
  threshold of their own, and have the next version. Expired roots may still name the next ones.
- Releases whose keys may not sign them any more are forgotten, so that floors that an attacker raised fall (B12).
- The same roots with one signature more are the same roots.
"""

from __future__ import annotations

from dataclasses import replace

from hotglm.envelope import ROOTS_TYPE, Envelope, parse_envelope
from hotglm.errors import Problem, ReplayedError, SignatureError, TrustError, shorten_repr
from hotglm.roots import ROOT_ROLE, Roots, parse_roots
from hotglm.trust.keys import find_key_faults, find_signers
from hotglm.trust.state import AcceptedRelease, JournalEntry, SlotRecord, TrustState

__all__ = ["apply_roots", "parse_any_roots", "parse_first_roots", "parse_next_roots", "parse_pinned_roots"]


def parse_first_roots(text: bytes, *, file: str) -> Roots:
    """Return roots that nothing was believed in before; they must be signed by their own `root` role.

    Raises:
        SignatureError: they are not. TrustError: they break their format, or hold keys that cannot be used.
        MissingExtraError: `cryptography` is not installed.
    """
    envelope, roots = _parse(text, file=file)
    _judge_root_role(envelope, roots, whose="its own", file=file)
    return roots


def parse_any_roots(text: bytes, *, file: str) -> Roots:
    """Return what roots say, whoever signed them; for looking, and to number the next ones. Nobody may believe them.

    Raises:
        SignatureError, TrustError: they break their format.
    """
    return parse_roots(parse_envelope(text, payload_type=ROOTS_TYPE, file=file).payload, file=file)


def parse_pinned_roots(state: TrustState) -> Roots:
    """Return the roots that are believed in; they were judged when they were taken.

    Raises:
        SignatureError, TrustError: they break their format.
    """
    return parse_roots(parse_envelope(state.roots, payload_type=ROOTS_TYPE).payload)


def parse_next_roots(text: bytes, *, pinned: Roots, file: str) -> Roots:
    """Return roots that may take the place of those that are believed in, or are the same.

    Args:
        text: their envelope.
        pinned: what is believed in.
        file: where they stand, for the refusal.

    Raises:
        SignatureError: a threshold of the old or of the new `root` role has not signed (THRESHOLD_NOT_MET).
        ReplayedError: they are older (ROOTS_ROLLBACK), other ones of the same version (ROOTS_REUSED), or leave a
            version out (ROOTS_SKIPPED).
        TrustError: they break their format, or hold keys that cannot be used.
        MissingExtraError: `cryptography` is not installed.
    """
    envelope, roots = _parse(text, file=file)
    if roots == pinned:
        return pinned
    _judge_version(roots, pinned, file=file)
    _judge_root_role(envelope, pinned, whose="the old", file=file)
    _judge_root_role(envelope, roots, whose="its own", file=file)
    return roots


def apply_roots(state: TrustState, text: bytes, *, at: str, reason: str, file: str) -> TrustState:
    """Return what is remembered once these roots are believed in.

    Raises:
        TrustError: they cannot be taken, as `parse_next_roots` says.
    """
    if text == state.roots:
        return state
    pinned = parse_pinned_roots(state)
    roots = parse_next_roots(text, pinned=pinned, file=file)

    def is_kept(record: SlotRecord, one: AcceptedRelease) -> bool:
        slot = record.slot or None
        applying = roots.find_roles(model=record.model, slot=slot)
        return any(len(role.keys & set(one.key_ids)) >= role.threshold for _, role in applying)

    after, num = state.forget(is_kept)
    after = replace(after, roots=text, written_at=at)
    if roots == pinned:
        return after
    what = f"roots went from version {pinned.version} to {roots.version}, {num} accepted releases forgotten"
    return after.with_entry(JournalEntry(at=at, what=what, reason=reason[:1000]))


def _parse(text: bytes, *, file: str) -> tuple[Envelope, Roots]:
    envelope = parse_envelope(text, payload_type=ROOTS_TYPE, file=file)
    roots = parse_roots(envelope.payload, file=file)
    faults = find_key_faults(roots)
    if faults:
        raise TrustError(
            f"The roots of trust {shorten_repr(file)} hold keys that cannot be used.",
            problems=[Problem(code="BAD_KEY", message=fault, file=file) for fault in faults],
            remedy="take keys that `hotglm keygen` made.",
        )
    return envelope, roots


def _judge_version(roots: Roots, pinned: Roots, *, file: str) -> None:
    expected, found = pinned.version + 1, roots.version
    if found == expected:
        return
    if found < pinned.version:
        code, remedy = "ROOTS_ROLLBACK", "put the newest roots there."
    elif found == pinned.version:
        code, remedy = "ROOTS_REUSED", "publish changed roots under the next version."
    else:
        code, remedy = "ROOTS_SKIPPED", "give all versions between, in order, to `hotglm trust rotate`."
    message = f"Expected roots of version {expected}, after {pinned.version}, got version {found}."
    problem = Problem(code=code, message=message, file=file, expected=expected, found=found)
    raise ReplayedError(f"The roots of trust {shorten_repr(file)} were refused.", problems=[problem], remedy=remedy)


def _judge_root_role(envelope: Envelope, roots: Roots, *, whose: str, file: str) -> None:
    role = roots.roles[ROOT_ROLE]
    num = len(role.keys & find_signers(envelope, roots))
    if num >= role.threshold:
        return
    code = "THRESHOLD_NOT_MET" if num else "BAD_SIGNATURE" if envelope.signatures else "UNSIGNED"
    message = f"Expected {role.threshold} different keys of {whose} role {ROOT_ROLE!r} to have signed, got {num}."
    raise SignatureError(
        f"The roots of trust {shorten_repr(file)} are not signed as they must be.",
        problems=[Problem(code=code, message=message, file=file, expected=role.threshold, found=num)],
        remedy="sign them with the keys that are missing: `hotglm sign ROOTS --key KEY`.",
    )
