"""Models and files that the benchmarks are about: plain stacks of square layers, by size and number of tensors."""

from __future__ import annotations

import math
import os

import torch
from safetensors.torch import save_file
from torch import nn

import hotglm

__all__ = ["FileMaker", "Stack", "draw_state", "find_side"]


def find_side(*, nbytes: int, num_tensors: int) -> int:
    """Return the width of a stack: the largest for which its float32 weights stay within `nbytes`.

    A multiple of 16 where there is room, as widths of real layers are.
    """
    side = math.isqrt(nbytes // 4 // num_tensors)
    return side // 16 * 16 or max(2, side)


class Stack(nn.Module):
    """`num_tensors` square layers without bias, with a ReLU after each, of about `nbytes` float32 weights together."""

    def __init__(self, *, nbytes: int, num_tensors: int) -> None:
        """Allocate the layers; what is in them is whatever was in memory, until a state is loaded."""
        super().__init__()
        self.side = find_side(nbytes=nbytes, num_tensors=num_tensors)
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear(self.side, self.side, bias=False) for _ in range(num_tensors))
        self.to_empty(device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the stack; x: (batch, side)."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def draw_state(*, nbytes: int, num_tensors: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights for a `Stack` that keep the size of what passes through it."""
    generator = torch.Generator().manual_seed(seed)
    side = find_side(nbytes=nbytes, num_tensors=num_tensors)
    scale = (6 / side) ** 0.5
    return {
        f"layers.{index}.weight": torch.empty(side, side).uniform_(-scale, scale, generator=generator)
        for index in range(num_tensors)
    }


class FileMaker:
    """Writes the weights of one layout to disk, in the formats that the peers read."""

    def make(
        self, *, path: str, nbytes: int, num_tensors: int, seed: int, pickled: bool = False, digested: bool = False
    ) -> int:
        """Write `path`, and `path` + `.pt` where that is asked for; return the bytes of the tensors."""
        state = draw_state(nbytes=nbytes, num_tensors=num_tensors, seed=seed)
        if digested:
            hotglm.save_weights(state, path)
        else:
            save_file(state, path)
        _flush(path)
        if pickled:
            torch.save(state, f"{path}.pt")
            _flush(f"{path}.pt")
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
