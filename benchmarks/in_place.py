"""Commits in place: how long they keep passes out, against `load_state_dict` under a lock, and against copying memory.

Three ways to get new bytes into tensors that must not move, in turns: the exchange of a commit (which also saves the
old bytes, so it moves twice as many), `load_state_dict` of a dict in memory under a lock that passes take, and a plain
copy of one block of that size by as many threads, which is what the memory of the machine allows. What counts is how
long passes are kept out. Then a service of 4 threads goes on while commits are made, and its longest pass is looked at.
"""

from __future__ import annotations

import itertools
import threading
import time

import torch

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.models import Stack, draw_state

__all__ = ["InPlaceProbe", "measure"]

_NUM_TENSORS = 100
_NUM_READERS = 4


def measure(bench: Bench) -> list[Row]:
    """Return one row for each peer, and one for the passes."""
    probe = {"nbytes": bench.nbytes, "num_tensors": _NUM_TENSORS, "rounds": bench.rounds(9)}
    found = bench.ask_once("benchmarks.in_place:InPlaceProbe", "run", **probe)
    ours, lock, copy = (Sample.of(found[name]) for name in ("hotglm", "lock", "copy"))
    tail = bench.ask_once("benchmarks.in_place:InPlaceProbe", "serve", **{**probe, "nbytes": bench.size(64 * MIB)})
    what, small = describe_size(bench.nbytes), describe_size(bench.size(64 * MIB))
    return [
        Row(
            group="in_place",
            name=f"passes kept out, commit in place of {what}",
            hotglm=ours,
            peer=lock,
            peer_name="load_state_dict from memory under a lock",
            unit="ms",
            ratio=lock.median / ours.median,
            ratio_name="peer / hotglm",
            note="the peer keeps no old version, and one that fails leaves a mixture",
        ),
        Row(
            group="in_place",
            name=f"bytes moved a second, commit in place of {what}",
            hotglm=Sample.of([2 * bench.nbytes / second / MIB for second in ours.values]),
            peer=Sample.of([bench.nbytes / second / MIB for second in copy.values]),
            peer_name="Tensor.copy_ of one block",
            unit="MiB",
            ratio=2 * copy.median / ours.median,
            ratio_name="hotglm / peer",
            target=">= 0.8x",
            met=at_least(2 * copy.median / ours.median, 0.8),
            note="both directions are counted: new bytes in, old ones out, by way of a buffer in the cache",
        ),
        Row(
            group="in_place",
            name=f"longest pass of {_NUM_READERS} threads during commits in place, {small}",
            hotglm=Sample.of(tail["during"]),
            peer=Sample.of(tail["bound"]),
            peer_name="longest steady pass, and the time the gate was closed",
            unit="ms",
            ratio=max(tail["during"]) / max(tail["bound"]),
            ratio_name="hotglm / peer",
            target="<= 1.5x",
            met=at_most(max(tail["during"]) / max(tail["bound"]), 1.5),
            note="a pass waits for the ones inside and for the exchange, and for nothing else",
        ),
    ]


class InPlaceProbe:
    """A slot that swaps in place, a model under a lock, and two blocks of memory, in one process."""

    def __init__(self, *, nbytes: int, num_tensors: int, rounds: int) -> None:
        """Make them, with their memory faulted in."""
        self._rounds = rounds
        self._nbytes = nbytes
        self._states = [draw_state(nbytes=nbytes, num_tensors=num_tensors, seed=seed) for seed in (1, 2)]
        self._model = Stack(nbytes=nbytes, num_tensors=num_tensors)
        self._model.load_state_dict(self._states[0])
        self._slot = hotglm.ModuleSlot(
            Stack(nbytes=nbytes, num_tensors=num_tensors),
            version="1.0.0",
            policy=hotglm.StagePolicy(digest=False, finite=False),
            swap=hotglm.InPlace(timeout_s=60),
        )
        self._slot.update(self._states[0], version="1.0.1")
        self._slot.update(self._states[1], version="1.0.2")
        self._lock = threading.Lock()

    def run(self) -> dict[str, list[float]]:
        """Return the seconds for which each way keeps passes out."""
        source, target = torch.ones(self._nbytes // 4), torch.zeros(self._nbytes // 4)

        def copy() -> float:
            started = time.perf_counter()
            target.copy_(source)
            return time.perf_counter() - started

        turns = itertools.count()

        def load() -> float:
            started = time.perf_counter()
            with self._lock:
                self._model.load_state_dict(self._states[next(turns) % 2])
            return time.perf_counter() - started

        sides = {"hotglm": self._roll_back, "lock": load, "copy": copy}
        alternate(sides, rounds=2)
        found = alternate(sides, rounds=self._rounds)
        return {name: list(sample.values) for name, sample in found.items()}

    def _roll_back(self) -> float:
        record = self._slot.rollback("1.0.1" if str(self._slot.version) == "1.0.2" else "1.0.2").in_place
        return record.closed_s if record is not None else 0.0

    def serve(self) -> dict[str, list[float]]:
        """Return the longest passes while commits are made, and what bounds them."""
        x = torch.ones(1, self._model.side)
        longest, stop = [0.0] * _NUM_READERS, threading.Event()

        def read(index: int) -> None:
            while not stop.is_set():
                started = time.perf_counter()
                with torch.inference_mode():
                    self._slot(x)
                longest[index] = max(longest[index], time.perf_counter() - started)

        threads = [threading.Thread(target=read, args=(index,)) for index in range(_NUM_READERS)]
        for thread in threads:
            thread.start()
        during, bound = [], []
        for _ in range(self._rounds):
            stop.wait(0.3)
            steady = max(longest)
            longest[:] = [0.0] * _NUM_READERS
            closed = self._roll_back()
            stop.wait(0.3)
            during.append(max(longest))
            bound.append(steady + closed)
        stop.set()
        for thread in threads:
            thread.join()
        return {"during": during, "bound": bound}
