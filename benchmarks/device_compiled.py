"""What a swap costs a compiled or captured model on a device: the first pass after it, and what is made anew for it.

Ways that torch or hotglm capture are measured beside the same way at rest: `torch.compile` in its default mode, a
captured graph, a graph around compiled code, and torch's own graph trees, which are swapped in place. Each output is
compared with that of a module that was loaded cold and is run in the same way, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import hotglm
from benchmarks.bench import Bench, Row, Sample, at_most
from benchmarks.device_setting import Setting, timed
from hotglm.integrations.cuda_graphs import count_graphs, graphed
from hotglm.model.compilations import counting

__all__ = ["measure"]

_LIMIT = 1.05
_NUM_STEADY = 5
_NUM_FIRST = 4
"""Passes that are run before anything is measured: torch warms up in the first, and records in the second."""

_Way = Callable[[nn.Module, torch.Tensor], nn.Module]


def _compile(module: nn.Module, **options: Any) -> nn.Module:
    compiled: Any = torch.compile(module, **options)
    made: nn.Module = compiled
    return made


_WAYS: dict[str, tuple[_Way, hotglm.Flip | hotglm.InPlace]] = {
    "compiled": (lambda module, x: _compile(module), hotglm.Flip()),  # noqa: ARG005 - all ways are called alike
    "captured graph": (lambda module, x: graphed(module, [x], otherwise="error"), hotglm.Flip()),
    "graph around compiled code": (lambda module, x: graphed(_compile(module), [x], otherwise="error"), hotglm.Flip()),
    "graph trees (reduce-overhead), in place": (
        lambda module, x: _compile(module, mode="reduce-overhead"),  # noqa: ARG005 - likewise
        hotglm.InPlace(timeout_s=60.0),
    ),
}


@dataclass(slots=True)
class _Found:
    """What one way of running came to: seconds, and how often something was compiled or captured for a swap."""

    first: list[float] = field(default_factory=list)
    steady: list[float] = field(default_factory=list)
    recompiles: int = 0
    recaptures: int = 0


def measure(bench: Bench, setting: Setting) -> list[Row]:
    """Return two rows for each way of running the model."""
    return [row for name, (way, swap) in _WAYS.items() for row in _rows(name, _run(bench, setting, way, swap))]


@torch.no_grad()
def _run(bench: Bench, setting: Setting, way: _Way, swap: hotglm.Flip | hotglm.InPlace) -> _Found:
    torch._dynamo.reset()
    x = torch.randn(8, setting.side, dtype=torch.bfloat16, device="cuda")
    found, rounds = _Found(), bench.rounds(7)
    output = _swap(setting, _make_slot(setting, way(setting.build(), x), x, swap), x, found, rounds=rounds)
    _compare(output, setting, way, x, path=setting.paths[(rounds - 1) % 2])  # the slot's memory is free by now
    return found


def _make_slot(
    setting: Setting, module: nn.Module, x: torch.Tensor, swap: hotglm.Flip | hotglm.InPlace
) -> hotglm.ModuleSlot:
    """Return a slot whose module has run, and has been swapped into every arena: two, or three of a small one."""
    policy = hotglm.StagePolicy(num_threads=os.cpu_count(), reuse=False)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=policy, swap=swap)
    for _ in range(_NUM_FIRST):
        slot(x)
    for number in (1, 2, 3):
        slot.update(setting.paths[number % 2], version=f"1.0.{number}")
        slot(x)
    return slot


def _swap(setting: Setting, slot: hotglm.ModuleSlot, x: torch.Tensor, found: _Found, *, rounds: int) -> torch.Tensor:
    """Swap and time passes; return the last output, and close the slot."""
    missed = sum(count_graphs(slot).missed.values())
    with counting() as passes:  # of this thread; what a stage makes is in its receipt
        for number in range(rounds):
            receipt = slot.update(setting.paths[number % 2], version=f"1.1.{number}")
            found.first.append(timed(lambda: slot(x)))
            found.steady += [timed(lambda: slot(x)) for _ in range(_NUM_STEADY)]
            found.recompiles += receipt.recompiles
            found.recaptures += receipt.recaptures
    found.recompiles += passes.num_compiled
    found.recaptures += passes.num_captured + sum(count_graphs(slot).missed.values()) - missed
    output: torch.Tensor = slot(x).clone()  # graph trees write the next output where this one is
    slot.close()
    return output


def _compare(output: torch.Tensor, setting: Setting, way: _Way, x: torch.Tensor, *, path: str) -> None:
    module = setting.build()
    module.load_state_dict(load_file(path, device="cuda"))
    cold = way(module, x)
    expected = [cold(x).clone() for _ in range(_NUM_FIRST)]
    assert torch.equal(output, expected[-1]), "a swap must give what a cold load gives, bit for bit"


def _rows(name: str, found: _Found) -> list[Row]:
    first, steady = Sample.of(found.first), Sample.of(found.steady)
    num_made, num_swaps = found.recompiles + found.recaptures, len(found.first)
    ratio = first.median / steady.median
    return [
        Row(
            group="device",
            name=f"first pass after the swap, {name}",
            hotglm=first,
            peer=steady,
            peer_name="a steady pass",
            unit="ms",
            ratio=ratio,
            ratio_name="first / steady",
            target=f"<= {_LIMIT}x",
            met=at_most(ratio, _LIMIT),
            note="outputs equal those of a cold load that is run likewise, bit for bit",
        ),
        Row(
            group="device",
            name=f"compiled or captured for {num_swaps} swaps, {name}",
            hotglm=Sample.of([float(num_made)]),
            peer=Sample.of([float(num_swaps)]),
            peer_name="one for each new model that is started cold",
            unit="x",
            ratio=float(num_made),
            ratio_name="made by hotglm",
            target="0",
            met=num_made == 0,
            note=f"{found.recompiles} pieces of code, {found.recaptures} graphs, staging and passes together",
        ),
    ]
