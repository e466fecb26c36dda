"""P9, I05, I07, I08, I10: how much memory updates take, what they give up for it, whom they name; by formulas."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm import seam
from hotglm.errors import ArgumentError, CallableCheckError, HotglmError, MemoryPlanError, NoRollbackError
from hotglm.events import Event, HeldEvent
from hotglm.seam import Seam
from hotglm.slot import memory
from hotglm.slot.memory import RESERVE_NBYTES, read_available_nbytes
from hotglm.testing.seams import fail_with, hooked
from support.universal import Chain, World, make_state, universal

WIDTH, DEPTH = 64, 3
NBYTES = DEPTH * (WIDTH * WIDTH + WIDTH) * 4
X = torch.ones(WIDTH)
BIG: dict[str, Any] = {"small_nbytes": 0, "drain_timeout_s": 0.01}
"""Treats these small weights as large ones: no third copy."""


class CountedMemory(Seam):
    """The real memory, with the bytes of every arena that is mapped, and the most there ever were."""

    def __init__(self) -> None:
        self.maps: list[tuple[weakref.ref[mmap.mmap], int]] = []
        self.peak_nbytes = 0

    def map_anonymous(self, nbytes: int) -> mmap.mmap:
        made = super().map_anonymous(nbytes)
        self.maps.append((weakref.ref(made), nbytes))
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        return made

    @property
    def nbytes(self) -> int:
        return sum(nbytes for reference, nbytes in self.maps if reference() is not None)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedMemory:
    made = CountedMemory()
    monkeypatch.setattr(seam, "active", made)
    return made


def make(number: int = 0) -> Chain:
    chain = Chain(width=WIDTH, depth=DEPTH)
    chain.load_state_dict(make_state(number, width=WIDTH, depth=DEPTH))
    return chain


def make_slot(*, number: int = 0, **options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(
        make(number), name="chain", version=f"1.0.{number}", memory=hotglm.MemoryPolicy(**{**BIG, **options})
    )


def update(slot: hotglm.ModuleSlot, number: int, **options: Any) -> hotglm.Receipt:
    return slot.update(make_state(number, width=WIDTH, depth=DEPTH), version=f"1.0.{number}", **options)


def answers(slot: hotglm.ModuleSlot, number: int) -> bool:
    with torch.no_grad():
        return bool(slot(X).equal(make(number)(X)))


def refuse(module: nn.Module) -> bool:
    return False


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    yield []  # noqa: PT022 - typed


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_copies", [2, 3, 4])
@pytest.mark.parametrize("is_small", [False, True])
def test_the_peak_of_all_arenas_is_copies_times_weights(
    counted: CountedMemory, max_copies: int, is_small: bool
) -> None:
    """P9: with `max_copies` = n, arenas never hold more than n times the weights; small weights one time more."""
    small_nbytes = NBYTES if is_small else NBYTES - 1
    slot = make_slot(max_copies=max_copies, small_nbytes=small_nbytes)
    for number in range(1, 12):
        update(slot, number)
        slot(X)
    copies = max_copies + is_small
    assert counted.peak_nbytes == copies * NBYTES
    assert slot.status().arenas_nbytes == counted.nbytes == copies * NBYTES
    assert len(slot.status().generations) == copies
    assert len(counted.maps) == copies, "arenas are taken once and then in turns"


def test_refused_stages_and_rollbacks_take_no_more(counted: CountedMemory) -> None:
    """P9: stages that fail, are discarded or superseded, and rollbacks, stay within two copies."""
    slot = make_slot()
    for number in range(1, 10):
        update(slot, number)
        with pytest.raises(CallableCheckError):
            update(slot, number + 1, policy=hotglm.StagePolicy(checks=(refuse,)))
        with slot.stage(make_state(number + 1, width=WIDTH, depth=DEPTH), version="1.1.0"):
            pass
        assert answers(slot, number)
    assert counted.peak_nbytes == 2 * NBYTES
    slot.close()
    slot.wait_drained(timeout_s=5)
    gc.collect()
    assert counted.nbytes <= 2 * NBYTES


def test_a_slot_that_is_gone_leaves_no_memory(counted: CountedMemory) -> None:
    """P9: the last reference to a slot is the last to its arenas."""
    slot = make_slot()
    for number in range(1, 5):
        update(slot, number)
    del slot
    gc.collect()
    assert counted.nbytes == 0


def fail_reading(slot: hotglm.ModuleSlot, path: Path) -> None:
    always = fail_with("preadv", lambda: OSError(5, "planted"))
    with hooked(lambda kind, count, args: always(args) if kind == "preadv" else None):
        slot.update(path)


def fail_to_commit(slot: hotglm.ModuleSlot, path: Path) -> None:
    slot.commit(slot.stage(path), expected="9.9.9")


FAILURES: dict[str, Callable[[hotglm.ModuleSlot, Path], object]] = {
    "open": lambda slot, path: slot.update("/nonexistent"),
    "verdict": lambda slot, path: slot.update({"other": torch.ones(1)}, version="9.0.0"),
    "read": fail_reading,
    "check": lambda slot, path: slot.update(path, policy=hotglm.StagePolicy(checks=(refuse,))),
    "commit": fail_to_commit,
    "update": lambda slot, path: slot.update(path, expected="9.9.9"),
    "rollback": lambda slot, path: slot.rollback("9.9.9"),
    "confirm": lambda slot, path: slot.confirm(expected="9.9.9"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_that_is_kept_keeps_no_memory(counted: CountedMemory, tmp_path: Path, name: str) -> None:
    """P9: whatever is refused, its error and traceback hold neither the spare nor what was live, collector or not."""
    hotglm.save_weights(make(9), tmp_path / "nine.safetensors", version="1.0.9", name="chain")
    slot = make_slot()
    update(slot, 1)
    update(slot, 2)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(HotglmError) as caught:
            FAILURES[name](slot, tmp_path / "nine.safetensors")
        for number in range(3, 6):
            update(slot, number)
        assert counted.nbytes == counted.peak_nbytes == 2 * NBYTES
    finally:
        gc.enable()
    assert caught.value.__traceback__ is not None
    assert answers(slot, 5)


# -- the rollback target -----------------------------------------------------------------------------------------------


def test_a_large_model_gives_its_rollback_target_up_when_a_stage_begins_to_fill_the_spare(
    counted: CountedMemory,
) -> None:
    """With two copies, a stage that fails after loading has used the rollback target up; one refused before has not."""
    slot = make_slot()
    update(slot, 1)
    update(slot, 2)
    with pytest.raises(HotglmError):
        slot.update({"other": torch.ones(1)}, version="1.0.3")
    with slot.stage(make_state(3, width=WIDTH, depth=DEPTH), version="1.0.3") as staged:
        assert staged.plan.retires == (2,)
        assert "gives up generation 2" in staged.plan.explain()
    with pytest.raises(NoRollbackError):
        slot.rollback()
    assert answers(slot, 2)
    assert counted.peak_nbytes <= 2 * NBYTES


@pytest.mark.parametrize("options", [{"small_nbytes": NBYTES}, {"max_copies": 3}])
def test_a_third_copy_keeps_the_rollback_target_through_a_failed_stage(options: dict[str, int]) -> None:
    """I07: small weights, or `max_copies=3`, keep the way back open through any number of stages that fail."""
    slot = make_slot(**options)
    update(slot, 1)
    update(slot, 2)
    for _ in range(3):
        with pytest.raises(CallableCheckError):
            update(slot, 3, policy=hotglm.StagePolicy(checks=(refuse,)))
    receipt = slot.rollback()
    assert str(receipt.new_version) == "1.0.1"
    assert answers(slot, 1)


def test_rollback_needs_nothing_but_memory(world: World) -> None:
    """I05, I06: with the source file gone and readers running, going back and forth brings the same bits, at once."""
    number, path = world.write(name="gone.safetensors")
    old = world.answer()
    world.publish(number)
    world.slot.update(path)
    path.unlink()
    for _ in range(50):
        assert world.slot.rollback().action == "rolled back"
        assert world.answer().equal(old)
        world.slot.rollback(world.slot.status().generations[1].number)
        assert world.answer().equal(world.expected(number))
    world.wait_for_passes()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("memory")) as made:
        yield made


def test_going_back_where_nothing_is_held_is_refused(world: World) -> None:
    """I07: going back to an unknown version, to an evicted one or with a wrong expectation is refused by name."""
    first, path = world.write()
    world.publish(first)
    world.slot.update(path)
    with universal(world, NoRollbackError, code="NO_ROLLBACK", num_refused=0) as outcome:
        world.slot.rollback("9.9.9")
    assert "9.9.9" in str(outcome.refusal)
    with universal(world, NoRollbackError, code="NO_ROLLBACK", num_refused=0):
        world.slot.rollback("1.0.0")
    with universal(world, hotglm.ConflictError, code="CONFLICT", num_refused=0):
        world.slot.rollback(expected="1.0.0")


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_limit_refuses_before_anything_is_taken_or_given_up(counted: CountedMemory) -> None:
    """I10: a plan that does not fit is refused with both sizes before anything is mapped or given up."""
    slot = make_slot(limit_nbytes=2 * NBYTES - 1)
    update(slot, 1)
    maps = len(counted.maps)
    with pytest.raises(MemoryPlanError) as caught:
        update(slot, 2)
    assert str(2 * NBYTES - 1) in str(caught.value)
    assert str(NBYTES) in str(caught.value)
    assert isinstance(caught.value, MemoryError)
    assert len(counted.maps) == maps
    assert str(slot.rollback().new_version) == "1.0.0", "the rollback target is still held"
    assert answers(slot, 0)


def test_a_machine_without_memory_refuses_the_plan(counted: CountedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """I10: fresh memory must be there beside a reserve for the service; arenas that are there already need none."""
    slot = make_slot()
    available = NBYTES
    monkeypatch.setattr("hotglm.slot.spare.read_available_nbytes", lambda: available)
    with pytest.raises(MemoryPlanError):
        update(slot, 1)
    assert counted.maps == []
    available = NBYTES + RESERVE_NBYTES
    update(slot, 1)
    update(slot, 2)
    available = 0
    update(slot, 3)
    assert answers(slot, 3)


def test_the_least_of_machine_container_and_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is available is the least of three, and page cache of a container that nobody uses counts as available."""
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:      4096 kB\n"}
    monkeypatch.setattr(memory, "_read_text", lambda path: files.get(path, ""))
    assert read_available_nbytes() == 4096 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "4000\n"}
    assert read_available_nbytes() == 1000
    files["/sys/fs/cgroup/memory.stat"] = "anon 1000\ninactive_file 2500\n"
    assert read_available_nbytes() == 3500
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert read_available_nbytes() == 4096 * 1024


@pytest.mark.parametrize(
    "options", [{"max_copies": 1}, {"small_nbytes": -1}, {"limit_nbytes": -1}, {"drain_timeout_s": -1}]
)
def test_a_policy_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    """One copy is no slot, and sizes and times are not negative."""
    with pytest.raises(ArgumentError):
        hotglm.MemoryPolicy(**options)


# -- what is held outside ----------------------------------------------------------------------------------------------


def test_a_held_generation_is_left_to_its_holder_and_named(counted: CountedMemory, heard: list[Event]) -> None:
    """I08, P9: a session on an old generation costs one copy while it lasts, is named, and reads its own bits."""
    slot = make_slot()
    update(slot, 1)
    slot.subscribe(heard.append)
    with slot.acquire() as generation:
        for number in range(2, 6):
            update(slot, number)
            with torch.no_grad():
                assert generation.module(X).equal(make(1)(X))
        assert counted.nbytes == slot.status().arenas_nbytes == 3 * NBYTES
        held = [event for event in heard if isinstance(event, HeldEvent)]
        assert [event.number for event in held] == [generation.number]
        assert __file__ in held[0].holders[0]
        assert any(entry.state == "draining" for entry in slot.status().generations)
        del generation
    assert answers(slot, 5)
    slot.wait_drained(timeout_s=5)
    assert slot.status().arenas_nbytes == counted.nbytes == 2 * NBYTES
    assert counted.peak_nbytes == 3 * NBYTES


def test_a_holder_does_not_push_a_slot_over_its_limit(counted: CountedMemory) -> None:
    """I10: where the limit leaves no room beside a copy that a session holds, the refusal names the session."""
    slot = make_slot(limit_nbytes=2 * NBYTES)
    update(slot, 1)
    update(slot, 2)
    with slot.acquire() as generation:
        update(slot, 3)
        with pytest.raises(MemoryPlanError) as caught:
            update(slot, 4)
        assert __file__ in str(caught.value)
        assert counted.peak_nbytes <= 2 * NBYTES
        assert answers(slot, 3)
        del generation
    update(slot, 4)
    assert answers(slot, 4)


def test_the_first_module_kept_outside_costs_one_copy_and_is_named(counted: CountedMemory, heard: list[Event]) -> None:
    """DESIGN, ownership: whoever keeps the module that the slot was given is named, and is never written under."""
    kept = [make(0)]
    slot = hotglm.ModuleSlot(kept[0], name="chain", version="1.0.0", memory=hotglm.MemoryPolicy(**BIG))
    slot.subscribe(heard.append)
    for number in range(1, 5):
        update(slot, number)
    with torch.no_grad():
        assert kept[0](X).equal(make(0)(X))
    assert counted.nbytes == 2 * NBYTES, "the kept module is the third copy"
    status = slot.status()
    assert [(entry.number, entry.state) for entry in status.generations if entry.state == "draining"] == [
        (1, "draining")
    ]
    assert [event.number for event in heard if isinstance(event, HeldEvent)] == [1]
    assert any(holder.number == 1 and "Chain" in holder.description for holder in slot.find_holders())
    kept.clear()
    gc.collect()
    slot.wait_drained(timeout_s=5)
    assert all(entry.state != "draining" for entry in slot.status().generations)


def test_weights_that_grow_get_arenas_that_fit(counted: CountedMemory, tmp_path: Path) -> None:
    """P9: after a change to a larger and back to a smaller structure, arenas that fit nobody are not kept."""
    slot = hotglm.ModuleSlot(make(0), name="chain", version="1.0.0", accept="major", memory=hotglm.MemoryPolicy(**BIG))
    for number, width in enumerate((64, 64, 128, 128, 128, 64, 64, 64), start=1):
        chain = Chain(width=width, depth=DEPTH)
        chain.load_state_dict(make_state(number, width=width, depth=DEPTH))
        slot.update(chain, version=f"{number + 1}.0.0")
        with torch.no_grad():
            assert slot(torch.ones(width)).equal(chain(torch.ones(width)))
        del chain
    largest = DEPTH * (128 * 128 + 128) * 4
    assert counted.peak_nbytes <= 2 * largest
    assert slot.status().arenas_nbytes == counted.nbytes <= 2 * largest
