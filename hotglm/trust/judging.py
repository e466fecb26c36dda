"""The decisions of a trust policy, one by one: who signed, is it old news, has it expired. Pure.

Rules this module keeps:

- Each decision is made once, with the host's policy alone; a refusal is final and nothing laxer is tried (T11, B27).
- A threshold counts keys, not signatures (T5, B22). Only the roles that apply to this model and slot count (T6, B25).
- Floors come from what was accepted before (T8); one instant decides about every expiry (T10, B13, B14).
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from hotglm.errors import ExpiredError, Problem, ReplayedError, SignatureError, shorten_repr
from hotglm.manifest_fields import Manifest
from hotglm.roots import Roots
from hotglm.trust.state import AcceptedRelease, SlotRecord
from hotglm.version import Version

__all__ = ["judge_expiry", "judge_replay", "judge_signers"]

_ALERT = "find out who published it; if the keys changed, take the new roots with `hotglm trust rotate`."


def judge_signers(roots: Roots, signers: Iterable[str], *, model: str, slot: str | None, file: str) -> tuple[str, ...]:
    """Return the names of the roles whose thresholds these keys meet.

    Args:
        roots: what the host believes in.
        signers: ids of keys of the roots that have signed.
        model: name of the model that is signed.
        slot: name of the slot that it is for; None where it is for none.
        file: the envelope, for the refusal.

    Raises:
        SignatureError: none (BAD_SIGNATURE, KEY_NOT_ALLOWED, THRESHOLD_NOT_MET).
    """
    valid = frozenset(signers)
    counts = {name: (len(role.keys & valid), role) for name, role in roots.find_roles(model=model, slot=slot)}
    met = tuple(name for name, (num, role) in counts.items() if num >= role.threshold)
    if met:
        return met
    what = f"model {shorten_repr(model)}" + ("" if slot is None else f" in slot {shorten_repr(slot)}")
    best = max(counts.items(), key=lambda item: item[1][0], default=None)
    if not valid:
        code, message = "BAD_SIGNATURE", "Expected a signature of a key of the roots, got none that holds."
    elif best is None or best[1][0] == 0:
        names = ", ".join(sorted(valid))
        code, message = "KEY_NOT_ALLOWED", f"Expected a key that may sign {what}, got only {names}, which may not."
    else:
        name, (num, role) = best
        code = "THRESHOLD_NOT_MET"
        message = f"Expected {role.threshold} different keys of role {name!r} for {what}, got {num}."
    raise SignatureError(
        "The signatures are not the ones that this host asks for.",
        problems=[Problem(code=code, message=message, file=file)],
        remedy=_ALERT,
    )


def judge_expiry(manifest: Manifest, roots: Roots, *, now: datetime, file: str) -> None:
    """Refuse what must not be taken for new any more at `now`; the instant of expiry is expired (B13).

    Raises:
        ExpiredError: the release (EXPIRED), the roots (ROOTS_EXPIRED), or both.
    """
    problems = []
    if manifest.is_expired(now):
        message = f"Expected a release that is good at {now}, got one that expired at {manifest.expires_at}."
        problems.append(Problem(code="EXPIRED", message=message, file=file))
    if roots.expires_at is not None and now >= roots.expires_at:
        message = f"Expected roots that are good at {now}, got ones that expired at {roots.expires_at}."
        problems.append(Problem(code="ROOTS_EXPIRED", message=message))
    if problems:
        raise ExpiredError(
            "It must not be taken for new any more.",
            problems=problems,
            remedy="publish a newer release, or roots with a later expiry; and look whether updates still arrive here.",
        )


def judge_replay(record: SlotRecord, offered: AcceptedRelease, *, max_jump: int, file: str) -> bool:
    """Refuse old news and leaps; tell whether this very release was accepted before.

    Args:
        record: what was accepted.
        offered: what is offered now.
        max_jump: by how much sequence, epoch and major number may grow at once (B12).
        file: the release, for the refusal.

    Raises:
        ReplayedError: its version or number is below the floor (VERSION_ROLLBACK, SEQUENCE_ROLLBACK), its version
            was accepted with other content (VERSION_REUSED), or it leaps too far (JUMP_TOO_LARGE).
    """
    if record.accepted and record.accepted[0].digest == offered.digest:
        return True  # the newest one again, which is no news (B11)
    problems = [*_find_rollbacks(record, offered, file=file), *_find_jumps(record, offered, max_jump, file=file)]
    if not problems:
        return False
    raise ReplayedError(
        "It is older than what was accepted before, reuses its version, or leaps too far.",
        problems=problems,
        remedy="publish it under a newer version and number; to go back on purpose, `hotglm trust lower`.",
    )


def _find_rollbacks(record: SlotRecord, offered: AcceptedRelease, *, file: str) -> list[Problem]:
    problems = []
    version, floor, number = Version(offered.version), record.floor_version, record.floor_sequence
    if floor is not None and version < floor:
        message = f"Expected version {floor} (the floor) or later, got {version}."
        problems.append(
            Problem(code="VERSION_ROLLBACK", message=message, file=file, expected=str(floor), found=str(version))
        )
    if offered.sequence < number:
        message = f"Expected number {number} (the floor) or a larger one, got {offered.sequence}."
        problems.append(
            Problem(code="SEQUENCE_ROLLBACK", message=message, file=file, expected=number, found=offered.sequence)
        )
    for one in record.accepted:
        if Version(one.version) == version and one.digest != offered.digest:
            message = f"Expected {one.digest} under version {version}, as accepted before, got {offered.digest}."
            problems.append(
                Problem(code="VERSION_REUSED", message=message, file=file, expected=one.digest, found=offered.digest)
            )
    return problems


def _find_jumps(record: SlotRecord, offered: AcceptedRelease, max_jump: int, *, file: str) -> list[Problem]:
    version, floor, number = Version(offered.version), record.floor_version, record.floor_sequence
    leaps = {"number": offered.sequence - number}
    if floor is not None:
        leaps |= {"epoch": version.epoch - floor.epoch, "major number": version.release[0] - floor.release[0]}
    return [
        Problem(
            code="JUMP_TOO_LARGE",
            message=f"Expected the {what} to grow by at most {max_jump}, got {leap}.",
            file=file,
            expected=max_jump,
            found=leap,
        )
        for what, leap in leaps.items()
        if leap > max_jump
    ]
