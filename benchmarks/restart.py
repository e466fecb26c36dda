"""Time without answers: a swap, against a restart of the same service with the other file.

The service is a process of its own that loads its weights and answers requests over a socket; its passes last about
a millisecond, so that they do not hide what a swap adds. Clients ask without pause. The figure is the longest time
between two answers, whoever got them, around the change; where nothing changes it is the length of a pass or two,
which is what the control says. A request is lost if it was sent and got no answer, or could not be sent.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from benchmarks.bench import MIB, Bench, Row, Sample, at_least, describe_size
from benchmarks.files import WeightsOnDisk, make_weights, warm_cache

__all__ = ["measure"]

_NUM_TENSORS = 64
_NUM_CLIENTS = 2
_MARGIN_S = 0.25
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def measure(bench: Bench) -> list[Row]:
    """Return a row for the time without answers and one for the requests that were lost."""
    old, new = (
        make_weights(bench, nbytes=bench.size(16 * MIB), num_tensors=_NUM_TENSORS, seed=seed) for seed in (1, 2)
    )
    for weights in (old, new):
        warm_cache(weights.path)
    gaps: dict[str, list[float]] = {"control": [], "swap": [], "restart": []}
    lost = {"control": 0, "swap": 0, "restart": 0}
    requests = dict(lost)
    with _Service(os.path.join(bench.directory, "service.sock"), old) as service:
        for _ in range(1 if bench.quick else 5):
            changes: tuple[tuple[str, Callable[[], None]], ...] = (
                ("control", lambda: time.sleep(_MARGIN_S)),
                ("swap", lambda: service.swap(new.path)),
                ("restart", lambda: service.restart(old)),
            )
            for name, change in changes:
                tally = _ask_during(service.address, change)
                gaps[name].append(tally.longest_gap_s)
                lost[name] += tally.num_lost
                requests[name] += len(tally.answers_s)
    return _make_rows(
        describe_size(old.nbytes), {name: Sample.of(values) for name, values in gaps.items()}, lost, requests
    )


def _make_rows(size: str, gaps: dict[str, Sample], lost: dict[str, int], requests: dict[str, int]) -> list[Row]:
    ratio = gaps["restart"].median / gaps["swap"].median
    control = f"without any change the longest is {gaps['control'].median * 1e3:.1f} ms"
    return [
        Row(
            group="restart",
            name=f"time without answers, {size} of weights",
            hotglm=gaps["swap"],
            peer=gaps["restart"],
            peer_name="restart of the service",
            unit="ms",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=">= 100x",
            met=at_least(ratio, 100),
            note=f"longest time between two answers; {control}",
        ),
        Row(
            group="restart",
            name="requests lost during the change",
            hotglm=Sample.of([lost["swap"]]),
            peer=Sample.of([lost["restart"]]),
            peer_name="restart of the service",
            unit="requests",
            ratio=float(lost["swap"]),
            ratio_name="lost with the swap",
            target="0",
            met=lost["swap"] == 0,
            note=f"{requests['swap']} answered at swaps, {requests['restart']} around restarts; clients try each 5 ms",
        ),
    ]


class _Service:
    """The service's process, and the two ways of giving it other weights."""

    def __init__(self, address: str, weights: WeightsOnDisk) -> None:
        self.address = address
        self._process = self._start(weights)

    def swap(self, path: str) -> None:
        """Have the running process update its slot."""
        assert _exchange(self.address, f"update {path}\n", timeout_s=60) == "done\n"

    def restart(self, weights: WeightsOnDisk) -> None:
        """End the process in the usual way and start it again."""
        self._stop()
        self._process = self._start(weights)

    def _start(self, weights: WeightsOnDisk) -> subprocess.Popen[bytes]:
        arguments = [self.address, weights.path, str(weights.nbytes), str(weights.num_tensors)]
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.service", *arguments], cwd=_HERE)
        while True:
            try:
                if _exchange(self.address, "pass\n", timeout_s=60) == "done\n":
                    return process
            except OSError:
                assert process.poll() is None, "the service ended"
                time.sleep(0.005)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


@dataclass
class _Tally:
    """When answers came, and how many requests were lost; clients write it side by side."""

    answers_s: list[float] = field(default_factory=list)
    num_lost: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def longest_gap_s(self) -> float:
        times = sorted(self.answers_s)
        return max(later - earlier for earlier, later in pairwise(times))


def _ask_during(address: str, change: Callable[[], None]) -> _Tally:
    """Ask without pause from a while before the change to a while after it."""
    tally, stopped = _Tally(), threading.Event()
    clients = [threading.Thread(target=_ask, args=(address, tally, stopped)) for _ in range(_NUM_CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(_MARGIN_S)
    change()
    time.sleep(_MARGIN_S)
    stopped.set()
    for client in clients:
        client.join()
    return tally


def _ask(address: str, tally: _Tally, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            with _connect(address, timeout_s=60) as connection, connection.makefile("rw") as stream:
                while not stopped.is_set():
                    stream.write("pass\n")
                    stream.flush()
                    if stream.readline() != "done\n":
                        raise ConnectionError("no answer")
                    tally.answers_s.append(time.perf_counter())
        except OSError:
            with tally.lock:
                tally.num_lost += 1
            time.sleep(0.005)


def _connect(address: str, *, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _exchange(address: str, line: str, *, timeout_s: float) -> str:
    with _connect(address, timeout_s=timeout_s) as connection, connection.makefile("rw") as stream:
        stream.write(line)
        stream.flush()
        return stream.readline()
