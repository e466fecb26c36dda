"""All interleavings of passes and one commit in place at the steps of the gate, each of them run (F21).

A pass stops before it adds its mark, between its mark and the look at the gate, and in the middle of its layers. The
commit stops before it closes the gate, before it looks whether anybody is inside, and in the middle of its exchange,
where two layers are new and the others are old. Nobody waits here: a pass that would wait for the commit ends without
an output, and a commit that would wait for a pass fails.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

import hotglm
from hotglm import seam
from hotglm.slot.closing import Closing
from hotglm.slot.gate import Gate, Mark, Ticket
from hotglm.slot.in_place import InPlaceAdmission
from support.planted import PlainGate, plant_gate
from support.schedule import Actor, Outcome, Schedule, explore
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, weights


class HeldBackError(Exception):
    """A pass that would wait for the commit; here it ends instead."""


class StepMarks(set[Mark]):
    """The marks of a gate, with a stop on either side of adding one."""

    def __init__(self, point: Callable[[str], None]) -> None:
        super().__init__()
        self._point = point

    def add(self, mark: Mark) -> None:
        self._point("will mark")
        super().add(mark)
        self._point("has marked")


class StepSeam(seam.Seam):
    """A stop in the middle of the exchange."""

    def __init__(self, point: Callable[[str], None]) -> None:
        self._point = point
        self._num = 0

    def reach(self, place: str) -> None:
        if place == "exchange.copy":
            self._num += 1
            if self._num == 6:  # two of four layers are new, and the third is on its way
                self._point("half written")


class Talker(Oracle):
    """An oracle with a coroutine."""

    async def answer(self) -> torch.Tensor:
        output: torch.Tensor = self(INPUT)
        return output


async def read_in_session(slot: hotglm.ModuleSlot) -> torch.Tensor:
    async with slot.acquire_async() as generation:
        output: torch.Tensor = generation.module(INPUT)
        return output


READERS: dict[str, Callable[[hotglm.ModuleSlot], torch.Tensor]] = {
    "call": lambda slot: slot(INPUT),
    "coroutine": lambda slot: asyncio.run(slot.answer()),
    "asynchronous session": lambda slot: asyncio.run(read_in_session(slot)),
}


class Program:
    """A slot with one version staged, passes and a commit, made anew for each schedule."""

    def __init__(
        self, *, num_passes: int, plant: Callable[[Gate], None], patch: pytest.MonkeyPatch, kind: str = "call"
    ) -> None:
        self._schedule: Schedule | None = None
        self._kind = kind
        self.seen: dict[str, str] = {}
        self._num_passes = num_passes
        self.slot = hotglm.ModuleSlot(
            Talker(PRIMES[0], boundary=self._at_layer),
            name="oracle",
            version=name_version(PRIMES[0]),
            policy=LEAN,
            swap=hotglm.InPlace(),
        )
        self._staged = self.slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
        self.gate = plant_gate(self.slot)
        plant(self.gate)
        self._instrument(self.gate)
        patch.setattr(seam, "active", StepSeam(self._point))

    def _instrument(self, gate: PlainGate) -> None:
        gate._inside = StepMarks(self._point)
        close = gate.close

        def step_close(closing: Closing) -> None:
            self._point("will close")
            close(closing)

        def step_wait_empty(closing: Closing, **options: object) -> bool:
            self._point("will look")
            return not gate._inside

        def step_knock(closing: Closing) -> None:
            raise HeldBackError

        gate.close = step_close  # type: ignore[method-assign]
        gate.wait_empty = step_wait_empty  # type: ignore[method-assign]
        gate._knock = step_knock  # type: ignore[method-assign]

    def build(self) -> tuple[Sequence[Actor], Callable[[Schedule], None]]:
        names = "ab"[: self._num_passes]
        passes = [
            Actor(
                name,
                lambda name=name: self._read(name),  # type: ignore[misc]
                independent_of=frozenset(names) - {name},
                twin_of=None if name == "a" else "a",
            )
            for name in names
        ]
        return [*passes, Actor("commit", self._commit)], self._use

    def _use(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def _point(self, name: str) -> None:
        if self._schedule is not None:
            self._schedule.point(name)

    def _at_layer(self, layer: int) -> None:
        if layer == 2 and threading.current_thread().name.startswith("pass"):
            self._point("between layers")

    def _read(self, name: str) -> None:
        threading.current_thread().name = f"pass {name}"
        try:
            self.seen[name] = name_version(read_version(READERS[self._kind](self.slot)))
        except HeldBackError:
            self.seen[name] = "held back"

    def _commit(self) -> None:
        try:
            self.slot.commit(self._staged)
            self.seen["commit"] = "made"
        except hotglm.DrainTimeoutError:
            self.seen["commit"] = "waits"

    def find_violations(self, outcome: Outcome) -> list[str]:
        found = [f"raised {failure!r}" for failure in outcome.failures]
        allowed = {name_version(PRIMES[0]), "held back"}
        allowed |= {name_version(PRIMES[1])} if self.seen["commit"] == "made" else set()
        passes = {name: seen for name, seen in self.seen.items() if name != "commit"}
        found += [f"pass {name} saw {seen}" for name, seen in passes.items() if seen not in allowed]
        live = PRIMES[1] if self.seen["commit"] == "made" else PRIMES[0]
        if read_version(self.slot.live.module(INPUT)) != live or str(self.slot.version) != name_version(live):
            found.append("what is live is not what was published")
        if self.gate.closing is not None or self.gate.count_inside():
            found.append("the gate is not open and empty in the end")
        return found


def run_all(
    *, num_passes: int, plant: Callable[[Gate], None], kind: str = "call", until_violated: bool = False
) -> tuple[list[object], set[object]]:
    """Return the violations of all schedules, and every combination of what was seen."""
    programs: list[Program] = []
    violations: list[object] = []
    seen: set[object] = set()
    with pytest.MonkeyPatch.context() as patch:

        def build() -> tuple[Sequence[Actor], Callable[[Schedule], None]]:
            patch.undo()
            programs[:] = [Program(num_passes=num_passes, plant=plant, patch=patch, kind=kind)]
            return programs[0].build()

        for outcome in explore(build):
            programs[0]._schedule = None
            found = programs[0].find_violations(outcome)
            violations += [(*found, *outcome.trace)] if found else []
            seen.add(tuple(sorted(programs[0].seen.items())))
            if found and until_violated:
                break
    return violations, seen


@pytest.mark.parametrize(
    ("num_passes", "kind"),
    [*((1, kind) for kind in READERS), pytest.param(2, "call", marks=pytest.mark.slow)],
)
def test_in_every_order_a_pass_sees_one_version(num_passes: int, kind: str) -> None:
    """C14, F21: whatever the order of their steps, nobody reads what is half written, and the gate ends open."""
    violations, seen = run_all(num_passes=num_passes, plant=lambda gate: None, kind=kind)
    assert violations == []
    old, new = name_version(PRIMES[0]), name_version(PRIMES[1])
    if num_passes == 1:
        pairs = {("made", old), ("made", new), ("made", "held back"), ("waits", old)}
        assert seen == {(("a", a), ("commit", commit)) for commit, a in pairs}


def look_first(gate: Gate) -> None:
    """Bug: a pass looks whether the gate is closing, and only then adds its mark."""

    def try_enter(has_older: Callable[[Mark], bool]) -> Ticket | None:
        if gate.closing is not None and not has_older(Mark(Ticket())):
            return None
        ticket = Ticket()
        mark = ticket.mark = Mark(ticket, gate._inside.discard)
        mark.thread, mark.since_s, mark.what = threading.get_ident(), 0.0, "pass"
        mark.is_call = True
        gate._inside.add(mark)
        return ticket

    gate._try_enter = try_enter  # type: ignore[method-assign]


def close_late(gate: Gate) -> None:
    """Bug: a commit looks whether anybody is inside, and only then closes the gate."""
    gate.close = lambda closing: None  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("plant", [look_first, close_late])
def test_the_other_order_of_two_steps_is_found(plant: Callable[[Gate], None], kind: str) -> None:
    """C14, control: where either side looks before it says what it does, some order tears a pass."""
    violations, _ = run_all(num_passes=1, plant=plant, kind=kind, until_violated=True)
    assert violations != []


def test_the_gate_of_a_program_is_the_one_that_passes_go_through() -> None:
    """The instrumented gate is the slot's own, not one beside it."""
    with pytest.MonkeyPatch.context() as patch:
        program = Program(num_passes=1, plant=lambda gate: None, patch=patch)
        admission = program.slot._admission
        assert isinstance(admission, InPlaceAdmission)
        assert admission.gate is program.gate
        with program.slot.acquire():
            assert program.gate.count_inside() == 1
