"""A stretch of arena with a target for each tensor, as staging makes them, to load into without a slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hotglm.model.extents import extent_nbytes
from hotglm.weights.arena import ALIGNMENT, Arena, Lease
from hotglm.weights.proof import Target

__all__ = ["Spare", "random_tensor"]


class Spare:
    """Targets in an arena of their own; `ties` maps further names to the first name of the same tensor."""

    def __init__(self, like: Mapping[str, torch.Tensor], *, ties: Mapping[str, str] | None = None) -> None:
        offsets: dict[str, int] = {}
        end = 0
        for name, tensor in like.items():
            offsets[name] = end
            end += -(-extent_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
        self.arena = Arena(end)
        self.lease: Lease = self.arena.lease()
        self.targets = {
            name: Target(view=self._view(offsets[name], tensor), offset=offsets[name], key=name)
            for name, tensor in like.items()
        }
        for alias, name in (ties or {}).items():
            self.targets[alias] = self.targets[name]

    def _view(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        stride = None if like.is_contiguous() else like.stride()
        return self.lease.view(offset, dtype=like.dtype, shape=like.shape, stride=stride)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.targets[name].view


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of random finite values of any dtype that safetensors has."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    if dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex64).to(dtype)
    if dtype.is_floating_point:
        return torch.rand(shape).add(0.25).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)
