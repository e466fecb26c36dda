"""F17, P9: after thousands of swaps, descriptors, maps, threads, objects and memory are where they were.

In CI 2,000 full updates from a file and 10,000 changes by rollback; under `stress` 10,000 full updates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm.errors import CallableCheckError
from hotglm.testing.usage import assert_no_leak
from support.universal import Chain, make_state

WIDTH = 32
NBYTES = 3 * (WIDTH * WIDTH + WIDTH) * 4
X = torch.ones(WIDTH)


def verify_constant(step: Callable[[int], object], num: int) -> None:
    assert_no_leak(step, num=num, max_objects_per_step=0.1)


@pytest.fixture
def slot() -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(make(), name="chain", version="1.0.0")


def make() -> Chain:
    chain = Chain(width=WIDTH)
    chain.load_state_dict(make_state(0, width=WIDTH))
    return chain


def swap_files(slot: hotglm.ModuleSlot, directory: Path) -> Callable[[int], object]:
    paths = []
    for number in (1, 2):
        path = directory / f"{number}.safetensors"
        hotglm.save_weights(make_state(number, width=WIDTH), path, version=f"1.0.{number}")
        paths.append(path)
    expected = []
    for number in (1, 2):
        chain = make()
        chain.load_state_dict(make_state(number, width=WIDTH))
        expected.append(chain(X).detach())

    def swap(index: int) -> None:
        slot.update(paths[index % 2])
        with torch.no_grad():
            assert slot(X).equal(expected[index % 2])

    return swap


def test_two_thousand_updates_leave_nothing(slot: hotglm.ModuleSlot, tmp_path: Path) -> None:
    """2,000 full updates from files: each serves its own bits, and nothing has piled up."""
    verify_constant(swap_files(slot, tmp_path), 2_000)
    assert slot.status().arenas_nbytes == 3 * NBYTES
    assert len(slot.history) <= 1_000


@pytest.mark.stress
def test_ten_thousand_updates_leave_nothing(slot: hotglm.ModuleSlot, tmp_path: Path) -> None:
    """10,000 full updates from files."""
    verify_constant(swap_files(slot, tmp_path), 10_000)
    assert slot.status().arenas_nbytes == 3 * NBYTES


def test_ten_thousand_rollbacks_leave_nothing(slot: hotglm.ModuleSlot) -> None:
    """10,000 changes of the live generation without loading, there and back, leave nothing."""
    slot.update(make_state(1, width=WIDTH), version="1.0.1")
    slot.update(make_state(2, width=WIDTH), version="1.0.2")
    verify_constant(lambda index: slot.rollback("1.0.1" if index % 2 == 0 else "1.0.2"), 10_000)


def test_a_thousand_refusals_leave_nothing(slot: hotglm.ModuleSlot) -> None:
    """1,000 stages that load and then fail their check, the last ten errors kept, leave nothing."""
    state = make_state(1, width=WIDTH)
    policy = hotglm.StagePolicy(checks=(lambda module: False,))
    kept: list[BaseException] = []

    def refuse(index: int) -> None:
        with pytest.raises(CallableCheckError) as caught:
            slot.update(state, version="1.0.1", policy=policy)
        kept[index % 10 : index % 10 + 1] = [caught.value]

    verify_constant(refuse, 1_000)
    assert slot.status().arenas_nbytes <= 3 * NBYTES


def test_slots_that_come_and_go_leave_nothing() -> None:
    """300 slots, each updated, rolled back and dropped with a session and a stage open, leave nothing."""

    def live_and_die(index: int) -> None:
        slot = hotglm.ModuleSlot(make(), name="chain", version="1.0.0")
        slot.update(make_state(1, width=WIDTH), version="1.0.1")
        slot.stage(make_state(2, width=WIDTH), version="1.0.2")
        slot.acquire().__enter__()
        slot.rollback()

    verify_constant(live_and_die, 300)


def test_a_growing_slot_is_noticed(slot: hotglm.ModuleSlot) -> None:
    """The measure finds a planted leak: generations that are kept, one per swap."""
    kept: list[object] = []

    def leak(index: int) -> None:
        slot.update(make_state(index, width=WIDTH), version=f"1.0.{index + 1}")
        kept.append(slot.live)

    policy = hotglm.MemoryPolicy(drain_timeout_s=0)
    slot = hotglm.ModuleSlot(make(), name="chain", version="1.0.0", memory=policy)
    with pytest.raises(AssertionError):
        verify_constant(leak, 40)
