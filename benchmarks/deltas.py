"""Deltas: what a small change costs to carry and to stage, beside the full release, and beside general binary diffs.

Staging. What a service does that follows a chain of deltas: the base is live, the spare holds the release before it,
which differs from the base in as many tensors, and fingerprints of both are known (the first stage after a start hashes
what is live once instead, which costs what a verified load costs). Each round puts the release before into the spare,
untimed, then stages the delta and throws it away. The peer is another process that stages the full form of the same
release with `StagePolicy(reuse=False)`, verified as well. Both have the default number of threads, and the files in the
page cache.

Sizes. What a delta of a tensor takes depends on the drift alone, so that each row says which: synthetic weights
N(0, 1) * 0.02 whose float32 masters took steps of Adam's size, an RL-like step that replaced one element in a hundred,
and a small transformer that was really trained, then fine-tuned with AdamW, and rounded to bfloat16 before and after.

Other tools see the two safetensors files as bytes; hotglm's side is `make_delta`, which verifies both releases, encodes
and writes a third. A peer that is not there, or does not work here, is named, and has no row.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.drift import DRIFTS, Drifted, draw_pair
from benchmarks.files import warm_cache
from benchmarks.models import Stack, draw_state
from benchmarks.worker import Stand, Worker
from hotglm.deltas.making import make_delta
from hotglm.release.files import open_weights
from hotglm.release.store_reading import release_name
from hotglm.weights.arena import Arena
from hotglm.weights.delta_codec import encode
from hotglm.weights.loader import load_supply
from hotglm.weights.proof import LoadOptions, Target
from hotglm.weights.seals import seal_tensor
from hotglm.weights.supply import Kept, Supply

__all__ = ["Applier", "Differ", "Maker", "Stager", "measure"]

_NUM_TENSORS = 100
_NUM_THREADS = 2
_OF = "benchmarks.deltas"
_PAIR_NBYTES = 16 * MIB
"""Size of the files that other tools are given, of a run on 1 GiB: bsdiff wants minutes for 256 MiB."""


def measure(bench: Bench) -> list[Row]:
    """Return the rows on staging, sizes, applying, and other tools."""
    made = bench.start(f"{_OF}:Maker", directory=bench.directory, nbytes=bench.nbytes)
    with made as maker:
        cases = {kind: maker.ask("make", kind=kind) for kind in ("few", "all", "scattered")}
    rows = [
        *_staged(bench, "5 % of tensors changed", cases["few"], limit=5.0),
        *_staged(bench, "100 % of tensors changed", cases["all"], limit=None),
        *_staged(bench, "1 % of elements changed, in all tensors", cases["scattered"], limit=None, is_judged=False),
        *(_size(bench, drift) for drift in DRIFTS),
        *_applied(bench, cases["all"]["full"]),
    ]
    for kind in ("rl", "adam-10"):
        rows += _differ(bench, kind)
    return rows


# -- staging -----------------------------------------------------------------------------------------------------------


def _staged(
    bench: Bench, name: str, case: Mapping[str, str], *, limit: float | None, is_judged: bool = True
) -> Iterator[Row]:
    options = {"before": case["before"], "base": case["base"], "nbytes": bench.nbytes}
    with (
        bench.start(f"{_OF}:Stager", path=case["delta"], reuse=True, **options) as ours,
        bench.start(f"{_OF}:Stager", path=case["full"], reuse=False, **options) as peer,
    ):
        sides: dict[str, Callable[[], float]] = {
            "hotglm": partial(_ask_s, ours, "stage"),
            "peer": partial(_ask_s, peer, "stage"),
        }
        alternate(sides, rounds=2)
        found = alternate(sides, rounds=bench.rounds(9))
        read = {side: worker.ask("read_nbytes") / MIB for side, worker in (("hotglm", ours), ("peer", peer))}
    what = f"{name}, {describe_size(bench.nbytes)} in {_NUM_TENSORS} tensors"
    faster = limit is not None
    ratio = found["peer"].median / found["hotglm"].median
    ratio = ratio if faster else 1 / ratio
    yield Row(
        group="deltas",
        name=f"release to ready spare, {what}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="the full release, verified, without reuse",
        unit="ms",
        ratio=ratio,
        ratio_name="full / delta" if faster else "delta / full",
        target=(f">= {limit:.0f}x" if limit is not None else "<= 1.05x") if is_judged else "",
        met=(at_least(ratio, limit) if limit is not None else at_most(ratio, 1.05)) if is_judged else None,
        note="the default number of threads each; fingerprints of what is live and of the spare are known",
    )
    if limit is not None:
        ratio = read["peer"] / read["hotglm"]
        yield Row(
            group="deltas",
            name=f"bytes read, {what}",
            hotglm=Sample.of([read["hotglm"]]),
            peer=Sample.of([read["peer"]]),
            peer_name="the full release",
            unit="MiB",
            ratio=ratio,
            ratio_name="full / delta",
            target=">= 8x fewer",
            met=at_least(ratio, 8.0),
            note="of weights and payloads, as the receipt says; headers and manifests are not counted",
        )


class Maker:
    """Writes a base, a full release and the delta between them, for each way of changing weights."""

    def __init__(self, *, directory: str, nbytes: int) -> None:
        """Draw the base."""
        self._root = Path(directory)
        self._nbytes = nbytes
        self._base = draw_state(nbytes=nbytes, num_tensors=_NUM_TENSORS, seed=1)

    def make(self, *, kind: str) -> dict[str, str]:
        """Make one case; return where its releases stand."""
        root = self._root / f"deltas-{kind}"
        if not root.exists():
            write_release(root / "s", 1, self._change(kind, seed=2))
            base = write_release(root / "s", 2, self._base)
            full = write_release(root / "f", 3, self._change(kind, seed=3))
            make_delta(base, full, root / "s" / release_name(3, "1.0.3")).close()
        return {
            "before": str(root / "s" / release_name(1, "1.0.1")),
            "base": str(root / "s" / release_name(2, "1.0.2")),
            "full": str(root / "f" / release_name(3, "1.0.3")),
            "delta": str(root / "s" / release_name(3, "1.0.3")),
        }

    def _change(self, kind: str, *, seed: int) -> dict[str, torch.Tensor]:
        if kind == "scattered":
            generator = torch.Generator().manual_seed(seed)
            return {name: _replace_some(tensor, generator) for name, tensor in self._base.items()}
        other = draw_state(nbytes=self._nbytes, num_tensors=_NUM_TENSORS, seed=seed)
        every = 1 if kind == "all" else 20
        changed = set(list(self._base)[seed % every :: every])
        return {name: other[name] if name in changed else tensor for name, tensor in self._base.items()}


def _replace_some(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    where = torch.rand(tensor.shape, generator=generator) < 0.01
    return torch.where(where, torch.randn(tensor.shape, generator=generator), tensor)


def write_release(root: Path, sequence: int, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a full release under the name that a store gives it."""
    directory = root / release_name(sequence, f"1.0.{sequence}")
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    hotglm.pack(directory, name="Stack", version=f"1.0.{sequence}", sequence=sequence).close()
    return directory


class Stager:
    """Stages one release again and again on top of a base."""

    def __init__(self, *, before: str, base: str, path: str, nbytes: int, reuse: bool) -> None:
        """Make the base live, on top of the release before it."""
        policy = hotglm.StagePolicy(reuse=reuse, nice=0)
        self._slot = hotglm.ModuleSlot(Stack(nbytes=nbytes, num_tensors=_NUM_TENSORS), version="1.0.0", policy=policy)
        self._slot.update(before)
        self._slot.update(base)
        self._before, self._path = before, path
        self._read_nbytes = 0
        for file in (*Path(path).rglob("*.safetensors"), *Path(before).rglob("*.safetensors")):
            warm_cache(str(file))

    def stage(self) -> float:
        """Return the seconds of one stage, which is then thrown away; the spare held the release before the base."""
        self._slot.stage(self._before).discard()
        started = time.perf_counter()
        staged = self._slot.stage(self._path)
        duration_s = time.perf_counter() - started
        self._read_nbytes = staged.origins.read_nbytes
        staged.discard()
        return duration_s

    def read_nbytes(self) -> int:
        """Return what the last stage read."""
        return self._read_nbytes


# -- sizes -------------------------------------------------------------------------------------------------------------


def _size(bench: Bench, drift: Drifted) -> Row:
    old, new = draw_pair(drift.kind, numel=bench.size(64 * MIB) // 2, quick=bench.quick)
    ours, full = measure_sizes(old, new)
    ratio = ours / full
    return Row(
        group="deltas",
        name=f"size of a delta: {drift.description}",
        hotglm=Sample.of([ours / MIB]),
        peer=Sample.of([full / MIB]),
        peer_name="the full tensors",
        unit="MiB",
        ratio=ratio,
        ratio_name="delta / full",
        target="" if drift.limit is None else f"<= {drift.limit:.0%}",
        met=None if drift.limit is None else at_most(ratio, drift.limit),
        note=drift.note(old, new),
    )


def measure_sizes(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the bytes of a delta's parts, and of the tensors themselves."""
    ours = sum(encode(old[name], tensor).nbytes for name, tensor in new.items())
    return ours, sum(tensor.numel() * tensor.element_size() for tensor in new.values())


# -- applying ----------------------------------------------------------------------------------------------------------


def _applied(bench: Bench, full: str) -> Iterator[Row]:
    for way, name in (("read", "whole tensors of a payload, not verified"), ("copy", "what is live, by fingerprint")):
        with bench.start(f"{_OF}:Applier", full=full) as applier:
            sides: dict[str, Callable[[], float]] = {
                "hotglm": partial(_ask_s, applier, way),
                "peer": partial(_ask_s, applier, "move"),
            }
            alternate(sides, rounds=2)
            found = alternate(sides, rounds=bench.rounds(9))
        ratio = found["peer"].median / found["hotglm"].median
        yield Row(
            group="deltas",
            name=f"into memory that is there: {name}, {describe_size(bench.nbytes)}",
            hotglm=found["hotglm"],
            peer=found["peer"],
            peer_name=f"copying the tensors from memory, {_NUM_THREADS} threads",
            unit="ms",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=">= 0.5x",
            met=at_least(ratio, 0.5),
            note="from the page cache" if way == "read" else "the copy is summed up and held against the fingerprint",
        )


def _ask_s(worker: Worker | Stand, method: str) -> float:
    return float(worker.ask(method))


class Applier:
    """Fills a spare from a file, from memory with proof, and from memory without."""

    def __init__(self, *, full: str) -> None:
        """Take the memory: the spare, and what is live."""
        path = os.path.join(full, "model.safetensors")
        warm_cache(path)
        self._stack = ExitStack()
        self._files = self._stack.enter_context(open_weights(path))
        entries = {name: location.entry for name, location in self._files.tensors.items()}
        live, spare = (Arena(sum(-(-entry.nbytes // 64) * 64 for entry in entries.values())) for _ in "ab")
        self._leases = [arena.lease() for arena in (live, spare)]
        at = 0
        self._live: dict[str, torch.Tensor] = {}
        self._targets: dict[str, Target] = {}
        for name, entry in entries.items():
            options = {"dtype": getattr(torch, entry.torch_dtype), "shape": entry.shape}
            self._live[name] = self._leases[0].view(at, **options)
            self._targets[name] = Target(view=self._leases[1].view(at, **options), offset=at, key=name)
            at += -(-entry.nbytes // 64) * 64
        self._options = LoadOptions(digest=False, finite=False, num_threads=_NUM_THREADS)
        self.read()
        for name, target in self._targets.items():
            self._live[name].copy_(target.view)
        self._kept = {
            name: Kept(tensor=tensor, seal=seal_tensor(tensor, digest=None, is_finite=True))
            for name, tensor in self._live.items()
        }

    def read(self) -> float:
        """Return the seconds of a load from the file."""
        return self._load(Supply.of(self._files))

    def copy(self) -> float:
        """Return the seconds of a load from what is live."""
        return self._load(Supply.of(self._files, self._kept))

    def move(self) -> float:
        """Return the seconds of copying without proof, by as many threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(_NUM_THREADS)
        started = time.perf_counter()
        for name, tensor in self._live.items():
            self._targets[name].view.copy_(tensor)
        duration_s = time.perf_counter() - started
        torch.set_num_threads(threads)
        return duration_s

    def _load(self, supply: Supply) -> float:
        started = time.perf_counter()
        load_supply(supply, self._targets, lease=self._leases[1], options=self._options)
        return time.perf_counter() - started


# -- other tools -------------------------------------------------------------------------------------------------------


def _differ(bench: Bench, kind: str) -> Iterator[Row]:
    with bench.start(f"{_OF}:Differ", directory=bench.directory, kind=kind, nbytes=bench.size(_PAIR_NBYTES)) as differ:
        absent = differ.ask("find_absent")
        tools = [tool for tool in TOOLS if tool not in absent]
        times = {"hotglm": Sample.of([differ.ask("diff", tool="hotglm") for _ in range(bench.rounds(3))])}
        times |= {tool: Sample.of([differ.ask("diff", tool=tool)]) for tool in tools}
        sizes = {tool: differ.ask("size", tool=tool) for tool in ("hotglm", *tools)}
        full = differ.ask("size", tool="full")
    missing = "".join(f"; {tool} is not compared: {why}" for tool, why in absent.items())
    description = next(drift.description for drift in DRIFTS if drift.kind == kind)
    for tool in tools:
        ratio = times[tool].median / times["hotglm"].median
        is_judged = tool == "bsdiff4"
        yield Row(
            group="deltas",
            name=f"making a delta of {describe_size(full)}: {description}",
            hotglm=times["hotglm"],
            peer=times[tool],
            peer_name=TOOLS[tool],
            unit="ms",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=">= 10x faster" if is_judged else "",
            met=at_least(ratio, 10.0) if is_judged else None,
            note=f"of the full size: hotglm {sizes['hotglm'] / full:.2%}, {tool} {sizes[tool] / full:.2%}{missing}",
        )
        if is_judged:
            ratio = sizes["hotglm"] / sizes[tool]
            yield Row(
                group="deltas",
                name=f"size of that delta: {description}",
                hotglm=Sample.of([sizes["hotglm"] / MIB]),
                peer=Sample.of([sizes[tool] / MIB]),
                peer_name=TOOLS[tool],
                unit="MiB",
                ratio=ratio,
                ratio_name="hotglm / peer",
                target="comparable: <= 1.25x",
                met=at_most(ratio, 1.25),
                note="hotglm's payload holds the header of the result as well",
            )


TOOLS = {
    "bsdiff4": "bsdiff4.diff of the two files in memory",
    "xdelta3": "the program xdelta3, from file to file",
    "zstd": "zstd --patch-from (level 3, long distance), by the library",
}
"""What is compared, in words."""


class Differ:
    """One pair of files, and every tool that makes something out of them."""

    def __init__(self, *, directory: str, kind: str, nbytes: int) -> None:
        """Write the pair as releases."""
        self._root = Path(directory) / f"pair-{kind}"
        shutil.rmtree(self._root, ignore_errors=True)
        old, new = draw_pair(kind, numel=nbytes // 2, quick=True)
        self._old = write_release(self._root, 1, old)
        self._new = write_release(self._root, 2, new)
        self._sizes = {"full": (self._new / "model.safetensors").stat().st_size}
        self._bytes = [(path / "model.safetensors").read_bytes() for path in (self._old, self._new)]

    def find_absent(self) -> dict[str, str]:
        """Return the tools that are not there, or do not work, and why."""
        absent = {}
        for tool in TOOLS:
            try:
                self._make(tool)(b"0123456789" * 20, b"0123456789" * 19 + b"abc")
            except Exception as error:  # noqa: BLE001 - whatever keeps a peer from working is what is reported
                absent[tool] = f"{type(error).__name__}: {error}"
        return absent

    def diff(self, *, tool: str) -> float:
        """Return the seconds that one tool takes; note how much it wrote."""
        if tool == "hotglm":
            return self._diff_ours()
        make = self._make(tool)
        started = time.perf_counter()
        self._sizes[tool] = len(make(*self._bytes))
        return time.perf_counter() - started

    def size(self, *, tool: str) -> int:
        """Return the bytes that a tool wrote; those of the new file for `full`."""
        return self._sizes[tool]

    def _diff_ours(self) -> float:
        path = self._root / "delta"
        shutil.rmtree(path, ignore_errors=True)
        started = time.perf_counter()
        with contextlib.closing(make_delta(self._old, self._new, path)):
            duration_s = time.perf_counter() - started
        self._sizes["hotglm"] = (path / "delta.safetensors").stat().st_size
        return duration_s

    def _make(self, tool: str) -> Callable[[bytes, bytes], bytes]:
        if tool == "zstd":
            return _patch_from
        if tool == "xdelta3":
            old, new = self._old / "model.safetensors", self._new / "model.safetensors"
            return partial(_encode_by_program, old, new)
        module: Any = importlib.import_module(tool)
        return module.diff  # type: ignore[no-any-return]


def _encode_by_program(old: Path, new: Path, *_: bytes) -> bytes:
    delta = new.with_name("xdelta3.out")
    window = str(max(1 << 20, old.stat().st_size))  # the whole of the old file, as the others have it
    command = ["xdelta3", "-e", "-f", "-B", window, "-s", str(old), str(new), str(delta)]
    try:
        subprocess.run(command, check=True, capture_output=True)
        return delta.read_bytes()
    finally:
        delta.unlink(missing_ok=True)


def _patch_from(old: bytes, new: bytes) -> bytes:
    zstd: Any = importlib.import_module("hotglm.weights.zstd")._need_zstd()
    known = zstd.CompressionParameter
    window = max(20, (len(old) + len(new)).bit_length())
    options = {known.compression_level: 3, known.window_log: window, known.enable_long_distance_matching: 1}
    prefix = zstd.ZstdDict(old, is_raw=True).as_prefix
    compressor = zstd.ZstdCompressor(options=options, zstd_dict=prefix)
    return bytes(compressor.compress(new) + compressor.flush())
