"""What is known of live bytes follows them through exchanges in place, undone ones and rollbacks (P12, C02)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm import Progress, seam
from hotglm.errors import ConflictError, LiveMismatchError, StageFailedError
from support.delta_releases import write_full
from support.exchanges import FailAt
from support.gates import Beside
from support.swaps import same_state
from support.universal import Chain
from test_reuse import LAYER, NBYTES, cold, poke, state

V1, V2, V3 = state(1, 1, 1), state(1, 2, 1), state(3, 2, 1)


def make_slot(**options: Any) -> hotglm.ModuleSlot:
    options = {"memory": hotglm.MemoryPolicy(small_nbytes=0), **options}
    return hotglm.ModuleSlot(Chain(), name="m", version="1.0.0", swap=hotglm.InPlace(), **options)


def assert_live(slot: hotglm.ModuleSlot, tensors: Any) -> None:
    """What is live is `tensors`, bit for bit, and what is known of it says so, by digest and by fingerprint."""
    assert same_state(slot.live.module, cold(tensors))
    for quick in (True, False, True):
        assert slot.verify_live(quick=quick).num_compared == len(tensors)


@pytest.mark.parametrize("nth", [1, 2, 3, 8, 18])
def test_what_is_known_of_the_bytes_is_right_after_an_undo(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2: an exchange that fails at any copy leaves digests, fingerprints and what may be reused as they were."""
    slot = make_slot()
    paths = [write_full(tmp_path, number, tensors) for number, tensors in enumerate((V1, V2, V3), start=1)]
    slot.update(paths[0])
    assert_live(slot, V1)
    staged = slot.stage(paths[1])
    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", FailAt(nth))
        with pytest.raises(StageFailedError):
            slot.commit(staged)
    assert_live(slot, V1)
    receipt = slot.commit(staged)
    assert (receipt.origins.read_nbytes, receipt.origins.drifted) == (LAYER, ())
    assert_live(slot, V2)
    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", FailAt(nth))
        with pytest.raises(StageFailedError):
            slot.rollback()
    assert_live(slot, V2)
    slot.rollback()
    assert_live(slot, V1)
    receipt = slot.update(paths[2])  # of which one layer is live
    assert receipt.origins.drifted == ()
    assert_live(slot, V3)


def test_a_flipped_bit_is_found_wherever_the_bytes_have_gone(tmp_path: Path) -> None:
    """C02: one that flipped in the image comes back with a rollback, and is found there, and not in what was live."""
    slot = make_slot()
    for number, tensors in enumerate((V1, V2), start=1):
        slot.update(write_full(tmp_path, number, tensors))
        slot.verify_live()
    held = slot._admission.live.held[0]
    poke(held.module.state_dict()["layers.2.weight"], byte=7)
    assert_live(slot, V2)
    slot.rollback()
    for quick in (True, False):
        with pytest.raises(LiveMismatchError, match=r"layers\.2\.weight"):
            slot.verify_live(quick=quick)
    receipt = slot.update(write_full(tmp_path, 3, V3))
    assert receipt.origins.drifted == ("layers.2.weight",)
    assert_live(slot, V3)


@pytest.mark.parametrize("num_rollbacks", [1, 2])
def test_live_bytes_that_are_exchanged_while_they_are_copied_are_not_taken(num_rollbacks: int, tmp_path: Path) -> None:
    """P5: a rollback while a stage copies from what is live; whatever was copied, the stage has the new bytes."""
    slot = make_slot(memory=hotglm.MemoryPolicy(max_copies=3))
    paths = [write_full(tmp_path, number, tensors) for number, tensors in enumerate((V1, V2, V3), start=1)]
    slot.update(paths[0])
    slot.update(paths[1])
    slot.verify_live()
    done: list[object] = []

    def roll_back(progress: Progress) -> None:
        while len(done) < num_rollbacks:
            done.append(Beside(lambda: slot.rollback(to="1.0.1" if len(done) % 2 == 0 else "1.0.2")).result())

    staged = slot.stage(paths[2], progress=roll_back, policy=hotglm.StagePolicy(num_threads=1))
    assert len(done) == num_rollbacks
    live = V1 if num_rollbacks % 2 else V2
    assert_live(slot, live)
    if num_rollbacks % 2:
        with pytest.raises(ConflictError):
            slot.commit(staged)
    receipt = slot.commit(staged, expected=slot.live.number)
    assert receipt.nbytes == NBYTES
    assert_live(slot, V3)
    slot.rollback()
    assert_live(slot, live)
