"""Quantisers written by hand, of every kind that a slot may be told to run, and models to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.wrapped import Outer, make_plain, quantise_layers

__all__ = ["KINDS", "Int8Linear", "Kind", "NumberLinear", "replace_layers"]


class Int8Linear(nn.Module):
    """A layer with weights in int8 and a scale for each row, as people write them by hand."""

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("qweight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, width)."""
        return nn.functional.linear(x, self.qweight.float() * self.scale[:, None], self.bias)


class NumberLinear(nn.Module):
    """One whose scale is a plain number, which no swap of tensors reaches."""

    qweight: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = float(weight.abs().amax() / 127)
        self.register_buffer("qweight", (weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, width)."""
        return nn.functional.linear(x, self.qweight.float() * self.scale, self.bias)


def replace_layers(model: Any, kind: Callable[[nn.Linear], nn.Module] = Int8Linear) -> None:
    """Put quantised layers in the place of the linear ones, in place."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(model, name, kind(layer))


def _make_dynamic(model: Any) -> Any:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    return quantise(model, {nn.Linear}, dtype=torch.qint8)


def _tie(model: Any) -> None:
    quantise_layers(model)
    model[2].weight = model[0].weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to quantise.

    Attributes:
        quantize: in place, or returning another module.
        is_tensors_alone: whether versions differ in registered tensors alone.
    """

    quantize: Callable[[Any], Any]
    is_tensors_alone: bool = True

    def make(self, seed: int) -> Any:
        """Return the model that a cold start has: plain, with the weights of `seed`, quantised."""
        model = make_plain(seed)
        made = self.quantize(model)
        return model if made is None else made


KINDS = {
    "wrappers": Kind(quantize=quantise_layers),
    "nested": Kind(quantize=lambda model: quantise_layers(model, kind=Outer)),
    "tied": Kind(quantize=_tie),
    "layers": Kind(quantize=replace_layers),
    "numbers": Kind(quantize=lambda model: replace_layers(model, NumberLinear), is_tensors_alone=False),
    "packed": Kind(quantize=_make_dynamic, is_tensors_alone=False),
}
"""Wrapper subclasses as torchao has them, layers of one's own, and torch.ao's packed weights, which are no tensors."""
