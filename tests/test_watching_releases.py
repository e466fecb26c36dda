"""Watching releases of every kind: deltas that come out of order, signatures that come late, debris, and collection."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

import hotglm
from hotglm.errors import TrustStateError
from hotglm.events import RefusedEvent
from hotglm.testing.seams import hooked
from hotglm.watching.status import WatchState
from support.watched import Watched, make_slot, pack_shelf, write_weights

pytest.importorskip("cryptography")

from support.trusted import Host, Tiny, make_key, pack_tiny

# -- deltas ------------------------------------------------------------------------------------------------------------


def test_a_delta_that_comes_before_its_base_waits_for_it(tmp_path: Path) -> None:
    """C09: version 3 builds on version 2, which comes later: tried again, not refused, and then live."""
    away, shelf = tmp_path / "away", tmp_path / "shelf"
    fulls = [pack_shelf(away, number, version=f"1.0.{number}") for number in (1, 2, 3)]
    watched = Watched(tmp_path, place=shelf, follow=">=1")
    pack_shelf(shelf, 1, version="1.0.1")
    watched.settle()
    hotglm.make_delta(fulls[1], fulls[2], shelf / "1.0.3").close()
    watched.wait(30)
    assert (watched.state, watched.status.code) == (WatchState.RETRYING, "CHAIN_BASE_MISSING")
    assert watched.serves(1)
    hotglm.make_delta(fulls[0], fulls[1], shelf / "1.0.2").close()
    watched.wait(60)
    assert watched.serves(3)
    assert watched.status.refused == ()


def test_a_store_of_deltas_is_followed(tmp_path: Path) -> None:
    """A label over a chain of deltas is followed forwards and backwards; the skipped ones are applied on the way."""
    watched = Watched(tmp_path)
    for number in range(1, 6):
        hotglm.publish_delta(
            watched.store, write_weights(tmp_path / "sources", number, version=f"1.0.{number}"), name="chain"
        )
    for number in (1, 5, 2, 4):
        watched.store.move_label("stable", f"1.0.{number}")
        watched.wait(1.5)
        assert watched.serves(number)


# -- trust -------------------------------------------------------------------------------------------------------------


def trusting(directory: Path) -> tuple[Host, hotglm.ModuleSlot]:
    host = Host(directory)
    return host, hotglm.ModuleSlot(Tiny(), name="ranker", version="0.9.0", accept="major", trust=host.open())


def test_a_signature_that_comes_later_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unsigned release is refused by trust, told once, and goes live when it is signed: its manifest is the same."""
    _, slot = trusting(tmp_path)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    release = pack_tiny(shelf / "1.0.0")
    watched = Watched(tmp_path, place=shelf, follow=">=1,<2", slot=slot)
    with caplog.at_level(logging.INFO, logger="hotglm.watch"):
        watched.wait(100)
    assert len(caplog.records) == 1
    assert watched.state is WatchState.RETRYING
    assert [event.code for event in watched.of(RefusedEvent)] == [watched.status.code] * watched.status.counts.loads
    assert watched.status.counts.loads < 12
    hotglm.sign_release(release, make_key("release"))
    watched.wait(1.5)
    assert str(slot.version) == "1.0.0"


def test_a_trust_that_cannot_remember_keeps_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Confirming is asked again until the host's memory can be written; the service has it on disk already."""
    watched = Watched(tmp_path, service="api", trial_s=5.0)
    watched.publish(1)
    watched.settle()
    confirm, fails = watched.slot.confirm, [True]

    def fail(**options: object) -> bool:
        if fails[0]:
            raise TrustStateError("the disk is full")
        return confirm(**options)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(type(watched.slot), "confirm", lambda slot, **options: fail(**options))
    watched.wait(10)
    assert (watched.state, watched.status.code) == (WatchState.ON_TRIAL, "TRUST_STATE")
    fails[0] = False
    watched.wait(2)
    assert (watched.state, watched.slot.status().trial) == (WatchState.FOLLOWING, False)


# -- debris and collection ---------------------------------------------------------------------------------------------


def test_debris_in_a_store_is_passed_over(tmp_path: Path) -> None:
    """D16: half copies, temporary files and directories that the store did not name are not looked into."""
    watched = Watched(tmp_path, follow=">=1")
    watched.publish(1, label=None)
    releases = Path(watched.store.path, "releases")
    for name in ("000000009-1.0.9.partial", ".000000009-1.0.9", "9-1.0.9", "000000009-01.0.9", "1.0.9", "000000009-"):
        (releases / name).mkdir()
        (releases / name / "hotglm-manifest.json").write_bytes(b"{}\n")
    (releases / "000000009-1.0.9").mkdir()  # without a manifest
    Path(watched.store.path, "labels", ".stable.json.partial").write_text("{")
    Path(watched.store.path, "tmp", "w").mkdir()
    opened: list[str] = []
    with hooked(lambda kind, _, args: opened.append(args[0]) if kind == "open" else None):
        watched.settle()
    assert watched.serves(1)
    looked_into = {os.path.basename(os.path.dirname(path)) for path in opened if path.endswith("manifest.json")}
    assert looked_into == {"000000001-1.0.1", "000000009-1.0.9"}


def test_what_is_being_loaded_is_not_collected(tmp_path: Path) -> None:
    """D17: another process collects while a load is in flight: what is loaded stays until it is live."""
    watched = Watched(tmp_path, follow="==1.0.1")
    for number in (1, 2, 3):
        watched.publish(number, label=None)
    collected = []

    def collect(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "reach" and args[0] == "stage.load":
            collected.append(watched.store.collect_garbage(keep_newest=1))

    with hooked(collect):
        watched.settle()
    assert collected
    assert watched.serves(1)
    assert watched.find_path("1.0.1").exists()
    watched.store.collect_garbage(keep_newest=1)
    watched.wait(3)
    assert watched.serves(1)


def test_a_store_of_another_model_is_refused_by_the_verdict(tmp_path: Path) -> None:
    """A release of another name never goes live, and is told once."""
    slot = hotglm.ModuleSlot(make_slot().live.module, name="other", version="1.0.0")
    watched = Watched(tmp_path, slot=slot)
    watched.publish(1)
    watched.wait(20)
    assert (watched.state, watched.serves(0), watched.status.counts.loads) == (WatchState.REFUSED, True, 1)
