"""What a swap costs a compiled model: the first pass after it, compilations, and the way of those who compile anew.

Each side is a process of its own, because compiled code is of a process. The first pass after each commit is compared
with the passes that follow it in the same generation; the eager model is the control.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, at_most, describe_size
from benchmarks.models import Stack, draw_state

__all__ = ["CompiledProbe", "RecompilingProbe", "measure"]

_NUM_TENSORS = 16
_NUM_STEADY = 9
_BATCH = 32
_LIMIT = 1.05


def measure(bench: Bench) -> list[Row]:
    """Return one row for each way of compiling, one of counts, and one beside compiling anew."""
    size = bench.size(128 * MIB)
    ways = ("eager", "module", "regional")
    backend = "eager" if bench.quick else "inductor"
    common = {"nbytes": size, "backend": backend}
    found = {way: _run(bench, "CompiledProbe", way=way, rounds=bench.rounds(21), **common) for way in ways}
    anew = _run(bench, "RecompilingProbe", rounds=bench.rounds(3), **common)
    return [
        *(_first(way, size, found[way]) for way in ways),
        _count(size, [found[way] for way in ways[1:]]),
        _whole(size, found["module"], anew),
    ]


def _run(bench: Bench, kind: str, **arguments: Any) -> dict[str, list[float]]:
    answer: dict[str, list[float]] = bench.ask_once(f"benchmarks.compiled:{kind}", "run", **arguments)
    return answer


def _first(way: str, nbytes: int, found: dict[str, list[float]]) -> Row:
    first, steady = Sample.of(found["first"]), Sample.of(found["steady"])
    ratio = first.median / steady.median
    return Row(
        group="compiled",
        name=f"first pass after a swap, {way}, {describe_size(nbytes)}",
        hotglm=first,
        peer=steady,
        peer_name="steady passes of the same generation",
        unit="ms",
        ratio=ratio,
        ratio_name="first / steady",
        target=f"<= {_LIMIT}x",
        met=at_most(ratio, _LIMIT),
        note="medians over the swaps; a steady one is the median of those that follow; after a wait as long as "
        f"the swap, without one, it is {Sample.of(found['rested']).median / steady.median:.2f}x (caches, clocks, and "
        "threads of torch that sleep)",
    )


def _count(nbytes: int, runs: list[dict[str, list[float]]]) -> Row:
    total = sum(sum(found["compiled"]) for found in runs)
    num_swaps = sum(len(found["compiled"]) for found in runs)
    return Row(
        group="compiled",
        name=f"pieces of code compiled in {num_swaps} swaps, module and regional, {describe_size(nbytes)}",
        hotglm=Sample.of([total]),
        peer=Sample.of([float(num_swaps)]),
        peer_name="one for each new model that is compiled anew",
        unit="x",
        ratio=total,
        ratio_name="compiled by hotglm",
        target="0",
        met=total == 0,
        note="by torch's own counter of frames, staging and passes together",
    )


def _whole(nbytes: int, found: dict[str, list[float]], anew: dict[str, list[float]]) -> Row:
    ours, peer = Sample.of(found["whole"]), Sample.of(anew["whole"])
    ratio = peer.median / ours.median
    return Row(
        group="compiled",
        name=f"from weights in memory to the first answer, compiled, {describe_size(nbytes)}",
        hotglm=ours,
        peer=peer,
        peer_name="load_state_dict into a new model, torch.compile anew",
        unit="ms",
        ratio=ratio,
        ratio_name="peer / hotglm",
        note="the peer finds its generated code in inductor's cache on disk, as a restarted service does",
    )


class CompiledProbe:
    """Swaps a model that is compiled in one of the ways, and times the passes after each commit."""

    def __init__(self, *, nbytes: int, way: str, rounds: int, backend: str) -> None:
        """Make the slot, compile, and run once."""
        self._rounds = rounds
        self._states = [draw_state(nbytes=nbytes, num_tensors=_NUM_TENSORS, seed=seed) for seed in (1, 2)]
        model = Stack(nbytes=nbytes, num_tensors=_NUM_TENSORS)
        model.load_state_dict(self._states[0])
        self._x = torch.ones(_BATCH, model.side)
        if way == "module":
            model.compile(backend=backend)
        elif way == "regional":
            for index, layer in enumerate(model.layers):
                compiled: Any = torch.compile(layer, backend=backend)
                model.layers[index] = compiled
        policy = hotglm.StagePolicy(warm_up=(self._x,), finite=False, digest=False)
        self._slot = hotglm.ModuleSlot(model, name="stack", version="1.0.0", policy=policy)

    def run(self) -> dict[str, list[float]]:
        """Return seconds of first, steady and rested passes and of swaps, and how often torch compiled in each."""
        found: dict[str, list[float]] = {"first": [], "steady": [], "rested": [], "whole": [], "compiled": []}
        with torch.inference_mode():
            self._slot(self._x)
            for number in range(2):  # both arenas are faulted in
                self._swap(number)
            for number in range(2, self._rounds + 2):
                before, started = _count_frames(), time.perf_counter()
                self._swap(number)
                first = self._time_pass()
                found["whole"].append(time.perf_counter() - started)
                found["first"].append(first)
                found["steady"].append(Sample.of([self._time_pass() for _ in range(_NUM_STEADY)]).median)
                time.sleep(found["whole"][-1])
                found["rested"].append(self._time_pass())
                found["compiled"].append(float(_count_frames() - before))
        return found

    def _swap(self, number: int) -> None:
        self._slot.update(self._states[number % 2], version=f"1.0.{number + 1}")

    def _time_pass(self) -> float:
        started = time.perf_counter()
        self._slot(self._x)
        return time.perf_counter() - started


class RecompilingProbe:
    """What there is without hotglm: a new model for the new weights, compiled anew."""

    def __init__(self, *, nbytes: int, rounds: int, backend: str) -> None:
        """Make the weights, and let inductor's cache know the code."""
        self._rounds, self._nbytes, self._backend = rounds, nbytes, backend
        self._state = draw_state(nbytes=nbytes, num_tensors=_NUM_TENSORS, seed=1)
        self._start()

    def run(self) -> dict[str, list[float]]:
        """Return the seconds from weights in memory to the first answer."""
        return {"whole": [self._start() for _ in range(self._rounds)]}

    def _start(self) -> float:
        torch._dynamo.reset()
        started = time.perf_counter()
        model = Stack(nbytes=self._nbytes, num_tensors=_NUM_TENSORS)
        model.load_state_dict(self._state)
        model.compile(backend=self._backend)
        with torch.inference_mode():
            model(torch.ones(_BATCH, model.side))
        return time.perf_counter() - started


def _count_frames() -> int:
    return int(torch._dynamo.utils.counters["frames"]["total"])
