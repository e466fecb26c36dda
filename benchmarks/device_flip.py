"""Versions that take turns on a device: from a file to a ready spare, the commit, the service's tail, the memory.

Every row stands beside its peer, measured in the same run: the machine's own rate from pinned memory,
`safetensors.torch.load_file(device="cuda")`, `load_state_dict` under a lock, and the same service without an update.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import threading
import time
from importlib.util import find_spec
from statistics import quantiles

import torch
from safetensors.torch import load_file
from torch import nn

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, alternate, at_least, at_most, describe_size
from benchmarks.device_setting import Setting, find_pinned_rate, timed, to_note, to_row

__all__ = ["measure"]

_LOAD = 0.7


def measure(bench: Bench, setting: Setting) -> list[Row]:
    """Return the rows of issue 3 that concern staging and flips."""
    return [
        *_staging(bench, setting),
        *_commit(bench, setting),
        _tail(bench, setting, hotglm.Yielding()),
        _tail(bench, setting, None),
        _first_pass(bench, setting),
        _memory(bench, setting),
    ]


def _staging(bench: Bench, setting: Setting) -> list[Row]:
    slot = setting.slot()
    policies = {
        "plain": hotglm.StagePolicy(digest=False, finite=False, reuse=False, num_threads=os.cpu_count()),
        "verified": hotglm.StagePolicy(reuse=False, num_threads=os.cpu_count()),
    }

    def stage(kind: str) -> float:
        return timed(lambda: slot.stage(setting.paths[0], version="1.1.0", policy=policies[kind]).discard())

    def load() -> float:
        duration = timed(lambda: load_file(setting.paths[0], device="cuda"))
        torch.cuda.empty_cache()
        return duration

    sides = {"plain": lambda: stage("plain"), "verified": lambda: stage("verified"), "load_file": load}
    if find_spec("fastsafetensors") is not None:
        sides["fastsafetensors"] = lambda: _load_fast(setting.paths[0])
    found = alternate(sides, rounds=bench.rounds(5))
    pinned = Sample.of([setting.nbytes / find_pinned_rate()])
    size = describe_size(setting.nbytes)
    plain, verified = found["plain"], found["verified"]
    return [
        to_row(
            f"file (page cache) to ready spare, {size}",
            ours=plain,
            peer=pinned,
            peer_name="the machine's own copy from pinned memory",
            ratio=pinned.median / plain.median,
            ratio_name="rate / pinned rate",
            limit=0.9,
        ),
        to_row(
            f"file (page cache) to ready spare, {size}",
            ours=plain,
            peer=found["load_file"],
            peer_name='safetensors load_file(device="cuda")',
            ratio=found["load_file"].median / plain.median,
            ratio_name="peer / hotglm",
            limit=5,
        ),
        _compare_fast(found, size),
        to_row(
            f"the same, hashed and searched for NaN, {size}",
            ours=verified,
            peer=plain,
            peer_name="without",
            ratio=plain.median / verified.median,
            ratio_name="rate / rate without",
            limit=0.9,
        ),
    ]


def _load_fast(path: str) -> float:
    """Load a file with fastsafetensors, by way of its own pinned buffers: there is no GPUDirect storage."""
    package = importlib.import_module("fastsafetensors")

    def load() -> None:
        with package.fastsafe_open([path], device="cuda:0", nogds=True) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            del state

    duration = timed(load)
    torch.cuda.empty_cache()
    return duration


def _compare_fast(found: dict[str, Sample], size: str) -> Row:
    name = f"file (page cache) to ready spare, {size}"
    if "fastsafetensors" not in found:
        return to_note(f"{name}, against fastsafetensors", note="fastsafetensors is not there; see docs/devices.md")
    return to_row(
        name,
        ours=found["plain"],
        peer=found["fastsafetensors"],
        peer_name="fastsafetensors, without GPUDirect storage",
        ratio=found["fastsafetensors"].median / found["plain"].median,
        ratio_name="peer / hotglm",
        limit=2,
    )


def _commit(bench: Bench, setting: Setting) -> list[Row]:
    slot, lock, peer = setting.slot(), threading.Lock(), setting.build()
    ours: list[float] = []
    for number in range(bench.rounds(7)):
        staged = slot.stage(setting.paths[number % 2], version=f"1.1.{number}")
        torch.cuda.synchronize()
        started = time.perf_counter()
        slot.commit(staged)
        ours.append(time.perf_counter() - started)

    def load() -> None:
        with lock:
            peer.load_state_dict(load_file(setting.paths[0], device="cuda"))

    theirs = Sample.of([timed(load) for _ in range(bench.rounds(3))])
    sample = Sample.of(ours)
    row = {"group": "device", "hotglm": sample, "unit": "us"}
    ratio = theirs.median / sample.median
    return [
        Row(
            **row,  # type: ignore[arg-type]
            name="commit, flip",
            peer=theirs,
            peer_name="load_state_dict(load_file) under a lock",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=">= 1000x",
            met=at_least(ratio, 1000),
        ),
        Row(
            **row,  # type: ignore[arg-type]
            name="commit, flip, by itself",
            peer=sample,
            peer_name="none: an absolute limit",
            ratio=sample.median * 1e6,
            ratio_name="us",
            target="< 50 us",
            met=sample.median < 50e-6,
        ),
    ]


def _tail(bench: Bench, setting: Setting, pace: hotglm.Yielding | None) -> Row:
    """Compare the 99th percentile of a service at 70 % load with and without updates beside it."""
    policy = hotglm.StagePolicy(pace=pace, num_threads=4, timeout_s=60.0)
    slot = setting.slot()
    x = torch.randn(8, setting.side, dtype=torch.bfloat16, device="cuda")
    for _ in range(3):
        slot(x)
    busy_s = min(timed(lambda: slot(x)) for _ in range(10))
    seconds = 0.5 if bench.quick else 20.0
    steady = _serve(slot, x, busy_s / _LOAD, seconds)
    stop = threading.Event()

    updates: list[float] = []

    def update() -> None:
        with contextlib.suppress(hotglm.StageTimeoutError):
            while not stop.is_set():
                started, number = time.perf_counter(), len(updates)
                slot.update(setting.paths[number % 2], version=f"1.2.{number}", policy=policy)
                updates.append(round(time.perf_counter() - started, 3))

    thread = threading.Thread(target=update)
    thread.start()
    during = _serve(slot, x, busy_s / _LOAD, seconds)
    stop.set()
    thread.join()
    ours, peer = _percentile(during), _percentile(steady)
    return Row(
        group="device",
        name=f"p99 of a service at 70 % load during staging and commits, {'yielding' if pace else 'at will'}",
        hotglm=Sample.of([ours]),
        peer=Sample.of([peer]),
        peer_name="the same service at rest",
        unit="ms",
        ratio=ours / peer,
        ratio_name="hotglm / peer",
        target="<= 1.1x" if pace else "",
        met=at_most(ours / peer, 1.1) if pace else None,
        note=f"{len(during)} passes beside updates, {len(steady)} at rest; updates took {updates or 'over 60'} s",
    )


def _serve(slot: nn.Module, x: torch.Tensor, every_s: float, seconds: float) -> list[float]:
    """Return what each pass took, one begun every `every_s`, or as soon as the one before has ended."""
    taken: list[float] = []
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        while time.perf_counter() < due:
            time.sleep(max(0.0, min(1e-3, due - time.perf_counter())))
        started = time.perf_counter()
        slot(x)
        torch.cuda.current_stream().synchronize()
        taken.append(time.perf_counter() - started)
        due = max(due + every_s, time.perf_counter())
    return taken


def _percentile(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def _first_pass(bench: Bench, setting: Setting) -> Row:
    x = torch.randn(8, setting.side, dtype=torch.bfloat16, device="cuda")
    slot, first, steady = setting.slot(), [], []
    for number in range(bench.rounds(7)):
        slot.update(setting.paths[number % 2], version=f"1.3.{number}")
        first.append(timed(lambda: slot(x)))
        steady += [timed(lambda: slot(x)) for _ in range(5)]
    path = setting.paths[(bench.rounds(7) - 1) % 2]
    cold = setting.build()
    cold.load_state_dict(load_file(path, device="cuda"))
    assert torch.equal(cold(x), slot(x)), "a swap must give what a cold load gives, bit for bit"
    ours, peer = Sample.of(first), Sample.of(steady)
    return Row(
        group="device",
        name="first pass after the swap, eager",
        hotglm=ours,
        peer=peer,
        peer_name="a steady pass",
        unit="ms",
        ratio=ours.median / peer.median,
        ratio_name="first / steady",
        target="<= 1.05x",
        met=at_most(ours.median / peer.median, 1.05),
        note="outputs equal those of a cold load, bit for bit",
    )


def _memory(bench: Bench, setting: Setting) -> Row:
    """Swap 60 times and hold reserved memory, and the peak, against what they may be."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    slot, x = setting.slot(), torch.randn(8, setting.side, dtype=torch.bfloat16, device="cuda")
    reserved: list[float] = []
    for number in range(6 if bench.quick else 60):
        slot.update(setting.paths[number % 2], version=f"1.4.{number}")
        slot(x)
        if number == 2:
            torch.cuda.reset_peak_memory_stats()
        reserved.append(torch.cuda.memory_reserved() / MIB)
    peak = (torch.cuda.max_memory_allocated() - before) / setting.nbytes
    ratio = reserved[-1] / reserved[2]
    return Row(
        group="device",
        name=f"reserved device memory over {len(reserved)} swaps",
        hotglm=Sample.of(reserved[3:]),
        peer=Sample.of([reserved[2]]),
        peer_name="after the third swap",
        unit="MiB",
        ratio=ratio,
        ratio_name="last / third",
        target="grows <= 1 %",
        met=at_most(ratio, 1.01),
        note=f"peak of {peak:.2f} models",
    )
