"""Undoing what passes write to a module that are only run to be captured.

Rules this module keeps: weights are neither copied nor written; what nobody has written is not written here, because
later stages tell by torch's count what passes have written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from hotglm.model.wrappers import find_memory

__all__ = ["read_version", "restored"]


@contextlib.contextmanager
def restored(module: nn.Module, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Undo what passes in the body write to buffers (running statistics), and to `tensors` that are no weights."""
    memory = [leaf for buffer in module.buffers() for leaf in find_memory(buffer)]
    known = {_find_storage(leaf) for tensor in module.parameters() for leaf in find_memory(tensor)}
    known |= set(map(_find_storage, memory))
    loose = [tensor for tensor in tensors if _find_storage(tensor) not in known]
    versions = [read_version(tensor) for tensor in loose]
    values = [leaf.clone() for leaf in (*memory, *loose)]
    try:
        yield
    finally:
        written = [version is None or version != read_version(t) for t, version in zip(loose, versions, strict=True)]
        is_due = (*([True] * len(memory)), *written)
        with torch.inference_mode(mode=False), torch.no_grad():
            for leaf, value, due in zip((*memory, *loose), values, is_due, strict=True):
                if due:
                    leaf.copy_(value)


def _find_storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def read_version(tensor: torch.Tensor) -> int | None:
    """Return torch's count of the writes to a tensor; None for an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version
