"""What is live on a device, proved again; and a release of which a twentieth is new.

A quick proof is held against the rate at which the device reads the same tensors, a full one against all cores of the
host that hash the same bytes, and a stage that copies what is live against the same stage that reads everything.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hotglm
from benchmarks.bench import Bench, Row, alternate, describe_size
from benchmarks.device_setting import Setting, timed, to_note, to_row
from hotglm.weights.digest import tensor_bytes, view_buffer

__all__ = ["measure", "write_releases"]

_NUM_SHARDS = 20


def measure(bench: Bench, setting: Setting) -> list[Row]:
    """Return the rows on proofs and on reuse."""
    rows = [*_proofs(bench, setting)]
    gc.collect()
    with _make_room(setting) as directory:
        if directory is None:
            return [*rows, to_note("a release of which a twentieth is new", note="no room for one more model's files")]
        return [*rows, _reuse(bench, setting, directory)]


def _proofs(bench: Bench, setting: Setting) -> list[Row]:
    slot = setting.slot()
    slot.update(setting.paths[0], version="1.0.3")
    tensors = [tensor.detach() for tensor in slot.live.module.state_dict().values()]
    num_threads = os.cpu_count() or 1

    def read() -> float:
        return timed(lambda: [tensor.view(torch.int64).sum() for tensor in tensors])

    def prove(*, quick: bool) -> float:
        return timed(lambda: slot.verify_live(quick=quick, num_threads=num_threads))

    read(), prove(quick=True), prove(quick=False)  # kernels are loaded when they are first used
    quick = alternate({"proof": lambda: prove(quick=True), "read": read}, rounds=bench.rounds(9))
    host = [tensor_bytes(tensor).cpu() for tensor in tensors]
    full = alternate(
        {"proof": lambda: prove(quick=False), "hash": lambda: timed(lambda: _hash(host, num_threads))},
        rounds=bench.rounds(3),
    )
    size = describe_size(setting.nbytes)
    return [
        to_row(
            f"verify_live(quick=True), {size}",
            ours=quick["proof"],
            peer=quick["read"],
            peer_name="the device reads the same tensors (sum of words)",
            ratio=quick["read"].median / quick["proof"].median,
            ratio_name="rate / rate of reading",
            limit=0.5,
        ),
        to_row(
            f"verify_live(), {size}",
            ours=full["proof"],
            peer=full["hash"],
            peer_name="all cores hash the same bytes in host memory",
            ratio=full["hash"].median / full["proof"].median,
            ratio_name="rate / rate of hashing",
            limit=0.8,
        ),
    ]


def _hash(host: list[torch.Tensor], num_threads: int) -> list[str]:
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda data: hashlib.sha256(view_buffer(data)).hexdigest(), host))


def _reuse(bench: Bench, setting: Setting, directory: str) -> Row:
    """Stage a release of which a twentieth is new, with reuse and without."""
    base, new = write_releases(setting.paths, directory)
    slot = setting.slot()
    slot.update(base)
    policies = {
        kind: hotglm.StagePolicy(reuse=kind == "reuse", num_threads=os.cpu_count()) for kind in ("reuse", "full")
    }

    def stage(kind: str) -> float:
        return timed(lambda: slot.stage(new, policy=policies[kind]).discard())

    found = alternate({kind: lambda kind=kind: stage(kind) for kind in policies}, rounds=bench.rounds(5))  # type: ignore[misc]
    origins = slot.update(new, policy=policies["reuse"]).origins
    read = origins.read_nbytes / setting.nbytes
    assert origins.copied_nbytes + origins.read_nbytes == setting.nbytes, "what is not read is copied"
    slot.verify_live()
    return to_row(
        f"release to ready spare, {read:.0%} of {describe_size(setting.nbytes)} new",
        ours=found["reuse"],
        peer=found["full"],
        peer_name="the same, everything read (reuse=False)",
        ratio=found["full"].median / found["reuse"].median,
        ratio_name="peer / hotglm",
        limit=5,
    )


@contextmanager
def _make_room(setting: Setting) -> Iterator[str | None]:
    """Yield a directory beside the files of the setting; None where there is no room for as much again."""
    beside = os.path.dirname(setting.paths[0])
    if shutil.disk_usage(beside).free < 1.2 * setting.nbytes:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=beside) as directory:
        yield directory


def write_releases(paths: tuple[str, str], directory: str) -> tuple[str, str]:
    """Write the weights of the first file as a release of shards, and one that has one of them from the second file.

    The shards that both have are one file each, linked.
    """
    base, new = os.path.join(directory, "base"), os.path.join(directory, "new")
    os.mkdir(base)
    os.mkdir(new)
    with safe_open(paths[0], framework="pt") as first, safe_open(paths[1], framework="pt") as second:
        names = sorted(first.keys())
        shards = [names[index::_NUM_SHARDS] for index in range(min(_NUM_SHARDS, len(names)))]
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(shards):
            file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            save_file({name: first.get_tensor(name) for name in shard}, os.path.join(base, file))
            if index:
                os.link(os.path.join(base, file), os.path.join(new, file))
            else:
                save_file({name: second.get_tensor(name) for name in shard}, os.path.join(new, file))
    for number, release in enumerate((base, new), start=1):
        with open(os.path.join(release, "model.safetensors.index.json"), "w", encoding="utf-8") as index_file:
            json.dump({"metadata": {}, "weight_map": weight_map}, index_file)
        hotglm.pack(release, name="m", version=f"1.5.{number}", sequence=number).close()
    return base, new
