"""A watcher over a slot whose weights are swapped in place: what waits for passes is tried again, either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm import seam
from hotglm.events import CommittedEvent, QuarantinedEvent, RolledBackEvent
from hotglm.slot.in_place import InPlaceAdmission
from hotglm.watching.status import WatchState
from support.exchanges import FailAt
from support.gates import Beside
from support.watched import Watched, make_slot


class Busy:
    """A session in another thread that is open until it is told to end."""

    def __init__(self, slot: hotglm.ModuleSlot) -> None:
        self._slot, self._opened, self._end = slot, threading.Event(), threading.Event()
        self._thread = Beside(self._hold)
        assert self._opened.wait(30)

    def _hold(self) -> None:
        with self._slot.acquire():
            self._opened.set()
            assert self._end.wait(60)

    def end(self) -> None:
        self._end.set()
        self._thread.result()


@pytest.fixture
def hold() -> Iterator[Callable[[hotglm.ModuleSlot], Busy]]:
    """Open sessions that are ended with the test."""
    opened: list[Busy] = []

    def open_one(slot: hotglm.ModuleSlot) -> Busy:
        opened.append(Busy(slot))
        return opened[-1]

    yield open_one
    for one in opened:
        one.end()


def make(directory: Path, **policy: Any) -> Watched:
    return Watched(directory, slot=make_slot(swap=hotglm.InPlace(timeout_s=0.01)), **policy)


def test_a_commit_that_waits_too_long_is_tried_again(tmp_path: Path, hold: Callable[[hotglm.ModuleSlot], Busy]) -> None:
    """A pass that is inside too long is not the release's fault: nothing is refused, and it goes live behind it."""
    watched = make(tmp_path)
    watched.publish(1)
    busy = hold(watched.slot)
    watched.wait(30)
    counts = watched.status.counts
    assert (watched.state, watched.serves(0)) == (WatchState.RETRYING, True)
    assert 2 <= counts.retries <= 8  # pauses double
    assert counts.refused == 0
    assert watched.of(QuarantinedEvent) == []
    busy.end()
    watched.wait(60)
    assert watched.serves(1)
    assert len(watched.of(CommittedEvent)) == 1


def test_an_exchange_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that failed and was undone says nothing of the release; the old version serves, bit for bit."""
    watched = make(tmp_path)
    watched.publish(1)
    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", FailAt(4))
        watched.wait(0)
    assert (watched.state, watched.serves(0)) == (WatchState.RETRYING, True)
    assert watched.of(QuarantinedEvent) == []
    watched.wait(30)
    assert watched.serves(1)


@pytest.mark.parametrize("before", ["the module", "a release"])
def test_a_trial_that_fails_goes_back_behind_the_passes(
    before: str, tmp_path: Path, hold: Callable[[hotglm.ModuleSlot], Busy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I03: while a pass goes on the bad version is said to be live, which it is; then the one before serves again."""
    watched = make(tmp_path, service="api", trial_s=10.0, probe=lambda slot: verdicts[-1])
    verdicts: list[object] = [None]
    good, bad = 0, 1
    if before == "a release":
        watched.publish(1)
        watched.wait(12)
        good, bad = 1, 2
    watched.publish(bad)
    watched.wait(2)
    assert (watched.state, watched.serves(bad)) == (WatchState.ON_TRIAL, True)
    busy, tries = hold(watched.slot), list[object]()
    roll_back = InPlaceAdmission.rollback

    def count(*args: Any, **kwargs: Any) -> object:
        tries.append(args)
        return roll_back(*args, **kwargs)

    monkeypatch.setattr(InPlaceAdmission, "rollback", count)
    verdicts.append("worse")
    watched.wait(30)
    assert 2 <= len(tries) <= 8  # each of them holds passes back for a while, so pauses double
    assert (watched.state, watched.serves(bad)) == (WatchState.ON_TRIAL, True)
    assert "it has to go: worse" in str(watched.status)
    assert watched.of(RolledBackEvent) == watched.of(QuarantinedEvent) == []
    verdicts.append(None)  # it was judged, and stays judged
    busy.end()
    watched.wait(60)
    assert watched.serves(good)
    assert watched.slot.history[-1].action == "rolled back"
    assert [event.code for event in watched.of(QuarantinedEvent)] == ["TRIAL_FAILED"]
    watched.wait(600)
    assert watched.serves(good)


def test_a_label_that_is_taken_back_waits_for_the_passes_too(
    tmp_path: Path, hold: Callable[[hotglm.ModuleSlot], Busy]
) -> None:
    """Nobody is refused; rounds are as many as there are pauses, and no more."""
    watched = make(tmp_path, service="api", trial_s=1000.0)
    watched.publish(1)
    watched.wait(1002)
    watched.publish(2)
    watched.wait(2)
    busy = hold(watched.slot)
    watched.store.move_label("stable", "1.0.1")
    watched.wait(30, limit=100)
    assert (watched.state, watched.serves(2)) == (WatchState.ON_TRIAL, True)
    busy.end()
    watched.wait(60)
    assert watched.serves(1)
    assert watched.of(QuarantinedEvent) == []
    watched.store.move_label("stable", "1.0.2")
    watched.wait(5)
    assert watched.serves(2)
