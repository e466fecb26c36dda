"""Interrupts everywhere in an update: afterwards the old version or the new one serves, whole (F18, F19).

CPython delivers an interrupt (Ctrl-C, an exception that another thread sets) only where it looks for one: when a call
returns, when a function is entered and when a loop jumps back. `InterruptAt` raises at each such point of the caller's
thread in turn; that is finer than every statement, and leaves out the places that no interrupt can reach, such as
between the end of a `with` and the release of its lock. A real signal at random times then says the same.

Not used: `PyThreadState_SetAsyncExc`. While a thread starts another, both thread states carry the starter's number
(CPython 3.11), so that the exception may kill the new one and leave the starter waiting for it for ever.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

import hotglm
from support.interrupts import interrupt_rounds
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, run_in_thread, weights


class Interrupt(BaseException):
    """What no code catches by accident."""


def make_slot() -> hotglm.ModuleSlot:
    slot = hotglm.ModuleSlot(Oracle(PRIMES[0]), name="oracle", version=name_version(PRIMES[0]), policy=LEAN)
    for prime in PRIMES[1:4]:
        slot.update(weights(prime), version=name_version(prime))
    return slot


def update_to(slot: hotglm.ModuleSlot, prime: int) -> None:
    slot.update(weights(prime), version=name_version(prime))


def assert_serves(slot: hotglm.ModuleSlot, *primes: int) -> None:
    """The live generation is whole, is one of `primes`, and says which."""
    found = read_version(slot(INPUT))
    assert found in primes
    live = slot._admission.live
    assert str(live.generation.version) == name_version(found)
    assert live.history[-1].number == live.generation.number
    assert live.history[-1].epoch == live.epoch
    assert live.generation not in live.held


def assert_works(slot: hotglm.ModuleSlot) -> None:
    """Every lock is free: an update, a rollback and a confirmation go through, in another thread and in this one."""

    def use() -> None:
        for prime in (PRIMES[10], PRIMES[11]):
            update_to(slot, prime)
        slot.rollback()
        slot.confirm()
        assert_serves(slot, PRIMES[10])

    run_in_thread(use)
    update_to(slot, PRIMES[12])
    assert_serves(slot, PRIMES[12])
    assert slot.wait_drained(timeout_s=10) is None  # type: ignore[func-returns-value]  # it returns, that is all


_CHECKING = ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")


@functools.cache
def find_points(code: types.CodeType) -> frozenset[int]:
    """Return the offsets of instructions before which an interrupt can be delivered."""
    handlers = {}
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]  # dis has no public way to ask
        handlers.update(dict.fromkeys(range(entry.start, entry.end, 2), entry.target))
    instructions = list(dis.get_instructions(code))
    # CPython looks at the end of the first instruction of a pair; raising before the second is the same thing if the
    # same handler covers both.
    return frozenset(
        second.offset
        for first, second in itertools.pairwise(instructions)
        if first.opname in _CHECKING and handlers.get(first.offset) == handlers.get(second.offset)
    )


class InterruptAt:
    """A trace function that raises at the nth point inside hotglm at which the calling thread can be interrupted."""

    def __init__(self, target: int | None) -> None:
        self.num_points = 0
        self.where = ""
        self._target = target

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if "/hotglm/" not in name:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in find_points(frame.f_code):
            self.num_points += 1
            if self.num_points == self._target:
                self.where = f"{name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
                raise Interrupt(self.where)
        return self

    def run(self, action: Callable[[], object]) -> bool:
        """Run `action`; return whether it was interrupted."""
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for a frame that wants opcodes when tracing begins
        sys.settrace(self)
        try:
            action()
        except Interrupt:
            return True
        finally:
            sys.settrace(None)
        return False


def count_points(prepare: Callable[[], Callable[[], object]]) -> int:
    counter = InterruptAt(None)
    counter.run(prepare())
    return counter.num_points


@pytest.fixture(autouse=True)
def _drop_what_python_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an interrupt falls into a finaliser or the callback of a weak reference, Python reports it and goes on.

    The hook of pytest would keep the exception, and every frame below it.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda report: None)


@pytest.mark.parametrize("operation", ["update", "stage", "commit", "rollback", "confirm", "discard"])
def test_an_interrupt_at_every_point_leaves_one_whole_version(operation: str) -> None:
    """F18: wherever the caller is interrupted, the operation has happened whole or not at all, and locks are free."""
    target, step, before = PRIMES[20], 0, PRIMES[0]
    slot = make_slot()

    def prepare() -> Callable[[], object]:
        nonlocal before
        update_to(slot, PRIMES[4])
        update_to(slot, before := PRIMES[5])
        if operation in ("commit", "discard"):
            staged = slot.stage(weights(target), version=name_version(target))
            return lambda: slot.commit(staged) if operation == "commit" else staged.discard()
        actions: dict[str, Callable[[], object]] = {
            "update": lambda: update_to(slot, target),
            "stage": lambda: slot.stage(weights(target), version=name_version(target)),
            "rollback": slot.rollback,
            "confirm": slot.confirm,
        }
        return actions[operation]

    num_points = count_points(prepare)
    assert num_points >= 4
    while (step := step + 1) <= num_points:
        action = prepare()
        epoch, staged = slot.status().epoch, slot._core.stager.staged
        tracer = InterruptAt(step)
        tracer.run(action)
        after = {"update": target, "commit": target, "rollback": PRIMES[4]}.get(operation, before)
        try:
            assert_serves(slot, before, after)
            assert slot.status().epoch - epoch == (read_version(slot(INPUT)) == after != before)
            if operation == "commit" and staged is not None and slot.status().epoch == epoch:
                slot.commit(staged)  # P2: nothing has changed, so it can be committed again
                assert_serves(slot, target)
            del action, staged
            assert_works(slot)
        except BaseException as error:
            raise AssertionError(f"after an interrupt at {tracer.where}") from error


@pytest.mark.parametrize("num_rounds", [200, pytest.param(10_000, marks=pytest.mark.stress)])
def test_a_keyboard_interrupt_at_any_time_leaves_one_whole_version(num_rounds: int) -> None:
    """F19: Ctrl-C between any two bytecodes of an update, a rollback or a session; what serves is whole."""
    slot = make_slot()

    def work(round_: int) -> None:
        prime = PRIMES[5 + round_ % 30]
        with slot.acquire() as generation:
            assert read_version(generation.module(INPUT)) in PRIMES
        update_to(slot, prime)
        slot.rollback()
        slot.rollback(to=name_version(prime))
        slot.confirm()

    def verify(round_: int) -> None:
        assert read_version(slot(INPUT)) in PRIMES
        assert str(slot.version) == name_version(read_version(slot(INPUT)))
        if round_ % 20 == 0:
            assert_works(slot)

    interrupt_rounds(work, verify, num_rounds=num_rounds, longest_s=6e-3)
    assert_works(slot)


def test_an_interrupt_as_a_held_version_dies_loses_no_memory() -> None:
    """F19: an interrupt in the first Python code that runs as the last reference to a version goes keeps none of it."""
    slot = make_slot()
    kept = slot.live.module
    for prime in PRIMES[5:9]:
        update_to(slot, prime)

    def interrupt(frame: types.FrameType, event: str, arg: Any) -> None:
        raise Interrupt

    sys.settrace(interrupt)
    del kept
    sys.settrace(None)
    slot.wait_drained(timeout_s=5)
    assert slot.find_holders() == ()
    assert_works(slot)
