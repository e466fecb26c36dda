"""What calling through the slot costs, against calling the module, and against the smallest lock around that call.

The module computes nothing, so that nothing hides the cost of the call; every figure is what is *added* to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import nn

import hotglm
from benchmarks.bench import Bench, Row, Sample, alternate, at_most

__all__ = ["CallProbe", "measure"]

_LIMIT_S = 200e-9


class Echo(nn.Module):
    """Returns what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


def measure(bench: Bench) -> list[Row]:
    """Return two rows for one thread and two for four."""
    rows = []
    for num_threads in (1, 4):
        found = bench.ask_once(
            "benchmarks.call:CallProbe",
            "run",
            num_threads=num_threads,
            num_calls=200 if bench.quick else 20_000,
            rounds=bench.rounds(61),
        )
        rows += _make_rows(num_threads, slot=Sample.of(found["slot"]), lock=Sample.of(found["lock"]))
    return rows


def _make_rows(num_threads: int, *, slot: Sample, lock: Sample) -> list[Row]:
    who = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    ratio = slot.median / lock.median
    return [
        Row(
            group="call",
            name=f"call overhead, {who}",
            hotglm=slot,
            peer=lock,
            peer_name="`with lock: module(x)`",
            unit="ns",
            ratio=slot.median / _LIMIT_S,
            ratio_name="hotglm / 200 ns",
            target="< 200 ns",
            met=slot.median < _LIMIT_S,
            note="added to module(x), in paired rounds; below zero because the slot skips a frame that nn.Module makes",
        ),
        Row(
            group="call",
            name=f"call overhead against a lock, {who}",
            hotglm=slot,
            peer=lock,
            peer_name="`with lock: module(x)`",
            unit="ns",
            ratio=ratio,
            ratio_name="hotglm / peer",
            target="< 0.5x",
            met=at_most(ratio, 0.5),
        ),
    ]


class CallProbe:
    """Times the three ways of calling, in turns, in one process."""

    def __init__(self, *, num_threads: int, num_calls: int, rounds: int) -> None:
        """Make the module and the slot around it."""
        self._num_threads = num_threads
        self._num_calls = num_calls
        self._rounds = rounds
        self._module = Echo()
        self._slot = hotglm.ModuleSlot(Echo(), name="echo", version="1.0.0")
        self._x = torch.zeros(1)

    def run(self) -> dict[str, list[float]]:
        """Return what slot and lock add to a call, in seconds, round by round."""
        module, slot, lock = self._module, self._slot, threading.Lock()
        sides: dict[str, Callable[[], float]] = {
            "module": lambda: self._time(_call, module),
            "slot": lambda: self._time(_call, slot),
            "lock": lambda: self._time(_call_locked, module, lock),
        }
        alternate(sides, rounds=2)  # warm-up
        found = alternate(sides, rounds=self._rounds)
        base = found["module"].values
        return {
            name: [value - plain for value, plain in zip(found[name].values, base, strict=True)]
            for name in ("slot", "lock")
        }

    def _time(self, loop: Callable[..., None], *arguments: Any) -> float:
        if self._num_threads == 1:
            started = time.perf_counter()
            loop(self._x, self._num_calls, *arguments)
            return (time.perf_counter() - started) / self._num_calls
        return self._time_threads(loop, *arguments)

    def _time_threads(self, loop: Callable[..., None], *arguments: Any) -> float:
        barrier = threading.Barrier(self._num_threads)
        spans: list[tuple[float, float]] = []

        def work() -> None:
            barrier.wait()
            started = time.perf_counter()
            loop(self._x, self._num_calls, *arguments)
            spans.append((started, time.perf_counter()))

        threads = [threading.Thread(target=work) for _ in range(self._num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_s = max(ended for _, ended in spans) - min(started for started, _ in spans)
        return wall_s / (self._num_calls * self._num_threads)


def _call(x: torch.Tensor, num_calls: int, module: Callable[[torch.Tensor], object]) -> None:
    for _ in repeat(None, num_calls):
        module(x)


def _call_locked(
    x: torch.Tensor, num_calls: int, module: Callable[[torch.Tensor], object], lock: threading.Lock
) -> None:
    for _ in repeat(None, num_calls):
        with lock:
            module(x)
