"""What a slot owes its users in the corners: memory given back, proofs not skipped, the truth announced."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.events import ClosedEvent, CommittedEvent, DiscardedEvent

X = torch.ones(1, 256)
NBYTES = 256 * 256 * 4
TWO_COPIES = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.01)


def state(value: float, size: int = 256) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size, size), value)}


def make_slot(**settings: Any) -> hotglm.ModuleSlot:
    settings = {"memory": TWO_COPIES, **settings}
    return hotglm.ModuleSlot(nn.Linear(256, 256, bias=False), name="m", version="1.0.0", **settings)


def test_a_pass_keeps_its_memory_when_its_storages_are_moved_away() -> None:
    """Sending a state dict to another process moves storages; a module that is held keeps the arena all the same."""
    slot = make_slot()
    slot.update(state(1.0), version="1.0.1")
    held = slot.live.module
    lease = slot.live.lease
    assert lease is not None
    ForkingPickler.dumps(slot.state_dict())
    assert lease() is not None
    del held


def test_arenas_that_nobody_uses_are_given_back() -> None:
    """What kept modules of discarded stages cost is returned once they are let go, and all of it after close."""
    slot = make_slot()
    kept = []
    for value in range(5):
        with slot.stage(state(float(value)), version="1.0.1") as staged:
            kept.append(staged.module)
    assert slot.status().arenas_nbytes >= 5 * NBYTES
    kept.clear()
    for patch in (1, 2):
        slot.update(state(float(patch)), version=f"1.0.{patch}")
    slot.wait_drained(timeout_s=10)
    assert slot.status().arenas_nbytes <= 2 * NBYTES
    slot.close()
    assert slot.status().arenas_nbytes <= NBYTES
    assert torch.equal(slot(X), X @ state(2.0)["weight"].t())


def test_memory_kept_of_discarded_stages_is_named_when_there_is_no_more() -> None:
    """A limit that is used up by what somebody kept of a discarded stage says so."""
    slot = make_slot(memory=hotglm.MemoryPolicy(small_nbytes=0, limit_nbytes=NBYTES))
    with slot.stage(state(1.0), version="1.0.1") as staged:
        kept = staged.module
    before = slot(X)
    with pytest.raises(hotglm.MemoryPlanError, match="Still held"):
        slot.update(state(2.0), version="1.0.1")
    assert torch.equal(slot(X), before)
    del kept
    slot.update(state(2.0), version="1.0.1")


def test_a_limit_counts_what_is_dropped_as_dropped() -> None:
    """Growing weights fit where the old arena and the new one do not stand side by side."""
    grow = nn.Linear(300, 300, bias=False)
    slot = make_slot(
        accept="major", memory=hotglm.MemoryPolicy(small_nbytes=0, limit_nbytes=NBYTES * 2 + 300 * 300 * 4 - NBYTES)
    )
    slot.update(state(1.0), version="1.0.1")
    slot.update(state(2.0), version="1.0.2")
    slot.update(grow, version="2.0.0")
    assert slot.live.module.in_features == 300


def test_the_rollback_target_is_given_up_last() -> None:
    """After a rollback, a stage that fails leaves the target of the next rollback, not what was rolled back from."""
    slot = make_slot(memory=hotglm.MemoryPolicy(max_copies=3, small_nbytes=0))
    slot.update(state(1.0), version="1.0.1")
    slot.update(state(2.0), version="1.0.2")
    slot.rollback()
    with pytest.raises(hotglm.NonFiniteError):
        slot.update(state(float("nan")), version="1.0.3")
    assert str(slot.rollback().new_version) == "1.0.0"


def test_a_dropped_slot_needs_no_garbage_collector() -> None:
    """Module and arenas are gone with the last reference to the slot."""
    gc.collect()
    gc.disable()
    try:
        slot = make_slot()
        slot.update(state(1.0), version="1.0.1")
        module, lease = weakref.ref(slot.live.module), slot.live.lease
        del slot
        assert module() is None
        assert lease is not None
        assert lease() is None
    finally:
        gc.enable()


def test_the_mode_set_while_a_stage_waits_is_kept() -> None:
    """A version staged before `slot.eval()` serves in evaluation mode when it is committed after."""
    slot = make_slot()
    staged = slot.stage(state(1.0), version="1.0.1")
    slot.eval()
    slot.commit(staged)
    assert not slot.live.module.training


def test_checks_given_by_an_iterator_run_every_time() -> None:
    """A policy made from iterators proves the second update like the first; what is no check is refused at once."""
    checks: Iterator[Any] = (check for check in [lambda module: False])
    slot = make_slot(policy=hotglm.StagePolicy(checks=checks))  # type: ignore[arg-type]
    before = slot(X)
    for _ in range(2):
        with pytest.raises(hotglm.CallableCheckError):
            slot.update(state(1.0), version="1.0.1")
    assert torch.equal(slot(X), before)
    for wrong in ({"checks": (3,)}, {"goldens": (3,)}, {"warm_up": torch.ones(1)}, {"timeout_s": float("nan")}):
        with pytest.raises(hotglm.ArgumentError):
            hotglm.StagePolicy(**wrong)
    with pytest.raises(hotglm.ArgumentError):
        hotglm.Golden(inputs=X, outputs=X, rtol=-1)


def test_settings_that_cannot_be_meant_are_refused_at_once() -> None:
    """A slot names every setting of the wrong kind, before the first update meets it."""
    with pytest.raises(hotglm.ArgumentError, match="name, policy, memory, refresh"):
        hotglm.ModuleSlot(nn.Linear(1, 1), name=5, policy="x", memory=3, refresh=3)  # type: ignore[arg-type]
    slot = make_slot()
    with pytest.raises(hotglm.ArgumentError):
        slot.update(state(1.0), version="1.0.1", policy={})  # type: ignore[arg-type]


def test_closing_from_inside_a_stage_leaves_no_half_closed_slot() -> None:
    """A close that is refused changes nothing; the next one closes, releases the held versions and is announced."""
    slot = make_slot()
    slot.update(state(1.0), version="1.0.1")
    events: list[object] = []
    slot.subscribe(events.append)
    with pytest.raises(hotglm.ReentrantError):
        slot.update(state(2.0), version="1.0.2", progress=lambda progress: slot.close())
    assert not slot.status().closed
    slot.close()
    assert [generation.state for generation in slot.status().generations] == ["live"]
    assert sum(isinstance(event, ClosedEvent) for event in events) == 1


def test_a_method_that_runs_in_a_held_generation_is_waited_for() -> None:
    """A generate that calls no forward is a pass, too: waiting for it to drain names it with its stack."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def generate(self) -> None:
            entered.set()
            leave.wait(10)

    slot = hotglm.ModuleSlot(Slow(256, 256, bias=False), name="m", version="1.0.0")
    thread = threading.Thread(target=slot.generate, name="generator")
    thread.start()
    assert entered.wait(10)
    slot.update(state(1.0), version="1.0.1")
    with pytest.raises(hotglm.DrainTimeoutError, match=r"generator[\s\S]*leave\.wait"):
        slot.wait_drained(timeout_s=0.01)
    leave.set()
    thread.join(10)
    slot.wait_drained(timeout_s=10)


def test_what_is_announced_after_an_interrupt_is_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt right after the store announces the commit, not a discard."""
    slot = make_slot()
    events: list[object] = []
    slot.subscribe(events.append)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slot._core, "_receipt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        slot.update(state(1.0), version="1.0.1")
    assert str(slot.version) == "1.0.1"
    assert sum(isinstance(event, CommittedEvent) for event in events) == 1
    assert not any(isinstance(event, DiscardedEvent) for event in events)


def test_a_session_is_entered_once() -> None:
    """A second entry is a typed error."""
    slot = make_slot()
    session = slot.acquire()
    with session:
        pass
    with pytest.raises(hotglm.SlotStateError), session:
        pass
