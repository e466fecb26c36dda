"""Coroutines and asynchronous sessions at the gate: a commit in place holds them back, and their event loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

import hotglm
from hotglm import seam
from hotglm.errors import DrainTimeoutError, ReentrantError, SlotStateError
from hotglm.slot.closing import Closing
from hotglm.slot.gate import Gate
from hotglm.slot.in_place import InPlaceAdmission
from support.exchanges import FailAt
from support.gates import Beside, Held, is_closing, wait_until
from support.planted import plant_gate
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, weights
from test_commit_faults import InterruptAt, count_points

OLD, NEW = PRIMES[0], PRIMES[1]


class Talker(Oracle):
    """A model with coroutines and a stream."""

    async def answer(self) -> int:
        return read_version(self(INPUT))

    async def ask_twice(self, go_on: asyncio.Event) -> tuple[int, int]:
        first = read_version(self(INPUT))
        await go_on.wait()
        return first, read_version(self(INPUT))

    async def stream(self, log: list[str]) -> AsyncGenerator[int, str]:
        sent: str | None = "begun"
        try:
            while True:
                log.append(sent or "next")
                try:
                    sent = yield read_version(self(INPUT))
                except KeyError as error:
                    sent = f"caught {error.args[0]}"
        finally:
            log.append(f"ended in {read_version(self(INPUT))}")


def make_slot(boundary: Callable[[int], object] | None = None, *, timeout_s: float = 20) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(
        Talker(OLD, boundary=boundary),
        name="talker",
        version=name_version(OLD),
        policy=LEAN,
        swap=hotglm.InPlace(timeout_s=timeout_s),
    )


def gate_of(slot: hotglm.ModuleSlot) -> Gate:
    assert isinstance(slot._admission, InPlaceAdmission)
    return slot._admission.gate


def update_to(slot: hotglm.ModuleSlot, prime: int) -> hotglm.Receipt:
    return slot.update(weights(prime), version=name_version(prime))


def assert_serves(slot: hotglm.ModuleSlot, prime: int) -> None:
    """Nobody is left inside, the gate is open, and this version serves, bit for bit."""
    gate = gate_of(slot)
    assert (gate.count_inside(), gate.closing) == (0, None)
    assert read_version(slot(INPUT)) == prime
    assert str(slot.version) == name_version(prime)


class Closed:
    """A slot whose gate is closed: a pass in a thread is inside, and a commit waits for it."""

    def __init__(self, *, timeout_s: float = 20) -> None:
        self.held = Held()
        self.slot = make_slot(self.held, timeout_s=timeout_s)
        self._inside = Beside(lambda: self.slot(INPUT), name="held")
        assert self.held.arrived.acquire(timeout=30)

    def begin(self) -> Beside:
        """Begin the commit; return it once the gate is closed."""
        self.commit = Beside(lambda: update_to(self.slot, NEW))
        wait_until(lambda: is_closing(self.slot))
        return self.commit

    def end(self) -> None:
        self.held.release.set()
        self._inside.thread.join(30)

    @property
    def closing(self) -> Closing:
        closing = gate_of(self.slot).closing
        assert closing is not None
        return closing


@pytest.fixture
def closed() -> Iterator[Closed]:
    one = Closed()
    yield one
    one.end()


async def take_turns(num: int = 20) -> None:
    for _ in range(num):
        await asyncio.sleep(0)


def create_task_outside(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Return a task that is not inside what the running one is in, as those of other requests are not."""
    return asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())


async def read_in_session(slot: hotglm.ModuleSlot) -> int:
    async with slot.acquire_async() as generation:
        return read_version(generation.module(INPUT))


async def read_stream(slot: hotglm.ModuleSlot) -> int:
    async with contextlib.aclosing(slot.stream([])) as stream:
        async for version in stream:
            return int(version)
    raise AssertionError("the stream gave nothing")


READERS: dict[str, Callable[[hotglm.ModuleSlot], Coroutine[Any, Any, int]]] = {
    "coroutine": lambda slot: slot.answer(),
    "session": read_in_session,
    "stream": read_stream,
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_held_back_leaves_its_loop_to_others(kind: str, closed: Closed) -> None:
    """P1, K13: a coroutine that comes while a commit waits begins in the new version; the loop turns meanwhile.

    It is the loop itself that lets the commit's last pass go: were it blocked, the commit would time out.
    """

    async def main() -> int:
        commit = closed.begin()
        task = asyncio.create_task(READERS[kind](closed.slot))
        await take_turns()
        assert not task.done()
        assert commit.thread.is_alive()
        closed.held.release.set()
        return await asyncio.wait_for(task, 30)

    assert asyncio.run(main()) == NEW
    assert closed.commit.result().in_place.num_waited_for == 1
    assert_serves(closed.slot, NEW)


def test_a_wait_that_blocks_the_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: where the thread waits instead of the task, nobody lets the pass go, and the commit times out."""

    async def block(closing: Closing) -> bool:
        return closing.wait_opened()

    monkeypatch.setattr(Closing, "wait_opened_async", block)
    closed = Closed(timeout_s=0.2)

    async def main() -> None:
        closed.begin()
        task = asyncio.create_task(closed.slot.answer())
        await take_turns()
        closed.held.release.set()
        assert await task == OLD

    asyncio.run(main())
    with pytest.raises(DrainTimeoutError):
        closed.commit.result()
    closed.end()
    assert_serves(closed.slot, OLD)


def test_sessions_that_overlap_in_one_loop_hold_no_commit_off(closed: Closed) -> None:
    """P4: a session that comes while a commit waits is let in after it, though a task of its thread is inside."""

    async def main() -> int:
        async with closed.slot.acquire_async() as generation:
            commit = closed.begin()
            closed.end()
            late = [create_task_outside(reader(closed.slot)) for reader in READERS.values()]
            await take_turns()
            assert not any(task.done() for task in late)
            assert commit.thread.is_alive()
            old = read_version(generation.module(INPUT))
        assert await asyncio.gather(*late) == [NEW] * len(late)
        return old

    assert asyncio.run(main()) == OLD
    assert_serves(closed.slot, NEW)


def test_overlapping_sessions_that_are_let_in_by_thread_are_found(closed: Closed) -> None:
    """Control: with the rule for plain calls, tasks of a thread that is inside pass the closed gate."""
    gate = plant_gate(closed.slot)
    gate._has_older_in_task = gate._has_older  # type: ignore[method-assign]

    async def main() -> int:
        async with closed.slot.acquire_async():
            closed.begin()
            return await asyncio.wait_for(create_task_outside(read_in_session(closed.slot)), 30)

    assert asyncio.run(main()) == OLD
    closed.commit.result()


def test_what_a_task_that_is_inside_calls_is_let_in(closed: Closed) -> None:
    """F16: while a commit waits for a session, its task, what that starts, and plain calls of its thread go through."""
    slot = closed.slot

    async def nested() -> list[int]:
        async with slot.acquire_async():
            entered.set()
            await go_on.wait()
            own = [await reader(slot) for reader in READERS.values()]
            return [*own, await asyncio.create_task(slot.answer()), read_version(await asyncio.to_thread(slot, INPUT))]

    async def main() -> tuple[list[int], tuple[int, int], int]:
        task, pair = asyncio.create_task(nested()), asyncio.create_task(slot.ask_twice(go_on))
        await entered.wait()
        closed.begin()
        closed.end()
        plain = read_version(slot(INPUT))  # of a task that is not inside, in a thread that is needed by those that are
        go_on.set()
        return await task, await pair, plain

    entered, go_on = asyncio.Event(), asyncio.Event()
    inside, twice, plain = asyncio.run(main())
    assert inside == [OLD] * 5
    assert twice == (OLD, OLD)
    assert plain == OLD
    closed.commit.result()
    assert_serves(slot, NEW)


def test_a_coroutine_inside_a_plain_call_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """F16: a pass that runs a loop of its own, whose coroutine calls the slot, does not wait for itself."""
    seen: list[int] = []

    def run_loop(layer: int) -> None:
        if layer == 1 and threading.current_thread().name == "outer" and not seen:
            seen.append(0)
            entered.set()
            wait_until(lambda: is_closing(slot))
            seen.append(asyncio.run(slot.answer()))

    slot, entered = make_slot(run_loop), threading.Event()
    outer = Beside(lambda: slot(INPUT), name="outer")
    assert entered.wait(30)
    commit = Beside(lambda: update_to(slot, NEW))
    assert read_version(outer.result()) == OLD
    assert seen == [0, OLD]
    commit.result()
    assert_serves(slot, NEW)


def test_a_task_that_is_inside_is_refused_a_commit(closed: Closed) -> None:
    """F07: in a worker thread as well, since it would wait for itself; another task of the loop is not."""
    slot = make_slot()

    async def main() -> None:
        async with slot.acquire_async():
            with pytest.raises(ReentrantError):
                await asyncio.to_thread(update_to, slot, NEW)
        await asyncio.to_thread(update_to, slot, NEW)

    asyncio.run(main())
    assert_serves(slot, NEW)


# -- waiting, cancelled, woken, forgotten ------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "woken"])
@pytest.mark.parametrize("kind", READERS)
def test_a_task_that_is_cancelled_while_it_is_held_back_leaves_nothing(kind: str, when: str, closed: Closed) -> None:
    """F08: cancelled while it waits, or after it was woken and before it runs: it is not inside, and waits no more."""
    errors: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        commit, closing = closed.begin(), closed.closing
        task = asyncio.create_task(READERS[kind](closed.slot))
        await take_turns()
        assert len(closing._waiters) == 1
        if when == "woken":
            closed.end()
            commit.thread.join(30)  # this blocks the loop, so that the task is woken and has not run
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await take_turns()
        assert not closing._waiters
        assert errors == []
        assert gate_of(closed.slot).count_inside() == (when == "waiting")  # the pass in its thread

    asyncio.run(main())
    closed.end()
    closed.commit.result()
    assert_serves(closed.slot, NEW)


def test_a_session_that_is_held_back_is_not_entered_by_another_task(closed: Closed) -> None:
    """One object is one session, also while it waits; one that was cancelled there was never entered."""

    async def main() -> int:
        closed.begin()
        session = closed.slot.acquire_async()
        cancelled = asyncio.create_task(session.__aenter__())
        await take_turns()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        first = asyncio.create_task(session.__aenter__())
        await take_turns()
        with pytest.raises(SlotStateError, match="entered once"):
            await session.__aenter__()
        closed.end()
        generation = await asyncio.wait_for(first, 30)
        assert gate_of(closed.slot).count_inside() == 1
        version = read_version(generation.module(INPUT))
        await session.__aexit__(None, None, None)
        return version

    assert asyncio.run(main()) == NEW
    closed.commit.result()
    assert_serves(closed.slot, NEW)


def test_a_loop_that_is_closed_meanwhile_fails_no_commit(closed: Closed) -> None:
    """A task that waits in a loop that is gone is woken no more; the commit ends as it does without it."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it says that the task is still pending
    closed.begin()
    task = loop.create_task(closed.slot.answer())
    loop.run_until_complete(take_turns())
    loop.close()
    closing = closed.closing
    assert len(closing._waiters) == 1
    closed.end()
    closed.commit.result()
    closing.end()  # nor does it fail whoever else opens the gate
    del task
    assert_serves(closed.slot, NEW)


def test_tasks_are_woken_by_the_commit_itself(closed: Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that waits does not look by itself every so often to find the gate open: it is told, in each loop."""
    monkeypatch.setattr("hotglm.slot.closing._SLICE_S", 3600.0)
    closed.begin()
    others = [Beside(lambda: asyncio.run(closed.slot.answer())) for _ in range(2)]
    wait_until(lambda: len(closed.closing._waiters) == len(others))
    closed.end()
    assert [other.result() for other in others] == [NEW] * len(others)


def test_a_wake_up_that_is_lost_costs_a_moment_only(closed: Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: a commit that died before it told anybody holds no task back."""
    monkeypatch.setattr(Closing, "end", lambda closing: closing._opened.set())
    closed.begin()
    other = Beside(lambda: asyncio.run(closed.slot.answer()))
    wait_until(lambda: len(closed.closing._waiters) == 1)
    closed.end()
    assert other.result() == NEW


def test_where_nothing_whole_is_left_no_task_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """C18: after a commit that could not be undone, coroutines and sessions are refused, not held back for ever."""
    slot = make_slot()

    def refuse(self: object) -> None:
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", FailAt(6))
        patch.setattr("hotglm.weights.exchange.Lane.undo", refuse)
        with pytest.raises(hotglm.StageFailedError):
            update_to(slot, NEW)
    for reader in READERS.values():
        with pytest.raises(SlotStateError, match="could not be undone"):
            asyncio.run(asyncio.wait_for(reader(slot), 30))


def test_without_a_loop_of_asyncio_the_thread_waits(closed: Closed) -> None:
    """A coroutine that something else drives is a pass as well; nothing could wake it, so its thread waits."""
    closed.begin()

    def drive() -> object:
        coroutine = closed.slot.answer()
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("it wants an event loop")

    driven = Beside(drive)
    wait_until(lambda: gate_of(closed.slot).count_inside() == 1)
    closed.end()
    assert driven.result() == NEW


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_driven_as_if_it_were_the_module_s_own() -> None:
    """What is sent and thrown in reaches it, and closing it runs its end, inside the pass."""
    slot, log = make_slot(timeout_s=0.02), list[str]()

    async def main() -> None:
        stream = slot.stream(log)
        assert await anext(stream) == OLD
        assert await stream.asend("sent") == OLD
        assert await stream.athrow(KeyError("thrown")) == OLD
        with pytest.raises(DrainTimeoutError):
            await asyncio.get_running_loop().run_in_executor(None, update_to, slot, NEW)
        await stream.aclose()
        assert log == ["begun", "sent", "caught thrown", f"ended in {OLD}"]
        with pytest.raises(ValueError, match="planted"):
            await _fail(slot.stream(log))

    asyncio.run(main())
    assert log[-1] == f"ended in {OLD}"
    update_to(slot, NEW)
    assert_serves(slot, NEW)


async def _fail(stream: AsyncGenerator[int, str]) -> None:
    await anext(stream)
    await stream.athrow(ValueError("planted"))


def test_each_step_of_a_stream_is_of_the_task_that_drives_it(closed: Closed) -> None:
    """F16: a stream that another task goes on with may call the slot while a commit waits for it."""
    slot = closed.slot

    async def call_again(generation: AsyncIterator[int]) -> tuple[int, int]:
        await anext(generation)  # this task drives it now, so it is inside
        return await slot.answer(), await anext(generation)

    async def main() -> tuple[int, int]:
        stream = slot.stream([])
        await anext(stream)
        closed.begin()
        closed.end()
        found: tuple[int, int] = await create_task_outside(call_again(stream))
        await stream.aclose()
        return found

    assert asyncio.run(main()) == (OLD, OLD)
    closed.commit.result()
    assert_serves(slot, NEW)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("kind", READERS)
def test_an_interrupt_at_every_point_of_a_coroutine(kind: str) -> None:
    """F18, C15: wherever it is interrupted, it is not left inside."""
    slot = make_slot(timeout_s=1)
    reader = READERS[kind]

    def prepare() -> Callable[[], object]:
        return lambda: asyncio.run(reader(slot))

    num_points = count_points(prepare)
    assert num_points >= 4
    for step in range(1, num_points + 1):
        tracer = InterruptAt(step)
        tracer.run(prepare())
        gc.collect(1)  # a task and the error that ended it are a circle
        assert gate_of(slot).count_inside() == 0, tracer.where
    update_to(slot, NEW)
    assert_serves(slot, NEW)


def test_a_session_is_entered_once_and_flips_have_it_too() -> None:
    """`acquire_async` gives what `acquire` gives, with either policy; entered a second time it is refused."""
    flipped = hotglm.ModuleSlot(Talker(OLD), name="talker", version=name_version(OLD), policy=LEAN)

    async def main(slot: hotglm.ModuleSlot) -> None:
        session = slot.acquire_async()
        assert "test_gate_async.py" in session.place
        async with session as generation:
            assert generation.number == 1
        with pytest.raises(SlotStateError, match="entered once"):
            async with session:
                pass
        async with slot.acquire_async() as generation:
            await asyncio.get_running_loop().run_in_executor(None, update_beside, slot)
            assert read_version(generation.module(INPUT)) == OLD
        update_to(slot, NEW)

    def update_beside(slot: hotglm.ModuleSlot) -> None:
        if slot is flipped:
            update_to(slot, NEW)
            return
        with pytest.raises(DrainTimeoutError, match=r"session acquired at .*test_gate_async\.py:\d+"):
            update_to(slot, NEW)

    for slot in (flipped, make_slot(timeout_s=0.02)):
        asyncio.run(main(slot))
        assert read_version(slot(INPUT)) == NEW
