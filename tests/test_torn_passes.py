"""No pass is torn: a million passes, ten thousand swaps, and five planted bugs that the harness catches (F01, F02).

The five CI runs add up to 1,000,000 passes and 10,000 swaps. Each cycle is an update into the arena that passes have
just left, followed by rollbacks back and forth: 3,400 whole updates and 6,600 rollbacks in all. At this switch interval
an update takes 4 ms beside one reader and 100 ms beside eight, so runs with many readers get fewer of them.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

import hotglm
from support.planted import DataAssignment, ForgottenPin, InPlaceCopy, LateSwap, ReaderPreferringLock, TwoBuffers
from support.torn import (
    INPUT,
    PRIMES,
    Engine,
    Relay,
    SlotEngine,
    count_passes_until_swapped,
    dawdle_at_times,
    plan_swaps,
    read_version,
    run_harness,
    weights,
)

PASSES = 200_000  # in each of five runs
SWAPS = 2_000


def read_now(engine: SlotEngine) -> int:
    return read_version(engine.slot(INPUT))


@pytest.mark.parametrize(
    ("readers", "updates"), [(1, 2000), (2, 1000), (4, 300), (8, 40), pytest.param(16, 60, marks=pytest.mark.slow)]
)
def test_no_pass_is_torn_or_stale(readers: int, updates: int) -> None:
    """F01, F11, F12: with 1 to 16 readers no output mixes versions, is older than the swap before it, or goes back."""
    engine = SlotEngine(PRIMES[0], boundary=dawdle_at_times())
    plan = plan_swaps(updates=updates, rollbacks=SWAPS - updates)
    report = run_harness(engine, plan, readers=readers, passes=PASSES, budget_s=240)
    assert report.is_clean, report
    assert report.passes >= PASSES
    assert report.swaps == SWAPS
    assert (engine.num_updates, engine.num_rollbacks) == (updates, SWAPS - updates)
    assert read_now(engine) == plan[-1]


@pytest.mark.stress
@pytest.mark.parametrize("readers", [1, 2, 4, 8, 16])
def test_no_pass_is_torn_in_a_minute(readers: int) -> None:
    """F01, long form: 60 s each, every second swap a whole update."""
    engine = SlotEngine(PRIMES[0], boundary=dawdle_at_times())
    report = run_harness(
        engine, plan_swaps(updates=100_000, rollbacks=100_000), readers=readers, passes=10**9, budget_s=60
    )
    assert report.is_clean, report
    assert report.swaps > 200
    assert report.duration_s >= 60


@pytest.mark.parametrize("planted", [InPlaceCopy, DataAssignment, TwoBuffers, ForgottenPin])
def test_planted_bugs_are_found(planted: type) -> None:
    """F02: the harness that finds nothing in a slot finds torn passes in each way of swapping that tears."""
    engine: Engine = planted(PRIMES[0], boundary=dawdle_at_times())
    report = run_harness(engine, plan_swaps(updates=20_000), readers=4, passes=10**9, budget_s=60, until_torn=True)
    assert report.torn > 0, report
    assert report.errors == []


def test_an_old_version_after_the_swap_is_found() -> None:
    """F11, F12, control: the harness counts passes in a version that was replaced before they began."""
    report = run_harness(LateSwap(PRIMES[0]), plan_swaps(updates=50), readers=2, passes=1_000, budget_s=60)
    assert report.stale > 0, report
    assert report.torn == 0


def test_a_writer_starves_behind_a_reader_preferring_lock() -> None:
    """F02, F14: while passes overlap without a gap, a lock that prefers readers never lets the swap in."""
    relay = Relay(limit=5_000)
    assert count_passes_until_swapped(ReaderPreferringLock(PRIMES[0], boundary=relay), relay, readers=4) is None
    assert relay.begun >= 5_000


def test_a_swap_gets_through_while_passes_never_cease() -> None:
    """F14: under the same unbroken chain of passes a slot's update takes effect, and its rollback too."""
    relay = Relay(limit=5_000)
    engine = SlotEngine(PRIMES[0], boundary=relay)
    num_passes = count_passes_until_swapped(engine, relay, readers=4)
    assert num_passes is not None
    assert num_passes < 5_000
    assert read_now(engine) == PRIMES[1]
    engine.swap(PRIMES[0])
    assert read_now(engine) == PRIMES[0]


# -- F23: an ageing oracle ---------------------------------------------------------------------------------------------


class Poison:
    """After each update, makes a slot let go of its rollback targets, and fills all memory it calls free with NaN."""

    def __init__(self) -> None:
        self.num_poisoned = 0

    def __call__(self, slot: hotglm.ModuleSlot) -> None:
        for held in slot._admission.live.held:
            slot._core.spares.retire_now(held)
            del held  # or this name is what keeps its memory
        # The swapper, which calls this, is the only thread that stages: nothing is leased between question and answer.
        arena = slot._core.spares.pool.find_free(1)
        if arena is not None:
            ctypes.memset(arena.address, 0xFF, arena.nbytes)
            self.num_poisoned += 1


def test_nobody_reads_what_is_free() -> None:
    """F23: memory is poisoned as soon as the slot calls it free, and no pass of four readers ever sees the poison."""
    poison = Poison()
    engine = SlotEngine(PRIMES[0], after_update=poison, boundary=dawdle_at_times())
    plan = plan_swaps(updates=200)
    report = run_harness(engine, plan, readers=4, passes=20_000, budget_s=120)
    assert report.is_clean, report
    assert report.swaps == len(plan)
    assert poison.num_poisoned > 10
    assert read_now(engine) == plan[-1]


def test_the_poison_is_seen_where_pins_are_forgotten() -> None:
    """F23, control: a slot that forgets its pins shows the poison at once."""
    poison = Poison()
    engine = ForgottenPin(PRIMES[0], after_update=poison, boundary=dawdle_at_times())
    report = run_harness(engine, plan_swaps(updates=5_000), readers=4, passes=10**9, budget_s=60, until_torn=True)
    assert report.torn > 0, report


def test_the_oracle_knows_mixtures() -> None:
    """A mixture of two versions in any layer, or of elements, is never taken for a version."""
    slot = hotglm.ModuleSlot(SlotEngine(PRIMES[0]).slot.live.module, name="oracle", version="1.0.0")
    for layer in range(4):
        mixed = {**weights(PRIMES[1]), f"w{layer}": weights(PRIMES[2])[f"w{layer}"]}
        slot.update(mixed, version=f"1.0.{layer + 1}")
        assert read_version(slot(INPUT)) == 0
    one_row = weights(PRIMES[1])
    one_row["w3"][2] *= 2
    slot.update(one_row, version="1.0.5")
    assert read_version(slot(INPUT)) == 0
    assert read_version(torch.full((4,), float("nan"))) == 0
    slot.update(weights(PRIMES[1]), version="1.0.6")
    assert read_version(slot(INPUT)) == PRIMES[1]
