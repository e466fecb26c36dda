"""All interleavings of two readers and one swapper at instrumented points, each of them run (F21).

A reader stops where it has loaded the publication but not yet its `call`, before the call, and between two layers. The
swapper stops before and after everything it does to the memory that readers may be in: before it stops holding a
generation, before it asks whether the memory is free, before it leases it, after it has filled it, under the writers'
lock right before the store, and after. Readers only read what the swapper writes, so where their steps follow each
other directly, one order of them stands for both (`support.schedule`).
"""

from __future__ import annotations

import dis
import math
import sys
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import hotglm
from hotglm.slot.admission import Admission
from hotglm.slot.claim import StageClaim
from hotglm.slot.generation import Retired
from hotglm.slot.memory import ArenaPool
from hotglm.weights.arena import Arena, Lease
from support.planted import forget_pins
from support.schedule import Actor, Outcome, Schedule, explore
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, weights

CALL = hotglm.ModuleSlot.__call__.__code__


def find_offsets(*names: str) -> dict[int, str]:
    """Return the instructions of `ModuleSlot.__call__` at which a reader stops, by offset."""
    found: dict[int, str] = {}
    for instruction in dis.get_instructions(CALL):
        if instruction.argval == "call" and instruction.opname.startswith("LOAD"):
            found[instruction.offset] = "loaded live"
        elif instruction.opname == "CALL_FUNCTION_EX":
            found[instruction.offset] = "loaded call"
    assert len(found) == 2
    return {offset: name for offset, name in found.items() if name in names}


@dataclass(slots=True)
class Scenario:
    """What the swapper does, and where everybody stops.

    Attributes:
        swaps: primes to update to; 0 means a rollback.
        reader_points: where readers stop.
        swapper_points: where the swapper stops.
    """

    swaps: tuple[int, ...]
    reader_points: tuple[str, ...]
    swapper_points: tuple[str, ...]
    planted: Callable[[hotglm.ModuleSlot], object] | None = None
    offsets: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = find_offsets(*self.reader_points)


class Program:
    """A slot with two arenas in use, two readers and a swapper, made anew for each schedule."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.schedule: Schedule | None = None
        self.expected: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.inside: dict[str, int] = {}  # readers between two layers, and the arena they are in
        self.violations: list[str] = []
        memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.0)
        self.slot = hotglm.ModuleSlot(
            Oracle(PRIMES[0], boundary=self.at_layer), name="oracle", version="1.0.0", policy=LEAN, memory=memory
        )
        if scenario.planted is not None:
            scenario.planted(self.slot)
        for prime in PRIMES[1:3]:
            self.slot.update(weights(prime), version=name_version(prime))

    def build(self) -> tuple[Sequence[Actor], Callable[[Schedule], None]]:
        first = Actor("a", lambda: self.read("a"), independent_of=frozenset({"b"}))
        second = Actor("b", lambda: self.read("b"), independent_of=frozenset({"a"}), twin_of="a")
        return [first, second, Actor("swapper", self.swap)], self.use

    def use(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def point(self, name: str) -> None:
        schedule = self.schedule
        if schedule is not None:
            schedule.point(name)

    # -- readers -----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> None:
        threading.current_thread().name = f"reader {name}"
        # Nobody else runs from here to the load of `live`, so this is the version that the whole pass must be in.
        self.expected[name] = str(self.slot.version)
        sys.settrace(self.trace)
        try:
            output = self.slot(INPUT)
        finally:
            sys.settrace(None)
        self.outputs[name] = name_version(read_version(output))

    def trace(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if frame.f_code is not CALL:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in self.scenario.offsets:
            self.point(self.scenario.offsets[frame.f_lasti])
        return self.trace

    def at_layer(self, layer: int) -> None:
        thread = threading.current_thread().name
        if layer == 2 and thread.startswith("reader") and "between layers" in self.scenario.reader_points:
            caller = sys._getframe(1)
            name = thread.removeprefix("reader ")
            self.inside[name] = caller.f_locals["self"].w3.data_ptr()
            self.point("between layers")
            del self.inside[name]

    # -- the swapper -------------------------------------------------------------------------------------------------

    def swap(self) -> None:
        for prime in self.scenario.swaps:
            if prime:
                self.slot.update(weights(prime), version=name_version(prime))
            else:
                self.slot.rollback()

    def at(self, name: str) -> None:
        if name in self.scenario.swapper_points:
            self.point(name)

    def verify_lease(self, arena: Arena) -> None:
        for name, address in self.inside.items():
            if arena.address <= address < arena.address + arena.nbytes:
                self.violations.append(f"the arena that reader {name} runs in was leased")

    def find_violations(self, outcome: Outcome) -> list[str]:
        found = [*self.violations, *(f"raised {failure!r}" for failure in outcome.failures)]
        if self.outputs != self.expected:
            found.append(f"readers began in {self.expected} and ended in {self.outputs}")
        if name_version(read_version(self.slot(INPUT))) != name_version(self.scenario.swaps[-1]):
            found.append("what was published last does not serve")
        return found


_program: list[Program] = []


def at(name: str) -> None:
    if _program:
        _program[-1].at(name)


@pytest.fixture(autouse=True)
def _instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the swapper's stopping points around the real code, by wrapping what it calls."""
    lease, retire, claim, commit = Arena.lease, Admission.retire, StageClaim.take, Admission.commit
    find_free, rollback = ArenaPool.find_free, Admission.rollback
    is_free: Callable[[Retired], bool] = Retired.is_free.fget  # type: ignore[attr-defined]

    def lease_stopping(arena: Arena) -> Lease:
        at("lease")
        if _program:
            _program[-1].verify_lease(arena)
        return lease(arena)

    def wrap(function: Callable[..., Any], *, before: str = "", after: str = "") -> Callable[..., Any]:
        def stopping(*args: Any, **kwargs: Any) -> Any:
            at(before)
            result = function(*args, **kwargs)
            at(after)
            return result

        return stopping

    monkeypatch.setattr(Arena, "lease", lease_stopping)
    monkeypatch.setattr(Admission, "retire", wrap(retire, before="retire"))
    monkeypatch.setattr(Retired, "is_free", property(wrap(is_free, before="is free")))
    monkeypatch.setattr(ArenaPool, "find_free", wrap(find_free, before="find free"))
    monkeypatch.setattr(StageClaim, "take", wrap(claim, before="filled", after="claimed"))
    monkeypatch.setattr(Admission, "commit", wrap(commit, after="published"))
    monkeypatch.setattr(Admission, "rollback", wrap(rollback, after="published"))


@dataclass(slots=True)
class Found:
    """What an exploration found."""

    num_schedules: int = 0
    traces: set[tuple[str, ...]] = field(default_factory=set)
    violations: list[tuple[str, ...]] = field(default_factory=list)


def run_all(scenario: Scenario, *, until_violated: bool = False) -> Found:
    found = Found()

    def build() -> tuple[Sequence[Actor], Callable[[Schedule], None]]:
        _program[:] = []
        program = Program(scenario)
        _program[:] = [program]
        return program.build()

    for outcome in explore(build):
        program = _program[-1]
        _program[:] = []
        found.num_schedules += 1
        found.traces.add(outcome.trace)
        violations = program.find_violations(outcome)
        if violations:
            found.violations.append((*violations, *outcome.trace))
            if until_violated:
                break
    return found


PASSING = ("loaded live", "between layers")
BACK_AND_UP, UP_TWICE = (0, PRIMES[3]), (PRIMES[3], PRIMES[4])

SCENARIOS = {
    "pass, rollback and update": Scenario(BACK_AND_UP, PASSING, ("lease", "published")),
    "entry, rollback and update": Scenario(BACK_AND_UP, ("loaded live", "loaded call"), ("lease", "published")),
    "pass, two updates": Scenario(UP_TWICE, ("between layers",), ("retire", "lease", "published")),
}
LONG = {
    "every point of a pass": Scenario(BACK_AND_UP, (*PASSING, "loaded call"), ("lease", "published")),
    "every point of an update": Scenario(BACK_AND_UP, PASSING, ("retire", "lease", "filled", "claimed", "published")),
    "every point of two updates": Scenario(UP_TWICE, ("between layers",), ("retire", "is free", "lease", "published")),
}


@pytest.mark.parametrize(
    "scenario",
    [
        *(pytest.param(scenario, id=name) for name, scenario in SCENARIOS.items()),
        *(pytest.param(scenario, id=name, marks=pytest.mark.slow) for name, scenario in LONG.items()),
    ],
)
def test_every_pass_is_in_the_version_it_began_in_whatever_the_order(scenario: Scenario) -> None:
    """F21: in every interleaving each pass ends in the version it began in, and no arena is leased under a reader."""
    found = run_all(scenario)
    assert found.violations == []
    assert found.num_schedules == len(found.traces) >= count_schedules(scenario)


def count_schedules(scenario: Scenario) -> int:
    """Return from the points alone how many schedules there are at least.

    A reader of `r` steps and a swapper of `s` have C(r + s, r) orders. Two readers that commute choose theirs freely;
    the second never begins first, which leaves a little more than half.
    """
    num_reader = 1 + len(scenario.reader_points)
    num_swapper = 1 + sum(
        len(scenario.swapper_points) if prime else len({"published"} & set(scenario.swapper_points))
        for prime in scenario.swaps
    )
    return math.comb(num_reader + num_swapper, num_reader) ** 2 // 2


@pytest.mark.parametrize("scenario", [pytest.param(scenario, id=name) for name, scenario in SCENARIOS.items()])
def test_without_a_grace_period_some_order_tears(scenario: Scenario) -> None:
    """F21, control: the same exploration of a slot that forgets its pins finds violations."""
    found = run_all(replace(scenario, planted=forget_pins), until_violated=True)
    assert found.violations != []


def test_the_scheduler_runs_every_order_once() -> None:
    """Three actors of two steps that all depend on each other have 6! / (2! 2! 2!) = 90 orders."""
    orders = []

    def build() -> tuple[Sequence[Actor], Callable[[Schedule], None]]:
        schedules: list[Schedule] = []
        actors = [Actor(name, lambda: schedules[0].point("middle")) for name in "abc"]
        return actors, schedules.append

    for outcome in explore(build):
        assert outcome.failures == ()
        orders.append(outcome.order)
    assert len(orders) == len(set(orders)) == 90
    assert all(sorted(order) == list("aabbcc") for order in orders)
