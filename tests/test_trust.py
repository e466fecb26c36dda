"""Which releases a host accepts: signatures, thresholds, floors, expiry, rotation (FAULTS group B).

| row | where |
|---|---|
| B01, B02, B03, B08 | signatures, below; every bit and every cut in test_trust_flips.py |
| B05, B06, B07, B29 | test_envelope.py; another purpose, below |
| B04, B23, B24 | not in FAULTS.md |
| B09, B10, B11, B12 | floors, below |
| B13, B14 | time, below |
| B15, B20, B29 | numbers, paths and sizes of manifests: test_manifest.py; of roots: test_roots.py |
| B16 to B19, B21 | files of a release: test_release_directory.py; signed ones: test_trust_flips.py |
| B22, B25, B26, B27 | roles and policy, below, and test_roots.py |
| B28 | test_trust_state.py |
| B30 | test_trust_golden.py |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hotglm.envelope import ENVELOPE_NAME, MANIFEST_TYPE, ROOTS_TYPE, Envelope, format_envelope, parse_envelope
from hotglm.errors import ArgumentError, ExpiredError, ReplayedError, SignatureError, TrustError
from hotglm.manifest_fields import MAX_SEQUENCE
from hotglm.release.directory import open_release
from hotglm.roots import ALGORITHMS, PublicKey, Roots
from hotglm.trust import judging
from hotglm.trust.keys import SigningKey, load_algorithms
from hotglm.trust.opening import create_trust
from hotglm.trust.policy import Trust
from hotglm.trust.signing import sign_release, write_roots
from support.trusted import START, Host, make_key, make_release, make_role, make_roots, pack_tiny


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def refuse(host: Host, path: Path, error: type[TrustError] = SignatureError, *, slot: str | None = None) -> str:
    """Return the code that a release is refused with; nothing is remembered by that."""
    before = host.state_path.read_bytes()
    with pytest.raises(error) as caught:
        host.offer(path, host.open(slot=slot))
    assert host.state_path.read_bytes() == before
    return caught.value.code


def read_envelope(path: Path) -> Envelope:
    return parse_envelope((path / ENVELOPE_NAME).read_bytes(), payload_type=MANIFEST_TYPE)


def put_envelope(path: Path, envelope: Envelope) -> None:
    (path / ENVELOPE_NAME).write_bytes(format_envelope(envelope))


# -- signatures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_signature_of_each_algorithm_is_accepted(algorithm: str, tmp_path: Path) -> None:
    """A release that the right key signed is accepted, and the answer says who vouches for it."""
    key = make_key("release", algorithm)
    host = Host(tmp_path, make_roots(key, roles={"release": make_role(key)}))
    accepted = host.offer(make_release(tmp_path / "a", key))
    assert (accepted.model, str(accepted.version), accepted.roles) == ("ranker", "1.0.0", ("release",))
    assert accepted.key_ids == (key.public.id,)
    assert accepted.at == START


def test_an_unsigned_release_is_refused(host: Host, tmp_path: Path) -> None:
    """No envelope, a link in its place, or one without signatures: UNSIGNED (B01)."""
    path = pack_tiny(tmp_path / "a")
    assert refuse(host, path) == "UNSIGNED"
    os.symlink(path / "a.txt", path / ENVELOPE_NAME)
    assert refuse(host, path) == "UNSIGNED"
    os.unlink(path / ENVELOPE_NAME)
    with open_release(path) as release:
        put_envelope(path, Envelope(payload_type=MANIFEST_TYPE, payload=release.manifest_bytes))
    assert refuse(host, path) == "UNSIGNED"


def test_the_wrong_key_is_refused_whatever_it_says(host: Host, tmp_path: Path) -> None:
    """A foreign key, under its own id, under that of a trusted key, or under none, is BAD_SIGNATURE (B03)."""
    path = make_release(tmp_path / "a", make_key("stranger"))
    assert refuse(host, path) == "BAD_SIGNATURE"
    (signature,) = read_envelope(path).signatures
    for key_id in (make_key("release").public.id, ""):
        with open_release(path) as release:
            claimed = Envelope(payload_type=MANIFEST_TYPE, payload=release.manifest_bytes)
        put_envelope(path, claimed.with_signature(type(signature)(key_id=key_id, signature=signature.signature)))
        assert refuse(host, path) == "BAD_SIGNATURE"


def test_the_key_id_is_a_hint(host: Host, tmp_path: Path) -> None:
    """A signature that names no key is tried with all; one that names another key than its own does not count."""
    path = make_release(tmp_path / "a")
    envelope = read_envelope(path)
    (signature,) = envelope.signatures
    put_envelope(
        path,
        Envelope(
            payload_type=MANIFEST_TYPE,
            payload=envelope.payload,
            signatures=(type(signature)(key_id=make_key("root").public.id, signature=signature.signature),),
        ),
    )
    assert refuse(host, path) == "BAD_SIGNATURE"
    put_envelope(
        path,
        Envelope(
            payload_type=MANIFEST_TYPE,
            payload=envelope.payload,
            signatures=(type(signature)(key_id="", signature=signature.signature),),
        ),
    )
    host.offer(path)


def test_a_signature_for_another_purpose_is_refused(tmp_path: Path) -> None:
    """What a key signed as roots of trust does not hold as a release: the type is signed, too (B05)."""
    key = make_key("release")
    host = Host(tmp_path)
    path = pack_tiny(tmp_path / "a")
    with open_release(path) as release:
        other = key.sign(Envelope(payload_type=ROOTS_TYPE, payload=release.manifest_bytes))
    put_envelope(path, other)
    assert refuse(host, path) == "WRONG_TYPE"
    put_envelope(path, Envelope(payload_type=MANIFEST_TYPE, payload=other.payload, signatures=other.signatures))
    assert refuse(host, path) == "BAD_SIGNATURE"


def test_a_signature_over_another_manifest_is_refused(host: Host, tmp_path: Path) -> None:
    """A good envelope of one release beside another one does not vouch for that (B16)."""
    first, second = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    (second / ENVELOPE_NAME).write_bytes((first / ENVELOPE_NAME).read_bytes())
    assert refuse(host, second) == "BAD_SIGNATURE"


def test_the_algorithm_is_the_keys(tmp_path: Path) -> None:
    """Roots that give a key another algorithm than its own are refused; nothing in an envelope names one (B08)."""
    spki = make_key("release").public.spki
    wrong = PublicKey(algorithm="rsa-pss-sha256", spki=spki)
    root = make_key("root")
    roots = Roots(
        keys={key.id: key for key in (root.public, wrong)},
        roles={"root": make_role(root), "release": make_role(root)},
    )
    with pytest.raises(TrustError) as caught:
        Host(tmp_path, roots)
    assert caught.value.code == "BAD_KEY"


def test_a_key_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """One key has one id: another encoding of it, which would have another, is no key (B22)."""
    key = make_key("release", "ecdsa-p256-sha256").public
    algorithms, point = load_algorithms(), key.spki[-64:]
    compressed = b"\x30\x39" + key.spki[2:23] + b"\x03\x22\x00" + bytes([2 + point[-1] % 2]) + point[:32]
    assert algorithms.find_public_fault(key.algorithm, key.spki) is None
    assert "encoding" in algorithms.find_public_fault(key.algorithm, compressed)
    assert not algorithms.is_valid(key.algorithm, compressed, signature=b"", message=b"")


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> tuple[Host, list[SigningKey]]:
    """Return a host that asks for two of three keys."""
    all_three = [make_key(name) for name in ("a", "b", "c")]
    return Host(tmp_path, make_roots(*all_three, roles={"release": make_role(*all_three, threshold=2)})), all_three


def test_a_threshold_counts_different_keys(three: tuple[Host, list[SigningKey]], tmp_path: Path) -> None:
    """One key is one, however often it signed, under whatever ids; two of three are enough (B22)."""
    host, (first, second, _) = three
    path = make_release(tmp_path / "r", first)
    assert refuse(host, path) == "THRESHOLD_NOT_MET"
    envelope = read_envelope(path)
    (signature,) = envelope.signatures
    hints = [signature.key_id] * 9, ["", signature.key_id], ["", ""], [signature.key_id, second.public.id]
    for key_ids in hints:
        copies = tuple(type(signature)(key_id=key_id, signature=signature.signature) for key_id in key_ids)
        put_envelope(path, Envelope(payload_type=MANIFEST_TYPE, payload=envelope.payload, signatures=copies))
        assert refuse(host, path) == "THRESHOLD_NOT_MET"
    sign_release(path, second)
    assert host.offer(path).key_ids == tuple(sorted([first.public.id, second.public.id]))


def test_randomised_signatures_of_one_key_count_once(tmp_path: Path) -> None:
    """Different valid signatures of one key (ECDSA has many) are one key (B22)."""
    key, other = make_key("release", "ecdsa-p256-sha256"), make_key("a")
    host = Host(tmp_path, make_roots(key, other, roles={"release": make_role(key, other, threshold=2)}))
    path = pack_tiny(tmp_path / "r")
    with open_release(path) as release:
        bare = Envelope(payload_type=MANIFEST_TYPE, payload=release.manifest_bytes)
    several = tuple(key.sign(bare).signatures[0] for _ in range(6))
    assert len(set(several)) == 6
    put_envelope(path, Envelope(payload_type=MANIFEST_TYPE, payload=bare.payload, signatures=several))
    assert refuse(host, path) == "THRESHOLD_NOT_MET"


def test_bad_signatures_beside_good_ones_do_not_matter(host: Host, tmp_path: Path) -> None:
    """Signatures of strangers are passed over."""
    host.offer(make_release(tmp_path / "a", make_key("stranger"), make_key("release")))


def test_a_key_without_a_role_is_named(host: Host, tmp_path: Path) -> None:
    """The root key, or one that stands in no role, has no say about releases: KEY_NOT_ALLOWED (B25)."""
    assert refuse(host, make_release(tmp_path / "a", make_key("root"))) == "KEY_NOT_ALLOWED"


def test_a_key_for_one_slot_is_refused_in_another(tmp_path: Path) -> None:
    """Who may sign for one slot or model may not for another, whatever was answered before (B25)."""
    key = make_key("team")
    host = Host(tmp_path, make_roots(key, roles={"team": make_role(key, models=["ranker"], slots=["one"])}))
    path = make_release(tmp_path / "a", key)
    trust = host.open()
    with open_release(path) as release:
        for _ in range(2):
            accepted = trust.for_slot("one").verify(release)
            assert accepted.slot == "one"
            for slot in ("two", None):
                with pytest.raises(SignatureError) as caught:
                    (trust if slot is None else trust.for_slot(slot)).verify(release)
                assert caught.value.code == "KEY_NOT_ALLOWED"
            trust.for_slot("one").accept(accepted)
    other = make_release(tmp_path / "b", key, model="other")
    assert refuse(host, other, slot="one") == "KEY_NOT_ALLOWED"


def test_slots_remember_for_themselves(host: Host, tmp_path: Path) -> None:
    """What one slot accepted is no floor of another slot, or of another model."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    host.offer(new, host.open(slot="one"))
    host.offer(old, host.open(slot="two"))
    host.offer(make_release(tmp_path / "c", model="other"), host.open(slot="one"))
    assert refuse(host, old, ReplayedError, slot="one") == "VERSION_ROLLBACK"


def test_there_is_one_attempt(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is final: signatures are judged once, and nothing laxer is tried after it (B27)."""
    calls: list[object] = []
    path = make_release(tmp_path / "a", make_key("stranger"))
    trust = host.open()

    def judge(*args: object, **kwargs: object) -> tuple[str, ...]:
        calls.append(args)
        return judging.judge_signers(*args, **kwargs)  # type: ignore[arg-type]  # what it was given

    monkeypatch.setattr("hotglm.trust.policy.judge_signers", judge)
    with open_release(path) as release, pytest.raises(SignatureError):
        trust.verify(release)
    assert len(calls) == 1


# -- floors ------------------------------------------------------------------------------------------------------------


def test_an_older_version_is_refused(host: Host, tmp_path: Path) -> None:
    """After 1.1.0 has been accepted, 1.0.0 is old news, and the refusal names the floor (B09)."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    host.offer(old)
    host.offer(new)
    with open_release(old) as release, pytest.raises(ReplayedError) as caught:
        host.open().verify(release)
    (problem,) = caught.value.problems
    assert (problem.code, problem.expected, problem.found) == ("VERSION_ROLLBACK", "1.1.0", "1.0.0")


def test_a_smaller_number_is_refused(host: Host, tmp_path: Path) -> None:
    """A newer version under a smaller number of the store is old news, too (B09)."""
    host.offer(make_release(tmp_path / "a", sequence=7))
    assert refuse(host, make_release(tmp_path / "b", version="1.1.0", sequence=6), ReplayedError) == "SEQUENCE_ROLLBACK"
    host.offer(make_release(tmp_path / "c", version="1.1.0", sequence=7))


def test_judging_alone_is_no_floor(host: Host, tmp_path: Path) -> None:
    """Only what is remembered as accepted refuses others: a release that was looked at and failed later does not."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    with open_release(new) as release:
        host.open().verify(release)
    host.offer(old)


def test_a_version_means_the_same_for_ever(host: Host, tmp_path: Path) -> None:
    """Another content under a version that was accepted is refused, and both digests are named (B10)."""
    first = host.offer(make_release(tmp_path / "a"))
    path = make_release(tmp_path / "b", sequence=2)
    with open_release(path) as release, pytest.raises(ReplayedError) as caught:
        host.open().verify(release)
    (problem,) = caught.value.problems
    assert (problem.code, problem.expected) == ("VERSION_REUSED", first.digest)
    assert problem.found not in (None, first.digest)


def test_the_same_again_is_no_news(host: Host, tmp_path: Path) -> None:
    """The newest release again is accepted, and nothing is written (B11)."""
    path = make_release(tmp_path / "a")
    host.offer(path)
    before = host.state_path.stat().st_mtime_ns, host.state_path.stat().st_ino
    host.clock.move(days=1)
    host.offer(path)
    assert (host.state_path.stat().st_mtime_ns, host.state_path.stat().st_ino) == before


@pytest.mark.parametrize(
    "more", [{"sequence": MAX_SEQUENCE, "version": "1.1.0"}, {"version": "9000000.0"}, {"version": "2000000!1.0"}]
)
def test_a_leap_is_refused(more: dict[str, object], host: Host, tmp_path: Path) -> None:
    """A number that leaps so far that no honest one could follow is refused; how far is the host's to say (B12)."""
    host.offer(make_release(tmp_path / "a"))
    path = make_release(tmp_path / "b", **more)
    assert refuse(host, path, ReplayedError) == "JUMP_TOO_LARGE"
    host.offer(path, host.open(max_jump=2**60))


def test_a_first_leap_is_refused_too(host: Host, tmp_path: Path) -> None:
    """Before anything was accepted the number is counted from 0 (B12)."""
    path = make_release(tmp_path / "a", sequence=MAX_SEQUENCE)
    assert refuse(host, path, ReplayedError) == "JUMP_TOO_LARGE"


def test_a_floor_is_lowered_with_a_reason(host: Host, tmp_path: Path) -> None:
    """An operator may let older releases in again; the journal keeps when, what and why."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    host.offer(old)
    host.offer(new)
    trust = host.open()
    with pytest.raises(ArgumentError):
        trust.lower("ranker", "1.0.0", reason=" ")
    assert trust.lower("other", None, reason="nothing there") == 0
    assert trust.lower("ranker", "1.0.0", reason="1.1.0 forgets users") == 1
    host.offer(old)
    entry = host.open().read()[0].journal[0]
    assert (entry.reason, entry.at) == ("1.1.0 forgets users", START.isoformat())
    assert "1.0.0" in entry.what
    host.offer(new)
    assert trust.lower("ranker", None, reason="all of it") == 2


def test_another_process_may_have_been_faster(host: Host, tmp_path: Path) -> None:
    """What was judged is judged again when it is remembered: by then a newer one may have been accepted."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    slow, fast = host.open(), host.open()
    with open_release(old) as release:
        judged = slow.verify(release)
    host.offer(new, fast)
    with pytest.raises(ReplayedError) as caught:
        slow.accept(judged)
    assert caught.value.code == "VERSION_ROLLBACK"


# -- the confirmed one -------------------------------------------------------------------------------------------------


def test_a_restart_comes_back_to_what_was_confirmed(host: Host, tmp_path: Path) -> None:
    """The release that was confirmed last is accepted whatever was accepted after it, and when it has expired."""
    path = make_release(tmp_path / "a", expires_at=START + timedelta(days=1))
    trust = host.open()
    trust.confirm(host.offer(path))
    host.offer(make_release(tmp_path / "b", version="1.1.0"))
    host.clock.move(days=2)
    accepted = host.offer(path)
    assert accepted.is_confirmed
    state = trust.read()[0]
    assert str(state.find_record(slot=None, model="ranker").floor_version) == "1.1.0"
    trust.confirm(host.offer(make_release(tmp_path / "c", version="1.2.0")))
    assert refuse(host, path, ReplayedError) == "VERSION_ROLLBACK"


def test_the_confirmed_one_must_still_be_signed(host: Host, tmp_path: Path) -> None:
    """Its signatures are judged by the roots of today: a revoked key vouches for nothing."""
    path = make_release(tmp_path / "a")
    host.open().confirm(host.offer(path))
    new = make_key("new")
    host.put_roots(make_roots(new, roles={"release": make_role(new)}, version=2), make_key("root"))
    host.open()
    assert refuse(host, path) == "KEY_NOT_ALLOWED"
    sign_release(path, new)
    assert host.offer(path).is_confirmed


def test_the_confirmed_one_is_a_floor_again_when_all_was_forgotten(host: Host, tmp_path: Path) -> None:
    """After a rotation that forgot everything, the confirmed release seeds the floor when it is staged again."""
    old, new = make_key("release"), make_key("new")
    path = make_release(tmp_path / "a", old, version="1.1.0")
    host.open().confirm(host.offer(path))
    host.put_roots(make_roots(new, roles={"release": make_role(new)}, version=2), make_key("root"))
    sign_release(path, new)
    assert host.offer(path).is_confirmed
    assert refuse(host, make_release(tmp_path / "b", new), ReplayedError) == "VERSION_ROLLBACK"


def test_what_new_keys_have_signed_too_outlives_a_rotation(host: Host, tmp_path: Path) -> None:
    """A release that is signed again and accepted again keeps the floor when its first keys are rotated away."""
    old, new = make_key("release"), make_key("new")
    path = make_release(tmp_path / "a", old, version="1.1.0")
    host.offer(path)
    host.put_roots(make_roots(old, new, roles={"release": make_role(old, new)}, version=2), make_key("root"))
    sign_release(path, new)
    host.offer(path)
    host.put_roots(make_roots(new, roles={"release": make_role(new)}, version=3), make_key("root"))
    host.open()
    assert refuse(host, make_release(tmp_path / "b", new), ReplayedError) == "VERSION_ROLLBACK"
    host.offer(path)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "code"), [(-1, None), (0, "EXPIRED"), (1, "EXPIRED")])
def test_an_expired_release_is_refused(seconds: int, code: str | None, host: Host, tmp_path: Path) -> None:
    """From the instant of its expiry on a release is not taken for new (B13)."""
    path = make_release(tmp_path / "a", expires_at=START + timedelta(days=1))
    host.clock.move(days=1, seconds=seconds)
    if code is None:
        host.offer(path)
    else:
        assert refuse(host, path, ExpiredError) == code


def test_expired_roots_accept_nothing_new(tmp_path: Path) -> None:
    """Roots that expired refuse what is new, not what was confirmed (B13)."""
    host = Host(tmp_path, make_roots(expires_at=START + timedelta(days=1)))
    path = make_release(tmp_path / "a")
    host.open().confirm(host.offer(path))
    host.clock.move(days=1)
    assert host.offer(path).is_confirmed
    assert refuse(host, make_release(tmp_path / "b", version="1.1.0"), ExpiredError) == "ROOTS_EXPIRED"


def test_one_instant_decides(tmp_path: Path) -> None:
    """The clock is asked once for each judgement, so that it cannot jump between two questions (B14)."""
    host = Host(tmp_path)
    path = make_release(tmp_path / "a", expires_at=START + timedelta(days=1))
    times = iter([START, START + timedelta(days=9)])
    trust = Trust(roots_path=str(host.roots_path), state_path=str(host.state_path), clock=lambda: next(times))
    with open_release(path) as release:
        assert trust.verify(release).at == START
        assert trust.verify(release, now=START + timedelta(hours=1)).at == START + timedelta(hours=1)
        with pytest.raises(ExpiredError):
            trust.verify(release, now=START + timedelta(days=2))
        with pytest.raises(ArgumentError):
            trust.verify(release, now=datetime(2026, 11, 20))  # noqa: DTZ001 - it is refused


def test_old_news_comes_before_expiry(host: Host, tmp_path: Path) -> None:
    """An old release that is played back after it expired is reported as played back."""
    old = make_release(tmp_path / "a", expires_at=START + timedelta(days=1))
    host.offer(old)
    host.offer(make_release(tmp_path / "b", version="1.1.0"))
    host.clock.move(days=2)
    assert refuse(host, old, ReplayedError) == "VERSION_ROLLBACK"


def test_how_stale_it_is_can_be_seen(host: Host, tmp_path: Path) -> None:
    """When something was accepted last is remembered: updates that never arrive can be alerted on (B13)."""
    host.offer(make_release(tmp_path / "a"))
    host.clock.move(days=30)
    record = host.open().read()[0].find_record(slot=None, model="ranker")
    assert host.clock.now - datetime.fromisoformat(record.accepted[0].at) == timedelta(days=30)


# -- rotation ----------------------------------------------------------------------------------------------------------


def next_roots(*others: SigningKey, version: int = 2) -> Roots:
    return make_roots(*others, version=version, roles={"release": make_role(*others)})


def test_new_roots_are_taken_when_old_and_new_have_signed(host: Host, tmp_path: Path) -> None:
    """A running process takes the next roots from the file, with the next question."""
    trust, key = host.open(), make_key("new")
    path = make_release(tmp_path / "a", key)
    with open_release(path) as release, pytest.raises(SignatureError):
        trust.verify(release)
    host.put_roots(next_roots(key), make_key("root"))
    with open_release(path) as release:
        assert trust.verify(release).roots_version == 2
    state, roots = trust.read()
    assert roots.version == 2
    assert "version 1 to 2" in state.journal[0].what


def new_root(version: int = 2) -> Roots:
    """Return roots whose `root` role has another key."""
    key = make_key("root2")
    return Roots(
        version=version,
        keys={one.public.id: one.public for one in (key, make_key("release"))},
        roles={"root": make_role(key), "release": make_role(make_key("release"))},
    )


@pytest.mark.parametrize(
    ("make", "signers", "error", "code"),
    [
        (next_roots, (), SignatureError, "UNSIGNED"),
        (next_roots, ("stranger",), SignatureError, "BAD_SIGNATURE"),
        (next_roots, ("release",), SignatureError, "BAD_SIGNATURE"),
        (new_root, ("root",), SignatureError, "BAD_SIGNATURE"),  # not by the new one
        (new_root, ("root2",), SignatureError, "BAD_SIGNATURE"),  # not by the old one
        (lambda *_: make_roots(version=3), ("root",), ReplayedError, "ROOTS_SKIPPED"),
        (lambda *_: make_roots(make_key("a"), version=1), ("root",), ReplayedError, "ROOTS_REUSED"),
    ],
)
def test_other_roots_are_refused(
    make: Callable[..., Roots],
    signers: tuple[str, ...],
    error: type[TrustError],
    code: str,
    host: Host,
    tmp_path: Path,
) -> None:
    """Roots that the old or the new role has not signed, or of another version than the next, refuse everything."""
    roots = make(make_key("new")) if make is next_roots else make()
    path = make_release(tmp_path / "a")
    good = host.roots_path.read_bytes()
    host.put_roots(roots, *(make_key(name) for name in signers))
    with pytest.raises(error) as caught:
        host.open()
    assert code in {problem.code for problem in caught.value.problems}
    host.roots_path.write_bytes(good)
    host.offer(path)


def test_the_root_key_itself_can_be_rotated(host: Host) -> None:
    """Signed by the old root key and the new one, roots with another root key are taken; the old one is out then."""
    host.put_roots(new_root(), make_key("root"), make_key("root2"))
    assert host.open().read()[1].version == 2
    host.put_roots(make_roots(version=3), make_key("root"))
    with pytest.raises(SignatureError):
        host.open()


def test_old_roots_do_not_come_back(host: Host) -> None:
    """Once the next roots were taken, the old file is refused (a rollback of the roots themselves)."""
    old = host.roots_path.read_bytes()
    host.put_roots(new_root(), make_key("root"), make_key("root2"))
    host.open()
    host.roots_path.write_bytes(old)
    with pytest.raises(ReplayedError) as caught:
        host.open()
    assert caught.value.code == "ROOTS_ROLLBACK"


def test_a_memory_that_lags_does_not_bring_old_roots_back(host: Host, tmp_path: Path) -> None:
    """Two memories share a roots file: one that takes a version that the other has left leaves the newer file there."""
    create_trust(host.roots_path, state=tmp_path / "other.json", clock=host.clock)
    paths = []
    for version in (2, 3):
        paths.append(tmp_path / f"roots-{version}.json")
        write_roots(paths[-1], make_roots(version=version), keys=(make_key("root"),))
    assert host.open().rotate(*paths).version == 3
    lagging = Trust(roots_path=str(host.roots_path), state_path=str(tmp_path / "other.json"), clock=host.clock)
    assert lagging.rotate(paths[0]).version == 3
    assert host.open().read()[1].version == 3


def test_a_host_that_missed_some_takes_them_in_order(host: Host, tmp_path: Path) -> None:
    """`rotate` takes several versions one after the other, and puts the last where the roots are."""
    paths = []
    for version in (2, 3):
        paths.append(tmp_path / f"roots-{version}.json")
        write_roots(paths[-1], make_roots(version=version), keys=(make_key("root"),))
    trust = host.open()
    with pytest.raises(ReplayedError):
        trust.rotate(paths[1])
    assert trust.rotate(*paths).version == 3
    assert host.roots_path.read_bytes() == paths[1].read_bytes()
    assert host.open().read()[1].version == 3


def test_a_floor_that_a_stolen_key_raised_falls_with_it(host: Host, tmp_path: Path) -> None:
    """Releases that a revoked key had signed are forgotten with the next roots, so that honest ones follow (B12)."""
    trust = host.open(max_jump=2**60)
    honest = make_release(tmp_path / "a", make_key("release"), make_key("new"))
    host.offer(honest, trust)
    host.offer(make_release(tmp_path / "evil", version="1.1.0", sequence=MAX_SEQUENCE), trust)
    follower = make_release(tmp_path / "b", make_key("new"), version="1.0.1", sequence=2)
    host.put_roots(
        make_roots(make_key("new"), roles={"release": make_role(make_key("new"))}, version=2), make_key("root")
    )
    host.offer(follower)


def test_one_signature_more_leaves_the_roots_as_they_are(host: Host) -> None:
    """The same roots with other signatures are the same roots: nothing is forgotten, nothing is a new version."""
    host.put_roots(make_roots(), make_key("root"), make_key("release"))
    state, roots = host.open().read()
    assert roots.version == 1
    assert len(state.journal) == 1


def test_expired_roots_may_name_the_next_ones(tmp_path: Path) -> None:
    """Whoever renewed the roots too late can still renew them."""
    host = Host(tmp_path, make_roots(expires_at=START + timedelta(days=1)))
    host.clock.move(days=2)
    host.put_roots(make_roots(version=2, expires_at=START + timedelta(days=100)), make_key("root"))
    host.offer(make_release(tmp_path / "a"))
    assert host.open().read()[1].expires_at == datetime(2027, 2, 28, 12, tzinfo=UTC)
