"""Real handwritten digits, and two classifiers trained on them.

Rules this module keeps:

- The digits are the 1797 that scikit-learn ships (UCI ML hand-written digits); nothing is downloaded or generated.
- Nobody trains on the held-out digits; the traffic of the demo asks about these alone.
- Everything is seeded, and one thread computes, so that a machine trains the same weights every time.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hotglm
from hotglm.demo.classifier import Digits

__all__ = ["SHEET_SIZE", "Data", "load_data", "measure_accuracy", "train"]

SHEET_SIZE = 16
"""Digits in one request: a sheet of them is classified in one pass."""

_NUM_SHEETS = 28
_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The digits, split once.

    Attributes:
        images: what is trained on, [N, 64], float32 in 0..1.
        labels: their digits, [N], int64.
        sheets: held-out images, each [16, 64].
        answers: their digits, each [16].
    """

    images: torch.Tensor
    labels: torch.Tensor
    sheets: tuple[torch.Tensor, ...]
    answers: tuple[torch.Tensor, ...]


def load_data() -> Data:
    """Return scikit-learn's digits, shuffled with a fixed seed and split.

    Raises:
        MissingExtraError: scikit-learn, or numpy, which it brings, is not installed.
    """
    bunch = _import("sklearn.datasets").load_digits()
    order = _import("numpy").random.default_rng(0).permutation(len(bunch.target))
    images = torch.tensor(bunch.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(bunch.target[order], dtype=torch.int64)
    num_held_out = _NUM_SHEETS * SHEET_SIZE
    return Data(
        images=images[num_held_out:],
        labels=labels[num_held_out:],
        sheets=tuple(sheet.clone() for sheet in torch.split(images[:num_held_out], SHEET_SIZE)),
        answers=tuple(torch.split(labels[:num_held_out], SHEET_SIZE)),
    )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)  # by name: it is of an extra, and this says which
    except ModuleNotFoundError as error:
        raise hotglm.MissingExtraError(
            f"The demo needs scikit-learn for its handwritten digits, and {error.name or name!r} is not installed.",
            remedy="pip install 'hotglm[demo]'.",
        ) from error


def train(data: Data, *, num_images: int, num_steps: int, learning_rate: float) -> Digits:
    """Return a classifier trained on the first `num_images` images, for `num_steps` batches."""
    torch.manual_seed(0)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    for batch in _draw_batches(min(num_images, len(data.images)), num_steps):
        loss = nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


def _draw_batches(num_images: int, num_steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        yield torch.randint(num_images, (_BATCH_SIZE,), generator=generator)


def measure_accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of held-out digits that `model` gets right, 0 to 1."""
    with torch.inference_mode():
        right = [(model(s).argmax(1) == a).float().mean() for s, a in zip(data.sheets, data.answers, strict=True)]
    return float(torch.stack(right).mean())
