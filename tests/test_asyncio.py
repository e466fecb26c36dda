"""FAULTS K13: sessions across await, updates in worker threads, cancelled tasks and two loops."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from typing import cast

import pytest
import torch

import hotglm
from hotglm.errors import HotglmError
from hotglm.testing.seams import hooked, only_nth, pause
from support.universal import Chain, make_state

X = torch.arange(8.0)


def make(number: int) -> Chain:
    chain = Chain()
    chain.load_state_dict(make_state(number))
    return chain


def expected(number: int) -> torch.Tensor:
    return cast("torch.Tensor", make(number)(X))


@pytest.fixture
def slot() -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(make(0), name="chain", version="1.0.0", memory=hotglm.MemoryPolicy(drain_timeout_s=0.01))


def test_a_session_holds_one_generation_across_await(slot: hotglm.ModuleSlot) -> None:
    """A coroutine in a session sees its generation after every await, while others update and see the new ones."""

    async def hold(started: asyncio.Event, go_on: asyncio.Event) -> None:
        with slot.acquire() as generation:
            before = generation.module(X)
            started.set()
            await go_on.wait()
            assert generation.module(X).equal(before)
            assert generation.number == 1

    async def main() -> None:
        started, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(started, go_on))
        await started.wait()
        for number in range(1, 5):
            await asyncio.to_thread(slot.update, make_state(number), f"1.0.{number}")
            assert slot(X).equal(expected(number))
        go_on.set()
        await task

    asyncio.run(main())
    slot.wait_drained(timeout_s=10)


def test_a_cancelled_task_lets_its_session_go(slot: hotglm.ModuleSlot) -> None:
    """A task that is cancelled inside a session releases it; the old generation drains."""

    async def hold(started: asyncio.Event) -> None:
        with slot.acquire() as generation:
            generation.module(X)
            started.set()
            await asyncio.Event().wait()

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(hold(started))
        await started.wait()
        for number in range(1, 4):
            await asyncio.to_thread(slot.update, make_state(number), f"1.0.{number}")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(slot.wait_drained, timeout_s=10)

    asyncio.run(main())
    assert slot(X).equal(expected(3))


def test_a_cancelled_update_comes_to_its_end_in_its_thread(slot: hotglm.ModuleSlot) -> None:
    """Cancelling the await of an update cancels nothing in its thread: it commits whole, and the next one follows."""
    reached, wakes = threading.Event(), threading.Event()

    def wait_inside(module: torch.nn.Module) -> None:
        reached.set()
        wakes.wait(30)

    async def main() -> None:
        policy = hotglm.StagePolicy(checks=(wait_inside,))
        task = asyncio.create_task(asyncio.to_thread(slot.update, make_state(1), "1.0.1", policy=policy))
        assert await asyncio.to_thread(reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slot(X).equal(expected(0))
        wakes.set()
        await asyncio.to_thread(slot.update, make_state(2), "1.0.2")

    asyncio.run(main())
    assert [str(entry.version) for entry in slot.history] == ["1.0.0", "1.0.1", "1.0.2"]
    assert slot(X).equal(expected(2))


def test_the_loop_is_not_blocked_while_a_version_is_read(slot: hotglm.ModuleSlot) -> None:
    """While a stage waits for its disk, the event loop runs on, and so do passes in it."""
    reached, wakes = threading.Event(), threading.Event()

    async def main(path: str) -> int:
        task = asyncio.create_task(asyncio.to_thread(slot.update, path))
        assert await asyncio.to_thread(reached.wait, 30)
        turns = 0
        for _ in range(100):
            assert slot(X).equal(expected(0))
            await asyncio.sleep(0)
            turns += 1
        wakes.set()
        await task
        return turns

    with (
        torch.no_grad(),
        hooked(only_nth("preadv", 1, pause(reached, wakes))),
        tempfile.TemporaryDirectory() as directory,
    ):
        hotglm.save_weights(make_state(1), f"{directory}/one.safetensors", version="1.0.1")
        assert asyncio.run(main(f"{directory}/one.safetensors")) == 100
    assert slot(X).equal(expected(1))


@pytest.mark.slow
def test_the_loop_lags_little_while_much_is_loaded() -> None:
    """K13: loading 256 MiB in a thread keeps the event loop from turning for 50 ms at most, on an idle machine."""
    width = 4096
    slot = hotglm.ModuleSlot(Chain(width=width, depth=4), name="chain", version="1.0.0")
    states = [{name: tensor.clone() for name, tensor in slot.state_dict().items()} for _ in range(2)]
    slot.update(states[0], "1.0.1")
    slot.update(states[1], "1.0.2")

    async def main() -> float:
        task = asyncio.create_task(asyncio.to_thread(slot.update, states[0], "1.0.3"))
        worst = 0.0
        while not task.done():
            begun = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - begun)
        await task
        return worst

    assert asyncio.run(main()) < 0.05


def test_two_loops_in_two_threads_share_a_slot(slot: hotglm.ModuleSlot) -> None:
    """Updates from two event loops all succeed, one after the other, and end in one of the versions whole."""
    failures: list[BaseException] = []

    async def update(base: int) -> None:
        for number in range(5):
            await asyncio.to_thread(slot.update, make_state(base + number), f"1.0.{base + number}")
            slot(X)

    def run(base: int) -> None:
        try:
            asyncio.run(update(base))
        except BaseException as failure:  # noqa: BLE001 - asserted below, in the test's own thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(base,)) for base in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(slot.history) == 11
    assert slot(X).equal(expected(int(str(slot.version).rsplit(".", 1)[1])))


def test_an_update_on_the_loop_itself_is_refused_or_made_but_never_hangs(slot: hotglm.ModuleSlot) -> None:
    """Calling update in a coroutine blocks the loop for its length and no longer: it works, and raises typed errors."""

    async def main() -> None:
        slot.update(make_state(1), "1.0.1")
        with pytest.raises(HotglmError):
            slot.update("/nonexistent")

    asyncio.run(main())
    assert slot(X).equal(expected(1))
