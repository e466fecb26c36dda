"""Slots, stores and packing with a trust: only accepted releases go live, and what served serves on (FAULTS B, K15)."""

from __future__ import annotations

import copy
import hashlib
import pickle
import shutil
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from torch import nn

import hotglm
from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import HotglmError
from hotglm.events import (
    DigestMismatchEvent,
    Event,
    ExpiredEvent,
    RefusedEvent,
    ReplayedEvent,
    SignatureRefusedEvent,
)
from hotglm.release.packing import ReleaseDetails
from hotglm.trust import signing
from support.trusted import START, Clock, Host, Tiny, make_key, make_release, make_role, make_roots, pack_tiny

PASSPHRASE = "between us"


class World:
    """A host, a slot that believes what the host does, and what it announced."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = Host(directory)
        self.trust = self.host.open()
        self.slot = self.start()

    def start(self) -> hotglm.ModuleSlot:
        """Return a slot as a process that starts has it."""
        slot = hotglm.ModuleSlot(Tiny(), name="ranker", version="0.9.0", accept="major", trust=self.trust)
        self.events: list[Event] = []
        slot.subscribe(self.events.append)
        return slot

    def refuse(self, path: Path, error: type[HotglmError], event: type[Event]) -> HotglmError:
        """Stage what is refused; then the live generation still serves, bit for bit, and nothing was remembered."""
        before, memory = self.slot(), self.host.state_path.read_bytes()
        with pytest.raises(error) as caught:
            self.slot.update(path)
        assert torch.equal(self.slot(), before)
        assert [type(one) for one in self.events if isinstance(one, RefusedEvent)] == [event]
        assert self.host.state_path.read_bytes() == memory
        self.events.clear()
        return caught.value


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_signed_release_goes_live(world: World, tmp_path: Path) -> None:
    """What trust accepts is staged and committed, and the proof stays with the generation."""
    world.slot.update(make_release(tmp_path / "a"))
    assert str(world.slot.version) == "1.0.0"
    accepted = world.slot.live.accepted
    assert accepted is not None
    assert (accepted.slot, accepted.roles) == ("ranker", ("release",))


def test_each_outcome_has_its_error_and_its_event(world: World, tmp_path: Path) -> None:
    """Unsigned, damaged, expired, played back: each refused by its own error, announced by its own event."""
    good = make_release(tmp_path / "a", version="1.1.0")
    world.slot.update(good)
    world.events.clear()
    world.refuse(pack_tiny(tmp_path / "b", version="2.0.0"), hotglm.SignatureError, SignatureRefusedEvent)
    world.refuse(make_release(tmp_path / "c"), hotglm.ReplayedError, ReplayedEvent)
    expired = make_release(tmp_path / "d", version="2.0.0", expires_at=START - timedelta(days=1))
    world.refuse(expired, hotglm.ExpiredError, ExpiredEvent)
    damaged = make_release(tmp_path / "e", version="2.0.0")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    world.refuse(damaged, hotglm.DigestMismatchError, DigestMismatchEvent)
    assert issubclass(ReplayedEvent, RefusedEvent)


def test_a_damaged_memory_refuses_every_release(world: World, tmp_path: Path) -> None:
    """While what is remembered cannot be used, nothing is staged (B28)."""
    world.host.state_path.write_bytes(b"")
    world.refuse(make_release(tmp_path / "a"), hotglm.TrustStateError, RefusedEvent)


def test_only_releases_can_be_trusted(world: World, tmp_path: Path) -> None:
    """A plain file or directory cannot be signed and is refused; mappings and modules are the host's own."""
    source = tmp_path / "a.source"
    pack_tiny(tmp_path / "a")
    for path in (source, source / "model.safetensors", tmp_path / "missing"):
        error = world.refuse(path, hotglm.SignatureError, SignatureRefusedEvent)
        assert error.code == "UNSIGNED"
    world.slot.update({"w": torch.ones(2)}, version="1.0.0")
    assert world.slot.live.accepted is None


def test_nothing_is_read_before_it_is_trusted(world: World, tmp_path: Path) -> None:
    """Beside manifest and signatures no file of a refused release is opened."""
    path = pack_tiny(tmp_path / "a")
    for file in path.iterdir():
        if not file.name.startswith("hotglm-manifest."):
            size = file.stat().st_size
            file.write_bytes(bytes(size))  # no header, no text
    world.refuse(path, hotglm.SignatureError, SignatureRefusedEvent)


def test_digests_of_the_caller_do_not_stand_for_those_that_were_signed(world: World, tmp_path: Path) -> None:
    """Bytes that were changed in a signed release are refused, though the caller's own digests are those of them."""
    path, before = make_release(tmp_path / "a"), world.slot()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")
    digest = f"sha256:{hashlib.sha256(weights.read_bytes()[-8:]).hexdigest()}"
    with pytest.raises(hotglm.DigestMismatchError):
        world.slot.update(path, digests={"w": digest})
    assert torch.equal(world.slot(), before)


def test_what_was_verified_is_what_is_used(world: World, tmp_path: Path) -> None:
    """A manifest that is swapped after the release was opened changes nothing (no second read, B06)."""
    good, other = make_release(tmp_path / "a"), pack_tiny(tmp_path / "b", version="9.9.9")
    from_disk = type(world.trust).verify

    def swap_then_verify(self: hotglm.Trust, release: hotglm.Release, **more: object) -> hotglm.Accepted:
        (good / "hotglm-manifest.json").write_bytes((other / "hotglm-manifest.json").read_bytes())
        return from_disk(self, release)

    with mock.patch.object(hotglm.Trust, "verify", swap_then_verify):
        world.slot.update(good)
    assert str(world.slot.version) == "1.0.0"
    world.refuse(good, hotglm.SignatureError, SignatureRefusedEvent)


def test_the_floor_is_raised_by_what_stands_proved(world: World, tmp_path: Path) -> None:
    """A release that fails its checks is no floor; one that is staged is, committed or not."""
    old, new = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")

    def refuse_all(module: nn.Module) -> bool:
        return False

    with pytest.raises(hotglm.CheckError):
        world.slot.stage(new, policy=hotglm.StagePolicy(checks=(refuse_all,)))
    world.slot.stage(old).discard()
    world.slot.stage(new).discard()
    world.events.clear()
    world.refuse(old, hotglm.ReplayedError, ReplayedEvent)


def test_what_cannot_be_remembered_is_not_staged(world: World, tmp_path: Path) -> None:
    """A stage whose floor cannot be written fails, and the next one works."""
    path = make_release(tmp_path / "a")
    with mock.patch("hotglm.trust.files.replace_whole", side_effect=hotglm.StoreWriteError("full")):
        world.refuse(path, hotglm.TrustStateError, RefusedEvent)
    world.slot.update(path)


def test_a_restart_comes_back_to_what_was_confirmed(world: World, tmp_path: Path) -> None:
    """After `confirm` a new process stages that release again, though a newer one was tried and it has expired."""
    good = make_release(tmp_path / "a", expires_at=START + timedelta(days=1))
    world.slot.update(good)
    assert world.slot.confirm()
    world.slot.update(make_release(tmp_path / "b", version="1.1.0"))
    world.host.clock.move(days=30)
    world.slot = world.start()
    world.slot.update(good)
    assert str(world.slot.version) == "1.0.0"
    unconfirmed = make_release(tmp_path / "c", version="1.0.5")
    world.events.clear()
    world.refuse(unconfirmed, hotglm.ReplayedError, ReplayedEvent)


def test_a_confirmation_that_cannot_be_written_is_tried_again(world: World, tmp_path: Path) -> None:
    """`confirm` says that it could not be remembered; called again, it remembers."""
    world.slot.update(make_release(tmp_path / "a"))
    with (
        mock.patch("hotglm.trust.files.replace_whole", side_effect=hotglm.StoreWriteError("full")),
        pytest.raises(hotglm.TrustStateError),
    ):
        world.slot.confirm()
    assert not world.slot.confirm()
    record = world.trust.read()[0].find_record(slot="ranker", model="ranker")
    assert record.confirmed is not None
    assert record.confirmed.version == "1.0.0"


def test_rollback_in_memory_asks_nobody(world: World, tmp_path: Path) -> None:
    """Going back to a generation that is held needs no release, and a confirmation then means that one."""
    world.slot.update(make_release(tmp_path / "a"))
    world.slot.update(make_release(tmp_path / "b", version="1.1.0"))
    world.slot.rollback()
    world.slot.confirm()
    record = world.trust.read()[0].find_record(slot="ranker", model="ranker")
    assert record.confirmed is not None
    assert record.confirmed.version == "1.0.0"


def test_a_slot_asks_in_its_own_name(tmp_path: Path) -> None:
    """A role for one slot opens that slot alone, though both were given the same trust (B25)."""
    host = Host(tmp_path, make_roots(roles={"team": make_role(make_key("release"), slots=["one"])}))
    path, trust = make_release(tmp_path / "a", model="m"), host.open()
    slots = [
        hotglm.ModuleSlot(Tiny(), name=name, version="0.9.0", accept="major", trust=trust) for name in ("one", "m")
    ]
    with pytest.raises(hotglm.SignatureError) as caught:
        slots[1].update(path)
    assert caught.value.code == "KEY_NOT_ALLOWED"
    with pytest.raises(hotglm.IncompatibleError):  # trusted; the verdict minds the name
        slots[0].update(path)


def test_a_copied_slot_keeps_its_trust(tmp_path: Path) -> None:
    """A deep copy or a pickle of a slot asks the same trust."""
    host = Host(tmp_path)
    trust = hotglm.open_trust(host.roots_path, state=host.state_path)
    slot = hotglm.ModuleSlot(Tiny(), name="ranker", version="0.9.0", accept="major", trust=trust)
    path = pack_tiny(tmp_path / "a")
    for other in (copy.deepcopy(slot), pickle.loads(pickle.dumps(slot))):
        with pytest.raises(hotglm.SignatureError):
            other.update(path)


def test_a_trust_is_what_open_trust_returns(tmp_path: Path) -> None:
    """Something else is refused when the slot is made."""
    with pytest.raises(hotglm.ArgumentError):
        hotglm.ModuleSlot(Tiny(), trust="roots.json")  # type: ignore[arg-type]  # that is the point


# -- deltas ------------------------------------------------------------------------------------------------------------


def test_a_delta_is_signed_like_a_full_release(world: World, tmp_path: Path) -> None:
    """A delta is accepted by its own signatures; its base, which nobody signed, is bound by digests alone."""
    key = make_key("release")
    base, new = pack_tiny(tmp_path / "a"), pack_tiny(tmp_path / "b", version="1.1.0")
    world.slot.update(make_release(tmp_path / "first", version="0.9.5"))
    hotglm.make_delta(base, new, tmp_path / "unsigned").close()
    world.refuse(tmp_path / "unsigned", hotglm.SignatureError, SignatureRefusedEvent)
    hotglm.make_delta(base, new, tmp_path / "signed", signing_key=key).close()
    world.slot.update(tmp_path / "signed")
    assert str(world.slot.version) == "1.1.0"
    hotglm.sign_release(new, key)
    world.slot.update(new)  # in full: the same result under the same version is no news
    (base / "a.txt").write_text("siDe")
    world.slot.update(tmp_path / "signed")


def test_a_delta_on_another_base_is_refused(world: World, tmp_path: Path) -> None:
    """A base that was changed behind a signed delta is found out by the digests that the delta was signed with."""

    def pack_filled(name: str, number: float, version: str) -> Path:
        file = tmp_path / f"{name}.safetensors"
        hotglm.save_weights({"w": torch.full((2,), number)}, file, name="ranker", version=version)
        hotglm.pack(file, tmp_path / name).close()
        return tmp_path / name

    base, new = pack_filled("a", 1.0, "1.0.0"), pack_filled("b", 1.0, "1.1.0")
    hotglm.make_delta(base, new, tmp_path / "delta", signing_key=make_key("release")).close()
    kept = tmp_path / "elsewhere" / "a"
    kept.parent.mkdir()
    base.rename(kept)
    shutil.rmtree(new)
    evil = pack_filled("a.evil", 6.0, "1.0.0")
    evil.rename(base)
    world.refuse(tmp_path / "delta", hotglm.DeltaError, RefusedEvent)
    shutil.rmtree(base)
    kept.rename(base)
    world.slot.update(tmp_path / "delta")
    assert world.slot().tolist() == [1.0, 1.0]


def test_a_published_delta_is_signed(tmp_path: Path) -> None:
    """`publish_delta` signs what it publishes, as a delta and in full."""
    trust = Host(tmp_path).open()
    store = hotglm.open_store(tmp_path / "store", creates=True)
    for version in ("1.0.0", "1.1.0"):
        pack_tiny(tmp_path / version, version=version)
        hotglm.publish_delta(
            store,
            tmp_path / f"{version}.source",
            name="ranker",
            version=version,
            details=ReleaseDetails(signing_key=make_key("release")),
            policy=hotglm.DeltaPolicy(max_ratio=1.0),
        )
        with store.open_release(version) as release:
            trust.accept(trust.verify(release))


# -- stores and packing ------------------------------------------------------------------------------------------------


def test_a_release_is_signed_before_it_appears(tmp_path: Path) -> None:
    """`pack` and `publish` with a signing key: packed, in place and in a store, the signature is there and holds."""
    host, details = Host(tmp_path), ReleaseDetails(signing_key=make_key("release"))
    names = {"name": "ranker", "version": "1.0.0"}
    pack_tiny(tmp_path / "x")
    source = tmp_path / "x.source"
    store = hotglm.open_store(tmp_path / "store", creates=True)
    stored = store.publish(source, name="ranker", version="1.0.0", details=details)
    trust = host.open()
    for release in (
        store.open_release("1.0.0"),
        hotglm.pack(source, tmp_path / "copied", details=details, **names),  # type: ignore[arg-type]
        hotglm.pack(source, details=details, **names),  # type: ignore[arg-type]
    ):
        with release:
            assert trust.verify(release).roles == ("release",)
    assert (Path(stored.path) / ENVELOPE_NAME).stat().st_mode & 0o222 == 0


def test_a_label_moves_only_to_what_trust_accepts(tmp_path: Path) -> None:
    """With a trust, a label stays where it is until the release is signed; then it moves."""
    trust = Host(tmp_path).open()
    store = hotglm.open_store(tmp_path / "store", creates=True)
    pack_tiny(tmp_path / "x")
    stored = store.publish(tmp_path / "x.source", name="ranker", version="1.0.0")
    with pytest.raises(hotglm.SignatureError):
        store.move_label("stable", "1.0.0", trust=trust)
    assert store.read_labels() == {}
    hotglm.sign_release(stored.path, make_key("release"))
    assert store.move_label("stable", "1.0.0", trust=trust).release.version == "1.0.0"
    assert trust.read()[0].records == ()


def test_two_who_sign_at_once_lose_no_signature(tmp_path: Path) -> None:
    """Several signers of one release at the same time: all signatures are there."""
    path = pack_tiny(tmp_path / "a")
    keys = [make_key(f"signer-{number}") for number in range(6)]
    barrier = threading.Barrier(len(keys))

    def sign(key: hotglm.SigningKey) -> None:
        barrier.wait(timeout=30)
        hotglm.sign_release(path, key)

    threads = [threading.Thread(target=sign, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert hotglm.sign_release(path, keys[0]) == len(keys)


def test_signing_without_the_lock_loses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: without the lock, a signer that comes between reading and writing is lost (a test of the test above)."""
    path, late = pack_tiny(tmp_path / "a"), make_key("late")
    monkeypatch.setattr(signing, "try_exclusively", lambda path: signing.os.open("/dev/null", 0))  # type: ignore[attr-defined]
    write = signing._write
    done: list[bool] = []

    def write_late(target: str, envelope: object) -> int:
        if not done:
            done.append(True)
            hotglm.sign_release(path, late)
        return write(target, envelope)  # type: ignore[arg-type]

    monkeypatch.setattr(signing, "_write", write_late)
    hotglm.sign_release(path, make_key("release"))
    assert hotglm.sign_release(path, make_key("release")) == 1


def test_only_what_was_verified_is_signed(tmp_path: Path) -> None:
    """A release with a flipped bit is not signed."""
    path = pack_tiny(tmp_path / "a")
    (path / "a.txt").write_text("siDe")
    with pytest.raises(hotglm.DigestMismatchError):
        hotglm.sign_release(path, make_key("release"))
    assert not (path / ENVELOPE_NAME).exists()


def test_signatures_of_other_bytes_are_dropped(tmp_path: Path) -> None:
    """An envelope of another manifest in its place gives way to a fresh one; one that is broken is not overwritten."""
    first, second = make_release(tmp_path / "a"), make_release(tmp_path / "b", version="1.1.0")
    (second / ENVELOPE_NAME).write_bytes((first / ENVELOPE_NAME).read_bytes())
    assert hotglm.sign_release(second, make_key("a")) == 1
    (second / ENVELOPE_NAME).write_bytes(b"{}\n")
    with pytest.raises(hotglm.SignatureError):
        hotglm.sign_release(second, make_key("a"))


def test_keys_are_kept_with_care(tmp_path: Path) -> None:
    """A private key is readable for its owner alone, never overwritten, and needs its passphrase."""
    path = tmp_path / "key.pem"
    key = hotglm.SigningKey.create(path, passphrase=PASSPHRASE)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in path.read_bytes()
    with pytest.raises(hotglm.StoreWriteError):
        hotglm.SigningKey.create(path)
    for passphrase in (None, "other"):
        with pytest.raises(hotglm.ArgumentError) as caught:
            hotglm.SigningKey.read(path, passphrase=passphrase)
        assert caught.value.code == "BAD_KEY"
    assert hotglm.SigningKey.read(path, passphrase=PASSPHRASE).public == key.public
    hotglm.write_public_key(tmp_path / "key.pub", key.public)
    assert hotglm.read_public_key(tmp_path / "key.pub") == key.public
    assert PASSPHRASE not in repr(key)


def test_other_keys_are_refused(tmp_path: Path) -> None:
    """Keys of other kinds and sizes, and files that are none, are BAD_KEY."""
    encoding, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    plain, spki = serialization.NoEncryption(), serialization.PublicFormat.SubjectPublicKeyInfo
    others: list[Any] = [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=1024),  # noqa: S505 - it is refused
        x25519.X25519PrivateKey.generate(),
    ]
    for key in others:
        (tmp_path / "key").write_bytes(key.private_bytes(encoding, pkcs8, plain))
        with pytest.raises(hotglm.ArgumentError):
            hotglm.SigningKey.read(tmp_path / "key")
        (tmp_path / "pub").write_bytes(key.public_key().public_bytes(encoding, spki))
        with pytest.raises(hotglm.ArgumentError):
            hotglm.read_public_key(tmp_path / "pub")
    (tmp_path / "key").write_bytes(b"nothing")
    for read in (hotglm.SigningKey.read, hotglm.read_public_key):
        with pytest.raises(hotglm.ArgumentError):
            read(tmp_path / "key")
    with pytest.raises(hotglm.ArgumentError):
        hotglm.SigningKey.create(tmp_path / "new", algorithm="md5")
    with pytest.raises(hotglm.ArgumentError):
        hotglm.SigningKey.create(tmp_path / "new", passphrase="")


def test_roots_are_signed_by_several_at_different_times(tmp_path: Path) -> None:
    """Signatures are added to roots one by one; something else is not signed."""
    hotglm.write_roots(tmp_path / "roots.json", make_roots())
    assert [hotglm.sign_roots(tmp_path / "roots.json", make_key(name)) for name in ("root", "a", "root")] == [1, 2, 2]
    hotglm.create_trust(tmp_path / "roots.json", state=tmp_path / "state.json", clock=Clock())
    with pytest.raises(hotglm.SignatureError):
        hotglm.sign_roots(make_release(tmp_path / "r") / ENVELOPE_NAME, make_key("root"))
