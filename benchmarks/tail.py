"""The worst pass while an update is staged and committed, over the steady median; beside it the machine's own worst.

The service: one thread that runs pass after pass of a 1 GiB stack of 16 layers, on batches that make a pass last about
100 ms. The target is judged with torch on one thread, so that the service leaves one of two cores, as the documentation
advises; what happens when torch takes both is shown beside it. The update: `slot.update` from another thread under the
default `StagePolicy()`, which hashes every tensor and proves every value finite.

A *window* is the time of one update; its worst pass is the longest that overlaps it. The control is a window of the
same length in which nobody updates anything. The peer reloads in the serving thread between two passes, which is what
`model.load_state_dict(load_file(path))` does to the request that comes next; its worst pass includes that wait.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

import hotglm
from benchmarks.bench import Bench, Row, Sample, at_most, describe_size
from benchmarks.files import drop_cache, make_weights, warm_cache
from benchmarks.models import Stack

__all__ = ["Service", "measure"]

_NUM_TENSORS = 16
_NUM_STEADY = 10
_LIMITS = {"warm": 1.15, "cold": 1.5}


def measure(bench: Bench) -> list[Row]:
    """Return two rows, warm and cold, for one torch thread and for two."""
    weights = make_weights(bench, nbytes=bench.nbytes, num_tensors=_NUM_TENSORS)
    rows: list[Row] = []
    for num_threads in (1, 2):
        with bench.start(
            "benchmarks.tail:Service", num_threads=num_threads, quick=bench.quick, **asdict(weights)
        ) as service:
            for cache in ("warm", "cold"):
                found = service.ask("run", cache=cache, rounds=bench.rounds(5))
                rows += _make_rows(found, size=describe_size(weights.nbytes), num_threads=num_threads, cache=cache)
    return rows


def _make_rows(found: dict[str, Any], *, size: str, num_threads: int, cache: str) -> list[Row]:
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    what = f"worst pass during an update, {size}, {cache} page cache, torch on {threads}"
    ours, control, peer = (Sample.of(found[name]) for name in ("hotglm", "control", "peer"))
    limit, is_judged = _LIMITS[cache], num_threads == 1
    steady = f"p50 {median(found['p50_s']) * 1e3:.1f} ms, window {median(found['window_s']) * 1e3:.0f} ms"
    leaves = "" if is_judged else "; the service leaves no core"
    return [
        Row(
            group="tail",
            name=what,
            hotglm=ours,
            peer=peer,
            peer_name="blocking reload between two passes",
            unit="x",
            ratio=ours.median,
            ratio_name="worst pass / steady p50",
            target=f"<= {limit}x" if is_judged else "",
            met=at_most(ours.median, limit) if is_judged else None,
            note=f"median over the updates of each one's worst pass, {steady}; worst of all {ours.worst:.2f}x{leaves}",
        ),
        Row(
            group="tail",
            name=f"{what} (control)",
            hotglm=ours,
            peer=control,
            peer_name="no update at all, windows of the same length",
            unit="x",
            ratio=ours.median / control.median,
            ratio_name="hotglm / control",
            note=f"what the machine does by itself; worst of all {control.worst:.2f}x",
        ),
    ]


class Service:
    """A service in one thread, its slot, and the peer's model."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int, num_threads: int, quick: bool) -> None:
        """Load both models and find the batch whose pass lasts about 100 ms."""
        torch.set_num_threads(num_threads)
        self._path = path
        self._num_updates = 0
        self._model = Stack(nbytes=nbytes, num_tensors=num_tensors)
        self._model.load_state_dict(load_file(path, backend="pread"))
        self._slot = hotglm.ModuleSlot(Stack(nbytes=nbytes, num_tensors=num_tensors), name="service", version="1.0.0")
        for _ in range(2):
            self._update()  # both arenas are there; the module that the slot was given is gone
        self._x = self._choose_batch(pass_s=0.001 if quick else 0.1)

    def run(self, *, cache: str, rounds: int) -> dict[str, Any]:
        """Return worst pass over steady median for updates, control windows and reloads, round by round.

        The steady median is that of the same round, taken right before and right after, so that a neighbour who comes
        and goes within minutes moves both.
        """
        found: dict[str, list[float]] = {"hotglm": [], "control": [], "peer": [], "p50_s": [], "window_s": []}
        for _ in range(rounds):
            self._prepare(cache)
            steady = [self._time_pass() for _ in range(_NUM_STEADY)]
            worst_s, window_s = self._serve_during_update()
            control = self._serve_for(window_s)
            steady += [self._time_pass() for _ in range(_NUM_STEADY)]
            self._prepare(cache)
            reload_s = self._reload_and_pass()
            p50_s = median(steady)
            for name, value in (("hotglm", worst_s), ("control", max(control)), ("peer", reload_s)):
                found[name].append(value / p50_s)
            found["p50_s"].append(p50_s)
            found["window_s"].append(window_s)
        return found

    def _choose_batch(self, *, pass_s: float) -> torch.Tensor:
        batch = 1
        while True:
            self._x = torch.randn(batch, self._model.side)
            self._time_pass()
            if min(self._time_pass() for _ in range(3)) >= pass_s or batch >= 4096:
                return self._x
            batch *= 2

    def _prepare(self, cache: str) -> None:
        if cache == "warm":
            warm_cache(self._path)
        else:
            drop_cache(self._path)

    @torch.no_grad()
    def _time_pass(self) -> float:
        started = time.perf_counter()
        self._slot(self._x)
        return time.perf_counter() - started

    def _serve_for(self, window_s: float) -> list[float]:
        end = time.perf_counter() + window_s
        passes = [self._time_pass()]
        while time.perf_counter() < end:
            passes.append(self._time_pass())
        return passes

    def _serve_during_update(self) -> tuple[float, float]:
        window: list[float] = []

        def update() -> None:
            started = time.perf_counter()
            self._update()
            window.append(time.perf_counter() - started)

        thread = threading.Thread(target=update)
        thread.start()
        passes = [self._time_pass()]
        while thread.is_alive():
            passes.append(self._time_pass())
        thread.join()
        assert window, "the update failed; its traceback is on standard error"
        return max(passes), window[0]

    def _update(self) -> None:
        self._num_updates += 1
        self._slot.update(self._path, version=f"1.0.{self._num_updates}")

    @torch.no_grad()
    def _reload_and_pass(self) -> float:
        started = time.perf_counter()
        self._model.load_state_dict(load_file(self._path))
        self._model(self._x)
        return time.perf_counter() - started
