"""Small models of each common kind, with inputs, for tests of what every model must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["ZOO", "Kind"]

Kind = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]
"""A constructor, and a maker of an input."""


class Convolutional(nn.Module):
    """Convolutions with batch norm in training-time statistics, channels last, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it
        with torch.no_grad():  # statistics other than 0 and 1
            for name, buffer in self.named_buffers():
                buffer.copy_(torch.rand(buffer.shape) + 0.5 if "running" in name else torch.tensor(7))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.features(x).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        output, (hidden, cell) = self.lstm(x)
        return self.head(output), hidden, cell


class Transformer(nn.Module):
    """Tied embeddings, learned positions, a causal mask that is not persistent, and torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.positions = nn.Parameter(torch.randn(6, 8))
        self.register_buffer("mask", torch.ones(6, 6).triu(1).bool(), persistent=False)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Mapping[str, torch.Tensor]:
        hidden = self.layers(self.embed(ids) + self.positions, mask=self.mask)
        return {"logits": self.head(hidden), "hidden": hidden}


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))


ZOO: Mapping[str, Kind] = {
    "mlp": (_mlp, lambda: torch.randn(4, 3)),
    "half-precision mlp": (lambda: _mlp().bfloat16(), lambda: torch.randn(4, 3).bfloat16()),
    "cnn with batch norm": (Convolutional, lambda: torch.randn(2, 3, 8, 8)),
    "lstm": (Recurrent, lambda: torch.randn(2, 5, 3)),
    "tied transformer": (Transformer, lambda: torch.randint(0, 16, (2, 6))),
}
