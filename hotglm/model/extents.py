"""Where the tensors of a module lie in memory, and where they go in an arena.

Rules this module keeps: only metadata is read; the arithmetic on addresses is `weights/layout.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hotglm.model.inspection import StateEntry
from hotglm.weights.arena import ALIGNMENT
from hotglm.weights.layout import Extent, Layout, plan_layout

__all__ = ["extent_nbytes", "lay_out", "overlaps_itself"]


def extent_nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes from the first to the last element of `tensor`, 0 if it has none."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of `tensor` share memory, as those of an expanded one do."""
    return extent_nbytes(tensor) < tensor.numel() * tensor.element_size()


def lay_out(entries: Iterable[StateEntry]) -> Layout:
    """Return where the tensors of a module go in an arena.

    Expanded tensors, whose elements share memory, get room for all of their elements.
    """
    extents: list[Extent] = []
    for entry in entries:
        expanded = overlaps_itself(entry.tensor)
        extents.append(
            Extent(
                name=entry.name,
                # An address of its own: negative, so that it meets no real one and no other.
                address=-(len(extents) + 1) << 48 if expanded else entry.tensor.data_ptr(),
                nbytes=entry.tensor.numel() * entry.tensor.element_size() if expanded else extent_nbytes(entry.tensor),
            )
        )
    return plan_layout(extents, alignment=ALIGNMENT)
