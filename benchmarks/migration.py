"""From a file of an older layout to a spare that is ready to be committed, against the same load without a migration.

Both sides are `slot.stage` of the same model with the same policy, each in a process of its own, in turns; only the
names or the shapes in the file differ. Renamed tensors, and the parts of a fused one, are read straight to where they
stay, so what a migration costs is its planning, and more reads of smaller size.

Where the file promises digests, a fused tensor is hashed as the file has it, and its parts are hashed as they are live:
twice the hashing, which cannot be less. That row has no target.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from safetensors.torch import save_file

import hotglm
from benchmarks.bench import Bench, Row, Sample, alternate, at_most, describe_size
from benchmarks.files import warm_cache
from benchmarks.models import Stack, draw_state

__all__ = ["Migrator", "OldFiles", "measure"]

_OF = "benchmarks.migration"
_NUM_THREADS = 2
_PLAIN = {"digest": False, "finite": False, "nice": 0, "num_threads": _NUM_THREADS}
_VERIFIED = {"digest": True, "finite": True, "nice": 0, "num_threads": _NUM_THREADS, "reuse": False}


def measure(bench: Bench) -> list[Row]:
    """Return a row for each kind of migration."""
    num_renamed, num_fused = (30, 12) if bench.quick else (1000, 120)
    renames = {"nbytes": bench.nbytes, "num_tensors": num_renamed}
    fused = {"nbytes": bench.nbytes, "num_tensors": num_fused}
    return [
        _row(bench, "one pattern", f"{num_renamed} tensors renamed by one pattern", renames, limit=1.1),
        _row(bench, "one by one", f"{num_renamed} tensors renamed by as many operations", renames, limit=1.1),
        _row(bench, "fused", f"{num_fused // 3} fused tensors split in three", fused, limit=1.5),
        _row(bench, "fused", f"{num_fused // 3} fused tensors split in three, digests", fused, limit=None),
    ]


def _row(bench: Bench, kind: str, name: str, layout: dict[str, int], *, limit: float | None) -> Row:
    old = _make_file(bench, "fused" if kind == "fused" else "renamed", layout, digested=limit is None)
    new = _make_file(bench, "plain", layout, digested=limit is None)
    policy = _PLAIN if limit is not None else _VERIFIED
    load_s: list[float] = []
    with (
        bench.start(f"{_OF}:Migrator", path=old, kind=kind, policy=policy, **layout) as ours,
        bench.start(f"{_OF}:Migrator", path=new, kind="plain", policy=policy, **layout) as peer,
    ):

        def stage() -> float:
            total_s, part_s = ours.ask("load")
            load_s.append(part_s)
            return float(total_s)

        sides = {"hotglm": stage, "peer": lambda: float(peer.ask("load")[0])}
        alternate(sides, rounds=2)  # two arenas each: later loads begin with the third
        load_s.clear()
        found = alternate(sides, rounds=bench.rounds(9))
    ratio = found["hotglm"].median / found["peer"].median
    return Row(
        group="migration",
        name=f"file to ready spare, {describe_size(layout['nbytes'])}, {name}",
        hotglm=found["hotglm"],
        peer=found["peer"],
        peer_name="the same stage of a file in the layout of the code",
        unit="ms",
        ratio=ratio,
        ratio_name="with / without migration",
        target="" if limit is None else f"<= {limit}x",
        met=None if limit is None else at_most(ratio, limit),
        note=f"{_NUM_THREADS} threads; whole stage(), of which reading {Sample.of(load_s).median * 1e3:.0f} ms",
    )


def _make_file(bench: Bench, kind: str, layout: dict[str, int], *, digested: bool) -> str:
    stem = f"migration-{kind}-{layout['nbytes']}-{layout['num_tensors']}{'-digested' if digested else ''}"
    path = os.path.join(bench.directory, f"{stem}.safetensors")
    if not os.path.exists(path):
        with bench.start(f"{_OF}:OldFiles") as maker:
            maker.ask("make", path=path, kind=kind, digested=digested, **layout)
    warm_cache(path)
    return path


class OldFiles:
    """Writes the weights of a `Stack` as an older version of it would have."""

    def make(self, *, path: str, kind: str, nbytes: int, num_tensors: int, digested: bool) -> None:
        """Write `path`: `plain`, `renamed`, or `fused` by threes."""
        state = draw_state(nbytes=nbytes, num_tensors=num_tensors, seed=1)
        if kind == "renamed":
            state = {name.replace("layers.", "old."): state.pop(name) for name in list(state)}
        elif kind == "fused":
            tensors = list(state.values())
            state.clear()
            for index in range(num_tensors // 3):
                state[f"fused.{index}.qkv"] = torch.cat(tensors[3 * index : 3 * index + 3])
        if digested:
            hotglm.save_weights(state, path)
        else:
            save_file(state, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _make_steps(kind: str, num_tensors: int) -> hotglm.Migrations:
    steps = hotglm.Migrations(kind)
    operations: list[Any] = []
    if kind == "one pattern":
        operations = [hotglm.Rename(r"old\.(.*)", r"layers.\1")]
    elif kind == "one by one":
        operations = [hotglm.Rename(rf"old\.{i}\.weight", f"layers.{i}.weight") for i in range(num_tensors)]
    elif kind == "fused":
        names = [tuple(f"layers.{3 * i + part}.weight" for part in range(3)) for i in range(num_tensors // 3)]
        operations = [hotglm.Split(f"fused.{i}.qkv", into) for i, into in enumerate(names)]
    if operations:
        steps.state("1", "2", operations)
    return steps


class Migrator:
    """A slot in its own process that stages one file again and again."""

    def __init__(self, *, path: str, kind: str, nbytes: int, num_tensors: int, policy: dict[str, Any]) -> None:
        """Put the model in a slot that knows the way from the file's layout to its own."""
        self._path = path
        self._version = "2.0" if kind == "plain" else "1.0"
        self._slot = hotglm.ModuleSlot(
            Stack(nbytes=nbytes, num_tensors=num_tensors),
            version="2.0",
            accept="major",
            policy=hotglm.StagePolicy(**policy),
            migrations=_make_steps(kind, num_tensors),
        )

    def load(self) -> tuple[float, float]:
        """Return the seconds of `stage`, and of its `load` part; commit it untimed."""
        started = time.perf_counter()
        staged = self._slot.stage(self._path, version=self._version)
        total_s = time.perf_counter() - started
        if bool(staged.migration) != (self._version == "1.0"):
            raise AssertionError(staged.migration)
        self._slot.commit(staged)
        return total_s, sum(timing.duration_s for timing in staged.timings if timing.part == "load")
