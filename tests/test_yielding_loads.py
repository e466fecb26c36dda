"""Loads that yield, through a slot: every way of loading works in pieces and rests before each, and brings the same."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import HotglmError, NonFiniteError
from hotglm.slot import live_proof
from hotglm.weights import pace as paces
from hotglm.weights import places, upload
from hotglm.weights.evaluation import Evaluation
from hotglm.weights.pace import PIECE_NBYTES, Pace, Senses
from hotglm.weights.split_arena import SplitLease
from hotglm.weights.yielding import Work
from support.fake_device import Choices, FakeDevice, FakePlaces
from support.loaded_machine import Machine

MIB = 1 << 20
POLICY = hotglm.StagePolicy(pace=hotglm.Yielding())
BRISK = hotglm.StagePolicy(pace=hotglm.Yielding(max_share=1.0, min_share=0.5))
"""For tests on the clocks of the system."""

BIG, SMALL = 3 * MIB + 4096, 1024 * 4


class Net(nn.Module):
    """One tensor of more than three pieces, one that is transposed in memory, and a small one."""

    def __init__(self, seed: float = 0.0) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.full((BIG // 4,), seed))
        self.turned = nn.Parameter(torch.full((1024, 512), seed).t())
        self.small = nn.Parameter(torch.full((1024,), seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.big[0] + self.turned[0, 0] + self.small[0]


X = torch.ones(3)
ALL_NBYTES = BIG + 2 * MIB + SMALL


class Pieces:
    """What was worked on, in which pieces."""

    def __init__(self) -> None:
        self.num: Counter[Work] = Counter()
        self.nbytes: Counter[Work] = Counter()
        self.largest = 0

    def note(self, work: Work, nbytes: int) -> None:
        self.num[work] += 1
        self.nbytes[work] += nbytes
        self.largest = max(self.largest, nbytes)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """Count the pieces of every thread, on a clock on which no work takes any time."""
    found, note = Pieces(), Pace.note

    def count(pace: Pace, work: Work, nbytes: int, *, wall_s: float, used_s: float, queued_s: float) -> float:
        found.note(work, nbytes)
        return note(pace, work, nbytes, wall_s=wall_s, used_s=used_s, queued_s=queued_s)

    monkeypatch.setattr(Pace, "note", count)
    monkeypatch.setattr(paces, "Senses", Machine().senses)
    return found


def make_state(seed: float) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in Net(seed).state_dict().items()}


def make_slot(policy: hotglm.StagePolicy = POLICY, **options: object) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(Net(), name="m", version="1.0.0", policy=policy, **options)  # type: ignore[arg-type]


def test_a_file_is_read_hashed_and_searched_in_pieces(tmp_path: Path, pieces: Pieces) -> None:
    """Every byte of a file is in a piece of at most 1 MiB, for all that is done with it; memory is faulted so."""
    save_file(make_state(2.0), tmp_path / "a.safetensors")
    slot = make_slot()
    receipt = slot.update(tmp_path / "a.safetensors", version="1.0.1")
    assert pieces.largest <= PIECE_NBYTES
    assert pieces.nbytes[Work.READ] == ALL_NBYTES
    assert pieces.nbytes[Work.HASH] == ALL_NBYTES
    assert pieces.nbytes[Work.SCAN] >= BIG + SMALL
    assert pieces.nbytes[Work.FAULT] >= ALL_NBYTES
    same = make_slot(hotglm.StagePolicy()).update(tmp_path / "a.safetensors", version="1.0.1")
    assert receipt.digests == same.digests
    assert torch.equal(slot(X), Net(2.0)(X))


@pytest.mark.parametrize("kind", ["mapping", "module"])
def test_memory_is_copied_in_pieces(kind: str, pieces: Pieces) -> None:
    """Every byte of a mapping or a module, whatever its strides."""
    slot = make_slot()
    slot.update(make_state(2.0) if kind == "mapping" else Net(2.0), version="1.0.1")
    assert pieces.largest <= PIECE_NBYTES
    assert pieces.nbytes[Work.COPY] == ALL_NBYTES
    assert pieces.nbytes[Work.HASH] == ALL_NBYTES
    assert torch.equal(slot(X), Net(2.0)(X))


def test_what_a_delta_keeps_and_changes_is_paced(
    tmp_path: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying what is live, applying a delta to it, and hashing what came of it: each in pieces."""
    states = [make_state(1.0), make_state(1.0)]
    states[1]["big"][7] = 3.0
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
        source, target = tmp_path / f"{number}.safetensors", tmp_path / f"r{number}"
        hotglm.pack(source, target, name="m", version=f"1.0.{number + 1}", sequence=number + 1)
    hotglm.make_delta(tmp_path / "r0", tmp_path / "r1", tmp_path / "d1")
    slot = make_slot()
    slot.update(tmp_path / "r0")
    rests: list[Work] = []
    monkeypatch.setattr(paces._Worker, "rest", lambda worker, work, nbytes: rests.append(work))
    before = len(rests)
    receipt = slot.update(tmp_path / "d1")
    assert receipt.origins.decoded_nbytes == BIG
    assert len(rests) - before >= ALL_NBYTES // (2 * MIB)
    assert torch.equal(slot(X), Net(1.0)(X))
    assert slot.live.module.get_parameter("big")[7] == 3.0


def test_a_migration_is_paced(tmp_path: Path, pieces: Pieces) -> None:
    """What is renamed is read in pieces, and between what is computed there are rests."""
    migrations = hotglm.Migrations("m")
    migrations.state("0.9", "1.0", [hotglm.Rename("large", "big"), hotglm.Scale("small", 2.0)])
    state = make_state(2.0)
    state["large"] = state.pop("big")
    hotglm.save_weights(state, tmp_path / "a.safetensors", version="0.9.0", name="m")
    slot = make_slot(migrations=migrations, accept="major")
    slot.update(tmp_path / "a.safetensors")
    assert pieces.largest <= PIECE_NBYTES
    assert pieces.nbytes[Work.READ] == ALL_NBYTES
    assert slot.live.module.get_parameter("small")[0] == 4.0


def _halve(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return both halves, doubled."""
    first, second = (2 * tensors["both"]).chunk(2)
    return {"first.weight": first, "second.weight": second}


def test_a_migration_rests_before_each_tensor_that_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed is no piece that could be cut, so the pace is kept between one and the next."""
    events: list[str] = []
    write = Evaluation.write
    monkeypatch.setattr(paces._Worker, "rest", lambda worker, work, nbytes: events.append("rest"))

    def note_and_write(evaluation: Evaluation, *arguments: Any) -> None:
        events.append("write")
        write(evaluation, *arguments)

    monkeypatch.setattr(Evaluation, "write", note_and_write)
    migrations = hotglm.Migrations("m")
    halves = ("first.weight", "second.weight")
    spec = hotglm.TensorSpec(dtype="float32", shape=(8, 8))
    migrations.state("0.9", "1.0", [hotglm.Apply(_halve, ["both"], dict.fromkeys(halves, spec))])
    net = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    unproved = replace(POLICY, digest=False, finite=False)  # proofs of one tensor would rest before the next, too
    slot = hotglm.ModuleSlot(net, name="m", version="1.0.0", migrations=migrations, accept="major", policy=unproved)
    slot.update({"both": torch.full((16, 8), 2.0)}, version="0.9.0")
    assert all((slot.live.module.get_parameter(half) == 4.0).all() for half in halves)
    computed = [number for number, event in enumerate(events) if event == "write"]
    assert [events[number - 1] for number in computed] == ["rest"] * 2


@pytest.mark.parametrize("quick", [False, True])
def test_verify_live_yields_as_the_slot_does(quick: bool, pieces: Pieces) -> None:
    """The pace of the slot's policy is that of a proof, too; it finds what a proof at will finds."""
    slot = make_slot()
    slot.update(make_state(2.0), version="1.0.1")
    expected = slot.verify_live().digest
    before = pieces.nbytes.total(), len(pieces.nbytes)
    rests: list[Work] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paces._Worker, "rest", lambda worker, work, nbytes: rests.append(work))
        assert slot.verify_live(quick=quick).digest == expected
    assert len(rests) >= ALL_NBYTES // (2 * MIB)
    assert before[0] > 0


class Watched(FakeDevice):
    """A lazy device, which counts copies that were submitted while an earlier one was not carried out yet."""

    num_open = 0
    num_overlapping = 0

    def go_on(self) -> None:
        """Do nothing before somebody waits for it."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.num_overlapping += self.num_open > 0
        self.num_open += 1
        super().copy(source, target)
        self.submit(self._close)

    def _close(self) -> None:
        self.num_open -= 1


def update_on_device(source: Path | Mapping[str, torch.Tensor]) -> tuple[Watched, hotglm.ModuleSlot]:
    """Return the device on which a slot was updated and proved at a pace, and the slot."""
    found, module = FakePlaces(), Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "active", found)
        device = Watched("fake:0", Choices(1))
        found.add(device, module)
        slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=POLICY)
        slot.update(source, version="1.0.1")
        assert slot.verify_live().digest == slot.live.digest
    return device, slot


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_copies_to_a_device_are_made_one_by_one(
    kind: str, tmp_path: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is seen done before the next is submitted; the engine is free in between, and told about."""
    state = make_state(2.0)
    save_file(state, tmp_path / "a.safetensors")
    source = tmp_path / "a.safetensors" if kind == "file" else state
    settled, settle = list[SplitLease](), SplitLease.settle

    def note(lease: SplitLease) -> None:
        settled.append(lease)
        settle(lease)

    monkeypatch.setattr(SplitLease, "settle", note)
    device, slot = update_on_device(source)
    assert pieces.nbytes[Work.UPLOAD] == ALL_NBYTES
    assert pieces.largest <= PIECE_NBYTES
    assert device.num_overlapping == 0
    assert kind == "file" or len(settled) >= pieces.num[Work.UPLOAD]  # copies that torch makes are waited for as well
    assert slot.live.digests == make_slot(hotglm.StagePolicy()).update(state, version="1.0.1").digests
    assert pieces.nbytes[Work.FETCH] == ALL_NBYTES * (1 if kind == "file" else 2)  # a mapping is hashed from there, too
    if kind == "file":  # and a device on which nobody waits is found out
        monkeypatch.setattr(upload, "is_yielding", lambda: False)
        assert update_on_device(source)[0].num_overlapping > 0


def test_the_receipt_tells_how_a_load_yielded() -> None:
    """P12: how long it worked and paused, at which share; none where it took what it got."""
    slot = make_slot()
    receipt = slot.update(make_state(2.0), version="1.0.1")
    assert receipt.pace is not None
    assert receipt.pace.busy_s > 0
    assert receipt.pace.yielded_s > 0
    assert 0.05 <= receipt.pace.least_share <= receipt.pace.last_share <= 0.25
    assert "yielded for" in receipt.explain()
    pace = receipt.to_dict()["pace"]
    assert isinstance(pace, dict)
    assert pace["busy_s"] == receipt.pace.busy_s
    at_will = slot.stage(make_state(3.0), version="1.0.2", policy=hotglm.StagePolicy())
    assert at_will.pace is None
    assert "yielded" not in slot.commit(at_will).explain()


def test_a_load_that_fails_while_it_yields_changes_nothing() -> None:
    """P2: what cannot be loaded is named, no thread or descriptor is left, and the live version serves bit for bit."""
    slot = make_slot(BRISK)
    slot.update(make_state(2.0), version="1.0.1")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for broken in (broken_state(), {"big": torch.zeros(3)}):
        with pytest.raises(HotglmError) as caught:
            slot.update(broken, version="1.0.2")
        assert isinstance(caught.value, NonFiniteError) or "big" in str(caught.value)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(slot(X), Net(2.0)(X))
    assert str(slot.version) == "1.0.1"


def broken_state() -> Mapping[str, torch.Tensor]:
    state = make_state(3.0)
    state["big"][-1] = torch.nan  # in the last piece
    return state


def test_a_pace_means_one_thread_unless_more_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is that of a core; so many threads, so many shares."""
    save_file(make_state(2.0), tmp_path / "a.safetensors")
    names: set[str] = set()
    working = Pace.working

    def note(pace: Pace, cancellation: object) -> object:
        names.add(threading.current_thread().name)
        return working(pace, cancellation)  # type: ignore[arg-type]

    monkeypatch.setattr(Pace, "working", note)
    make_slot(BRISK).update(tmp_path / "a.safetensors", version="1.0.1")
    assert {name for name in names if name.startswith("hotglm-load")} == {"hotglm-load-0"}
    make_slot(replace(BRISK, num_threads=2)).update(tmp_path / "a.safetensors", version="1.0.1")
    assert {name for name in names if name.startswith("hotglm-load")} == {"hotglm-load-0", "hotglm-load-1"}


def test_senses_of_this_system_go_forward() -> None:
    """Clocks of the thread and of its queue only grow."""
    senses = Senses()
    queue = senses.open_queue()
    one = (senses.now(), senses.used(), queue.read())
    sum(range(100_000))
    two = (senses.now(), senses.used(), queue.read())
    queue.close()
    assert all(after >= before for before, after in zip(one, two, strict=True))
    assert two[1] > one[1]


def test_a_proof_that_a_commit_waits_for_does_not_yield(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: beside commits in place that never let it end, the last attempt keeps them out, and so goes at will."""
    slot = make_slot(swap=hotglm.InPlace())
    slot.update(make_state(2.0), version="1.0.1")
    pieces.nbytes.clear()
    monkeypatch.setattr(live_proof, "_NUM_ATTEMPTS", 0)
    assert slot.verify_live().digest == slot.live.digest
    assert not pieces.nbytes


def test_a_refusal_tells_how_the_load_yielded(pieces: Pieces) -> None:
    """The receipt of a load that failed on its way has the pace that it went at."""
    slot = make_slot()
    with pytest.raises(NonFiniteError) as caught:
        slot.update(broken_state(), version="1.0.2")
    assert caught.value.receipt is not None
    assert caught.value.receipt.pace is not None
    assert torch.equal(slot(X), Net()(X))


def test_a_stage_that_fails_before_it_reads_tells_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faulting memory in yields as well: where that ends, the receipt of the refusal says how it went until then."""

    def fail(*_: object) -> None:
        raise MemoryError

    slot = hotglm.ModuleSlot(nn.Linear(64, 64), name="ranker", version="1.0.0", policy=BRISK)
    before = slot(torch.ones(64))
    monkeypatch.setattr("hotglm.weights.arena.Arena.populate", fail)
    with pytest.raises(hotglm.HotglmError) as refused:
        slot.update(nn.Linear(64, 64).state_dict(), version="1.0.1")
    assert refused.value.receipt is not None
    assert refused.value.receipt.pace is not None
    assert torch.equal(slot(torch.ones(64)), before)
