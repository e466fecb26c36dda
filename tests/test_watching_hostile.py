"""Watching beside a process that is in the way: calls at the wrong moment, forks on trial, disks that refuse."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import hotglm
from hotglm.errors import ArgumentError, StoreWriteError, ThreadStartError
from hotglm.release import services, store_reading
from hotglm.release.services import Service
from hotglm.testing.seams import hooked
from hotglm.watching import watcher as watcher_module
from hotglm.watching.status import WatchState
from support.watched import Watched, make_slot


def make(directory: Path, **policy: Any) -> Watched:
    """Return a watcher of the service `api` whose trials last ten seconds."""
    return Watched(directory, service="api", **{"trial_s": 10.0, **policy})


def read(watched: Watched) -> tuple[str | None, list[str], list[str]]:
    """Return what the service confirmed, what it tries and what it refuses, as versions."""
    state = Service(store=watched.store, name="api").read()
    confirmed = None if state.confirmed is None else state.confirmed.version
    return confirmed, [one.release.version for one in state.trials], [one.release.version for one in state.refused]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """Return a watcher that has confirmed 1.0.1."""
    made = make(tmp_path)
    made.publish(1)
    made.wait(12)
    assert read(made) == ("1.0.1", [], [])
    yield made
    made.engine.close()


def test_what_is_bad_is_what_was_live_when_somebody_said_so(watched: Watched) -> None:
    """`fail` about the version that serves, said while the next one is loaded, does not refuse the next one."""
    watched.publish(2)
    todo = ["latency x10"]

    def complain(kind: str, _: object, args: object) -> None:
        if kind == "reach" and todo:
            watched.watcher.fail(todo.pop())

    with hooked(complain):
        watched.settle()
    watched.wait(3)
    assert (todo, watched.state, watched.serves(2)) == ([], WatchState.ON_TRIAL, True)
    assert read(watched) == ("1.0.1", ["1.0.2"], [])
    watched.watcher.fail("latency x10")
    watched.settle()
    assert watched.serves(1)
    assert read(watched) == ("1.0.1", [], ["1.0.2"])


def test_a_child_forked_on_trial_goes_back_when_its_parent_dies_on_it(watched: Watched) -> None:
    """K01, I04: what a fork took over unconfirmed is not served on once the pool refused it."""
    watched.publish(2)
    watched.wait(2)
    watched.watcher.reset_after_fork()  # gives up the lock, as the death of the parent does
    Service(store=watched.store, name="api").start()
    assert read(watched) == ("1.0.1", [], ["1.0.2"])
    watched.wait(3)
    assert watched.serves(1)
    assert watched.state is WatchState.REFUSED


def test_a_child_forked_while_its_parent_loads_does_not_keep_the_trial_alive(watched: Watched) -> None:
    """I04: the child holds no lock of the trial, so that a parent that dies on the load has died on it."""
    watched.publish(2)
    seen: list[list[str]] = []

    def fork(kind: str, _: object, args: object) -> None:
        if kind == "reach" and not seen:
            watched.watcher.reset_after_fork()
            Service(store=watched.store, name="api").start()
            seen.append(read(watched)[2])

    with hooked(fork):
        watched.step()
    assert seen == [["1.0.2"]]


def test_a_restart_serves_what_was_confirmed_where_the_store_cannot_be_written(watched: Watched) -> None:
    """D15, S10: a store that is mounted read-only is no reason to serve what the process was built with."""
    watched.publish(2)
    with mock.patch.object(store_reading, "hold_exclusively", side_effect=OSError(errno.EROFS, "read-only")):
        again = make(watched.directory)
        again.engine.begin()
        assert again.serves(1)
        status = again.wait(5)
        assert (status.state, status.code) == (WatchState.WAITING, "PERMISSION")
        assert again.serves(1)
        assert status.counts.commits == 1
    again.wait(1000)
    assert again.serves(2)
    again.engine.close()


def test_a_confirmation_that_cannot_be_written_is_told_once(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """E07, D13: a disk that stays full does not fill the log; when it is mended the trial ends well."""
    watched.publish(2)
    watched.settle()
    with (
        caplog.at_level(logging.INFO, "hotglm.watch"),
        mock.patch.object(services, "write_ledger", side_effect=StoreWriteError("disk full")),
    ):
        watched.wait(300)
    assert [one.getMessage() for one in caplog.records if "cannot be confirmed" in one.getMessage()] != []
    assert len(caplog.records) == 1
    assert watched.serves(2)
    watched.wait(5)
    assert read(watched) == ("1.0.2", [], [])


def test_a_probe_whose_answer_cannot_be_shown_has_failed_the_trial(watched: Watched) -> None:
    """I02: an answer that raises when it is printed does not keep the trial open for ever."""

    class Answer:
        def __repr__(self) -> str:
            raise ValueError("no")

    again = make(watched.directory, probe=lambda slot: Answer() if str(slot.version) == "1.0.2" else None)
    again.engine.begin()
    watched.publish(2)
    again.wait(5)
    assert again.serves(1)
    assert read(watched)[2] == ["1.0.2"]
    again.engine.close()


def test_a_watcher_that_gets_no_thread_leaves_nothing_behind(tmp_path: Path) -> None:
    """K07: it hears nothing and shows nothing, and may be started again."""
    slot = make_slot()
    watcher = hotglm.Watcher(slot, tmp_path)
    with (
        mock.patch.object(watcher_module, "start_thread", side_effect=ThreadStartError("no thread")),
        pytest.raises(ThreadStartError),
    ):
        watcher.start()
    assert slot.status().watchers == ()
    with watcher:
        assert len(slot.status().watchers) == 1
    slot.close()


@pytest.mark.parametrize("hour", ["22:00+00:00", "22:00Z"])
def test_a_window_in_a_time_zone_is_refused_when_it_is_made(hour: str) -> None:
    """It would raise at every look, and delay every update for ever."""
    with pytest.raises(ArgumentError):
        hotglm.TimeWindow(start=hour, end="06:00")


def test_records_whose_names_the_store_did_not_give_are_passed_over(watched: Watched) -> None:
    """S3, A31: a copy that an editor left is no label, and a file name reaches no terminal."""
    for directory in ("labels", "services"):
        path = Path(watched.store.join(directory))
        text = next(path.glob("*.json")).read_bytes()
        for name in ("\x1b[2Jevil", "stable (copy)", "v1", "-rf", os.fsdecode(b"\xff")):
            (path / f"{name}.json").write_bytes(text)
    assert list(watched.store.read_labels()) == ["stable"]
    assert list(watched.store.read_services()) == ["api"]


def test_what_a_damaged_release_builds_on_is_read_from_its_manifest_alone(watched: Watched) -> None:
    """S7: a file that one release has lost, which stays, does not keep everything older for ever."""
    for number in range(2, 6):
        watched.publish(number, label=None)
    newest = watched.find_path("1.0.5")
    newest.chmod(0o755)
    next(newest.glob("*.safetensors")).unlink()
    removed = watched.store.collect_garbage(keep_newest=1).removed
    assert [str(one.version) for one in removed] == ["1.0.2", "1.0.3", "1.0.4"]
