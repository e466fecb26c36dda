"""What a copy of a module is, and what may come between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ChangedWhileCopiedError", "Twin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A structural copy over an arena, with its tensors by name.

    Attributes:
        module: the copy.
        views: every registered name and the tensor it has in the arena (ties share memory); of a wrapper, what
            is inside.
        carried: names of unregistered or non-persistent state that keeps the value it had.
        loose: the copies of that state, and of what is recomputed.
    """

    module: nn.Module
    views: Mapping[str, torch.Tensor]
    carried: tuple[str, ...]
    loose: tuple[torch.Tensor, ...]


class ChangedWhileCopiedError(Exception):
    """A container of the serving module changed size while it was walked."""
