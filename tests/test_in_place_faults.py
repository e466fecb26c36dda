"""Interrupts everywhere in a swap in place, in the caller and in the commit's own thread (F18, F19).

The tools are those of tests/test_commit_faults.py: an exception at each point at which CPython can deliver one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hotglm
from hotglm import seam
from hotglm.errors import HotglmError, StageFailedError
from hotglm.slot import forking
from hotglm.slot.in_place import InPlaceAdmission
from support.gates import wait_until
from support.interrupts import interrupt_rounds
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, run_in_thread, weights
from test_commit_faults import Interrupt, InterruptAt, assert_serves, count_points


def make_slot() -> hotglm.ModuleSlot:
    slot = hotglm.ModuleSlot(
        Oracle(PRIMES[0]), name="o", version=name_version(PRIMES[0]), policy=LEAN, swap=hotglm.InPlace(timeout_s=5)
    )
    for prime in PRIMES[1:4]:
        update_to(slot, prime)
    return slot


def update_to(slot: hotglm.ModuleSlot, prime: int) -> None:
    slot.update(weights(prime), version=name_version(prime))


def gate_of(slot: hotglm.ModuleSlot) -> Any:
    assert isinstance(slot._admission, InPlaceAdmission)
    return slot._admission.gate


def assert_works(slot: hotglm.ModuleSlot) -> None:
    """Nobody is left inside, the gate is open and every lock is free: an update and a rollback go through."""
    # A caller that was interrupted while its stage's thread started leaves that behind; it ends at its next tensor.
    wait_until(lambda: gate_of(slot).count_inside() == 0)

    def use() -> None:
        for prime in (PRIMES[10], PRIMES[11]):
            update_to(slot, prime)
        slot.rollback()
        slot.confirm()
        assert_serves(slot, PRIMES[10])

    run_in_thread(use)
    assert gate_of(slot).closing is None


@pytest.fixture(autouse=True)
def _drop_what_python_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reports an interrupt in a finaliser and goes on; the hook of pytest would keep the frames."""
    monkeypatch.setattr(sys, "unraisablehook", lambda report: None)
    monkeypatch.setattr(threading, "excepthook", lambda report: None)


def prepare_operation(slot: hotglm.ModuleSlot, operation: str) -> Callable[[], object]:
    """Bring the slot to version 5, with version 4 held, and return what is to be interrupted."""
    update_to(slot, PRIMES[4])
    update_to(slot, PRIMES[5])
    if operation == "commit":
        staged = slot.stage(weights(PRIMES[20]), version=name_version(PRIMES[20]))
        return lambda: slot.commit(staged)
    if operation == "session":
        return lambda: run_session(slot)
    actions: dict[str, Callable[[], object]] = {"rollback": slot.rollback, "pass": lambda: slot(INPUT)}
    return actions[operation]


def run_session(slot: hotglm.ModuleSlot) -> None:
    with slot.acquire() as generation:
        generation.module(INPUT)


AFTER = {"commit": PRIMES[20], "rollback": PRIMES[4]}


@pytest.mark.parametrize("operation", ["commit", "rollback", "pass", "session"])
def test_an_interrupt_at_every_point_of_the_caller(operation: str) -> None:
    """F18, C15: what serves is the old version or the new one, and no pass is left inside."""
    slot = make_slot()
    num_points = count_points(lambda: prepare_operation(slot, operation))
    assert num_points >= 4
    for step in range(1, num_points + 1):
        action = prepare_operation(slot, operation)
        tracer = InterruptAt(step)
        tracer.run(action)
        try:
            assert_serves(slot, PRIMES[5], AFTER.get(operation, PRIMES[5]))
            del action
            assert_works(slot)
        except BaseException as error:
            raise AssertionError(f"after an interrupt at {tracer.where}") from error


WHERE = ("slot/in_place.py", "slot/gate.py", "slot/admission.py", "weights/exchange.py")
"""What a commit's thread runs once it can change anything; before that it only looks."""


class InThread:
    """Puts a tracer into those files in the commit's thread alone, through `threading.settrace`."""

    def __init__(self, target: int | None) -> None:
        self.tracer = InterruptAt(target)

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not threading.current_thread().name.startswith("hotglm-commit"):
            return None
        if not frame.f_code.co_filename.endswith(WHERE):
            return None
        return self.tracer(frame, event, arg)

    def run(self, action: Callable[[], object]) -> BaseException | None:
        threading.settrace(self)
        try:
            action()
        except (HotglmError, Interrupt) as error:
            return error
        finally:
            threading.settrace(None)  # this is how it is taken back
        return None


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", ["commit", "rollback"])
def test_a_failure_at_every_point_of_the_commit(operation: str, stride: int) -> None:
    """F18, C18, C19: a commit whose thread fails anywhere leaves the old version or the new one, and an open gate."""
    slot = make_slot()
    counter = InThread(None)
    counter.run(prepare_operation(slot, operation))
    assert counter.tracer.num_points > 50
    kinds = set()
    for step in range(stride, counter.tracer.num_points + 1, stride):
        action = prepare_operation(slot, operation)
        planted = InThread(step)
        error = planted.run(action)
        try:
            assert_serves(slot, PRIMES[5], AFTER[operation])
            is_new = read_version(slot(INPUT)) == AFTER[operation]
            kinds.add((is_new, type(error)))
            del action
            assert_works(slot)
        except BaseException as failure:
            raise AssertionError(f"after a failure at {planted.tracer.where}: {error!r}") from failure
    assert (False, StageFailedError) in kinds
    assert (True, type(None)) in kinds


@pytest.mark.parametrize("num_rounds", [150, pytest.param(10_000, marks=pytest.mark.stress)])
def test_a_keyboard_interrupt_at_any_time(num_rounds: int) -> None:
    """F19: Ctrl-C at any time of an update, a rollback, a session or a pass; what serves is whole."""
    slot = make_slot()

    def work(round_: int) -> None:
        with slot.acquire() as generation:
            assert read_version(generation.module(INPUT)) in PRIMES
        update_to(slot, PRIMES[5 + round_ % 30])
        assert read_version(slot(INPUT)) in PRIMES
        slot.rollback()

    def verify(round_: int) -> None:
        assert str(slot.version) == name_version(read_version(slot(INPUT)))
        if round_ % 25 == 0:
            assert_works(slot)

    interrupt_rounds(work, verify, num_rounds=num_rounds, longest_s=2e-2)
    assert_works(slot)


class SlowCopy(seam.Seam):
    """Says when an exchange has begun to write, and goes on when it is let."""

    def __init__(self) -> None:
        self.arrived, self.release, self._num = threading.Event(), threading.Event(), 0

    def reach(self, place: str) -> None:
        if place == "exchange.copy":
            self._num += 1
            if self._num == 5:
                self.arrived.set()
                assert self.release.wait(30)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[hotglm.ModuleSlot, SlowCopy, threading.Thread]]:
    """A slot in the middle of an exchange."""
    slot, slow = make_slot(), SlowCopy()
    staged = slot.stage(weights(PRIMES[9]), version=name_version(PRIMES[9]))
    monkeypatch.setattr(seam, "active", slow)
    thread = threading.Thread(target=lambda: slot.commit(staged), daemon=True)
    thread.start()
    assert slow.arrived.wait(30)
    yield slot, slow, thread
    slow.release.set()
    thread.join(30)


class AtCopy(seam.Seam):
    """Calls `action` in the middle of an exchange, in the thread that copies."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action, self._num = action, 0

    def reach(self, place: str) -> None:
        if place == "exchange.copy":
            self._num += 1
            if self._num == 5:
                self.action()


def fail() -> None:
    raise OSError("planted")


def test_a_stage_whose_commit_fails_behind_an_interrupt_can_be_committed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: Ctrl-C reaches the caller while the exchange is under way, and then that fails: the stage is as it was."""
    slot = make_slot()
    staged = slot.stage(weights(PRIMES[9]), version=name_version(PRIMES[9]))
    writing, settling = threading.Event(), threading.Event()
    wait_settled = InPlaceAdmission.wait_settled

    def note(admission: InPlaceAdmission) -> None:
        settling.set()
        wait_settled(admission)

    def interrupt(thread: threading.Thread, timeout: float | None = None) -> None:
        assert writing.wait(30)
        raise KeyboardInterrupt

    def fail_behind_the_interrupt() -> None:
        writing.set()
        assert settling.wait(30)
        fail()

    monkeypatch.setattr(InPlaceAdmission, "wait_settled", note)
    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", AtCopy(fail_behind_the_interrupt))
        patch.setattr(threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slot.commit(staged)
    assert_serves(slot, PRIMES[3])
    assert staged.state is hotglm.State.STAGED
    slot.commit(staged)
    assert_serves(slot, PRIMES[9])
    assert_works(slot)


def test_what_is_half_written_is_never_served_nor_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """C18: after a commit that could not be undone, no pass, commit or rollback goes through, in a child neither."""
    slot = make_slot()
    staged = slot.stage(weights(PRIMES[9]), version=name_version(PRIMES[9]))

    def refuse(lane: object) -> None:
        raise OSError("planted again")

    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", AtCopy(fail))
        patch.setattr("hotglm.weights.exchange.Lane.undo", refuse)
        with pytest.raises(StageFailedError) as first:
            slot.commit(staged)
    assert "serves" not in str(first.value)
    actions: list[Callable[[], object]] = [lambda: slot.commit(staged), slot.rollback, lambda: slot(INPUT)]
    for action in actions:
        with pytest.raises(hotglm.SlotStateError, match="could not be undone") as caught:
            action()
        assert (caught.value.serving, "serves" in str(caught.value)) == (None, False)
    child = os.fork()
    if child == 0:
        try:
            slot(INPUT)
        except hotglm.SlotStateError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("what", ["pass", "update", "rollback", "verify", "session", "close"])
def test_a_finaliser_in_the_thread_of_a_commit_waits_for_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: the garbage collector may run anybody's finaliser there; what would wait for the commit is refused."""
    slot = make_slot()
    actions: dict[str, Callable[[], object]] = {
        "pass": lambda: slot(INPUT),
        "update": lambda: update_to(slot, PRIMES[10]),
        "rollback": slot.rollback,
        "verify": slot.verify_live,
        "session": lambda: run_session(slot),
        "close": slot.close,
    }
    errors: list[BaseException] = []

    def finalise() -> None:
        try:
            actions[what]()
        except HotglmError as error:
            errors.append(error)

    monkeypatch.setattr(seam, "active", AtCopy(finalise))
    run_in_thread(lambda: update_to(slot, PRIMES[9]))
    assert [type(error) for error in errors] == [hotglm.ReentrantError]
    assert_serves(slot, PRIMES[9])
    assert_works(slot)


def test_a_child_never_gets_half_a_version(copying: tuple[hotglm.ModuleSlot, SlowCopy, threading.Thread]) -> None:
    """A fork in the middle of an exchange waits for its end; the child serves one version, whole, and can update."""
    slot, slow, _ = copying
    begin, waiting = InPlaceAdmission.begin_fork, threading.Event()

    def note(self: InPlaceAdmission) -> None:  # every slot that is left of other tests is asked as well
        if self is slot._admission:
            waiting.set()
        begin(self)

    def let_go() -> None:
        assert waiting.wait(30)
        slow.release.set()

    InPlaceAdmission.begin_fork = note  # type: ignore[method-assign]
    try:
        threading.Thread(target=let_go, daemon=True).start()
        child = os.fork()
        if child == 0:
            good = read_version(slot(INPUT)) == PRIMES[9]
            update_to(slot, PRIMES[12])
            os._exit(0 if good and read_version(slot(INPUT)) == PRIMES[12] else 1)
    finally:
        InPlaceAdmission.begin_fork = begin  # type: ignore[method-assign]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_version(slot(INPUT)) == PRIMES[9]


class Turn:
    """The turn of forks; says when a thread called `second` asks for it."""

    def __init__(self, asked: threading.Event) -> None:
        self._asked, self._lock = asked, threading.RLock()
        self.release = self._lock.release

    def acquire(self) -> bool:
        if threading.current_thread().name == "second":
            self._asked.set()
        return self._lock.acquire()


def fork_once(may_begin: threading.Event) -> None:
    if threading.current_thread().name == "second":
        assert may_begin.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def test_threads_that_fork_at_once_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fork lets go of what another thread's fork holds: from its first lock to its last release it is alone."""
    slots, asked, begun = (make_slot(), make_slot()), threading.Event(), threading.Event()
    seen: list[tuple[str, str]] = []
    admissions = [slot._admission for slot in slots]
    begin, end = InPlaceAdmission.begin_fork, InPlaceAdmission.end_fork

    def note(what: str, admission: InPlaceAdmission) -> bool:
        """Return whether it is the first thread that does something with one of the two slots."""
        name = threading.current_thread().name
        if name == "second":
            asked.set()
        if admission in admissions:
            seen.append((name, what))
        return admission in admissions and name == "first"

    def note_begin(admission: InPlaceAdmission) -> None:
        is_first = note("asks", admission)
        begin(admission)
        if is_first:
            begun.set()
            assert asked.wait(30)

    def note_end(admission: InPlaceAdmission) -> None:
        note("lets go", admission)
        end(admission)

    monkeypatch.setattr(forking, "_turn", Turn(asked))
    monkeypatch.setattr(InPlaceAdmission, "begin_fork", note_begin)
    monkeypatch.setattr(InPlaceAdmission, "end_fork", note_end)

    threads = [
        threading.Thread(target=fork_once, args=(begun,), name=name, daemon=True) for name in ("first", "second")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    both = ["asks", "asks", "lets go", "lets go"]
    assert seen == [("first", what) for what in both] + [("second", what) for what in both]


def test_a_child_forgets_the_passes_of_other_threads() -> None:
    """A pass that was running in another thread does not run in the child, and holds no commit back there."""
    held, arrived = threading.Event(), threading.Event()

    def wait(layer: int) -> None:
        if threading.current_thread().name == "held":
            arrived.set()
            assert held.wait(30)

    slot = hotglm.ModuleSlot(
        Oracle(PRIMES[0], boundary=wait), name="o", version="1.0.3", policy=LEAN, swap=hotglm.InPlace(timeout_s=1)
    )
    thread = threading.Thread(target=lambda: slot(INPUT), name="held", daemon=True)
    thread.start()
    assert arrived.wait(30)
    child = os.fork()
    if child == 0:
        update_to(slot, PRIMES[1])
        os._exit(0 if read_version(slot(INPUT)) == PRIMES[1] else 1)
    held.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_works(slot)
