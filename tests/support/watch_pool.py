"""A pool of processes that follow one store while some are killed: `python -m support.watch_pool WORKERS RELEASES DIR`.

The parent publishes and kills; each worker says what its passes answer. Checked all along: a process that starts serves
what was confirmed, and a pass answers as its version's weights do. Checked after each release: all agree.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import hotglm
from hotglm.release.store import Store
from support.watched import X, expected, make_slot, write_weights

__all__ = ["main"]

POLICY = hotglm.WatchPolicy(interval_s=0.02, trial_s=0.1, retry_s=0.02, max_retry_s=0.2)
PATIENCE_S = 60.0


@dataclass(slots=True, kw_only=True)
class Worker:
    """One process of the pool, as its parent sees it."""

    pid: int
    pipe: int
    text: str = ""
    version: str = ""
    faults: list[str] = field(default_factory=list)

    def read(self, timeout_s: float) -> None:
        """Take in what it said."""
        if select.select([self.pipe], [], [], timeout_s)[0]:
            self.text += os.read(self.pipe, 65_536).decode()
            *lines, self.text = self.text.split("\n")
            for line in lines:
                word, _, rest = line.partition(" ")
                if word == "serves":
                    self.version = rest
                else:
                    self.faults.append(line)


def main(num_workers: int, num_releases: int, directory: Path) -> None:
    """Run the pool.

    Raises:
        AssertionError: somebody served what he must not, or they do not agree.
    """
    torch.set_num_threads(1)
    rng = random.Random(num_releases)
    store = hotglm.open_store(directory / "store", creates=True)
    publish(store, directory, 1)
    workers = [start(store) for _ in range(num_workers)]
    await_agreement(workers, store)
    num_kills = 0
    for number in range(2, num_releases + 2):
        publish(store, directory, number)
        if rng.random() < 0.5 and number <= num_releases:  # nobody is killed on the last one: all must reach it
            time.sleep(rng.random() * 0.25)
            kill(workers.pop(rng.randrange(num_workers)))
            workers.append(start(store))
            num_kills += 1
        await_agreement(workers, store)
    assert {worker.version for worker in workers} == {f"1.0.{num_releases + 1}"}, workers
    for worker in workers:
        kill(worker)
    refused = store.service("pool").read().refused
    print(f"{num_kills} killed, {len(refused)} refused")


def publish(store: Store, directory: Path, number: int) -> None:
    """Publish the next release and let the label lead there."""
    store.publish(write_weights(directory / "sources", number, version=f"1.0.{number}"))
    store.move_label("stable", f"1.0.{number}")


def start(store: Store) -> Worker:
    """Fork a worker; nothing in this process has computed in parallel."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            serve(store, write)
        except BaseException as failure:  # noqa: BLE001 - whatever it is, the parent is told
            os.write(write, f"raised {failure!r}\n".encode())
        os._exit(1)
    os.close(write)
    return Worker(pid=pid, pipe=read)


def kill(worker: Worker) -> None:
    """End a worker without a warning."""
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)
    worker.read(0)
    os.close(worker.pipe)
    assert worker.faults == [], worker.faults


def serve(store: Store, pipe: int) -> None:
    """Serve for ever, and say what is served whenever that changes."""
    slot, service = make_slot(), store.service("pool")
    before = service.start()
    watcher = hotglm.watch(slot, store, service="pool", policy=POLICY)
    after = service.start()
    if before is not None and after is not None:
        first = slot.history[1]  # what was live before anything was followed
        number = int(str(first.version).rsplit(".", 1)[1])
        assert before.sequence <= number <= after.sequence, (before, first, after)
    said = ""
    while watcher.status().is_alive:
        with slot.acquire() as generation, torch.no_grad():
            version, answer = str(generation.version), generation.module(X)
        assert torch.equal(answer, expected(int(version.rsplit(".", 1)[1]))), version
        if version != said:
            said = version
            os.write(pipe, f"serves {version}\n".encode())
        time.sleep(0.002)


def await_agreement(workers: list[Worker], store: Store) -> None:
    """Wait until all serve what is confirmed, and the label leads there or to what was refused."""
    service, deadline_s = store.service("pool"), time.monotonic() + PATIENCE_S
    while True:
        for worker in workers:
            worker.read(0.01)
            assert worker.faults == [], worker.faults
        state, label = service.read(), store.read_label("stable")
        assert label is not None
        refused = {one.release.digest for one in state.refused}
        is_settled = state.confirmed is not None and (
            state.confirmed == label.release or (label.release.digest in refused and not state.trials)
        )
        if is_settled and state.confirmed and {w.version for w in workers} == {state.confirmed.version}:
            return
        assert time.monotonic() < deadline_s, (workers, state.confirmed, state.trials, label.release)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
