"""Going back: a rollback, against reloading the previous file into the live model (page cache warm)."""

from __future__ import annotations

import time
from dataclasses import asdict

from safetensors.torch import load_file

import hotglm
from benchmarks.bench import Bench, Row, Sample, alternate, at_least, describe_size
from benchmarks.files import make_weights, warm_cache
from benchmarks.models import Stack

__all__ = ["RollbackProbe", "measure"]

_NUM_TENSORS = 100


def measure(bench: Bench) -> list[Row]:
    """Return the row."""
    weights = make_weights(bench, nbytes=bench.nbytes, num_tensors=_NUM_TENSORS)
    found = bench.ask_once("benchmarks.rollback:RollbackProbe", "run", rounds=bench.rounds(15), **asdict(weights))
    ours, peer = Sample.of(found["hotglm"]), Sample.of(found["peer"])
    ratio = peer.median / ours.median
    return [
        Row(
            group="rollback",
            name=f"rollback, {describe_size(bench.nbytes)}",
            hotglm=ours,
            peer=peer,
            peer_name="load_state_dict(load_file(previous))",
            unit="us",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=">= 100x",
            met=at_least(ratio, 100),
            note="the peer reads through a mapping of a file that the page cache holds: its best case",
        )
    ]


class RollbackProbe:
    """Rolls back and forth, and reloads, in turns, in one process."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int, rounds: int) -> None:
        """Put a slot on its second version, and load a model for the peer."""
        self._path = path
        self._rounds = rounds
        self._slot = hotglm.ModuleSlot(Stack(nbytes=nbytes, num_tensors=num_tensors), version="1.0.0")
        self._slot.update(path, version="1.0.1")
        self._model = Stack(nbytes=nbytes, num_tensors=num_tensors)

    def run(self) -> dict[str, list[float]]:
        """Return the seconds of each rollback and of each reload."""
        warm_cache(self._path)
        sides = {"hotglm": self._roll_back, "peer": self._reload}
        alternate(sides, rounds=2)
        found = alternate(sides, rounds=self._rounds)
        return {name: list(sample.values) for name, sample in found.items()}

    def _roll_back(self) -> float:
        target = 2 if self._slot.live.number == 1 else 1  # the generation that was live stays held
        started = time.perf_counter()
        self._slot.rollback(target)
        return time.perf_counter() - started

    def _reload(self) -> float:
        started = time.perf_counter()
        self._model.load_state_dict(load_file(self._path))
        return time.perf_counter() - started
