"""Trust is opened, or used for the first time; the second is never taken for the first (T9, B28)."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.trust.files import locked_state, move_aside, read_roots, refuse_existing, write_state
from hotglm.trust.keys import load_algorithms
from hotglm.trust.policy import DEFAULT_MAX_JUMP, Trust, read_clock
from hotglm.trust.rotation import parse_first_roots
from hotglm.trust.state import JournalEntry, TrustState

__all__ = ["create_trust", "open_trust"]


def open_trust(
    roots: str | os.PathLike[str],
    *,
    state: str | os.PathLike[str],
    slot: str | None = None,
    max_jump: int = DEFAULT_MAX_JUMP,
    clock: Callable[[], datetime] = read_clock,
    lock_timeout_s: float = 30.0,
) -> Trust:
    """Open what this host believes in and remembers. Newer roots in the file are taken, if they are signed for that.

    Args:
        roots: the file of its signed roots of trust; read again for every release, so that new ones count at once.
        state: the file of what it remembers, made by `create_trust` or `hotglm trust init`.
        slot: name of the slot that releases are accepted for; a slot that is given a trust asks for its own.
        max_jump: by how much sequence, epoch and major number of a release may grow at once.
        clock: tells the time, in UTC.
        lock_timeout_s: how long to wait for another process that changes the memory, in seconds.

    Raises:
        TrustStateError: a file is missing, damaged or cannot be read. There is no second try without it.
        SignatureError, ReplayedError, TrustError: the roots file holds other roots, which cannot be taken.
        MissingExtraError: `cryptography` is not installed. ArgumentError: something that cannot be meant.
    """
    load_algorithms()
    trust = _make(roots, state, slot=slot, max_jump=max_jump, clock=clock, lock_timeout_s=lock_timeout_s)
    trust.read()
    return trust


def create_trust(
    roots: str | os.PathLike[str],
    *,
    state: str | os.PathLike[str],
    replaces: bool = False,
    reason: str = "first use",
    clock: Callable[[], datetime] = read_clock,
) -> Trust:
    """Begin to believe in roots and to remember, explicitly, once.

    Args:
        roots: the file of the roots, signed by their own `root` role. Make sure that it is the right one.
        state: where to remember; nothing may be there.
        replaces: whether what is there is moved aside, and forgotten with all floors: for recovery.
        reason: for the journal.
        clock: tells the time, in UTC.

    Raises:
        TrustStateError: something is remembered there already (TRUST_STATE_EXISTS), or it cannot be written.
        SignatureError, TrustError: the roots are not signed by themselves, or break their format.
        MissingExtraError: `cryptography` is not installed. ArgumentError: something that cannot be meant.
    """
    trust = _make(roots, state, clock=clock)
    text = read_roots(trust.roots_path)
    first = parse_first_roots(text, file=trust.roots_path)
    with locked_state(trust.state_path, timeout_s=trust.lock_timeout_s):
        if os.path.lexists(trust.state_path) and not replaces:
            raise refuse_existing(trust.state_path)
        aside = move_aside(trust.state_path)
        at = clock().isoformat(timespec="seconds")
        what = f"began with roots of version {first.version}" + (f"; the old memory is {aside}" if aside else "")
        entry = JournalEntry(at=at, what=what, reason=reason[:1000])
        write_state(trust.state_path, TrustState(roots=text, written_at=at, journal=(entry,)))
    return trust


def _make(
    roots: str | os.PathLike[str],
    state: str | os.PathLike[str],
    *,
    slot: str | None = None,
    max_jump: int = DEFAULT_MAX_JUMP,
    clock: Callable[[], datetime] = read_clock,
    lock_timeout_s: float = 30.0,
) -> Trust:
    if type(max_jump) is not int or max_jump < 1:
        raise ArgumentError(f"Expected a max_jump of 1 or more, got {shorten_repr(max_jump)}.", remedy="leave it out.")
    try:
        # The memory by its own name: replaced, a link to it would become a file of its own.
        roots_path, state_path = os.path.abspath(os.fsdecode(roots)), os.path.realpath(os.fsdecode(state))
    except (TypeError, ValueError) as error:
        remedy = "give two paths: of the roots, and of what is remembered."
        raise ArgumentError("Expected paths, got something else.", remedy=remedy) from error
    return Trust(
        roots_path=roots_path,
        state_path=state_path,
        slot=slot,
        max_jump=max_jump,
        clock=clock,
        lock_timeout_s=lock_timeout_s,
    )
