"""What the rows of the group `device` share: two files of one layout, the model they fill, and the machine's own rates.

Rules this module keeps: a part of the group is a module with `measure(bench, setting)`, and says nothing where there is
no device, because it is not asked. The files lie in memory, and the model is at least 14 GB of bfloat16.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, at_least

__all__ = ["Setting", "Stack", "find_pinned_rate", "open_scratch", "timed", "to_note", "to_row"]

_FULL_NBYTES = 14 << 30
_QUICK_NBYTES = 64 * MIB
_SIDE = 8192
_PIN_NBYTES = 1 << 30


@contextmanager
def open_scratch(bench: Bench) -> Iterator[str]:
    """Yield a directory in memory with room for two models, else that of the run."""
    needs = 2 * (_QUICK_NBYTES if bench.quick else _FULL_NBYTES) + (1 << 30)
    if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < needs:  # noqa: S108 - it is asked first
        yield bench.directory
        return
    with tempfile.TemporaryDirectory(prefix="hotglm-bench-", dir="/dev/shm") as directory:
        yield directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Two files of one layout, and what it takes to build a model of it."""

    paths: tuple[str, str]
    nbytes: int
    num_layers: int
    side: int

    @classmethod
    def make(cls, bench: Bench, directory: str) -> Setting:
        """Write the files; they stay in the page cache."""
        nbytes, side = (_QUICK_NBYTES, 1024) if bench.quick else (_FULL_NBYTES, _SIDE)
        num_layers = -(-nbytes // (2 * side * side))
        paths = (os.path.join(directory, "device-0.safetensors"), os.path.join(directory, "device-1.safetensors"))
        for seed, path in enumerate(paths):
            generator = torch.Generator("cuda").manual_seed(seed)
            scale = (6 / side) ** 0.5
            state = {
                f"layers.{index}.weight": torch.empty(side, side, dtype=torch.bfloat16, device="cuda")
                .uniform_(-scale, scale, generator=generator)
                .cpu()
                for index in range(num_layers)
            }
            save_file(state, path)
        return cls(paths=paths, nbytes=2 * side * side * num_layers, num_layers=num_layers, side=side)

    def build(self) -> nn.Module:
        """Return a model on the device, with whatever weights."""
        return Stack(self.side, self.num_layers)

    def slot(self) -> hotglm.ModuleSlot:
        """Return a slot that has been updated twice, so that both arenas and the ring are there."""
        policy = hotglm.StagePolicy(num_threads=os.cpu_count(), reuse=False)
        slot = hotglm.ModuleSlot(self.build(), name="m", version="1.0.0", policy=policy)
        for number in (1, 2):
            slot.update(self.paths[number % 2], version=f"1.0.{number}")
        return slot


class Stack(nn.Module):
    """Square layers of bfloat16 on the device, with whatever weights."""

    def __init__(self, side: int, num_layers: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.Linear(side, side, bias=False, dtype=torch.bfloat16) for _ in range(num_layers)
            )
        self.to_empty(device="cuda")
        self.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layers make of a batch (..., side)."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def timed(action: Callable[[], object]) -> float:
    """Return how long an action takes, with all the work that it gives the device, in seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def find_pinned_rate() -> float:
    """Return the machine's own rate from pinned memory, in bytes a second: the best of ten copies of 1 GiB."""
    host = torch.empty(_PIN_NBYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_PIN_NBYTES, dtype=torch.uint8, device="cuda")
    return _PIN_NBYTES / min(timed(lambda: device.copy_(host, non_blocking=True)) for _ in range(10))


def to_row(
    name: str, *, ours: Sample, peer: Sample, peer_name: str, ratio: float, ratio_name: str, limit: float
) -> Row:
    """Return a row of durations whose ratio, the larger the better, is held against a limit."""
    return Row(
        group="device",
        name=name,
        hotglm=ours,
        peer=peer,
        peer_name=peer_name,
        unit="ms",
        ratio=ratio,
        ratio_name=ratio_name,
        target=f">= {limit}x",
        met=at_least(ratio, limit),
    )


def to_note(name: str, *, note: str) -> Row:
    """Return a row without figures, which says why there are none."""
    nothing = Sample.of([0.0])
    return Row(
        group="device",
        name=name,
        hotglm=nothing,
        peer=nothing,
        peer_name="none",
        unit="x",
        ratio=0.0,
        ratio_name="none",
        note=" ".join(note.split()),
    )
