"""What a host remembers: damaged, missing or unwritable, it refuses everything and says how to recover (FAULTS B28)."""

from __future__ import annotations

import errno
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.errors import ArgumentError, MissingExtraError, SignatureError, TrustError, TrustStateError
from hotglm.release.directory import open_release
from hotglm.testing.seams import hooked
from hotglm.trust.opening import create_trust, open_trust
from hotglm.trust.state import (
    AcceptedRelease,
    JournalEntry,
    SlotRecord,
    TrustState,
    format_state,
    parse_state,
)
from support.scripts import run_script
from support.trusted import START, Host, make_key, make_release, make_roots

texts = st.text(max_size=8)
releases = st.builds(
    AcceptedRelease,
    version=st.sampled_from(["1.0", "1.1.0+x", "2!1"]),
    sequence=st.integers(1, 2**53 - 1),
    digest=texts,
    key_ids=st.lists(texts, max_size=3).map(tuple),
    at=texts,
)
records = st.builds(
    SlotRecord,
    slot=texts,
    model=texts,
    accepted=st.lists(releases, max_size=3).map(tuple),
    confirmed=st.none() | releases,
)
states = st.builds(
    TrustState,
    roots=st.binary(max_size=20),
    written_at=st.just("2026-11-20T12:00:00+00:00"),
    records=st.lists(records, max_size=3).map(tuple),
    journal=st.lists(st.builds(JournalEntry, at=texts, what=texts, reason=texts), max_size=2).map(tuple),
)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Return a host that has accepted and confirmed a release."""
    made = Host(tmp_path)
    made.open().confirm(made.offer(make_release(tmp_path / "a")))
    return made


def refuse(host: Host) -> TrustStateError:
    """Return the refusal of opening the trust; it says how to recover."""
    with pytest.raises(TrustStateError) as caught:
        host.open()
    assert caught.value.remedy
    return caught.value


@given(states)
def test_what_is_written_is_read(state: TrustState) -> None:
    """parse_state(format_state(s)) == s."""
    assert parse_state(format_state(state), file="f") == state


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_any_other_bytes_are_refused(text: bytes) -> None:
    """Whatever the bytes, the answer is a TrustStateError."""
    with pytest.raises(TrustStateError):
        parse_state(text, file="f")


def test_every_flipped_bit_and_every_cut_is_refused(host: Host) -> None:
    """One bit that flipped, or an end that is missing, is damage, never another memory."""
    text = host.state_path.read_bytes()
    for at in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(TrustStateError):
            parse_state(bytes(flipped), file="f")
    for end in range(len(text)):
        with pytest.raises(TrustStateError):
            parse_state(text[:end], file="f")
    with pytest.raises(TrustStateError):
        parse_state(text + b"\n", file="f")


def test_a_deleted_memory_is_no_first_use(host: Host) -> None:
    """A file that is gone refuses everything, and the refusal names the command for recovery."""
    host.state_path.unlink()
    error = refuse(host)
    assert error.code == "TRUST_STATE_MISSING"
    assert "hotglm trust init --replace" in error.remedy


@pytest.mark.parametrize("damage", [lambda t: b"", lambda t: t[:-40], lambda t: t.replace(b"1.0.0", b"0.9.9")])
def test_a_damaged_memory_refuses(damage: Any, host: Host, tmp_path: Path) -> None:
    """Emptied, cut or edited: refused when it is opened, and when a trust that is open is asked."""
    trust = host.open()
    host.state_path.write_bytes(damage(host.state_path.read_bytes()))
    assert refuse(host).code in ("TRUST_STATE_DAMAGED", "TRUST_STATE_BAD_JSON")
    with open_release(tmp_path / "a") as release, pytest.raises(TrustStateError):
        trust.verify(release)


def test_a_memory_of_a_later_format_is_refused(host: Host) -> None:
    """What a later hotglm wrote is not guessed at."""
    text = host.state_path.read_bytes()
    host.state_path.write_bytes(text.replace(b"hotglm.trust-state/1", b"hotglm.trust-state/2"))
    assert refuse(host).code == "TRUST_STATE_FORMAT"


def test_a_memory_from_the_future_is_refused(host: Host) -> None:
    """A clock that went back cannot judge expiry; a small step back is none."""
    host.clock.now = START - timedelta(minutes=30)
    host.open()
    host.clock.now = START - timedelta(hours=2)
    error = refuse(host)
    assert error.code == "TRUST_STATE_FUTURE"
    assert "clock" in error.remedy


def test_something_else_in_its_place_is_refused(host: Host, tmp_path: Path) -> None:
    """A directory or a FIFO refuses, and does not block."""
    host.state_path.unlink()
    host.state_path.mkdir()
    assert refuse(host).code == "TRUST_STATE_UNREADABLE"
    host.state_path.rmdir()
    os.mkfifo(host.state_path)
    assert refuse(host).code == "TRUST_STATE_UNREADABLE"


def test_a_memory_that_cannot_be_written_accepts_nothing(host: Host, tmp_path: Path) -> None:
    """Read-only, or on a full disk: nothing is accepted, what was remembered stays, and the next try works."""
    path = make_release(tmp_path / "b", version="1.1.0")
    before = host.state_path.read_bytes()
    for number in (errno.EROFS, errno.ENOSPC):

        def fail(kind: str, _: int, args: tuple[Any, ...], number: int = number) -> object:
            if kind == "create":
                raise OSError(number, os.strerror(number))
            return None

        with hooked(fail), pytest.raises(TrustStateError) as caught:
            host.offer(path)
        assert caught.value.code == "TRUST_STATE_UNWRITABLE"
        assert host.state_path.read_bytes() == before
        assert sorted(os.listdir(host.state_path.parent)) == ["trust.json", "trust.json.lock"]
    host.offer(path)


def test_a_memory_behind_a_link_stays_behind_it(host: Host, tmp_path: Path) -> None:
    """A link to another place, or device, is followed once; the file there is replaced, not the link."""
    link = tmp_path / "link.json"
    link.symlink_to(host.state_path)
    trust = open_trust(host.roots_path, state=link, clock=host.clock)
    host.offer(make_release(tmp_path / "b", version="1.1.0"), trust)
    assert link.is_symlink()
    assert b"1.1.0" in host.state_path.read_bytes()


def test_first_use_is_explicit_and_once(host: Host, tmp_path: Path) -> None:
    """A first use where something is remembered is refused; `replaces` keeps the old memory under another name."""
    with pytest.raises(TrustStateError) as caught:
        create_trust(host.roots_path, state=host.state_path, clock=host.clock)
    assert caught.value.code == "TRUST_STATE_EXISTS"
    before = host.state_path.read_bytes()
    create_trust(host.roots_path, state=host.state_path, replaces=True, reason="the disk died", clock=host.clock)
    aside = next(host.state_path.parent.glob("*.replaced-*"))
    assert aside.read_bytes() == before
    state = host.open().read()[0]
    assert state.records == ()
    assert aside.name in state.journal[0].what
    assert state.journal[0].reason == "the disk died"


def test_first_roots_are_signed_by_themselves(tmp_path: Path) -> None:
    """Nobody starts to believe in roots that their own keys have not signed."""
    host = Host(tmp_path)
    host.put_roots(make_roots(), make_key("release"))
    with pytest.raises(SignatureError):
        create_trust(host.roots_path, state=tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_missing_roots_refuse(host: Host, tmp_path: Path) -> None:
    """Without its roots a host accepts nothing, not even while it runs."""
    trust = host.open()
    host.roots_path.unlink()
    assert refuse(host).code == "ROOTS_UNREADABLE"
    with open_release(tmp_path / "a") as release, pytest.raises(TrustError):
        trust.verify(release)


def test_what_cannot_be_meant_is_refused(host: Host) -> None:
    """A jump that allows nothing, and paths that are none."""
    with pytest.raises(ArgumentError):
        host.open(max_jump=0)
    with pytest.raises(ArgumentError):
        open_trust(7, state=host.state_path)  # type: ignore[arg-type]  # that is the point


def test_without_cryptography_nothing_is_accepted(host: Host) -> None:
    """Where the package is missing a trust cannot be opened, and one that is open refuses (K15)."""
    done = run_script(
        """
        import sys
        sys.modules["cryptography"] = None
        import hotglm
        try:
            hotglm.open_trust(sys.argv[1], state=sys.argv[2])
        except hotglm.MissingExtraError as error:
            print(error.code, "hotglm[sign]" in str(error))
        """,
        str(host.roots_path),
        str(host.state_path),
    )
    assert done.stdout == "MISSING_EXTRA True\n", done.stderr


def test_a_trust_that_is_open_refuses_without_cryptography(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification that cannot be made is a refusal (K15)."""
    trust = host.open()
    monkeypatch.setitem(sys.modules, "hotglm.trust.algorithms", None)
    with open_release(tmp_path / "a") as release, pytest.raises(MissingExtraError):
        trust.verify(release)


def test_many_processes_lose_nothing(host: Host, tmp_path: Path) -> None:
    """What two trusts accept one after the other is remembered together."""
    one, two = host.open(slot="one"), host.open(slot="two")
    for version in range(1, 4):
        path = make_release(tmp_path / str(version), version=f"2.{version}")
        host.offer(path, one)
        host.offer(path, two)
    state = host.open().read()[0]
    assert [(record.slot, len(record.accepted)) for record in state.records] == [("", 1), ("one", 3), ("two", 3)]
