"""Processes that publish, label, collect and try releases of one store, each killed at a random point (P11, D17).

Run as a program: `python -m support.kill_storm NUM_KILLS DIRECTORY`. It prints how many kills there were, and how many
a second. Four drivers fork one child after the other. A child changes the store until it is killed: at a random one of
its own calls, or, one in ten, by its driver at a random instant, which may be in the middle of a call. What a child has
done it notes before it goes on. After every round of kills everything is verified: no process met an error that
concurrency does not explain, every release is whole, no label is lost, nor a move of one that was reported.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from hotglm.errors import SourceError, StoreError
from hotglm.release import environment
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.testing.seams import hooked
from support.kill_scenarios import look_everything_up, verify_store
from support.kill_sweep import Killer
from support.sources import write_source

NUM_DRIVERS = 4
NUM_KILLS_A_ROUND = 1000
MAX_CALLS = 100
MAX_PAUSE_S = 0.004
KINDS = ("publish", "publish", "publish", "label", "label", "label", "trial", "trial", "collect")
EXPLAINED = {"NOT_IN_STORE", "REFUSED", "NOT_FOUND", "INCOMPLETE", "MISSING_FILE"}
"""What a process may meet because another one collected, labelled or refused what it was looking at."""


class Act:
    """One child: changes a store at random, and notes each label move that was reported to it."""

    def __init__(self, store: Store, sources: list[Path], *, seed: str, reports: int) -> None:
        self._store = store
        self._sources = sources
        self._chance = random.Random(seed)
        self._seed = seed
        self._reports = reports

    def run(self) -> None:
        """Change the store for ever; end only by a kill, or by a surprise."""
        for turn in range(10**9):
            with contextlib.suppress(_Explained):
                self._change(self._chance.choice(KINDS), f"{self._seed}.{turn}")

    def _change(self, kind: str, version: str) -> None:
        try:
            getattr(self, f"_{kind}")(version)
        except (StoreError, SourceError) as error:
            if error.code not in EXPLAINED:
                raise
            raise _Explained from error

    def _publish(self, version: str) -> None:
        self._store.publish(self._chance.choice(self._sources), name="ranker", version=version)

    def _label(self, _: str) -> None:
        before = self._store.read_labels()["stable"]
        target = self._chance.choice(self._store.find_releases())
        if target.sequence != before.release.sequence:
            self._store.move_label("stable", target.sequence)
            os.write(self._reports, b"moved\n")

    def _collect(self, _: str) -> None:
        self._store.collect_garbage(keep_newest=2)

    def _trial(self, _: str) -> None:
        service = self._store.service("api")
        for refusal in service.read().refused:
            service.forgive(refusal.release.digest)
        with self._store.open_release("stable") as release, service.begin(release) as trial:
            trial.confirm()


class _Explained(Exception):  # noqa: N818 - no error: somebody else was there before
    """Somebody else changed what this process was looking at."""


def kill_one(store: Store, sources: list[Path], *, seed: str, reports: int) -> None:
    """Fork a child that changes the store, and have it killed somewhere."""
    chance = random.Random(f"kill {seed}")
    from_outside = chance.random() < 0.1
    child = os.fork()
    if child == 0:
        try:
            if chance.random() < 0.5:
                look_everything_up()
            number = 10**9 if from_outside else chance.randint(1, MAX_CALLS)
            with hooked(Killer(number, "kill")):
                Act(store, sources, seed=seed, reports=reports).run()
        except BaseException:  # noqa: BLE001 - printed, and the process ends
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    if from_outside:
        time.sleep(chance.random() * MAX_PAUSE_S)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), f"child {seed} ended by itself"


def drive(store: Store, sources: list[Path], *, round_: int, driver: int, num: int, reports: int) -> None:
    """Kill `num` children, one after the other."""
    for turn in range(num):
        kill_one(store, sources, seed=f"{round_}.{driver}.{turn}", reports=reports)


def storm(num_kills: int, directory: Path) -> None:
    """Kill processes at random, round by round, and verify what is left after each."""
    store = open_store(directory / "store", creates=True)
    sources = [write_source(directory / str(seed), seed=seed, shards=seed % 2 == 1) for seed in range(6)]
    store.publish(sources[0], name="ranker", version="0.1")
    store.move_label("stable", "0.1")
    reports = os.open(directory / "reports", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    gc.freeze()
    for round_ in range((num_kills + NUM_KILLS_A_ROUND - 1) // NUM_KILLS_A_ROUND):
        num = min(NUM_KILLS_A_ROUND, num_kills - round_ * NUM_KILLS_A_ROUND)
        run_drivers(store, sources, round_=round_, num=num, reports=reports)
        verify_all(store, num_reported=os.fstat(reports).st_size // len(b"moved\n"))
    store.collect_garbage(keep_newest=1)
    assert os.listdir(store.join("tmp")) == []
    assert sorted(os.listdir(store.join("labels"))) == ["stable.json"]
    assert os.listdir(store.join("services")) in ([], ["api.json"])


def run_drivers(store: Store, sources: list[Path], *, round_: int, num: int, reports: int) -> None:
    """Let the drivers of one round run, and wait for them."""
    running = []
    for driver in range(NUM_DRIVERS):
        share = num // NUM_DRIVERS + (driver < num % NUM_DRIVERS)
        if (child := os.fork()) == 0:
            try:
                drive(store, sources, round_=round_, driver=driver, num=share, reports=reports)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - printed, and the process ends
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        running.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in running]
    assert statuses == [0] * NUM_DRIVERS, f"round {round_}: a process met what nothing explains"


def verify_all(store: Store, *, num_reported: int) -> None:
    """Verify every release, number, label and confirmed release."""
    versions = verify_store(store)
    sequences = [one.sequence for one in store.find_releases()]
    assert len(set(sequences)) == len(sequences)
    assert len(set(versions)) == len(versions)
    assert store.read_labels()["stable"].revision > num_reported, "a move that was reported is lost"
    confirmed = store.service("api").start()
    if confirmed is not None:
        with store.open_release(confirmed.sequence) as release:
            assert release.digest == confirmed.digest


if __name__ == "__main__":
    environment._read_version = functools.cache(environment._read_version)
    began_s = time.monotonic()
    storm(int(sys.argv[1]), Path(sys.argv[2]))
    print(sys.argv[1], f"{int(sys.argv[1]) / (time.monotonic() - began_s):.0f}")
