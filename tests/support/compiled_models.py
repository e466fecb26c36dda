"""Small compiled models of every kind that a slot takes, and a program that swaps each of them 20 times.

Run as a program, it sets torch's stance to `fail_on_recompile`, which is of the whole process, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hotglm

__all__ = ["KINDS", "WIDTH", "Model", "draw", "make", "make_cold"]

WIDTH = 8
NUM_SWAPS = 20


class Block(nn.Module):
    """A layer with a buffer that passes in training mode write."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        return torch.relu(self.norm(self.linear(x)))


class Model(nn.Module):
    """Two blocks of one class and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = self.head(self.second(self.first(x)))
        return found


class WithMethod(Model):
    """A model that keeps a compiled method of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.fast = torch.compile(self.slow, **options)

    def slow(self, x: torch.Tensor) -> torch.Tensor:
        """Run it without the head; x: (batch, WIDTH)."""
        found: torch.Tensor = self.second(self.first(x))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = self.head(self.fast(x))
        return found


def _module(model: Any, options: dict[str, Any]) -> Any:
    return torch.compile(model, **options)


def _in_place(model: Any, options: dict[str, Any]) -> Any:
    model.compile(**options)
    return model


def _regional(model: Any, options: dict[str, Any]) -> Any:
    model.first.compile(**options)
    model.second.compile(**options)
    return model


def _regional_wrapped(model: Any, options: dict[str, Any]) -> Any:
    model.first = torch.compile(model.first, **options)
    model.second = torch.compile(model.second, **options)
    return model


def _nested(model: Any, options: dict[str, Any]) -> Any:
    return _in_place(_regional(model, options), options)


def _dynamic(model: Any, options: dict[str, Any]) -> Any:
    return torch.compile(model, dynamic=True, **options)


def _container(model: Any, options: dict[str, Any]) -> Any:
    return torch.compile(nn.Sequential(model.first, model.second, model.head), **options)


def _method(model: Any, options: dict[str, Any]) -> Any:
    del model
    return WithMethod(options)


KINDS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "module": _module,
    "in place": _in_place,
    "regional": _regional,
    "regional, wrapped": _regional_wrapped,
    "nested": _nested,
    "dynamic": _dynamic,
    "container": _container,
    "method": _method,
}
"""How a model is compiled: from the model and the options of `torch.compile`, the compiled one."""


def make(kind: str, *, is_training: bool = False, **options: Any) -> Any:
    """Return a new model, compiled in one of the ways."""
    return KINDS[kind](Model().train(is_training), options).train(is_training)


def make_cold(kind: str, state: dict[str, torch.Tensor], *, is_training: bool = False, **options: Any) -> Any:
    """Return a model with given weights that was never in a slot; names are those without wrappers."""
    with torch.inference_mode(mode=False), torch.no_grad():
        model = make(kind, is_training=is_training, **options)
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name.replace("_orig_mod.", "")])
    return model


def draw(slot: hotglm.ModuleSlot, seed: int) -> dict[str, torch.Tensor]:
    """Return other weights for the model in `slot`."""
    generator = torch.Generator().manual_seed(seed)
    state = slot.state_dict()
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.items()
    }


def swap(kind: str, **options: Any) -> dict[str, Any]:
    """Swap a compiled model often, where compiling raises; return what the receipts and torch have counted."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counted = torch._dynamo.utils.counters["frames"]
    shapes = [torch.randn(size, WIDTH) for size in ((4, 3, 5, 7) if kind == "dynamic" else (4,))]
    policy = hotglm.StagePolicy(warm_up=(shapes[0],))
    slot = hotglm.ModuleSlot(make(kind, **options), version="1.0.0", policy=policy)
    swaps: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = []
    with torch.inference_mode():
        at_first = counted["total"]
        for shape in shapes:
            slot(shape)
        before = counted["total"]
        receipts = []
        torch.compiler.set_stance("fail_on_recompile")
        try:
            for number in range(1, NUM_SWAPS + 1):
                state = draw(slot, number)
                receipts.append(slot.update(state, version=f"1.0.{number}"))
                swaps.append((state, [slot(shape) for shape in shapes]))
        finally:
            torch.compiler.set_stance("default")
        num_frames = counted["total"] - before
        wrong = 0
        for state, outputs in swaps:
            cold = make_cold(kind, state, **options)
            wrong += not all(torch.equal(one, cold(shape)) for one, shape in zip(outputs, shapes, strict=True))
    return {
        "first": before - at_first,
        "frames": num_frames,
        "recompiles": sum(receipt.recompiles for receipt in receipts),
        "since": slot.status().recompiles,
        "wrong": wrong,
        "swaps": len(swaps),
    }


if __name__ == "__main__":
    print(json.dumps({name: swap(name.partition(": ")[2], backend=name.partition(": ")[0]) for name in sys.argv[1:]}))
