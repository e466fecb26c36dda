"""What a stage is until it is committed: discarded, superseded, in conflict, closed over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import hotglm
from hotglm.errors import (
    ArgumentError,
    ConflictError,
    DiscardedError,
    HotglmError,
    ReentrantError,
    SlotClosedError,
    SupersededError,
)
from hotglm.events import (
    ClosedEvent,
    CommittedEvent,
    DiscardedEvent,
    Event,
    RefusedEvent,
    StagedEvent,
    SupersededEvent,
)
from hotglm.slot.generation import State
from hotglm.testing.seams import hooked, only_nth, pause
from support.chain_slot import X, answer, heard, kinds, make, slot, stage  # noqa: F401 - fixtures are used by name
from support.universal import World, make_state, universal


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("staged")) as made:
        yield made


# -- one stage, one end ------------------------------------------------------------------------------------------------


def test_a_stage_shows_the_version_beside_the_live_one(slot: hotglm.ModuleSlot) -> None:
    """A stage carries its verdict, plan, contract, digests and proved module, and nothing of it serves yet."""
    staged = stage(slot, 1)
    assert staged.state is State.STAGED
    assert staged.verdict.accepted
    assert staged.plan.nbytes > 0
    assert set(staged.digests) == set(make_state(1))
    assert staged.contract == slot.live.contract
    assert staged.module(X).equal(answer(1))
    assert slot(X).equal(answer(0))
    assert slot.status().staged == staged.version
    slot.commit(staged)
    assert slot(X).equal(answer(1))
    assert slot.status().staged is None


def test_a_discarded_stage_cannot_be_committed(slot: hotglm.ModuleSlot, heard: list[Event]) -> None:
    """discard() gives the spare back once; committing afterwards is refused, and the live version serves."""
    staged = stage(slot, 1)
    assert staged.discard() is True
    assert staged.discard() is False
    assert staged.state is State.DISCARDED
    with pytest.raises(DiscardedError, match="was discarded"):
        staged.module  # noqa: B018 - a property that raises
    with pytest.raises(DiscardedError) as caught:
        slot.commit(staged)
    assert (caught.value.slot, caught.value.version, caught.value.serving) == ("chain", "1.0.1", "1.0.0")
    assert kinds(heard) == [StagedEvent, DiscardedEvent, RefusedEvent]
    assert slot(X).equal(answer(0))


def test_leaving_the_context_discards_what_was_not_committed(slot: hotglm.ModuleSlot) -> None:
    """`with slot.stage(...) as staged:` ends the stage, by an exception as well; what was committed stays."""
    with pytest.raises(KeyError), stage(slot, 1) as staged:
        raise KeyError
    assert staged.state is State.DISCARDED
    with stage(slot, 2) as staged:
        slot.commit(staged)
    assert staged.state is State.LIVE_ON_TRIAL
    assert slot(X).equal(answer(2))


def test_a_stage_is_committed_once(slot: hotglm.ModuleSlot) -> None:
    """A second commit of one stage is refused, whoever tries."""
    staged = stage(slot, 1)
    slot.commit(staged)
    with pytest.raises(DiscardedError, match="committed already"):
        slot.commit(staged, expected="1.0.1")
    assert [str(entry.version) for entry in slot.history] == ["1.0.0", "1.0.1"]
    assert slot(X).equal(answer(1))


def test_of_many_commits_of_one_stage_one_wins(slot: hotglm.ModuleSlot) -> None:
    """Eight threads that commit the same stage at once: one receipt, seven typed refusals, one change of history."""
    staged = stage(slot, 1)
    start, results = threading.Barrier(8), []

    def commit() -> None:
        start.wait(10)
        try:
            results.append(slot.commit(staged).action)
        except HotglmError as refusal:
            results.append(refusal.code)

    threads = [threading.Thread(target=commit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results.count("committed") == 1
    assert len(slot.history) == 2
    assert slot(X).equal(answer(1))


def test_a_stage_of_another_slot_or_nothing_at_all_is_refused(slot: hotglm.ModuleSlot) -> None:
    """commit() takes what this slot's own stage() returned, and nothing else."""
    other = hotglm.ModuleSlot(make(), name="chain", version="1.0.0")
    for wrong in (stage(other, 1), None, "1.0.1"):
        with pytest.raises(ArgumentError):
            slot.commit(cast("hotglm.Staged", wrong))
    assert slot(X).equal(answer(0))


# -- compare and set ---------------------------------------------------------------------------------------------------


def test_a_commit_on_top_of_another_generation_is_a_conflict(world: World) -> None:
    """A stage expects the generation it was staged on; expected= names another one, by number or version."""
    number, path = world.write()
    world.publish(number)
    with universal(world, ConflictError, code="CONFLICT", version=f"1.0.{number}") as outcome:
        staged = world.slot.stage(path)
        world.slot.commit(staged, expected=world.slot.live.number + 1)
    assert outcome.refusal.receipt is not None
    with universal(world, ConflictError, code="CONFLICT"):
        world.slot.update(path, expected="0.0.1")
    staged = world.slot.stage(path)
    world.rollback()
    with universal(world, ConflictError, code="CONFLICT", version=f"1.0.{number}"):
        world.slot.commit(staged)


def test_an_expectation_that_holds_commits(slot: hotglm.ModuleSlot) -> None:
    """expected= takes the live number, its version as text and as a Version, in every call that takes it."""
    slot.commit(stage(slot, 1), expected=1)
    slot.update(make_state(2), version="1.0.2", expected="1.0.1")
    assert slot.confirm(expected=slot.version) is True
    assert slot.confirm() is False
    with pytest.raises(ConflictError):
        slot.confirm(expected="1.0.1")
    slot.rollback(expected=slot.live.number)
    assert slot(X).equal(answer(1))


# -- superseding -------------------------------------------------------------------------------------------------------


def test_a_newer_stage_supersedes_one_that_stands_ready(slot: hotglm.ModuleSlot, heard: list[Event]) -> None:
    """The older of two stages is over as soon as the newer begins, and says so."""
    old = stage(slot, 1)
    new = stage(slot, 2)
    with pytest.raises(SupersededError, match="superseded"):
        slot.commit(old)
    slot.commit(new)
    assert kinds(heard) == [StagedEvent, SupersededEvent, StagedEvent, RefusedEvent, CommittedEvent]
    superseded = cast("SupersededEvent", heard[1])
    assert (superseded.version, superseded.by_version) == ("1.0.1", "1.0.2")
    assert slot(X).equal(answer(2))


@pytest.mark.parametrize("newer", ["stage", "update"])
def test_a_newer_one_supersedes_a_stage_in_flight(slot: hotglm.ModuleSlot, tmp_path: Path, newer: str) -> None:
    """A stage in flight stops at its next step when a newer stage or update is asked for; an update never stops."""
    hotglm.save_weights(make_state(1), tmp_path / "one.safetensors", version="1.0.1")
    reached, go_on = threading.Event(), threading.Event()
    errors: list[HotglmError] = []

    def stage_old() -> None:
        try:
            slot.stage(tmp_path / "one.safetensors")
        except HotglmError as error:
            errors.append(error)

    def run_new() -> None:
        result = stage(slot, 2) if newer == "stage" else slot.update(make_state(2), version="1.0.2")
        results.append(result)

    results: list[object] = []
    with hooked(only_nth("preadv", 1, pause(reached, go_on))):
        old = threading.Thread(target=stage_old)
        old.start()
        assert reached.wait(10)
        cancellation = slot._core.stager._supersedable[0]
        new = threading.Thread(target=run_new)
        new.start()
        while not cancellation.is_cancelled:
            go_on.wait(0.001)
        go_on.set()
        old.join(10)
        new.join(10)
    assert [type(error) for error in errors] == [SupersededError]
    assert len(results) == 1
    assert slot(X).equal(answer(0 if newer == "stage" else 2))


def test_an_update_in_flight_is_waited_for(slot: hotglm.ModuleSlot) -> None:
    """Updates from several threads all succeed, one after the other; none supersedes another."""
    start = threading.Barrier(4)
    receipts: list[hotglm.Receipt] = []

    def update(number: int) -> None:
        start.wait(10)
        receipts.append(slot.update(make_state(number), version=f"1.0.{number}"))

    threads = [threading.Thread(target=update, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(receipts) == 4
    assert [entry.number for entry in slot.history][1:] == [receipt.new_number for receipt in receipts]


def test_an_update_from_inside_a_stage_is_refused(slot: hotglm.ModuleSlot) -> None:
    """A progress callback that updates its own slot is told so at once, and what it raises reaches the caller."""

    def update(progress: hotglm.Progress) -> None:
        slot.update(make_state(2), version="1.0.2")

    with pytest.raises(ReentrantError):
        stage(slot, 1, progress=update)
    assert slot(X).equal(answer(0))
    slot.update(make_state(2), version="1.0.2")
    assert slot(X).equal(answer(2))


# -- closing -----------------------------------------------------------------------------------------------------------


def test_a_closed_slot_serves_and_refuses_updates(slot: hotglm.ModuleSlot, heard: list[Event]) -> None:
    """close() ends updates, discards what is staged and lets rollback targets go, twice if need be; passes go on."""
    slot.update(make_state(1), version="1.0.1")
    staged = stage(slot, 2)
    slot.close()
    slot.close()
    attempts: list[Callable[[], object]] = [
        lambda: slot.update(make_state(3), version="1.0.3"),
        lambda: stage(slot, 3),
        lambda: slot.commit(staged),
        slot.rollback,
    ]
    for attempt in attempts:
        with pytest.raises((SlotClosedError, SupersededError)):
            attempt()
    assert kinds(heard).count(ClosedEvent) == 1
    assert slot.status().closed
    assert len(slot.status().generations) == 1
    assert slot(X).equal(answer(1))
