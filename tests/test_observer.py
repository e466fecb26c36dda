"""What a slot tells: events, progress, receipts, status, and who holds what of a generation that is gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import (
    DrainTimeoutError,
    HotglmError,
    IncompatibleError,
)
from hotglm.events import (
    ClosedEvent,
    CommittedEvent,
    ConfirmedEvent,
    DiscardedEvent,
    DrainedEvent,
    Event,
    HeldEvent,
    RefusedEvent,
    RolledBackEvent,
    StagedEvent,
    SupersededEvent,
)
from hotglm.slot.generation import State
from support.chain_slot import X, answer, heard, kinds, make, slot, stage  # noqa: F401 - fixtures are used by name
from support.universal import make_state

# -- events and receipts -----------------------------------------------------------------------------------------------


def test_every_kind_of_event_is_heard_once_it_is_true(slot: hotglm.ModuleSlot, heard: list[Event]) -> None:
    """Staged, committed, confirmed, rolled back, refused, discarded, superseded, drained, held, closed: all told."""
    slot.update(make_state(1), version="1.0.1")
    slot.confirm()
    slot.rollback()
    slot.rollback("1.0.1")
    with pytest.raises(HotglmError):
        slot.update({}, version="1.0.2")
    stage(slot, 2).discard()
    ready = stage(slot, 3)
    slot.update(make_state(4), version="1.0.4")
    assert ready.state is State.DISCARDED
    with slot.acquire():
        slot.update(make_state(5), version="1.0.5")
        slot.update(make_state(6), version="1.0.6")
    slot.wait_drained(timeout_s=10)
    slot.close()
    wanted = {StagedEvent, CommittedEvent, ConfirmedEvent, RolledBackEvent, RefusedEvent, DiscardedEvent}
    assert set(kinds(heard)) == wanted | {SupersededEvent, DrainedEvent, HeldEvent, ClosedEvent}
    assert kinds(heard)[:6] == [
        StagedEvent, CommittedEvent, ConfirmedEvent, RolledBackEvent, RolledBackEvent, RefusedEvent,
    ]  # fmt: skip
    assert all(event.slot == "chain" for event in heard)
    assert [event.at_s for event in heard] == sorted(event.at_s for event in heard)


def test_a_subscriber_that_raises_or_commits_harms_nobody(slot: hotglm.ModuleSlot) -> None:
    """Events are announced with nothing locked: a subscriber may raise, update, roll back or unsubscribe."""
    seen: list[str] = []

    def roll_back(event: Event) -> None:
        seen.append(type(event).__name__)
        if isinstance(event, CommittedEvent) and event.version == "1.0.1":
            slot.rollback()
            slot.update(make_state(2), version="1.0.2")
        raise ValueError("planted")

    slot.subscribe(roll_back)
    slot.update(make_state(1), version="1.0.1")
    assert str(slot.version) == "1.0.2"
    assert slot(X).equal(answer(2))
    assert seen.count("CommittedEvent") == 2


def test_progress_goes_from_nothing_to_everything(slot: hotglm.ModuleSlot, tmp_path: Path) -> None:
    """Progress is called in the caller's thread, never goes back, and ends with every byte done."""
    hotglm.save_weights(make_state(1), tmp_path / "one.safetensors", version="1.0.1")
    reports: list[hotglm.Progress] = []
    threads: set[str] = set()

    def report(progress: hotglm.Progress) -> None:
        reports.append(progress)
        threads.add(threading.current_thread().name)

    slot.update(tmp_path / "one.safetensors", progress=report)
    done = [entry.done_nbytes for entry in reports]
    total = sum(tensor.numel() * 4 for tensor in make_state(1).values())
    assert threads == {threading.current_thread().name}
    assert done == sorted(done)
    assert (done[-1], reports[-1].total_nbytes) == (total, total)


def test_a_receipt_says_what_was_done_and_proved(slot: hotglm.ModuleSlot) -> None:
    """P12: versions, generations, digests, verdict, plan, the time and bytes of each part, and what was checked."""
    receipt = slot.update(make_state(1), version="1.0.1")
    assert (str(receipt.old_version), str(receipt.new_version)) == ("1.0.0", "1.0.1")
    assert (receipt.old_number, receipt.new_number) == (1, slot.live.number)
    assert receipt.digest == slot.live.digest
    assert set(receipt.digests) == set(make_state(1))
    parts = [timing.part for timing in receipt.timings]
    assert parts[0] == "open"
    assert {"decide", "plan", "memory", "copy", "load", "refresh", "check"} <= set(parts)
    assert receipt.nbytes == sum(tensor.numel() * 4 for tensor in make_state(1).values())
    assert receipt.stage_s > 0
    assert "finite values" in receipt.checks
    plain = json.loads(json.dumps(receipt.to_dict()))
    assert plain["action"] == "committed"
    assert "1.0.0 -> 1.0.1" in receipt.explain()


def test_a_refusal_has_a_receipt_too(slot: hotglm.ModuleSlot) -> None:
    """P12: the error of a refused stage carries a receipt with its code, verdict and what was timed until then."""
    with pytest.raises(IncompatibleError) as caught:
        slot.update({"other": torch.ones(1)}, version="1.0.1")
    receipt = caught.value.receipt
    assert receipt is not None
    assert (receipt.action, receipt.code) == ("refused", caught.value.code)
    assert (receipt.old_number, receipt.new_number) == (1, 1)
    assert receipt.verdict is not None
    assert not receipt.verdict.accepted
    assert [timing.part for timing in receipt.timings] == ["open", "decide"]
    json.dumps(receipt.to_dict())
    status = slot.status()
    assert status.num_refused == 1
    assert "other" in status.last_refusal
    assert json.loads(json.dumps(status.to_dict()))["version"] == "1.0.0"
    assert "refused 1" in str(status)


# -- who holds what ----------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A module whose pass waits for the test."""

    reached = threading.Event()
    go_on = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 100:
            self.reached.set()
            self.go_on.wait(30)
        return cast("torch.Tensor", self.linear(x))


def update_gate(slot: hotglm.ModuleSlot, number: int) -> None:
    slot.update({"linear.weight": torch.eye(2), "linear.bias": torch.zeros(2)}, version=f"1.0.{number}")


def test_a_pass_that_outlives_the_wait_is_named_with_its_stack() -> None:
    """P4: wait_drained names the thread and the line where it stands; once it has left, waiting succeeds."""
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.01)
    slot = hotglm.ModuleSlot(Gate(), name="gate", version="1.0.0", memory=memory)
    Gate.reached.clear()
    Gate.go_on.clear()
    reader = threading.Thread(target=slot, args=(torch.full((2,), 1e3),), name="slow-reader")
    reader.start()
    assert Gate.reached.wait(10)
    try:
        for number in range(1, 4):
            update_gate(slot, number)
        with pytest.raises(DrainTimeoutError) as caught:
            slot.wait_drained(timeout_s=0.05)
        assert "slow-reader" in str(caught.value)
        assert "self.go_on.wait" in str(caught.value)
        assert caught.value.slot == "gate"
        status = slot.status()
        assert any("slow-reader" in holder.description for entry in status.generations for holder in entry.holders)
    finally:
        Gate.go_on.set()
        reader.join(10)
    slot.wait_drained(timeout_s=10)


def retire(slot: hotglm.ModuleSlot) -> None:
    """Bring the slot three versions on, so that what was live is neither live nor held."""
    for number in range(3):
        update_gate(slot, 10 + number)


@pytest.fixture
def gate() -> hotglm.ModuleSlot:
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.01)
    slot = hotglm.ModuleSlot(Gate(), name="gate", version="1.0.0", memory=memory)
    update_gate(slot, 1)
    return slot


def describe(slot: hotglm.ModuleSlot) -> str:
    return "\n".join(map(str, slot.find_holders()))


def test_nobody_is_named_where_nobody_holds(gate: hotglm.ModuleSlot) -> None:
    """find_holders is empty for a slot that nobody holds anything of."""
    retire(gate)
    assert gate.find_holders() == ()
    gate.wait_drained(timeout_s=5)


class Keeper:
    """Somebody else's object."""

    def __init__(self, kept: object) -> None:
        self.kept = kept


KEPT: dict[str, tuple[Callable[[hotglm.ModuleSlot], object], tuple[str, ...]]] = {
    "module": (lambda slot: slot.live.module, ("Gate", "Keeper")),
    "submodule": (lambda slot: slot.live.module.get_submodule("linear"), ("Linear", "Keeper")),
    "bound method": (lambda slot: slot.live.module.forward, ("bound method", "Gate.forward")),
    "parameter": (lambda slot: slot.live.module.get_parameter("linear.weight"), ("[2, 2]", "Keeper")),
    "view": (lambda slot: slot.live.module.get_parameter("linear.weight")[0], ("[2]", "Keeper")),
    "generation": (lambda slot: slot.live, ("eneration", "Keeper")),
    "entry of a dict": (lambda slot: {"a cache": slot.live.module}, ("Gate", "a cache")),
}


@pytest.mark.parametrize("name", KEPT)
def test_whatever_is_kept_is_named_with_its_keeper(gate: hotglm.ModuleSlot, name: str) -> None:
    """find_holders names a kept module, submodule, bound method, parameter, view or generation, and who keeps it."""
    take, words = KEPT[name]
    keeper = Keeper(take(gate))
    retire(gate)
    text = describe(gate)
    assert all(word in text for word in words), text
    del keeper
    gate.wait_drained(timeout_s=5)
    assert gate.find_holders() == ()


def test_what_looks_for_holders_does_not_name_itself(gate: hotglm.ModuleSlot) -> None:
    """find_holders names the one who keeps the module, and none of its own temporary objects."""
    keeper = Keeper(gate.live.module)
    retire(gate)
    assert [holder.description for holder in gate.find_holders()] == ["module 'Gate', kept by a Keeper"]
    del keeper


def test_what_the_collector_cannot_see_is_still_said(gate: hotglm.ModuleSlot) -> None:
    """While status() shows a generation as draining, find_holders is never empty: a local variable is a holder too."""
    kept = gate.live.module
    retire(gate)
    assert any(entry.state == "draining" for entry in gate.status().generations)
    assert gate.find_holders() != ()
    del kept


def test_a_session_is_named_with_its_thread_and_place(gate: hotglm.ModuleSlot) -> None:
    """find_holders and status name an open session by its thread and the line that acquired it."""
    with gate.acquire():
        retire(gate)
        text = describe(gate)
        assert f"{Path(__file__).name}:" in text
        assert threading.current_thread().name in text
        assert "session" in str(gate.status())
    gate.wait_drained(timeout_s=5)
