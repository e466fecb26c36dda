"""What holds a generation's memory, and what lets it go: passes, sessions, views, leaks (F03, F04, F08, F09, F10)."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import MemoryPlanError
from hotglm.events import Event, HeldEvent
from support.torn import INPUT, LAYERS, LEAN, PRIMES, Oracle, name_version, read_version, run_in_thread, weights

NBYTES = 512  # of the oracle's arena: four layers of 4 x 4 float64


def make_slot(
    *, boundary: Callable[[int], object] | None = None, limit_nbytes: int | None = None, updates: int = 2
) -> hotglm.ModuleSlot:
    """Return a slot on two arenas, both in use, that waits for nobody."""
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.0, limit_nbytes=limit_nbytes)
    module = Oracle(PRIMES[0], boundary=boundary)
    slot = hotglm.ModuleSlot(module, name="oracle", version=name_version(PRIMES[0]), policy=LEAN, memory=memory)
    del module
    for prime in PRIMES[1 : 1 + updates]:
        update(slot, prime)
    return slot


def update(slot: hotglm.ModuleSlot, prime: int) -> None:
    slot.update(weights(prime), version=name_version(prime))
    assert read_version(slot(INPUT)) == prime


def assert_all_let_go(slot: hotglm.ModuleSlot) -> None:
    """Nothing is held any more, and the slot is back to two arenas."""
    for prime in PRIMES[30:33]:
        update(slot, prime)
    gc.collect()
    slot.wait_drained(timeout_s=10)
    assert slot.find_holders() == ()
    assert slot.status().arenas_nbytes <= 3 * NBYTES


class Gate:
    """A boundary at which the pass of one thread stops until it is opened."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.thread: int | None = None
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, layer: int) -> None:
        if layer == self.layer and threading.get_ident() == self.thread:
            self.reached.set()
            assert self.opened.wait(30)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("num_swaps", [1, 2, 5])
def test_a_pass_keeps_its_version_however_many_swaps_it_outlives(layer: int, num_swaps: int) -> None:
    """F03, F04: a pass that stops at any layer while 1 to 5 swaps are made ends in the version in which it began."""
    gate = Gate(layer)
    slot = make_slot(boundary=gate)
    outputs: list[int] = []

    def read() -> None:
        gate.thread = threading.get_ident()
        outputs.extend(read_version(slot(INPUT)) for _ in range(2))

    thread = threading.Thread(target=read)
    thread.start()
    assert gate.reached.wait(30)
    gate.opened.clear()
    addresses = set()
    for prime in PRIMES[5 : 5 + num_swaps]:
        update(slot, prime)
        arena = slot.live.arena
        assert arena is not None
        addresses.add(arena.address)
    assert outputs == []
    assert len(addresses) == min(num_swaps, 2)
    gate.opened.set()
    thread.join(30)
    assert outputs == [PRIMES[2], PRIMES[4 + num_swaps]]
    assert_all_let_go(slot)


# -- F08: ends of a pass that are not a return -------------------------------------------------------------------------


class BoomError(Exception):
    """Raised by the model itself."""


def test_a_pass_that_raises_lets_go() -> None:
    """F08: a pass ends with its exception; keeping the exception keeps the memory, and dropping it gives it back."""

    def boom(layer: int) -> None:
        if layer == 2 and armed:
            raise BoomError

    armed: list[bool] = []
    slot = make_slot(boundary=boom)
    armed.append(True)
    with pytest.raises(BoomError) as caught:
        slot(INPUT)
    armed.clear()
    frame = caught.tb
    while frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_back.f_locals["self"]  # type: ignore[union-attr]
    for prime in PRIMES[5:9]:
        update(slot, prime)
    assert read_version(module(INPUT)) == PRIMES[2]
    del caught, frame, module
    assert_all_let_go(slot)


def test_a_thread_that_dies_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """F08: a thread that ends inside a session, by an exception or by returning, holds nothing after that."""
    slot = make_slot()
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # pytest's keeps the exception

    def forget() -> None:
        session = slot.acquire()
        assert read_version(session.__enter__().module(INPUT)) == PRIMES[2]

    def die() -> None:
        with slot.acquire() as generation:
            assert read_version(generation.module(INPUT)) == PRIMES[2]
            raise BoomError

    for target in (forget, die):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join(30)
    assert_all_let_go(slot)


def test_a_closed_generator_lets_go() -> None:
    """F08: a generator that streams from a session lets go when it is closed, and when it is dropped."""
    slot = make_slot()

    def stream() -> Iterator[int]:
        with slot.acquire() as generation:
            while True:
                yield read_version(generation.module(INPUT))

    closed, dropped = stream(), stream()
    assert next(closed) == next(dropped) == PRIMES[2]
    for prime in PRIMES[5:8]:
        update(slot, prime)
        assert next(closed) == next(dropped) == PRIMES[2]
    assert {holder.kind for holder in slot.find_holders()} >= {"session"}
    closed.close()  # type: ignore[attr-defined]
    del dropped
    assert_all_let_go(slot)


def test_a_cancelled_task_lets_go() -> None:
    """F08: an asyncio task that is cancelled, or times out, in the middle of a session lets go."""
    slot = make_slot()

    async def hold(started: asyncio.Event) -> None:
        with slot.acquire() as generation:
            assert read_version(await asyncio.to_thread(generation.module, INPUT)) == PRIMES[2]
            started.set()
            await asyncio.Event().wait()

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(hold(started))
        await started.wait()
        update(slot, PRIMES[5])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0)
        await asyncio.to_thread(update, slot, PRIMES[6])

    asyncio.run(main())
    assert_all_let_go(slot)


# -- F09: leaks --------------------------------------------------------------------------------------------------------


def test_a_leaked_session_is_named_with_its_place_and_swaps_go_on() -> None:
    """F09: a session that is never exited is announced by the line that opened it, and keeps one arena only."""
    slot = make_slot()
    events: list[Event] = []
    slot.subscribe(events.append)
    session = slot.acquire()
    for prime in PRIMES[5:9]:
        update(slot, prime)
    held = [event for event in events if isinstance(event, HeldEvent)]
    assert [event.number for event in held] == [3]
    assert "test_pins.py" in held[0].holders[0]
    assert "MainThread" in held[0].holders[0]
    assert any("test_pins.py" in holder.description for holder in slot.find_holders())
    assert slot.status().arenas_nbytes == 3 * NBYTES
    assert read_version(session.__enter__().module(INPUT)) == PRIMES[2]
    session.__exit__()
    assert_all_let_go(slot)


def test_a_pass_that_does_not_end_is_named_with_its_stack() -> None:
    """F09: a pass that outlives the limit is announced with its thread and the stack it stands in."""
    gate = Gate(2)
    slot = make_slot(boundary=gate)
    events: list[Event] = []
    slot.subscribe(events.append)

    def read() -> None:
        gate.thread = threading.get_ident()
        slot(INPUT)

    thread = threading.Thread(target=read, name="stuck reader")
    thread.start()
    assert gate.reached.wait(30)
    for prime in PRIMES[5:8]:
        update(slot, prime)
    gate.opened.set()
    thread.join(30)
    (held,) = [event for event in events if isinstance(event, HeldEvent)]
    assert "stuck reader" in held.holders[0]
    assert "self.opened.wait(30)" in held.holders[0]
    assert_all_let_go(slot)


def keep_module(slot: hotglm.ModuleSlot) -> object:
    return slot.live.module


def keep_generation(slot: hotglm.ModuleSlot) -> object:
    return slot.live


def keep_bound_method(slot: hotglm.ModuleSlot) -> object:
    return slot.live.module.forward


def keep_parameter(slot: hotglm.ModuleSlot) -> object:
    return next(slot.live.module.parameters())


def keep_view(slot: hotglm.ModuleSlot) -> object:
    return slot.live.module.get_buffer("w1")[0]


KEEPERS = [keep_module, keep_generation, keep_bound_method, keep_parameter, keep_view]


@pytest.mark.parametrize("keep", KEEPERS)
def test_memory_is_bounded_whatever_is_leaked(keep: Callable[[hotglm.ModuleSlot], object]) -> None:
    """F09: leaks are refused once `limit_nbytes` is reached, by a typed error that says who; then all is as before."""
    slot = make_slot(limit_nbytes=4 * NBYTES)
    kept: list[object] = []

    def leak() -> None:
        for prime in PRIMES[5:]:
            kept.append(keep(slot))
            update(slot, prime)

    with pytest.raises(MemoryPlanError) as refused:
        leak()
    assert len(kept) < 8
    found = read_version(slot(INPUT))
    assert found == PRIMES[3 + len(kept)]  # the one before the refused one
    assert str(slot.version) == name_version(found)
    assert slot.status().arenas_nbytes <= 4 * NBYTES
    assert refused.value.serving == str(slot.version)
    assert "held by" in str(refused.value)
    assert {holder.kind for holder in slot.find_holders()} <= {"module", "tensor"}
    assert slot.find_holders() != ()
    del refused
    kept.clear()
    assert_all_let_go(slot)


@pytest.mark.parametrize("keep", KEEPERS)
def test_a_leaked_reference_is_named(keep: Callable[[hotglm.ModuleSlot], object]) -> None:
    """F09: what keeps an old generation is named by kind, with what keeps it."""
    slot = make_slot()
    kept = {"under this key": keep(slot)}
    update(slot, PRIMES[5])
    update(slot, PRIMES[6])
    holders = slot.find_holders()
    named = "bound method Oracle.forward" if keep is keep_bound_method else "under this key"
    assert any(named in holder.description for holder in holders), holders
    assert {holder.number for holder in holders} == {3}
    kept.clear()
    assert slot.find_holders() == ()
    assert_all_let_go(slot)


# -- F10: memory outlives its version ----------------------------------------------------------------------------------


class FirstRow(nn.Module):
    """Returns a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def forward(self, index: int) -> torch.Tensor:
        return self.weight[index]


def test_an_output_that_aliases_weights_stays_as_it_was() -> None:
    """F10: a returned view of a weight keeps its values through any number of swaps, also when nothing else is left."""
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.0)
    slot = hotglm.ModuleSlot(FirstRow(), name="row", version="1.0.0", policy=LEAN, memory=memory)
    outputs = [slot(0)]
    for step in range(1, 8):
        slot.update({"weight": torch.full((3, 4), float(step))}, version=f"1.0.{step}")
        outputs.append(slot(step % 3))
    del slot
    gc.collect()
    for step, output in enumerate(outputs):
        assert output.tolist() == [float(step)] * 4


def test_a_gradient_belongs_to_the_version_of_its_forward() -> None:
    """F10: a backward pass after two swaps uses the weights that its forward used."""
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.0)
    slot = hotglm.ModuleSlot(nn.Linear(1, 1, bias=False), name="line", version="1.0.0", policy=LEAN, memory=memory)
    slot.update({"weight": torch.tensor([[3.0]])}, version="1.0.1")
    x = torch.ones(1, requires_grad=True)
    y = slot(x)
    for step in range(2, 6):
        run_in_thread(lambda step=step: slot.update({"weight": torch.full((1, 1), 7.0)}, version=f"1.0.{step}"))  # type: ignore[misc]
    y.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0]
    assert slot(torch.ones(1)).tolist() == [7.0]
