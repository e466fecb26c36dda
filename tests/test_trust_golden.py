"""Signed releases, roots and a memory that this format's first version wrote: they verify for ever (FAULTS B30).

tests/golden/signed-1 was made once, by code of 2026-11-20, with keys whose private halves were thrown away: releases
signed by three of three keys, one for each algorithm; one by a key that may sign one model for one slot; a delta; two
versions of roots; and a memory in which 1.0.0 was accepted and confirmed.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hotglm.errors import SignatureError
from hotglm.release.directory import open_release
from hotglm.trust.opening import open_trust
from hotglm.trust.policy import Accepted, Trust

GOLDEN = Path(__file__).parent / "golden" / "signed-1"
NOW = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """Return a copy, because memory and roots change."""
    path = tmp_path / "signed-1"
    shutil.copytree(GOLDEN, path)
    return path


def open_golden(signed: Path, slot: str | None = None) -> Trust:
    return open_trust(signed / "roots-1.json", state=signed / "trust.json", slot=slot, clock=lambda: NOW)


def judge(trust: Trust, path: Path) -> Accepted:
    with open_release(path) as release:
        accepted = trust.verify(release)
        release.verify()
    return accepted


@pytest.mark.parametrize("name", ["ranker-1.0.0", "ranker-1.1.0", "ranker-1.1.0-delta"])
def test_a_release_of_then_is_accepted_now(name: str, signed: Path) -> None:
    """Signatures of all three algorithms hold, full releases and deltas, under roots and memory of then."""
    trust = open_golden(signed)
    accepted = judge(trust, signed / name)
    algorithms = {trust.read()[1].keys[key_id].algorithm for key_id in accepted.key_ids}
    assert algorithms == {"ed25519", "ecdsa-p256-sha256", "rsa-pss-sha256"}
    assert accepted.roles == ("release",)


def test_a_delta_and_its_full_form_are_one_release(signed: Path) -> None:
    """Both lead to one result, so one is no news after the other."""
    trust = open_golden(signed)
    full, delta = judge(trust, signed / "ranker-1.1.0"), judge(trust, signed / "ranker-1.1.0-delta")
    assert full.digest == delta.digest
    trust.accept(full)
    trust.accept(delta)
    record = trust.read()[0].find_record(slot=None, model="ranker")
    assert [one.version for one in record.accepted] == ["1.1.0", "1.0.0"]


def test_a_delegation_of_then_holds_now(signed: Path) -> None:
    """A key for one model in one slot is that still."""
    assert judge(open_golden(signed, "api"), signed / "scorer-1.0.0").roles == ("team",)
    with pytest.raises(SignatureError) as caught:
        judge(open_golden(signed), signed / "scorer-1.0.0")
    assert caught.value.code == "THRESHOLD_NOT_MET"


def test_a_memory_of_then_is_read_now(signed: Path) -> None:
    """What was accepted, confirmed and noted is known still."""
    state, roots = open_golden(signed).read()
    record = state.find_record(slot=None, model="ranker")
    assert (str(record.floor_version), record.confirmed and record.confirmed.version) == ("1.0.0", "1.0.0")
    assert [entry.reason for entry in state.journal] == ["a line of the journal", "first use"]
    assert roots.version == 1


def test_roots_of_then_rotate_now(signed: Path) -> None:
    """The next roots, with another root key, are taken by the signatures of then; nothing is forgotten."""
    trust = open_golden(signed)
    assert trust.rotate(signed / "roots-2.json").version == 2
    assert len(trust.read()[0].find_record(slot=None, model="ranker").accepted) == 1
    assert judge(trust, signed / "ranker-1.0.0").is_confirmed
