"""The codec `sparse`: where elements changed, as gaps between their indices, and what they are now (X9).

Rules this module keeps:

- Exact: elements are replaced as bits, never added to (C11, C12).
- An index is inside the tensor and larger than the one before it, or nothing of the payload is used for sure: gaps are
  unsigned, so an order that goes back cannot be written, and a gap of zero is refused (C10).
- Applying it takes memory for one piece of the payload, whatever the tensor's size.

Gaps too large for their width are walked in steps over elements that stay as they are, which costs their old value
each: with one element in a hundred changed, 8 % more elements, against twice the width for every gap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hotglm.weights.delta_parts import Part, PayloadError, view_words

__all__ = ["decode_sparse", "encode_sparse", "verify_sparse"]

_GAPS = {torch.uint8: torch.uint8, torch.uint16: torch.int16, torch.uint32: torch.int32}
"""What gaps may be, and what torch computes with in its place."""

_PIECE_NUMEL = 1 << 17
_LARGEST = 8
"""One in so many elements is the most for which the codec is tried: above that, xor is smaller."""

_BAD_INDEX = "DELTA_BAD_INDEX"


def encode_sparse(
    old: torch.Tensor, new: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the gaps and the new values that make `new` of `old`, or None where too much differs.

    Args:
        old: bytes, flat.
        new: bytes, flat, as many.
        dtype: of the tensor.
    """
    before, after = view_words(old, dtype.itemsize), view_words(new, dtype.itemsize)
    numel, found, num_found = after.numel(), [], 0
    for start in range(0, numel, _PIECE_NUMEL):
        changed = (before[start : start + _PIECE_NUMEL] != after[start : start + _PIECE_NUMEL]).nonzero().view(-1)
        num_found += changed.numel()
        if num_found * _LARGEST > numel:
            return None
        found.append(changed + start)
    indices = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
    width = min(_GAPS, key=lambda width: _count(indices, width) * (width.itemsize + dtype.itemsize))
    gaps, indices = _walk(indices, torch.iinfo(width).max)
    return gaps.to(_GAPS[width]).view(width), after[indices].view(dtype)


def _count(indices: torch.Tensor, width: torch.dtype) -> int:
    """Return how many gaps of a width lead through all indices."""
    gaps = torch.diff(indices, prepend=torch.zeros(1, dtype=torch.int64))
    return indices.numel() + int(((gaps - 1).clamp_(min=0) // torch.iinfo(width).max).sum().item())


def _walk(indices: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gaps of at most `largest` that lead through all indices, and every index that they lead to."""
    gaps = torch.diff(indices, prepend=torch.zeros(1, dtype=torch.int64))
    num_steps = (gaps - 1).clamp_(min=0) // largest
    steps = torch.full((indices.numel() + int(num_steps.sum().item()),), largest, dtype=torch.int64)
    ends = torch.arange(indices.numel()) + num_steps.cumsum(0)
    steps[ends] = gaps - num_steps * largest
    return steps, steps.cumsum(0)


def verify_sparse(gaps: Part, values: Part, *, dtype: torch.dtype, numel: int) -> None:
    """Refuse parts whose headers say that they are none for a tensor of `numel` elements of `dtype`.

    Raises:
        PayloadError: they are none.
    """
    if gaps.dtype not in _GAPS or len(gaps.shape) != 1:
        message = f"Expected gaps of U8, U16 or U32 in one dimension, got {gaps.dtype} {list(gaps.shape)}."
        raise PayloadError(_BAD_INDEX, message)
    if gaps.shape[0] > numel:
        message = f"Expected at most as many changes as the tensor has elements, {numel}, got {gaps.shape[0]}."
        raise PayloadError(_BAD_INDEX, message)
    if values.dtype is not dtype or values.shape != gaps.shape:
        message = f"Expected {gaps.shape[0]} values of {dtype}, got {values.dtype} {list(values.shape)}."
        raise PayloadError("DELTA_BAD_PAYLOAD", message)


def decode_sparse(
    view: torch.Tensor, gaps: Part, values: Part, *, dtype: torch.dtype, pause: Callable[[], object]
) -> None:
    """Make the new tensor of the old one, in place.

    Args:
        view: bytes of the tensor, flat, as those of the base.
        gaps: from one index to the next; the first is an index itself.
        values: of the elements at these.
        dtype: of the tensor.
        pause: called before each piece; whatever it raises ends the work.

    Raises:
        PayloadError: an index is named twice or lies outside; what stands in `view` then is worthless.
        SourceReadError, SourceChangedError: the payload cannot be read.
    """
    words = view_words(view, dtype.itemsize)
    verify_sparse(gaps, values, dtype=dtype, numel=words.numel())
    width, last = gaps.dtype.itemsize, 0
    for start in range(0, gaps.shape[0], _PIECE_NUMEL):
        pause()
        stop = min(start + _PIECE_NUMEL, gaps.shape[0])
        steps = _read_gaps(gaps.read(start * width, stop * width), width)
        zeros = (steps[0 if start else 1 :] == 0).nonzero()
        if zeros.numel():
            at = start + int(zeros[0].item()) + (0 if start else 1)
            raise PayloadError(_BAD_INDEX, f"Expected each index once, in order, got change {at} at that before it.")
        indices = steps.cumsum(0) + last  # no overflow: 2**17 gaps of less than 2**32 each
        last = int(indices[-1].item())
        if last >= words.numel():
            at = start + int((indices >= words.numel()).to(torch.uint8).argmax().item())
            found = int(indices[at - start].item())
            message = f"Expected indices below {words.numel()}, got {found} for change {at}."
            raise PayloadError(_BAD_INDEX, message)
        words[indices] = view_words(values.read(start * dtype.itemsize, stop * dtype.itemsize), dtype.itemsize)


def _read_gaps(flat: torch.Tensor, width: int) -> torch.Tensor:
    """Return unsigned integers of `width` bytes as int64, with which torch can compute."""
    return view_words(flat, width).to(torch.int64) & ((1 << (8 * width)) - 1)
