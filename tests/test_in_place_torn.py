"""In place under load: no pass is torn, no commit starves, and whatever breaks the gate is found."""

from __future__ import annotations

import pytest

import hotglm
from hotglm.slot.closing import Closing
from support.planted import NoWait, OpenGate, plant_gate
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
)

IN_PLACE = hotglm.InPlace(timeout_s=30)


@pytest.mark.parametrize(
    ("readers", "updates", "passes"),
    [(1, 100, 10_000), (8, 15, 5_000), pytest.param(8, 1_000, 3_000_000, marks=pytest.mark.stress)],
)
def test_no_pass_is_torn_or_stale_and_no_commit_starves(readers: int, updates: int, passes: int) -> None:
    """P1, P4, F01, F14: under 8 busy readers every commit and rollback goes through, between two passes."""
    engine = SlotEngine(PRIMES[0], boundary=dawdle_at_times(every=512, pause_s=0.002), swap=IN_PLACE)
    plan = plan_swaps(updates=updates, rollbacks=updates * 2)
    report = run_harness(engine, plan, readers=readers, passes=passes, budget_s=600)
    assert report.is_clean, report
    assert report.swaps == len(plan)
    assert read_version(engine.slot(INPUT)) == plan[-1]


@pytest.mark.parametrize("planted", [OpenGate, NoWait])
def test_a_broken_gate_is_found(planted: type) -> None:
    """F02, control: a gate that lets in while bytes are written, or writes while somebody is inside, tears passes."""
    engine: Engine = planted(PRIMES[0], boundary=dawdle_at_times(every=16, pause_s=0.001))
    report = run_harness(
        engine, plan_swaps(updates=2_000, rollbacks=200_000), readers=8, passes=10**9, budget_s=60, until_torn=True
    )
    assert report.torn > 0, report
    assert report.errors == []


def test_a_commit_goes_through_while_passes_never_cease() -> None:
    """F14: passes overlap without a gap until the commit comes; it waits for the four inside, and for no other."""
    relay = Relay(limit=5_000)
    engine = SlotEngine(PRIMES[0], boundary=relay, swap=hotglm.InPlace(timeout_s=30))
    gate = plant_gate(engine.slot)
    seen: list[tuple[int, int]] = []
    close, count = gate.close, gate.count_inside

    def close_and_let_go(closing: Closing) -> None:
        close(closing)
        seen.append((relay.begun, count()))
        relay.stop()  # the last pass would wait for a next one, which is held back

    gate.close = close_and_let_go  # type: ignore[method-assign]
    count_passes_until_swapped(engine, relay, readers=4)
    ((begun, inside),) = seen
    assert inside <= 4 + 1  # and perhaps one that takes its mark back
    assert relay.begun <= begun + 4  # those that had gone through the gate, and had not come to their first layer
    assert read_version(engine.slot(INPUT)) == PRIMES[1]
