"""The model of the demo, in two versions of its code.

Rules this module keeps: it is what a user would write, and nothing here knows about traffic, updates or measurements.
"""

from __future__ import annotations

import torch
from torch import nn

import hotglm

__all__ = ["NUM_CLASSES", "NUM_PIXELS", "Digits", "DigitsWithTemperature"]

NUM_PIXELS = 64
NUM_CLASSES = 10
_WIDTH = 768


def _make_layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(NUM_PIXELS, _WIDTH),
        nn.ReLU(),
        nn.Linear(_WIDTH, _WIDTH),
        nn.ReLU(),
        nn.Linear(_WIDTH, _WIDTH),
        nn.ReLU(),
        nn.Linear(_WIDTH, NUM_CLASSES),
    )


@hotglm.versioned("digits", "1.0.0", reads=">=1.0,<2", requires=["torch>=2.6"])
class Digits(nn.Module):
    """Classifies handwritten digits; weights of every 1.x fit this code."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _make_layers()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10] for images [N, 64] with values in 0..1."""
        logits: torch.Tensor = self.layers(images)
        return logits


@hotglm.versioned("digits", "2.0.0", requires=["torch>=2.6"])
class DigitsWithTemperature(nn.Module):
    """The next code: callers have to pass a temperature, so it cannot take the place of 1.x under running callers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _make_layers()

    def forward(self, images: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return logits [N, 10], divided by `temperature`."""
        logits: torch.Tensor = self.layers(images) / temperature
        return logits
