"""Swaps in place on devices: every wait of [Note: exchange] in weights/device_exchange.py, and every failure undone.

A small program does what a commit in place does: passes on two streams, a gate that was seen empty, an exchange, passes
again. The fake device carries the work out in any order that the protocol leaves open.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from hotglm.weights import device_exchange, exchanges
from hotglm.weights.device import Event
from hotglm.weights.device_arena import DeviceArena
from hotglm.weights.device_exchange import DeviceExchange, wait_for_work
from support.exchange_program import Failing, Program, start
from support.fake_device import Choices, FakeDevice, FakeEvent, every_schedule


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake goes on when it is asked, and not with time."""
    monkeypatch.setattr(device_exchange, "_MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(device_exchange, "_MAX_PAUSE_S", 0.0)


ALL_STREAMS = ("default", "second", "side")
"""Two that passes use, and the one on which a stage reads what is live."""


@pytest.mark.parametrize("sizes", [(3, 0, 40, 7, 1), (1,), (300,), (5, 5, 5, 5, 5, 5, 5)])
def test_every_pass_reads_its_own_version(sizes: tuple[int, ...]) -> None:
    """Whatever the device does when, passes before and after a swap read their version, and the image gets the old."""
    assert all(Program(Choices(seed), sizes=sizes).run(num_swaps=3, streams=ALL_STREAMS) for seed in range(10))


def test_every_schedule_of_a_small_program_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap of one tensor by way of the room, one stream: not one of all schedules there are goes wrong."""
    # A device that does nothing while the host asks has no end of schedules: here it goes on until it is done.
    monkeypatch.setattr(FakeEvent, "is_done", lambda event: event.wait() is None)
    results = [
        Program(choices, sizes=(2,), is_coarse=True).run(num_swaps=1, streams=("default",))
        for choices in itertools.islice(every_schedule(), 20_000)
    ]
    assert (100 < len(results) < 20_000, results.count(False)) == (True, 0)


def forget_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exchanges, "wait_for_work", lambda devices, timeout_s: None)


def record_before_the_gate_is_empty(patch: pytest.MonkeyPatch) -> None:
    """Record the events of the passes when the exchange is made, before the last of them are there."""
    made, early = Program.exchange, list[Event]()

    def make(program: Program) -> DeviceExchange:
        exchange: DeviceExchange = made(program)
        early[:] = program.device.record_passes()
        program.passes(program.seen[-1][0])
        return exchange

    def wait_for_early(devices: Any, timeout_s: float) -> None:
        for event in early:
            event.wait()

    patch.setattr(Program, "exchange", make)
    patch.setattr(exchanges, "wait_for_work", wait_for_early)


def forget_the_side_stream(patch: pytest.MonkeyPatch) -> None:
    def wait_for_passes(devices: Any, timeout_s: float) -> None:
        for device in devices:
            for event in device.record_passes():
                event.wait()

    patch.setattr(exchanges, "wait_for_work", wait_for_passes)


def publish_too_early(patch: pytest.MonkeyPatch) -> None:
    submit = DeviceExchange.submit

    def forget(exchange: DeviceExchange) -> Event:
        submit(exchange)
        return cast(FakeDevice, exchange.device).record_on("idle")

    patch.setattr(DeviceExchange, "submit", forget)


def record_too_early(patch: pytest.MonkeyPatch) -> None:
    submit = DeviceExchange.submit

    def record(exchange: DeviceExchange) -> Event:
        event = exchange._lane.record()
        submit(exchange)
        return event

    patch.setattr(DeviceExchange, "submit", record)


def forget_to_settle(patch: pytest.MonkeyPatch) -> None:
    """Bring the old bytes home without waiting until they are there."""
    settle = DeviceExchange.settle

    def hurry(exchange: DeviceExchange) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(FakeEvent, "wait", lambda event: None)
            settle(exchange)

    patch.setattr(DeviceExchange, "settle", hurry)


def bring_home_from_the_end(patch: pytest.MonkeyPatch) -> None:
    """Bring home in the order of the exchange, over what is still aside."""
    settle = DeviceExchange.settle

    def turn(exchange: DeviceExchange) -> None:
        exchange._steps.reverse()
        settle(exchange)

    patch.setattr(DeviceExchange, "settle", turn)


def copy_on_two_streams(patch: pytest.MonkeyPatch) -> None:
    """Submit every other set of copies to another stream: the two copies of a step, and steps, are not ordered."""
    copy, count = DeviceExchange._copy, iter(range(1 << 20))

    def copy_there(exchange: DeviceExchange, copies: Any) -> None:
        lane, exchange._lane = exchange._lane, exchange.device.lane(1) if next(count) % 2 else exchange._lane
        copy(exchange, copies)
        exchange._lane = lane

    patch.setattr(DeviceExchange, "_copy", copy_there)


HAZARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "passes": forget_passes,
    "reads of a stage": forget_the_side_stream,
    "early events of passes": record_before_the_gate_is_empty,
    "publish": publish_too_early,
    "early event": record_too_early,
    "home is not waited for": forget_to_settle,
    "home in the wrong order": bring_home_from_the_end,
    "copies on two streams": copy_on_two_streams,
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_missing_wait_is_caught(hazard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait that is planted to be missing makes a pass, or the undo image, wrong in one of a few schedules."""
    HAZARDS[hazard](monkeypatch)
    assert not all(Program(Choices(seed)).run(num_swaps=3, streams=ALL_STREAMS) for seed in range(40))


def test_a_room_that_is_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps larger than the room behind the image would write over what has not been copied yet."""
    monkeypatch.setattr(device_exchange, "_find_steps", _one_step)
    assert not Program(Choices(0)).run(num_swaps=2)


def _one_step(pairs: Any, block: DeviceArena) -> Iterator[Any]:
    parts = sorted(device_exchange._find_parts(pairs, block), key=lambda part: part.start, reverse=True)
    yield device_exchange._step_inside(parts, block)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_half", [False, True], ids=["before a copy", "in the middle of it"])
def test_a_failure_at_every_copy_is_undone(monkeypatch: pytest.MonkeyPatch, *, is_half: bool) -> None:
    """Both sides hold what they held, once `undo` has returned, wherever it failed, and later passes read that."""
    num_copies = sum(bool(copies[0]) for step in Program(Choices(0)).exchange()._steps for copies in step.there)
    assert num_copies > 8
    for nth in range(1, num_copies + 1):
        program = start(Choices(nth))
        exchange = program.exchange()
        wait_for_work([exchange.device], timeout_s=10.0)
        with monkeypatch.context() as patch:
            Failing(nth, is_half=is_half).plant(patch)
            with pytest.raises(MemoryError, match="planted"):
                exchange.submit()
        exchange.undo()
        assert (program.holds(program.live, 0), program.holds(program.image, 1)) == (True, True), nth
        program.passes(0)
        assert program.run(num_swaps=1)


@pytest.mark.parametrize("nth", range(1, 9))
def test_an_undo_that_fails_goes_on_where_it_failed(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """A second `undo` ends what the first has begun; so it is with `settle`."""
    program = start(Choices(nth))
    exchange = program.exchange()
    wait_for_work([exchange.device], timeout_s=10.0)
    exchange.submit()
    for way in (exchange.undo, exchange.settle):
        if way == exchange.settle:
            exchange.submit().wait()
        with monkeypatch.context() as patch:
            Failing(nth, is_half=True).plant(patch)
            with pytest.raises(MemoryError, match="planted"):
                way()
        way()
        versions = (0, 1) if way == exchange.undo else (1, 0)
        assert [program.holds(program.live, versions[0]), program.holds(program.image, versions[1])] == [True, True]


def test_an_undo_that_is_not_ordered_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies back on another stream may come before the copies that they take back."""
    undo = DeviceExchange.undo

    def turn(exchange: DeviceExchange) -> None:
        exchange._lane = exchange.device.lane(1)
        undo(exchange)

    monkeypatch.setattr(DeviceExchange, "undo", turn)
    results = []
    for seed in range(20):
        program = start(Choices(seed))
        exchange = program.exchange()
        wait_for_work([exchange.device], timeout_s=10.0)
        exchange.submit()
        exchange.undo()
        program.device.finish()
        results.append(program.holds(program.live, 0) and program.holds(program.image, 1))
    assert not all(results)
