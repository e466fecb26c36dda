"""What 200 updates, with a rollback every tenth, leave in memory, and how much they need at most.

Measured from outside the library: resident memory of the process by `/proc/self/status`, less what it was before
there was a model. The peak is the kernel's own high-water mark, set back when the model is in the slot. The peer is
the usual way of having a second version ready: build another model, load the file into it, replace the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, at_most, describe_size
from benchmarks.files import make_weights
from benchmarks.models import Stack, find_side

__all__ = ["Keeper", "measure"]

_NUM_TENSORS = 64
_RING_NBYTES = 0
"""What the plan allows beside the two copies: for weights above `MemoryPolicy.small_nbytes` on the CPU, nothing."""

_WARM_UPDATES = 10


def measure(bench: Bench) -> list[Row]:
    """Return a row for the growth and one for the peak."""
    options = [
        asdict(make_weights(bench, nbytes=bench.size(512 * MIB), num_tensors=_NUM_TENSORS, seed=seed))
        for seed in (1, 2)
    ]
    layout = {**options[0], "paths": [option.pop("path") for option in options]}
    del layout["path"]
    num_updates = _WARM_UPDATES + 10 if bench.quick else 200
    ours = bench.ask_once("benchmarks.memory:Keeper", "update_slot", num_updates=num_updates, **layout)
    peer = bench.ask_once("benchmarks.memory:Keeper", "replace_model", num_updates=num_updates, **layout)
    return [
        _growth(num_updates, _in_mib(ours["after"]), _in_mib(peer["after"])),
        _peak(describe_size(layout["nbytes"]), ours, peer),
    ]


def _in_mib(values: list[int]) -> Sample:
    return Sample.of([value / MIB for value in values])


def _growth(num_updates: int, ours: Sample, peer: Sample) -> Row:
    warm = Sample.of(ours.values[:_WARM_UPDATES]).median
    late = Sample.of(ours.values[-_WARM_UPDATES:]).median
    ratio = late / warm
    return Row(
        group="memory",
        name=f"resident memory over {num_updates} updates with a rollback every 10",
        hotglm=ours,
        peer=peer,
        peer_name="new model, load_state_dict(load_file), replace",
        unit="MiB",
        ratio=ratio,
        ratio_name="last ten / first ten",
        target="grows <= 1 %",
        met=at_most(ratio, 1.01),
        note=f"first ten {warm:.1f} MiB, last ten {late:.1f} MiB",
    )


def _peak(size: str, ours: dict[str, Any], peer: dict[str, Any]) -> Row:
    weights = ours["weights"]
    ratio = (ours["peak"] - _RING_NBYTES) / weights
    return Row(
        group="memory",
        name=f"peak of resident memory, {size} of weights",
        hotglm=_in_mib([ours["peak"]]),
        peer=_in_mib([peer["peak"]]),
        peer_name="new model, load_state_dict(load_file), replace",
        unit="MiB",
        ratio=ratio,
        ratio_name="hotglm / weights",
        target="<= 2.02x",
        met=at_most(ratio, 2.02),
        note=f"the peer's is {peer['peak'] / weights:.2f}x, its mapping of the file included",
    )


class Keeper:
    """Updates a model many times, and reads the process's memory after each."""

    def __init__(self, *, paths: list[str], nbytes: int, num_tensors: int, num_updates: int) -> None:
        """Run everything once on a small model, then note the memory that is not the model's."""
        self._paths = paths
        self._layout = {"nbytes": nbytes, "num_tensors": num_tensors}
        self._num_updates = num_updates
        small = _make(nbytes=4096, num_tensors=2)
        slot = hotglm.ModuleSlot(small, version="1.0.0", memory=hotglm.MemoryPolicy(small_nbytes=0))
        for _ in range(3):
            slot.update({name: tensor.clone() for name, tensor in small.state_dict().items()})
        slot.rollback()
        slot(torch.zeros(1, small.side))
        del slot, small
        self._baseline = _read_status("VmRSS")

    def update_slot(self) -> dict[str, Any]:
        """Return resident bytes after every update, the peak, and the bytes of the weights."""
        slot = hotglm.ModuleSlot(_make(**self._layout), version="1.0.0")
        x = torch.zeros(1, find_side(**self._layout))

        def step(index: int) -> None:
            slot.update(self._paths[index % 2], version=f"1.0.{index + 1}")
            slot(x)
            if index % 10 == 9:
                slot.rollback()
                slot(x)

        return self._run(step)

    def replace_model(self) -> dict[str, Any]:
        """Return the same for the peer."""
        live = [_make(**self._layout)]

        def step(index: int) -> None:
            fresh = Stack(**self._layout)
            fresh.load_state_dict(load_file(self._paths[index % 2]))
            live[0] = fresh
            live[0](torch.zeros(1, fresh.side))

        return self._run(step)

    def _run(self, step: Callable[[int], None]) -> dict[str, Any]:
        after: list[int] = []
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
        for index in range(self._num_updates):
            step(index)
            after.append(_read_status("VmRSS") - self._baseline)
        peak = _read_status("VmHWM") - self._baseline  # before anything else is done in this process
        weights = sum(tensor.nbytes for tensor in load_file(self._paths[0]).values())
        return {"after": after, "peak": peak, "weights": weights}


def _make(*, nbytes: int, num_tensors: int) -> Stack:
    module = Stack(nbytes=nbytes, num_tensors=num_tensors)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)  # memory that was never written would not count
    return module


def _read_status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
