"""How long a commit takes, against `load_state_dict` on the live model from a dict that is in memory already.

Both sides start from weights that are there. Before each timed step the caches are filled with something else,
because a service's pass would have done that, and because a commit of a small model must not look quicker for having
been staged into a warm cache.
"""

from __future__ import annotations

import time

import torch

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.models import Stack, draw_state

__all__ = ["CommitProbe", "measure"]

_CACHE_NBYTES = 128 * MIB
_GROWTH = 1.5


def measure(bench: Bench) -> list[Row]:
    """Return one row for each layout, and one for each growth."""
    tiny = bench.size(16 * MIB)
    small, large, many = _run(bench, tiny, 100), _run(bench, bench.nbytes, 100), _run(bench, bench.nbytes, 1000)
    little, size = describe_size(tiny), describe_size(bench.nbytes)
    return [
        _compare(f"{little} in 100 tensors", *small, judged=False),
        _compare(f"{size} in 100 tensors", *large, judged=True),
        _compare(f"{size} in 1000 tensors", *many, judged=True),
        _grow(f"{size} over {little}, 100 tensors", large[0], small[0]),
        _grow(f"1000 tensors over 100, {size}", many[0], large[0]),
    ]


def _run(bench: Bench, nbytes: int, num_tensors: int) -> tuple[Sample, Sample]:
    found = bench.ask_once(
        "benchmarks.commit:CommitProbe", "run", nbytes=nbytes, num_tensors=num_tensors, rounds=bench.rounds(15)
    )
    return Sample.of(found["hotglm"]), Sample.of(found["peer"])


def _compare(what: str, ours: Sample, peer: Sample, *, judged: bool) -> Row:
    ratio = peer.median / ours.median
    return Row(
        group="commit",
        name=f"commit pause, {what}",
        hotglm=ours,
        peer=peer,
        peer_name="load_state_dict from memory",
        unit="us",
        ratio=ratio,
        ratio_name="peer / hotglm",
        target=">= 100x" if judged else "",
        met=at_least(ratio, 100) if judged else None,
        note="the whole slot.commit(), receipt and event included" if judged else "for the growth below",
    )


def _grow(what: str, larger: Sample, smaller: Sample) -> Row:
    ratio = larger.median / smaller.median
    return Row(
        group="commit",
        name=f"commit pause, {what}",
        hotglm=larger,
        peer=smaller,
        peer_name="hotglm itself",
        unit="us",
        ratio=ratio,
        ratio_name="larger / smaller",
        target=f"does not grow: <= {_GROWTH}x",
        met=at_most(ratio, _GROWTH),
        note="limit above 1 because microseconds are noisy; the bytes grow 64x, the tensors 10x",
    )


class CommitProbe:
    """Stages and commits, and loads in place, in turns, in one process."""

    def __init__(self, *, nbytes: int, num_tensors: int, rounds: int) -> None:
        """Make a slot, a model of the same kind for the peer, and the dict that both take."""
        self._rounds = rounds
        self._state = draw_state(nbytes=nbytes, num_tensors=num_tensors, seed=1)
        self._model = Stack(nbytes=nbytes, num_tensors=num_tensors)
        self._model.load_state_dict(self._state)
        self._slot = hotglm.ModuleSlot(
            Stack(nbytes=nbytes, num_tensors=num_tensors),
            version="1.0.0",
            policy=hotglm.StagePolicy(digest=False, finite=False),
        )
        self._other = torch.zeros(_CACHE_NBYTES // 4)

    def run(self) -> dict[str, list[float]]:
        """Return the seconds of each commit and of each load."""
        sides = {"hotglm": self._commit, "peer": self._load}
        alternate(sides, rounds=2)  # both arenas are faulted in, both code paths warm
        found = alternate(sides, rounds=self._rounds)
        return {name: list(sample.values) for name, sample in found.items()}

    def _commit(self) -> float:
        staged = self._slot.stage(self._state, version="1.0.0")
        self._other.add_(1.0)
        started = time.perf_counter()
        self._slot.commit(staged)
        return time.perf_counter() - started

    def _load(self) -> float:
        self._other.add_(1.0)
        started = time.perf_counter()
        self._model.load_state_dict(self._state)
        return time.perf_counter() - started
