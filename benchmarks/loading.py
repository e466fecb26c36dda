"""From a file to a spare that is ready to be committed, against the usual ways of getting a file into tensors.

What is compared. A service keeps what is live while it loads the next version, so the peer holds the state dict that it
loaded before until the new one is there. Whether its new tensors then cost page faults is up to malloc: a tensor of more
than 32 MiB is mapped anew each time; smaller ones may land in memory that an earlier state dict left, which is the peer's
best case and is a row of its own (`previous dropped first`). hotglm fills an arena that was faulted in once, whatever the
sizes. Its time is the whole `slot.stage`, from the path to the proved spare, module included; the peers stop at a dict of
tensors, which still has to get into a module.

Each side has a process of its own; the two take turns, load by load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.bench import Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.files import WeightsOnDisk, make_weights, warm_cache
from benchmarks.worker import Worker

__all__ = ["HashPeer", "LoadPeer", "Stager", "measure"]

_LAYOUTS = (16, 100, 1000)
_PEERS = (("pread", "load_file(backend='pread')", 5.0), ("pickle", "torch.load", 5.0), ("clone", "load_file + clone", 10.0))
_PLAIN = {"digest": False, "finite": False, "nice": 0}
_VERIFIED = {"digest": True, "finite": True, "nice": 0}
_OF = "benchmarks.loading"


def measure(bench: Bench) -> list[Row]:
    """Return the rows of every layout: later loads, the peer's best case, first loads, verified loads."""
    rows: list[Row] = []
    for num_tensors in _LAYOUTS:
        weights = make_weights(bench, nbytes=bench.nbytes, num_tensors=num_tensors, pickled=True)
        warm_cache(weights.path)
        warm_cache(f"{weights.path}.pt")
        rows += [_later(bench, weights, *peer) for peer in _PEERS]
        rows.append(_best_case(bench, weights))
        rows.append(_first(bench, weights))
        rows += _verified(bench, weights)
    return rows


def _later(bench: Bench, weights: WeightsOnDisk, kind: str, peer_name: str, limit: float) -> Row:
    found = _take_turns(bench, weights, kind=kind, drop_first=False)
    ratio = found["peer"].median / found["hotglm"].median
    return Row(
        group="loading",
        name=f"file to ready spare, {_describe(weights)}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name=f"{peer_name}, previous held",
        unit="ms",
        ratio=ratio,
        ratio_name="peer / hotglm",
        target=f">= {limit:.0f}x",
        met=at_least(ratio, limit),
        note=f"hotglm: whole stage(); its `load` part alone takes {found['part'].median * 1e3:.0f} ms",
    )


def _best_case(bench: Bench, weights: WeightsOnDisk) -> Row:
    found = _take_turns(bench, weights, kind="pread", drop_first=True)
    return Row(
        group="loading",
        name=f"file to ready spare, {_describe(weights)}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="load_file(backend='pread'), previous dropped first",
        unit="ms",
        ratio=found["peer"].median / found["hotglm"].median,
        ratio_name="peer / hotglm",
        note="the peer's best case; a service that does this has nothing to serve with while it loads",
    )


def _take_turns(bench: Bench, weights: WeightsOnDisk, *, kind: str, drop_first: bool) -> dict[str, Sample]:
    parts: list[float] = []
    with _start_stager(weights, _PLAIN) as ours, _start_peer(weights, kind, drop_first=drop_first) as peer:

        def stage() -> float:
            total_s, load_s = ours.ask("load")
            parts.append(load_s)
            return float(total_s)

        sides: dict[str, Callable[[], float]] = {"hotglm": stage, "peer": lambda: float(peer.ask("load"))}
        alternate(sides, rounds=2)  # hotglm's two arenas, the peer's two dicts: later loads begin with the third
        parts.clear()
        return {**alternate(sides, rounds=bench.rounds(11)), "part": Sample.of(parts)}


def _first(bench: Bench, weights: WeightsOnDisk) -> Row:
    def stage() -> float:
        with _start_stager(weights, _PLAIN) as ours:
            return float(ours.ask("load")[0])

    def read() -> float:
        with _start_peer(weights, "pread", drop_first=False) as peer:
            return float(peer.ask("load"))

    found = alternate({"hotglm": stage, "peer": read}, rounds=bench.rounds(7))
    ratio = found["hotglm"].median / found["peer"].median
    return Row(
        group="loading",
        name=f"first load of a process, {_describe(weights)}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="load_file(backend='pread')",
        unit="ms",
        ratio=ratio,
        ratio_name="hotglm / peer",
        target="<= 1.1x",
        met=at_most(ratio, 1.1),
        note="a fresh process each time; both sides fault their memory in",
    )


def _verified(bench: Bench, weights: WeightsOnDisk) -> Iterator[Row]:
    for what, options in (("digests and finite values", _VERIFIED), ("digests alone", {**_VERIFIED, "finite": False})):
        totals: list[float] = []
        with _start_stager(weights, options) as ours, Worker(f"{_OF}:HashPeer", **asdict(weights)) as peer:

            def stage(ours: Worker = ours, totals: list[float] = totals) -> float:
                total_s, load_s = ours.ask("load")
                totals.append(total_s)
                return float(load_s)

            def digest(peer: Worker = peer) -> float:
                return float(peer.ask("digest"))

            alternate({"hotglm": stage, "peer": digest}, rounds=2)
            totals.clear()
            found = alternate({"hotglm": stage, "peer": digest}, rounds=bench.rounds(11))
        ratio = found["hotglm"].median / found["peer"].median
        yield Row(
            group="loading",
            name=f"verified load ({what}), {_describe(weights)}",
            hotglm=found["hotglm"],
            peer=found["peer"],
            peer_name="sha256 of each tensor in memory, 2 threads",
            unit="ms",
            ratio=ratio,
            ratio_name="hotglm / peer",
            target="<= 1.1x" if options["finite"] else "",
            met=at_most(ratio, 1.1) if options["finite"] else None,
            note=f"hotglm: reading included; the whole stage() takes {Sample.of(totals).median * 1e3:.0f} ms",
        )


def _start_stager(weights: WeightsOnDisk, policy: dict[str, Any]) -> Worker:
    return Worker(f"{_OF}:Stager", policy=policy, **asdict(weights))


def _start_peer(weights: WeightsOnDisk, kind: str, *, drop_first: bool) -> Worker:
    return Worker(f"{_OF}:LoadPeer", path=weights.path, kind=kind, drop_first=drop_first)


def _describe(weights: WeightsOnDisk) -> str:
    each = describe_size(weights.nbytes // weights.num_tensors)
    return f"{describe_size(weights.nbytes)} in {weights.num_tensors} tensors of {each}"


class Stager:
    """hotglm's side: stages a file, times it, commits it."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int, policy: dict[str, Any]) -> None:
        """Make a slot around a module of the same structure."""
        import hotglm  # noqa: PLC0415  # the peers' processes do without
        from benchmarks.models import Stack  # noqa: PLC0415

        self._path = path
        module = Stack(nbytes=nbytes, num_tensors=num_tensors)
        self._slot = hotglm.ModuleSlot(module, version="1.0.0", policy=hotglm.StagePolicy(**policy))

    def load(self) -> tuple[float, float]:
        """Return the seconds of `stage`, and of its `load` part; commit it untimed."""
        started = time.perf_counter()
        staged = self._slot.stage(self._path, version="1.0.0")
        total_s = time.perf_counter() - started
        self._slot.commit(staged)
        return total_s, sum(timing.duration_s for timing in staged.timings if timing.part == "load")


class LoadPeer:
    """A peer's side: loads a file into a state dict, times it, and holds it while the next is loaded."""

    def __init__(self, *, path: str, kind: str, drop_first: bool) -> None:
        """Choose the way of loading: `pread`, `pickle` or `clone`."""
        self._drop_first = drop_first
        self._held: object = None
        ways: dict[str, Callable[[], object]] = {
            "pread": partial(load_file, path, backend="pread"),
            "pickle": partial(torch.load, f"{path}.pt", map_location="cpu", weights_only=True),
            "clone": lambda: {name: tensor.clone() for name, tensor in load_file(path).items()},
        }
        self._load = ways[kind]

    def load(self) -> float:
        """Return the seconds of one load."""
        if self._drop_first:
            self._held = None
        started = time.perf_counter()
        fresh = self._load()
        duration_s = time.perf_counter() - started
        self._held = fresh
        return duration_s


class HashPeer:
    """The floor of a verified load: hashes the same tensors where they lie in memory, on two threads."""

    def __init__(self, *, path: str, nbytes: int, num_tensors: int) -> None:
        """Load them."""
        self._state = load_file(path, backend="pread")
        assert len(self._state) == num_tensors
        assert sum(tensor.nbytes for tensor in self._state.values()) <= nbytes

    def digest(self) -> float:
        """Return the seconds that hashing every tensor takes."""
        from hotglm.weights.digest import digest_tensor  # noqa: PLC0415

        started = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            digests = list(threads.map(digest_tensor, self._state.values()))
        assert len(digests) == len(self._state)
        return time.perf_counter() - started
