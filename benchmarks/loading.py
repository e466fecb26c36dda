"""From a file to a spare that is ready to be committed, against the usual ways of getting a file into tensors.

What is compared. A service serves while it loads, so in the peer's process, too, a live version stays in memory.
There are two ways to go on from there, and malloc makes them differ:

- *copied, then freed*: the new state dict is copied into the live model and dropped
  (`model.load_state_dict(load_file(p))`). Freed memory goes back to the system, and every load faults its pages in
  anew.
- *kept as live*: the new state dict takes the place of the old one, which is dropped once the new one is there.
  Tensors of up to 32 MiB then land in memory that an earlier dict left: the peer's best case. Larger ones are mapped
  anew each time.

hotglm fills an arena that was faulted in once, whatever the sizes. Its time is the whole `slot.stage`, from the path
to the proved spare, module included; the peers stop at a dict of tensors, and the copy into the model is not held
against them. Each side has a process of its own; the two take turns, load by load. Both may use all cores, which is
what torch does in the peers; a stage beside a busy service leaves one free (`StagePolicy.num_threads`).

Two floors are measured as well, without a target: reading the same bytes into memory that is there already, which no
loader that copies can beat, and reading and hashing them, which no loader that verifies can.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

import hotglm
from benchmarks.bench import Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.files import WeightsOnDisk, make_weights, touch_memory, warm_cache
from benchmarks.models import Stack
from benchmarks.worker import Stand, Worker
from hotglm.release.files import TensorLocation, open_weights
from hotglm.weights.digest import digest_tensor

__all__ = ["HashPeer", "LoadPeer", "Stager", "measure"]

_LAYOUTS = (100, 1000)
_NUM_THREADS = 2
_PEERS: tuple[tuple[str, str, float], ...] = (
    ("pread", "load_file(backend='pread')", 5.0),
    ("pickle", "torch.load", 5.0),
    ("clone", "load_file + clone", 10.0),
)
_FLOOR = ("bare", f"a floor: preadv of the file into memory that is there, {_NUM_THREADS} threads")
_PLAIN = {"digest": False, "finite": False, "nice": 0, "num_threads": _NUM_THREADS}
_OF = "benchmarks.loading"


def measure(bench: Bench) -> list[Row]:
    """Return the rows of every layout: later loads in both ways of going on, first loads, verified loads."""
    rows: list[Row] = []
    layouts = _LAYOUTS[:1] if bench.quick else _LAYOUTS
    files = [make_weights(bench, nbytes=bench.nbytes, num_tensors=count, pickled=True) for count in layouts]
    for weights in files:
        warm_cache(weights.path)
        warm_cache(f"{weights.path}.pt")
        rows += [_later(bench, weights, *peer, kept=kept) for kept in (False, True) for peer in _PEERS]
        rows.append(_later(bench, weights, *_FLOOR, None, kept=True))
        rows.append(_first(bench, weights, touched=True))
        promised = make_weights(bench, nbytes=weights.nbytes, num_tensors=weights.num_tensors, digested=True)
        warm_cache(promised.path)
        rows += [_verified(bench, promised, finite=finite, from_file=False) for finite in (True, False)]
        rows += [_verified(bench, promised, finite=finite, from_file=True) for finite in (True, False)]
    rows.append(_first(bench, files[0], touched=False))
    return rows


def _later(bench: Bench, weights: WeightsOnDisk, kind: str, peer_name: str, limit: float | None, *, kept: bool) -> Row:
    found = _take_turns(bench, weights, kind=kind, kept=kept)
    ratio = found["peer"].median / found["hotglm"].median
    way = "" if limit is None else ", kept as live" if kept else ", copied, then freed"
    return Row(
        group="loading",
        name=f"file to ready spare, {_describe(weights)}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name=peer_name + way,
        unit="ms",
        ratio=ratio,
        ratio_name="peer / hotglm",
        target="" if limit is None else f">= {limit:.0f}x",
        met=None if limit is None else at_least(ratio, limit),
        note=f"hotglm: {_NUM_THREADS} threads; whole stage(), of which reading {found['part'].median * 1e3:.0f} ms",
    )


def _take_turns(bench: Bench, weights: WeightsOnDisk, *, kind: str, kept: bool) -> dict[str, Sample]:
    parts: list[float] = []
    with _start_stager(bench, weights, _PLAIN) as ours, _start_peer(bench, weights, kind, kept=kept) as peer:

        def stage() -> float:
            total_s, load_s = ours.ask("load")
            parts.append(load_s)
            return float(total_s)

        sides: dict[str, Callable[[], float]] = {"hotglm": stage, "peer": lambda: float(peer.ask("load"))}
        alternate(sides, rounds=2)  # hotglm's two arenas, the peer's two dicts: later loads begin with the third
        parts.clear()
        return {**alternate(sides, rounds=bench.rounds(5)), "part": Sample.of(parts)}


def _first(bench: Bench, weights: WeightsOnDisk, *, touched: bool) -> Row:
    nbytes = 3 * weights.nbytes if touched else 0

    def stage() -> float:
        with _start_stager(bench, weights, _PLAIN) as ours:
            return float(ours.ask("load_first", touched_nbytes=nbytes)[0])

    def read() -> float:
        with _start_peer(bench, weights, "pread", kept=False) as peer:
            return float(peer.ask("load_first", touched_nbytes=nbytes))

    found = alternate({"hotglm": stage, "peer": read}, rounds=bench.rounds(5))
    ratio = found["hotglm"].median / found["peer"].median
    return Row(
        group="loading",
        name=f"first load of a process, {_describe(weights)}{'' if touched else ' (untouched memory)'}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="load_file(backend='pread')",
        unit="ms",
        ratio=ratio,
        ratio_name="hotglm / peer",
        target="<= 1.1x" if touched else "",
        met=at_most(ratio, 1.1) if touched else None,
        note="a fresh process each time, both sides fault their memory in; "
        + ("memory that was free was touched right before" if touched else "who gets pages from the host is chance"),
    )


def _verified(bench: Bench, weights: WeightsOnDisk, *, finite: bool, from_file: bool) -> Row:
    totals: list[float] = []
    policy = {"digest": True, "finite": finite, "nice": 0, "num_threads": _NUM_THREADS, "reuse": False}
    with _start_stager(bench, weights, policy) as ours, bench.start(f"{_OF}:HashPeer", **asdict(weights)) as peer:

        def stage() -> float:
            total_s, load_s = ours.ask("load")
            totals.append(total_s)
            return float(load_s)

        sides = {"hotglm": stage, "peer": lambda: float(peer.ask("hash_file" if from_file else "hash_memory"))}
        alternate(sides, rounds=2)
        totals.clear()
        found = alternate(sides, rounds=bench.rounds(5))
    ratio = found["hotglm"].median / found["peer"].median
    is_judged = not from_file and not finite  # finding NaN is another check, with a cost of its own: the row beside it
    return Row(
        group="loading",
        name=f"verified load ({'digests, finite values' if finite else 'digests alone'}), {_describe(weights)}, "
        "as save_weights writes it",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="a floor: sha256 of each tensor in the file" if from_file else "sha256 of each tensor in memory",
        unit="ms",
        ratio=ratio,
        ratio_name="hotglm / peer",
        target="<= 1.1x" if is_judged else "",
        met=at_most(ratio, 1.1) if is_judged else None,
        note=f"{_NUM_THREADS} threads each; hotglm reads as well, its whole stage() takes "
        f"{Sample.of(totals).median * 1e3:.0f} ms",
    )


def _start_stager(bench: Bench, weights: WeightsOnDisk, policy: dict[str, Any]) -> Worker | Stand:
    return bench.start(f"{_OF}:Stager", policy=policy, **asdict(weights))


def _start_peer(bench: Bench, weights: WeightsOnDisk, kind: str, *, kept: bool) -> Worker | Stand:
    return bench.start(f"{_OF}:LoadPeer", path=weights.path, kind=kind, kept=kept)


def _describe(weights: WeightsOnDisk) -> str:
    each = describe_size(weights.nbytes // weights.num_tensors)
    return f"{describe_size(weights.nbytes)} in {weights.num_tensors} tensors of {each}"


class Stager:
    """hotglm's side: stages a file, times it, commits it."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int, policy: dict[str, Any]) -> None:
        """Make a slot around a module of the same structure."""
        self._path = path
        module = Stack(nbytes=nbytes, num_tensors=num_tensors)
        self._slot = hotglm.ModuleSlot(module, version="1.0.0", policy=hotglm.StagePolicy(**policy))

    def load_first(self, *, touched_nbytes: int) -> tuple[float, float]:
        """Touch memory, then `load`."""
        touch_memory(touched_nbytes)
        return self.load()

    def load(self) -> tuple[float, float]:
        """Return the seconds of `stage`, and of its `load` part; commit it untimed."""
        started = time.perf_counter()
        staged = self._slot.stage(self._path, version="1.0.0")
        total_s = time.perf_counter() - started
        self._slot.commit(staged)
        return total_s, sum(timing.duration_s for timing in staged.timings if timing.part == "load")


class LoadPeer:
    """A peer's side: loads a file into a state dict beside a live one, and times it."""

    def __init__(self, *, path: str, kind: str, kept: bool) -> None:
        """Choose the way of loading, `pread`, `pickle` or `clone`, and the way of going on from there."""
        self._kept = kept
        self._live: dict[str, torch.Tensor] = {}
        unpickle = torch.load  # noqa: TID251  # the peer
        ways: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
            "pread": partial(load_file, path, backend="pread"),
            "pickle": partial(unpickle, f"{path}.pt", map_location="cpu", weights_only=True),
            "clone": lambda: {name: tensor.clone() for name, tensor in load_file(path).items()},
            "bare": _BareReader(path).read,
        }
        self._load = ways[kind]

    def load_first(self, *, touched_nbytes: int) -> float:
        """Touch memory, then `load`."""
        touch_memory(touched_nbytes)
        return self.load()

    def load(self) -> float:
        """Return the seconds of one load; what is done with the tensors afterwards is not timed."""
        started = time.perf_counter()
        fresh = self._load()
        duration_s = time.perf_counter() - started
        if self._kept or not self._live:
            self._live = fresh
        else:
            for name, tensor in fresh.items():
                self._live[name].copy_(tensor)
        return duration_s


class _BareReader:
    """A floor of loading: reads a file into memory that was touched before, and makes no tensor of it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._memory: mmap.mmap | None = None

    def read(self) -> dict[str, torch.Tensor]:
        with open(self._path, "rb", buffering=0) as file, ThreadPoolExecutor(_NUM_THREADS) as threads:
            nbytes = os.fstat(file.fileno()).st_size
            if self._memory is None:
                self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            view, step = memoryview(self._memory), 16 << 20

            def fill(start: int) -> int:
                return os.preadv(file.fileno(), [view[start : start + step]], start)

            assert sum(threads.map(fill, range(0, nbytes, step))) == nbytes
        return {}


class HashPeer:
    """The floor of a verified load: hashes the same tensors, in memory or in the file, with as many threads."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int) -> None:
        """Load them."""
        self._state = load_file(path, backend="pread")
        self._path = path
        assert len(self._state) == num_tensors
        assert sum(tensor.nbytes for tensor in self._state.values()) <= nbytes

    def hash_memory(self) -> float:
        """Return the seconds that hashing every tensor takes."""
        started = time.perf_counter()
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            digests = list(threads.map(digest_tensor, self._state.values()))
        assert len(digests) == len(self._state)
        return time.perf_counter() - started

    def hash_file(self) -> float:
        """Return the seconds that it takes with reading, piece by piece into a buffer that stays in the cache."""
        started = time.perf_counter()
        with open_weights(self._path) as files, ThreadPoolExecutor(_NUM_THREADS) as threads:
            digests = list(threads.map(_hash_range, files.tensors.values()))
        assert len(digests) == len(self._state)
        return time.perf_counter() - started


def _hash_range(location: TensorLocation) -> str:
    running, buffer = hashlib.sha256(), memoryview(bytearray(min(location.nbytes, 1 << 20)))
    done = 0
    while done < location.nbytes:
        view = buffer[: min(len(buffer), location.nbytes - done)]
        assert os.preadv(location.file.fd, [view], location.offset + done) == len(view)
        running.update(view)
        done += len(view)
    return running.hexdigest()
