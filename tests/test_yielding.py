"""Loads that yield: the controller on a simulated machine, law by law, each with a planted bug that it must catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import quantiles

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hotglm
from hotglm.errors import ArgumentError
from hotglm.weights import pace as paces
from hotglm.weights import yielding
from hotglm.weights.pace import PIECE_NBYTES, Pace, Senses, rest
from hotglm.weights.workers import Cancellation
from hotglm.weights.yielding import INTERVAL_S, STEPS, Work, Yielding, next_share
from support.loaded_machine import Machine, load

POLICY = Yielding()
PIECE_S = 0.001
LAG_S = INTERVAL_S + PIECE_S / POLICY.min_share
"""An interval ends with the first piece that ends after it."""


def during(start_s: float, stop_s: float, value: float, otherwise: float) -> Callable[[float], float]:
    return lambda now_s: value if start_s <= now_s < stop_s else otherwise


# -- the laws ----------------------------------------------------------------------------------------------------------


def law_alone_it_rises_to_its_largest_share() -> None:
    """From the smallest share, step by step, in `STEPS` intervals; there it stays."""
    samples, _ = load(Machine(), POLICY, num_pieces=600)
    shares = [sample.share for sample in samples]
    assert shares[0] == POLICY.min_share
    assert shares == sorted(shares)
    risen = next(sample for sample in samples if sample.share == POLICY.max_share)
    assert risen.now_s <= STEPS * LAG_S
    assert shares[-1] == POLICY.max_share


def law_the_share_is_the_part_of_the_time() -> None:
    """Over any second at its largest share, it is busy for that part of it."""
    machine = Machine()
    load(machine, POLICY, num_pieces=900)
    busy_s = sum(ended - begun for begun, ended in machine.worked if 1.0 <= begun < 2.0)
    assert busy_s == pytest.approx(POLICY.max_share, rel=0.05)


def law_contention_is_felt_by_cost() -> None:
    """Pieces that cost half as much again bring it down to its smallest share, by halves, each in an interval."""
    samples, pace = load(Machine(excess=during(1.0, 99.0, 1.5, 1.0)), POLICY, num_pieces=500)
    fallen = next(sample for sample in samples if sample.now_s > 1.0 and sample.share == POLICY.min_share)
    assert fallen.now_s - 1.0 <= (1 + math.ceil(math.log2(POLICY.max_share / POLICY.min_share))) * LAG_S
    assert samples[-1].share == POLICY.min_share
    assert pace.record.num_contended > 2


def law_a_bus_is_felt_by_those_who_use_it() -> None:
    """Reading that costs twice as much is felt beside eight times as much hashing that costs what it did."""
    machine = Machine()
    pace = Pace(POLICY, senses=machine.senses())
    with pace.working(Cancellation()):
        for _ in range(600):
            rest(Work.READ, PIECE_NBYTES)
            machine.work(PIECE_S / 8 * (1 if machine.now_s < 1.0 else 2))
            rest(Work.HASH, PIECE_NBYTES)
            machine.work(PIECE_S)
            rest(Work.SCAN, PIECE_NBYTES)  # and what hardly matters may cost what it likes
            machine.work(PIECE_S / 100 * (1 + int(machine.now_s * 1000) % 2))
            assert machine.now_s < 0.7 or machine.now_s > 1.0 or pace.share == POLICY.max_share
        rest()
    assert pace.share == POLICY.min_share


def law_contention_is_felt_by_queueing() -> None:
    """A fifth of its time spent in the queue for a core does the same, at the same cost."""
    samples, _ = load(Machine(queue=during(1.0, 99.0, 0.25, 0.0)), POLICY, num_pieces=500)
    assert samples[-1].share == POLICY.min_share


def law_it_recovers() -> None:
    """When the machine is left alone again, it is back at its largest share within `STEPS` intervals."""
    samples, _ = load(Machine(excess=during(1.0, 2.0, 1.5, 1.0)), POLICY, num_pieces=900)
    assert any(sample.share == POLICY.min_share for sample in samples if 1.5 < sample.now_s < 2.0)
    risen = next(sample for sample in samples if sample.now_s > 2.0 and sample.share == POLICY.max_share)
    assert risen.now_s - 2.0 <= (STEPS + 1) * LAG_S


def law_it_ends() -> None:
    """Whatever is sensed, and for ever: work of `B` ends within `B / min_share`, and queueing as it may."""
    machine = Machine(excess=lambda now_s: 1.0 + now_s, queue=lambda now_s: 0.5)
    samples, _ = load(machine, POLICY, num_pieces=200)
    assert min(sample.share for sample in samples) >= POLICY.min_share
    assert machine.now_s <= machine.queued_s + machine.used_s / POLICY.min_share + 2 * LAG_S


def law_a_disk_is_no_contention_and_waiting_for_it_is_pause_enough() -> None:
    """Pieces that wait for a disk longer than they work are not judged, and not paused for again."""
    machine = Machine()
    samples, pace = load(machine, POLICY, num_pieces=300, disk_s=0.02)
    assert samples[-1].share == POLICY.max_share
    assert pace.record.yielded_s <= INTERVAL_S
    assert machine.now_s == pytest.approx(300 * 0.021, rel=0.02)


def law_a_slower_machine_is_got_used_to() -> None:
    """Where everything costs more for good, that is no contention any more after 1200 intervals."""
    machine = Machine(excess=during(1.0, 999.0, 1.5, 1.0))
    samples, _ = load(machine, POLICY, num_pieces=6000)
    used_to = next(sample for sample in samples if sample.now_s > 2.0 and sample.share == POLICY.max_share)
    assert used_to.now_s <= 1.0 + (1200 + STEPS) * LAG_S


def law_a_small_excess_does_not_make_it_swing() -> None:
    """Noise below the limits changes nothing: no oscillation."""
    machine = Machine(excess=lambda now_s: 1.0 + 0.2 * (int(now_s * 1000) % 2), queue=lambda now_s: 0.05)
    samples, _ = load(machine, POLICY, num_pieces=900)
    assert {sample.share for sample in samples if sample.now_s > 1.0} == {POLICY.max_share}


def law_a_service_at_70_percent_keeps_its_tail() -> None:
    """p99 at most 1.10 of steady, where a load at will costs every pass 30 %, whether the load feels it or not."""
    for felt in (1.0, 1.4):
        pass_s, every_s, num_passes = 0.007, 0.010, 300
        machine = Machine(excess=lambda now_s, felt=felt: felt if now_s % 0.010 < 0.007 else 1.0)  # type: ignore[misc]
        load(machine, POLICY, num_pieces=1200, piece_s=0.0005)
        taken = [machine.slow(i * every_s, pass_s, slowdown=0.3) / pass_s for i in range(num_passes)]
        assert quantiles(taken, n=100)[98] <= 1.10


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_controller_keeps_its_laws(law: Callable[[], None]) -> None:
    """Each as it says."""
    law()


def keep_all() -> None:
    for law in LAWS:
        law()


# -- planted -----------------------------------------------------------------------------------------------------------


def plant_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    def plunge(share: float, policy: Yielding, *, is_contended: bool) -> float:
        return share / 2 if is_contended else next_share(share, policy, is_contended=False)

    monkeypatch.setattr(yielding, "next_share", plunge)


def plant_no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def soar(share: float, policy: Yielding, *, is_contended: bool) -> float:
        found = next_share(share, policy, is_contended=is_contended)
        return found if is_contended else min(1.0, share + policy.max_share / STEPS)

    monkeypatch.setattr(yielding, "next_share", soar)


def plant_no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def sink(share: float, policy: Yielding, *, is_contended: bool) -> float:
        return next_share(share, policy, is_contended=True) if is_contended else share

    monkeypatch.setattr(yielding, "next_share", sink)


def plant_timid_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "_BACK_OFF", 0.95)


def plant_deaf_to_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "EXCESS", math.inf)


def plant_deaf_to_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "QUEUED", math.inf)


def plant_jumpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "EXCESS", 1.02)


def plant_cost_by_the_clock_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    senses = Machine.senses
    monkeypatch.setattr(Machine, "senses", lambda machine: replace(senses(machine), used=lambda: machine.now_s))


def plant_never_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paces._Worker, "_pause", lambda worker: None)


def plant_never_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "_NUM_REMEMBERED", 10**9)


def plant_pauses_for_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Pace.note

    def lose_the_wall(pace: Pace, work: Work, nbytes: int, *, wall_s: float, used_s: float, queued_s: float) -> float:
        return note(pace, work, nbytes, wall_s=wall_s, used_s=used_s, queued_s=queued_s) + wall_s

    monkeypatch.setattr(Pace, "note", lose_the_wall)


PLANTED = [value for name, value in sorted(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_breaks_a_law(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bug that a controller of this kind can have is caught by one of the laws at least."""
    plant(monkeypatch)
    with pytest.raises((AssertionError, StopIteration)):
        keep_all()


# -- any machine -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shares=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(sorted),
    moods=st.lists(st.tuples(st.floats(1.0, 5.0), st.floats(0.0, 3.0)), min_size=1, max_size=20),
    disk_s=st.sampled_from([0.0, 0.0, 0.005]),
)
def test_the_bounds_hold_on_any_machine(shares: list[float], moods: list[tuple[float, float]], disk_s: float) -> None:
    """`W + B / max_share <= T <= W + B / min_share`, to one step, and no share is outside of its bounds."""
    policy = Yielding(min_share=shares[0], max_share=shares[1])
    machine = Machine(
        excess=lambda now_s: moods[int(now_s / 0.1) % len(moods)][0],
        queue=lambda now_s: moods[int(now_s / 0.1) % len(moods)][1],
    )
    samples, pace = load(machine, policy, num_pieces=100, disk_s=disk_s)
    assert all(policy.min_share <= sample.share <= policy.max_share for sample in samples)
    waited_s = machine.queued_s + 100 * disk_s
    piece_s = 5 * PIECE_S / policy.min_share + INTERVAL_S
    assert machine.now_s <= waited_s + machine.used_s / policy.min_share + piece_s
    assert machine.now_s >= machine.used_s / policy.max_share - piece_s
    record = pace.record
    assert record.busy_s == pytest.approx(machine.used_s)
    assert record.least_share == min([policy.min_share, *(sample.share for sample in samples)])


def test_small_pieces_are_paced_and_not_judged() -> None:
    """Pieces that are mostly Python are no sign of contention; they are paused for all the same."""
    machine = Machine(excess=during(1.0, 99.0, 3.0, 1.0))
    pace = Pace(POLICY, senses=machine.senses())
    with pace.working(Cancellation()):
        for _ in range(9000):
            rest(Work.HASH, 4096)
            machine.work(PIECE_S / 10)
        rest()
    assert pace.share == POLICY.max_share
    assert machine.used_s <= machine.now_s * POLICY.max_share * 1.01


def test_an_upload_is_judged_by_the_time_until_it_was_seen_done() -> None:
    """A copy engine that somebody else wants takes longer, and no core is busier for it; that is contention."""
    machine = Machine()
    pace, shares = Pace(POLICY, senses=machine.senses()), [0.0]
    with pace.working(Cancellation()):
        for _ in range(400):
            rest(Work.UPLOAD, PIECE_NBYTES)
            machine.wait(PIECE_S if machine.now_s < 1.0 else 2 * PIECE_S)
            shares.append(pace.share)
        rest()
    assert (max(shares), pace.share) == (POLICY.max_share, POLICY.min_share)


def test_a_pause_ends_with_its_stage() -> None:
    """A stage that is cancelled does not wait out a pause."""
    machine, cancellation = Machine(), Cancellation()

    def sleep(seconds: float) -> None:
        machine.wait(seconds)
        cancellation.cancel(KeyboardInterrupt())

    pace = Pace(POLICY, senses=replace(machine.senses(), sleep=sleep))
    with pace.working(cancellation):
        machine.work(60.0)
        with pytest.raises(KeyboardInterrupt):
            rest()
    assert machine.now_s < 60.1
    rest()  # and nothing is left of it: this thread works at will again
    assert not paces.is_yielding()


def test_without_a_pace_nothing_is_sensed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load at will is cut into no pieces and looks at no clock."""
    monkeypatch.setattr(paces._Worker, "rest", lambda *_: pytest.fail("rested"))
    data = memoryview(bytes(3 * PIECE_NBYTES))
    assert [piece.nbytes for piece in paces.cut_work(data, Work.HASH)] == [3 * PIECE_NBYTES]


def test_a_system_that_tells_of_no_queue_is_worked_on_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, or it is closed to us, nothing is sensed there, and no descriptor is left."""
    queue = Senses().open_queue()
    assert queue.read() >= 0.0
    queue.close()
    queue.close()
    assert queue.read() == 0.0

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr("os.open", refuse)
    assert Senses().open_queue().read() == 0.0


@pytest.mark.parametrize(
    "shares", [{"max_share": 0.0, "min_share": 0.0}, {"max_share": 1.5}, {"min_share": 0.5}, {"min_share": -1.0}]
)
def test_shares_that_cannot_be_meant_are_refused(shares: dict[str, float]) -> None:
    """They are in order, above nothing and at most all; a policy takes nothing else for a pace."""
    with pytest.raises(ArgumentError, match="min_share"):
        hotglm.Yielding(**shares)
    with pytest.raises(ArgumentError, match="pace"):
        hotglm.StagePolicy(pace=0.5)  # type: ignore[arg-type]
