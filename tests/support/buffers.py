"""A slot whose module is nothing but tensors, for what migrations make of them."""

from __future__ import annotations

import torch

import hotglm

__all__ = ["make_slot"]


def make_slot(migrations: hotglm.Migrations, **tensors: torch.Tensor) -> hotglm.ModuleSlot:
    """Return a slot that runs buffers as version 2.0."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    return hotglm.ModuleSlot(Holder(), name="ranker", version="2.0", migrations=migrations, accept="major")
