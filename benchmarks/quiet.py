"""p99 of a service at 70 % load while one update follows another: yielding, within a budget, and at will.

The service: one thread that begins a pass whenever one is due, every 1/0.7 of what a pass takes alone, with torch on
one thread. A request's time is counted from when it was due, so that one which had to wait for the pass before it
counts in full. The updates: `slot.update` from another thread, again and again, of a file that the page cache has;
every tensor is hashed and proved finite.

Each round has a window for each way of updating, in turns, and two for none: what the second of these has over the
first is what the machine does by itself. The p99 of a way is over all of its windows together, and so is that of none;
the spread is that of its single windows.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from itertools import chain
from statistics import median, quantiles
from typing import Any

import torch

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, at_most, describe_size
from benchmarks.files import make_weights
from benchmarks.models import Stack

__all__ = ["Service", "measure"]

_NUM_TENSORS = 16
_LOAD = 0.7
_LIMIT = 1.1
_RATE = 256 * MIB
_WAYS = {
    "none": None,
    "none again": None,
    "yielding": hotglm.StagePolicy(pace=hotglm.Yielding()),
    "within a budget": hotglm.StagePolicy(max_bytes_per_s=_RATE),
    "at will": hotglm.StagePolicy(),
}
_NAMES = {
    "none again": "no update at all (control)",
    "yielding": "updates, pace=Yielding()",
    "within a budget": f"updates, max_bytes_per_s={_RATE >> 20} MiB",
    "at will": "updates, StagePolicy()",
}


def measure(bench: Bench) -> list[Row]:
    """Return one row for each way of updating."""
    size = bench.size(128 * MIB)
    paths = [make_weights(bench, nbytes=size, num_tensors=_NUM_TENSORS, seed=seed).path for seed in (1, 2)]
    seconds = 0.2 if bench.quick else 3.0
    with bench.start("benchmarks.quiet:Service", paths=paths, nbytes=size) as service:
        found = [service.ask("run", seconds=seconds, turn=turn) for turn in range(bench.rounds(8))]
    return [_make_row(way, found, nbytes=size) for way in _NAMES]


def _make_row(way: str, found: list[dict[str, Any]], *, nbytes: int) -> Row:
    ours, peer = ([window[name]["taken_s"] for window in found] for name in (way, "none"))
    all_ours, all_peer = list(chain.from_iterable(ours)), list(chain.from_iterable(peer))
    ratio = _p99(all_ours) / _p99(all_peer)
    is_judged = way == "yielding"
    updates = [update_s for window in found for update_s in window[way]["updates_s"]]
    beside = f"{len(updates)} updates, {median(updates):.2f} s each" if updates else "no updates"
    p50 = median(all_ours) / median(all_peer)
    return Row(
        group="quiet",
        name=f"p99 of a service at 70 % load, {describe_size(nbytes)}, {_NAMES[way]}",
        hotglm=Sample.of([_p99(window) for window in ours]),
        peer=Sample.of([_p99(window) for window in peer]),
        peer_name="the same service, no update at all",
        unit="ms",
        ratio=ratio,
        ratio_name="p99 / steady p99",
        target=f"<= {_LIMIT}x" if is_judged else "",
        met=at_most(ratio, _LIMIT) if is_judged else None,
        note=f"p99 over {len(all_ours)} passes of all windows together; p50 {p50:.2f}x; {beside}",
    )


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


class Service:
    """A service in one thread, and its slot."""

    def __init__(self, *, paths: list[str], nbytes: int) -> None:
        """Load both versions, so that both arenas are there, and find out what a pass takes."""
        torch.set_num_threads(1)
        self._paths = paths
        self._num_updates = 0
        self._slot = hotglm.ModuleSlot(Stack(nbytes=nbytes, num_tensors=_NUM_TENSORS), name="service", version="1.0.0")
        for _ in range(3):
            self._update(hotglm.StagePolicy())
        module = self._slot.live.module
        assert isinstance(module, Stack)
        self._x = torch.randn(1, module.side)
        for _ in range(5):
            self._pass()
        self._every_s = median(self._pass() for _ in range(30)) / _LOAD

    def run(self, *, seconds: float, turn: int) -> dict[str, Any]:
        """Return what requests took in one window for each way of updating, and how long the updates took."""
        names = list(_WAYS)
        turn %= len(names)
        return {name: self._serve(name, seconds) for name in (*names[turn:], *names[:turn])}

    def _serve(self, way: str, seconds: float) -> dict[str, Any]:
        policy, updates, taken = _WAYS[way], list[float](), list[float]()
        with ExitStack() as stack:
            if policy is not None:
                stack.enter_context(_Repeating(lambda: updates.append(self._update(policy))))
            due = time.perf_counter()
            end = due + seconds
            while due < end:
                time.sleep(max(0.0, due - time.perf_counter()))
                self._pass()
                taken.append(time.perf_counter() - due)
                due += self._every_s
        return {"taken_s": taken, "updates_s": updates}

    @torch.no_grad()
    def _pass(self) -> float:
        started = time.perf_counter()
        self._slot(self._x)
        return time.perf_counter() - started

    def _update(self, policy: hotglm.StagePolicy) -> float:
        started = time.perf_counter()
        self._num_updates += 1
        self._slot.update(self._paths[self._num_updates % 2], version=f"1.0.{self._num_updates}", policy=policy)
        return time.perf_counter() - started


class _Repeating:
    """A thread that does something again and again, at least once, while the context lasts."""

    def __init__(self, action: Any) -> None:
        self._action = action
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            self._action()
            if self._stop.is_set():
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
