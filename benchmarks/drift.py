"""Pairs of weights, before and after a change, whose deltas are measured: synthetic ones, and really trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["DRIFTS", "Drifted", "draw_pair"]

_SCALE = 0.02
"""Of synthetic weights: about the standard deviation that transformers are initialised with and stay near."""

_TENSOR_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Drifted:
    """One way of changing weights.

    Attributes:
        kind: its key.
        description: in words.
        limit: largest size of the delta, as a share of the full tensors; None where no target stands.
    """

    kind: str
    description: str
    limit: float | None = None

    def note(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> str:
        """Return what share of the elements changed."""
        changed = sum(int((old[name] != tensor).sum().item()) for name, tensor in new.items())
        total = sum(tensor.numel() for tensor in new.values())
        return f"{changed / total:.1%} of {total} elements changed"


DRIFTS = (
    Drifted(kind="rl", description="RL-like step, 1 % of bfloat16 elements replaced, scattered", limit=0.04),
    Drifted(kind="adam-1", description="bfloat16 weights, masters moved by one step of 1e-6"),
    Drifted(kind="adam-10", description="bfloat16 weights, masters moved by 10 steps of 1e-5", limit=0.3),
    Drifted(kind="adam-100", description="bfloat16 weights, masters moved by 100 steps of 1e-5", limit=0.3),
    Drifted(kind="adam-hot", description="bfloat16 weights, masters moved by 100 steps of 1e-4"),
    Drifted(kind="float32", description="float32 weights, moved by 10 steps of 1e-5"),
    Drifted(kind="trained-10", description="a small transformer, 10 steps of AdamW at 1e-5, in bfloat16", limit=0.3),
    Drifted(kind="trained-30", description="a small transformer, 30 steps of AdamW at 1e-5, in bfloat16", limit=0.3),
    Drifted(kind="trained-100", description="a small transformer, 100 steps of AdamW at 1e-5, in bfloat16"),
)
"""Everything that is measured. Limits stand for what the issue calls a fine-tune; the rest shows where they end."""

_STEPS = {"adam-1": (1e-6, 1), "adam-10": (1e-5, 10), "adam-100": (1e-5, 100), "adam-hot": (1e-4, 100)}


def draw_pair(kind: str, *, numel: int, quick: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return weights before and after.

    Args:
        kind: of the drift.
        numel: how many elements, where they are synthetic.
        quick: whether to train for no longer than a smoke test lasts.
    """
    if kind.startswith("trained"):
        num_steps = int(kind.rpartition("-")[2])
        return _train(num_steps=10 if quick else 300, num_tuning=min(num_steps, 3) if quick else num_steps)
    generator = torch.Generator().manual_seed(0)
    draw = _CHANGES.get(kind, _walk(*_STEPS.get(kind, (1e-5, 10))))
    old, new = {}, {}
    for index, start in enumerate(range(0, numel, _TENSOR_NUMEL)):
        master = torch.randn(min(_TENSOR_NUMEL, numel - start), generator=generator) * _SCALE
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        old[f"w{index}"], new[f"w{index}"] = master.to(dtype), draw(master, generator).to(dtype)
    return old, new


def _walk(rate: float, num_steps: int) -> Callable[[torch.Tensor, torch.Generator], torch.Tensor]:
    """Return a random walk: steps of Adam are about as large as the rate, and point here and there."""

    def change(master: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return master + torch.randn(master.shape, generator=generator) * (rate * math.sqrt(num_steps))

    return change


def _replace_some(master: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    where = torch.rand(master.shape, generator=generator) < 0.01
    return torch.where(where, torch.randn(master.shape, generator=generator) * _SCALE, master)


_CHANGES = {"rl": _replace_some}


class _Small(nn.Module):
    """A transformer that learns to continue sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.layers(self.embed(ids)))
        return output


def _train(*, num_steps: int, num_tuning: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = _Small()
    _fit(model, rate=1e-3, num_steps=num_steps, stride=3)
    before = _as_bfloat16(model)
    _fit(model, rate=1e-5, num_steps=num_tuning, stride=5)
    return before, _as_bfloat16(model)


def _fit(model: nn.Module, *, rate: float, num_steps: int, stride: int) -> None:
    """Teach it to count in steps of `stride`, from where it stands."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(num_steps):
        ids = (torch.randint(64, (32, 1)) + stride * torch.arange(17)) % 64
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _as_bfloat16(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
