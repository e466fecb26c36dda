"""Watching with a trial: what is tried is noted before, what fails goes back, and a pool of processes agrees (I04)."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm.errors import StoreConflictError
from hotglm.events import ConfirmedEvent, QuarantinedEvent, RolledBackEvent
from hotglm.release.services import Service
from hotglm.testing.seams import hooked
from hotglm.watching.status import WatchState
from support.watched import Watched


def make(directory: Path, **policy: Any) -> Watched:
    """Return a watcher of the service `api` whose trials last ten seconds."""
    return Watched(directory, service="api", **{"trial_s": 10.0, **policy})


def join(other: Watched, **policy: Any) -> Watched:
    """Return the watcher of another process of the same service."""
    return make(other.directory, **policy)


def read(watched: Watched) -> tuple[str | None, list[str], list[str]]:
    """Return what the service confirmed, what it tries and what it refuses, as versions."""
    state = Service(store=watched.store, name="api").read()
    confirmed = None if state.confirmed is None else state.confirmed.version
    trials, refused = [one.release.version for one in state.trials], [one.release.version for one in state.refused]
    return confirmed, trials, refused


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """Return a watcher that has confirmed 1.0.1."""
    made = make(tmp_path)
    made.publish(1)
    made.wait(12)
    assert read(made) == ("1.0.1", [], [])
    return made


# -- one process -------------------------------------------------------------------------------------------------------


def test_a_version_is_on_trial_until_its_time_is_over(watched: Watched) -> None:
    """S10: noted before it is live, confirmed in the slot and on disk when the time of the monotonic clock is over."""
    watched.publish(2)
    watched.wait(9)
    assert (watched.state, watched.slot.status().trial, watched.serves(2)) == (WatchState.ON_TRIAL, True, True)
    assert read(watched) == ("1.0.1", ["1.0.2"], [])
    watched.wait(2)
    assert (watched.state, watched.slot.status().trial) == (WatchState.FOLLOWING, False)
    assert read(watched) == ("1.0.2", [], [])


def test_the_trial_is_on_disk_before_a_byte_is_loaded(watched: Watched) -> None:
    """I04: a process that dies while it stages has died on the release."""
    watched.publish(2)
    seen: list[list[str]] = []
    with hooked(lambda kind, _, args: seen.append(read(watched)[1]) if kind == "reach" else None):
        watched.settle()
    assert seen
    assert all(trials == ["1.0.2"] for trials in seen)


def test_without_a_service_there_is_no_trial_unless_asked(tmp_path: Path) -> None:
    """By default a version is confirmed at once where nobody notes trials; `trial_s` makes one all the same."""
    plain = Watched(tmp_path)
    plain.publish(1)
    plain.settle()
    assert not plain.slot.status().trial
    asked = Watched(tmp_path, trial_s=5.0, probe=lambda slot: "worse")
    asked.settle()
    assert asked.serves(0)
    assert [event.code for event in asked.of(QuarantinedEvent)] == ["TRIAL_FAILED"]


@pytest.mark.parametrize("how", ["slot", "watcher"])
def test_the_host_may_confirm(watched: Watched, how: str) -> None:
    """`slot.confirm()` and `watcher.confirm()` end the trial; both are on disk after the next round."""
    watched = join(watched, trial_s=math.inf)
    watched.settle()
    watched.publish(2)
    watched.wait(1000)
    assert watched.state is WatchState.ON_TRIAL
    assert watched.slot.confirm() if how == "slot" else watched.watcher.confirm()
    watched.settle()
    assert read(watched) == ("1.0.2", [], [])
    assert len(watched.of(ConfirmedEvent)) == 2


@pytest.mark.parametrize("how", ["probe says", "probe raises", "watcher", "slot"])
def test_a_trial_that_fails_goes_back_and_is_refused(watched: Watched, how: str) -> None:
    """I03: the version before serves again, bit for bit, and the release is refused on disk with the reason."""
    verdicts: list[object] = [None]

    def probe(slot: hotglm.ModuleSlot) -> object:
        if isinstance(verdicts[0], Exception):
            raise verdicts[0]
        return verdicts[0]

    watched = join(watched, probe=probe)
    watched.publish(2)
    watched.settle()
    watched.wait(3)
    assert watched.serves(2)
    if how == "watcher":
        watched.watcher.fail("latency x10")
    elif how == "slot":
        watched.slot.rollback()
    else:
        verdicts[0] = "latency x10" if how == "probe says" else ValueError("latency x10")
    watched.wait(1)
    watched.settle()
    assert watched.serves(1)
    assert watched.state is WatchState.REFUSED
    assert read(watched) == ("1.0.1", [], ["1.0.2"])
    assert how == "slot" or "latency x10" in watched.status.refused[0].reason
    watched.wait(100)
    assert watched.status.counts.loads == 1
    watched.publish(3)
    verdicts[0] = None
    watched.wait(12)
    assert read(watched)[0] == "1.0.3"
    assert watched.serves(3)


def test_a_newer_release_waits_for_the_end_of_a_trial(watched: Watched) -> None:
    """What going back needs is not given up while a trial runs; then the newest is taken."""
    watched.publish(2)
    watched.settle()
    watched.publish(3)
    watched.publish(4)
    watched.wait(8)
    assert watched.serves(2)
    watched.wait(14)
    assert watched.serves(4)
    assert read(watched) == ("1.0.4", [], [])
    assert watched.status.counts.skipped == 1


def test_a_label_that_is_taken_back_ends_the_trial_at_once(watched: Watched) -> None:
    """An operator who moves the label back need not wait; the release is neither confirmed nor refused."""
    watched = join(watched)
    watched.settle()
    watched.publish(2)
    watched.settle()
    watched.store.move_label("stable", "1.0.1")
    watched.settle()
    assert watched.serves(1)
    assert read(watched) == ("1.0.1", [], [])
    watched.store.move_label("stable", "1.0.2")
    watched.wait(12)
    assert read(watched) == ("1.0.2", [], [])
    assert watched.serves(2)


def test_closing_in_good_order_judges_nothing(watched: Watched) -> None:
    """A process that ends while it tries a release, in good order, leaves it to be tried again."""
    watched.publish(2)
    watched.settle()
    watched.engine.close()
    assert read(watched) == ("1.0.1", [], [])
    again = join(watched)
    again.wait(12)
    assert read(again) == ("1.0.2", [], [])


def test_a_load_that_is_broken_off_judges_nothing(watched: Watched) -> None:
    """What gives way to a newer release, or fails for a reason that may pass, was not on trial."""
    watched.publish(2)

    def fail(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "preadv":
            raise OSError(errno.EIO, "EIO")

    with hooked(fail):
        watched.settle()
    assert read(watched) == ("1.0.1", [], [])
    watched.wait(15)
    assert read(watched) == ("1.0.2", [], [])


def test_a_bad_release_is_refused_on_disk(watched: Watched) -> None:
    """The reason stands in the store's record; who forgives it there lets it be tried again."""
    watched.publish(2, bad=True)
    watched.wait(10)
    service = Service(store=watched.store, name="api")
    assert read(watched) == ("1.0.1", [], ["1.0.2"])
    assert "NONFINITE" in service.read().refused[0].reason
    assert watched.serves(1)
    service.forgive(service.read().refused[0].release.digest)
    watched.wait(2)
    assert watched.status.counts.refused == 2


def test_a_record_that_cannot_be_written_keeps_the_trial(watched: Watched) -> None:
    """D13: the disk is full when the trial ends: still on trial, said, and confirmed when it can be written."""
    watched.publish(2)
    watched.settle()

    def fail(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "pwrite":
            raise OSError(errno.ENOSPC, "ENOSPC")

    with hooked(fail):
        watched.wait(30)
    assert (watched.state, watched.status.code) == (WatchState.ON_TRIAL, "DISK_FULL")
    assert watched.slot.status().trial
    watched.wait(2)
    assert read(watched) == ("1.0.2", [], [])


def test_what_is_not_held_any_more_is_loaded_again(watched: Watched) -> None:
    """Going back works also where the host used the memory of the version before."""
    watched.publish(2)
    watched.settle()
    before = watched.slot._admission.live.before
    assert before is not None
    watched.slot._admission.retire(before)
    watched.watcher.fail("worse")
    watched.wait(2)
    assert watched.serves(1)
    assert watched.of(RolledBackEvent) == []


# -- starting ----------------------------------------------------------------------------------------------------------


def test_a_process_starts_on_what_was_confirmed(watched: Watched) -> None:
    """S10: before anything is followed the confirmed release is live, without a trial."""
    watched.publish(2)
    watched.wait(12)
    watched.publish(3, bad=True)
    again = join(watched)
    again.engine.begin()
    assert again.serves(2)
    assert not again.slot.status().trial
    again.wait(3)
    assert again.serves(2)
    assert read(again) == ("1.0.2", [], ["1.0.3"])


def test_a_confirmed_release_that_is_gone_is_said(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """A store that lost what was confirmed is no reason not to follow it."""
    path = watched.find_path("1.0.1")
    watched.publish(2)
    path.rename(watched.directory / "away")
    again = join(watched)
    again.wait(12)
    assert again.serves(2)
    assert "1.0.1 is not in the store" in caplog.text


# -- a pool ------------------------------------------------------------------------------------------------------------


def test_what_one_process_confirmed_needs_no_second_trial(watched: Watched) -> None:
    """S10: the others of a pool join what was confirmed, as a process that starts does."""
    other = join(watched)
    other.settle()
    watched.publish(2)
    watched.wait(12)
    other.clock.at_s += 20
    other.settle()
    assert (other.serves(2), other.state) == (True, WatchState.FOLLOWING)


def test_one_death_refuses_the_release_for_the_pool(watched: Watched) -> None:
    """S11: a process dies on trial: whoever tries the same goes back, and nobody takes it again."""
    dying, other = join(watched), join(watched)
    for one in (dying, other):
        one.settle()
    watched.publish(2)
    for one in (watched, dying, other):
        one.settle()
        assert one.serves(2)
    trial = dying.engine.trials.running
    assert trial is not None
    assert trial.running is not None
    trial.running.close()  # what the kernel does when the process ends
    for one in (watched, other):
        one.wait(12)
        assert one.serves(1)
        assert one.state is WatchState.REFUSED
    fresh = join(watched)
    fresh.wait(12)
    assert fresh.serves(1)
    assert read(watched) == ("1.0.1", [], ["1.0.2"])
    with watched.store.open_release("1.0.2") as release, pytest.raises(StoreConflictError):
        watched.store.service("api").begin(release)


def test_a_refusal_by_another_process_is_seen_while_a_trial_runs(watched: Watched) -> None:
    """S11: nobody waits for the end of a trial whose release was refused meanwhile."""
    watched.publish(2)
    watched.settle()
    with watched.store.open_release("1.0.2") as release:
        one = watched.store.service("api").begin(release)
        one.fail("outputs are wrong")
    watched.step()
    assert watched.serves(1)
    assert "outputs are wrong" in watched.status.refused[0].reason


def test_a_release_that_was_confirmed_stays_eligible(watched: Watched) -> None:
    """A later death on what the pool confirmed keeps nobody from starting on it: all converge."""
    other = join(watched)
    other.settle()
    watched.publish(2)
    other.settle()
    watched.wait(12)
    trial = other.engine.trials.running
    assert trial is not None
    assert trial.running is not None
    trial.running.close()
    fresh = join(watched)
    fresh.wait(12)
    watched.wait(12)
    assert fresh.serves(2)
    assert watched.serves(2)
    assert read(watched)[0] == "1.0.2"


def test_a_fork_lets_go_of_the_parents_trial(watched: Watched) -> None:
    """K01: a child's copy of the lock is closed, so that the parent's death is seen; the parent's trial goes on."""
    watched.publish(2)
    watched.settle()
    watched.watcher.reset_after_fork()
    trial = watched.engine.trials.running
    assert trial is not None
    assert trial.running is None
    assert watched.state is WatchState.IDLE
    fresh = join(watched)
    fresh.settle()
    assert read(fresh)[2] == ["1.0.2"]  # in this process nobody else holds the lock: as if the parent had died
