"""Seals: what is known of a tensor's bytes at rest, and copying at the speed of memory what still has them.

Rules this module keeps:

- A tensor is copied only as what its digest says: what was copied is held against a fingerprint that was taken when the
  digest was, or is hashed. Either is taken of the copy, after it was made, so that whoever writes the original
  meanwhile is found out, too (C02).
- What no longer has its digest is no error here; the caller takes the bytes from somewhere else, or says so.

[Note: fingerprint]
A fingerprint is a digest of sums. A chunk is looked at as 64-bit integers, in blocks of 251 rows of 16. The columns of
each block are summed up, wrapping, and hashed with SHA-256, behind what came before; and so are the rows, which are
looked at in the same way again, and what is left at the end is hashed as it is. Every flip of one bit changes a
column, and so does every word that moves to another column or block; one that moves in its column changes two rows. So
rows of weights that trade places are found. 251 is a prime, so that what repeats at the strides that tensors have, such
as the signs of one column of weights, falls on some columns of blocks an odd number of times: highest bits cancel in
pairs in a wrapping sum. (Columns of whole chunks alone, which stood here first, saw neither, at twice the speed.) It is
no cryptographic hash and stands for none: it tells whether memory of our own, which was hashed with SHA-256 once, is
still as it was. Who can write that memory at will needs no collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hotglm.weights.digest import digest_tensor, format_digest, view_buffer
from hotglm.weights.pace import rest

__all__ = ["WORD_NBYTES", "Seal", "copy_sealed", "find_flat", "is_intact", "matches_seal", "seal_tensor"]

_CHUNK_NBYTES = 2 << 20
WORD_NBYTES = 8
"""Fingerprints look at memory as words of this size."""

_NUM_COLUMNS = 16
_NUM_ROWS = 251
"""A prime (see the note on fingerprints)."""

_BLOCK_NBYTES = _NUM_ROWS * _NUM_COLUMNS * WORD_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What was found of a tensor's bytes when they were last proved.

    Attributes:
        digest: of its bytes in row-major order.
        fingerprint: of its memory from the first to the last element; None where it was not taken.
        stride: in elements, when that was taken.
        is_finite: whether it was searched for NaN and infinity, and had none.
    """

    digest: str
    fingerprint: int | None = None
    stride: tuple[int, ...] = ()
    is_finite: bool = False


def seal_tensor(tensor: torch.Tensor, *, digest: str | None, is_finite: bool) -> Seal:
    """Return the seal of a CPU tensor, which nobody writes meanwhile; hashes it where `digest` is None."""
    flat = find_flat(tensor)
    if flat is None:
        return Seal(digest=digest or digest_tensor(tensor), is_finite=is_finite)
    running = hashlib.sha256() if digest is None and tensor.is_contiguous() else None
    fingerprint = 0
    for chunk in _cut(flat):
        fingerprint = _add(fingerprint, chunk, running)
    if digest is None:
        digest = digest_tensor(tensor) if running is None else format_digest(running.hexdigest())
    return Seal(digest=digest, fingerprint=fingerprint, stride=tensor.stride(), is_finite=is_finite)


def matches_seal(tensor: torch.Tensor, seal: Seal) -> bool:
    """Tell, at the speed of memory, whether a tensor has the fingerprint of a seal; False where that has none."""
    if seal.fingerprint is None or seal.stride != tensor.stride():
        return False
    return seal_tensor(tensor, digest=seal.digest, is_finite=False).fingerprint == seal.fingerprint


def copy_sealed(
    view: torch.Tensor, tensor: torch.Tensor, seal: Seal, *, pause: Callable[[], object] = lambda: None
) -> Seal | None:
    """Copy a tensor that is to have the digest of `seal`; return the seal of the copy, None where it has another.

    Args:
        view: where to; of the same dtype and shape. Its values are worthless where None is returned.
        tensor: where from; on the CPU.
        seal: what is known of `tensor`.
        pause: called before each chunk; whatever it raises ends the work.
    """
    source, target = find_flat(tensor), find_flat(view)
    if source is None or target is None or tensor.stride() != view.stride():
        view.copy_(tensor)
        return seal_tensor(view, digest=seal.digest, is_finite=seal.is_finite) if _has(view, seal) else None
    is_known = seal.fingerprint is not None and seal.stride == view.stride()
    running = None if is_known or not view.is_contiguous() else hashlib.sha256()
    fingerprint = 0
    for into, chunk in zip(_cut(target), _cut(source), strict=True):
        pause()
        into.copy_(chunk)
        fingerprint = _add(fingerprint, into, running)
    if is_known:
        is_same = fingerprint == seal.fingerprint
    else:
        is_same = _has(view, seal) if running is None else format_digest(running.hexdigest()) == seal.digest
    if not is_same:
        return None
    return Seal(digest=seal.digest, fingerprint=fingerprint, stride=view.stride(), is_finite=seal.is_finite)


def is_intact(tensor: torch.Tensor, seal: Seal, *, pause: Callable[[], object] = lambda: None) -> bool:
    """Tell whether a tensor still has the bytes of a seal with a fingerprint; only read, at the speed of memory.

    A seal that was taken of other strides, or has no fingerprint, tells nothing: then the answer is no.
    """
    flat = find_flat(tensor)
    if flat is None or seal.fingerprint is None or seal.stride != tensor.stride():
        return False
    fingerprint = 0
    for chunk in _cut(flat):
        pause()
        fingerprint = _add(fingerprint, chunk, None)
    return fingerprint == seal.fingerprint


def _has(view: torch.Tensor, seal: Seal) -> bool:
    return digest_tensor(view) == seal.digest


def find_flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the memory of a tensor as flat bytes; None where its elements do not fill it, each once and as they are.

    None as well where it does not begin at a word, like a parameter that is a part of a larger one at an odd place.
    """
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if step != expected:
                return None
            expected *= size
    if tensor.is_conj() or tensor.is_neg() or tensor.storage_offset() * tensor.element_size() % WORD_NBYTES:
        return None
    plain = tensor.detach()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _cut(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, flat.numel(), _CHUNK_NBYTES):
        rest()
        yield flat[start : start + _CHUNK_NBYTES]


def _add(fingerprint: int, chunk: torch.Tensor, running: hashlib._Hash | None) -> int:
    """Return the fingerprint of what came before and `chunk`, which is hashed as well while it is in the cache."""
    if running is not None:
        running.update(view_buffer(chunk))
    sums = hashlib.sha256(fingerprint.to_bytes(WORD_NBYTES, "little"))
    _add_sums(sums, chunk)
    return int.from_bytes(sums.digest()[:WORD_NBYTES], "little")


def _add_sums(sums: hashlib._Hash, flat: torch.Tensor) -> None:
    """Hash the columns and the rows of the blocks in some bytes, and what is no block."""
    nbytes = flat.numel() // _BLOCK_NBYTES * _BLOCK_NBYTES
    if nbytes:
        rows = flat[:nbytes].view(torch.int64).view(-1, _NUM_COLUMNS)
        columns = rows.view(-1, _NUM_ROWS, _NUM_COLUMNS).sum(1).view(-1).view(torch.uint8)
        sums.update(view_buffer(columns))
        _add_sums(sums, rows.sum(1).view(torch.uint8))
    if nbytes < flat.numel():
        sums.update(view_buffer(flat[nbytes:]))
