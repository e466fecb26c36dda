"""Processes that publish, label, collect and try releases of one store, each killed at a random instant (P11, D17).

Run as a program: `python -m support.kill_storm NUM_KILLS DIRECTORY`. It prints how many kills there were; it fails if a
process met an error that concurrency does not explain, or if the store is not whole in the end.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

from hotglm.errors import SourceError, StoreError
from hotglm.release import environment
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from support.kill_sweep import verify_store
from support.releases import write_source

NUM_PROCESSES = 4
MAX_PAUSE_S = 0.02
EXPLAINED = {"NOT_IN_STORE", "REFUSED", "NOT_FOUND", "INCOMPLETE", "MISSING_FILE"}
"""What a process may meet because another one collected, labelled or refused what it was looking at."""


def act(store: Store, sources: list[Path], kind: int, version: str) -> None:
    """Change the store once."""
    if kind == 0:
        store.publish(random.choice(sources), name="ranker", version=version)
    elif kind == 1:
        store.move_label("stable", random.choice(store.find_releases()).sequence)
    elif kind == 2:
        store.collect_garbage(keep_newest=2)
    else:
        service = store.service("api")
        for refusal in service.read().refused:
            service.forgive(refusal.release.digest)
        with store.open_release("stable") as release, service.begin(release) as trial:
            trial.confirm()


def work(store: Store, sources: list[Path], number: int) -> None:
    """Change the store for ever, in one way; end only by a surprise."""
    random.seed(number)
    for turn in range(10**9):
        try:
            act(store, sources, number % 4, f"{number}.{turn}")
        except (StoreError, SourceError) as error:
            if error.code not in EXPLAINED:
                raise


def storm(num_kills: int, directory: Path) -> None:
    """Kill processes at random, start others in their place, and verify what is left."""
    store = open_store(directory / "store", creates=True)
    sources = [write_source(directory / str(seed), seed=seed) for seed in range(6)]
    store.publish(sources[0], name="ranker", version="0.1")
    store.move_label("stable", "0.1")
    running: list[int] = []
    number = 0
    for _ in range(num_kills):
        while len(running) < NUM_PROCESSES:
            number += 1
            if (child := os.fork()) == 0:
                try:
                    work(store, sources, number)
                finally:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
            running.append(child)
        time.sleep(random.random() * MAX_PAUSE_S)
        child = running.pop(random.randrange(len(running)))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "a process ended by itself"
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    verify_store(store)
    confirmed = store.service("api").start()
    if confirmed is not None:
        with store.open_release(confirmed.sequence) as release:
            assert release.digest == confirmed.digest
    sequences = [one.sequence for one in store.find_releases()]
    assert len(set(sequences)) == len(sequences)
    store.collect_garbage(keep_newest=1)
    assert os.listdir(store.join("tmp")) == []
    assert sorted(os.listdir(store.join("labels"))) == ["stable.json"]


if __name__ == "__main__":
    environment._read_version = functools.cache(environment._read_version)
    storm(int(sys.argv[1]), Path(sys.argv[2]))
    print(sys.argv[1])
