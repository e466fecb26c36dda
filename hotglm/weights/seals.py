"""Seals: what is known of a tensor's bytes at rest, and copying at the speed of memory what still has them.

Rules this module keeps:

- A tensor is copied only as what its digest says: what was copied is held against a fingerprint that was taken when the
  digest was, or is hashed. Either is taken of the copy, after it was made, so that whoever writes the original
  meanwhile is found out, too (C02).
- What no longer has its digest is no error here; the caller takes the bytes from somewhere else, or says so.

[Note: fingerprint]
A fingerprint is a sum of 64-bit integers, wrapping, in 16 lanes for each MiB, the lanes added up with odd factors that
differ. Every flip of one bit changes it, so does every change of one word, and one of several words unless they cancel
out to the last bit, 1 in 2**64 for what is not aimed at that. It is no cryptographic hash and stands for none: it tells
whether memory of our own, which was hashed with SHA-256 once, is still as it was. Who can write that memory at will
needs no collision. A core copies and sums up 12 GB/s, and hashes 1.8 (measured on an EPYC with SHA extensions).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hotglm.weights.digest import digest_tensor, format_digest, view_buffer

__all__ = ["Seal", "copy_sealed", "matches_seal", "seal_tensor"]

_CHUNK_NBYTES = 2 << 20
_NUM_LANES = 16
_WORD = 8
_STRIPE = _NUM_LANES * _WORD
_MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that multiplying loses nothing; the golden ratio's fraction, as usual for spreading."""


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
    flat = _find_flat(tensor)
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
    source, target = _find_flat(tensor), _find_flat(view)
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
    flat = _find_flat(tensor)
    if flat is None or seal.fingerprint is None or seal.stride != tensor.stride():
        return False
    fingerprint = 0
    for chunk in _cut(flat):
        pause()
        fingerprint = _add(fingerprint, chunk, None)
    return fingerprint == seal.fingerprint


def _has(view: torch.Tensor, seal: Seal) -> bool:
    return digest_tensor(view) == seal.digest


def _find_flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the memory of a tensor as flat bytes, None where its elements do not fill it, each once."""
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if step != expected:
                return None
            expected *= size
    plain = tensor.detach()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _cut(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, flat.numel(), _CHUNK_NBYTES):
        yield flat[start : start + _CHUNK_NBYTES]


def _add(fingerprint: int, chunk: torch.Tensor, running: hashlib._Hash | None) -> int:
    """Return the fingerprint of what came before and `chunk`, which is hashed as well while it is in the cache."""
    if running is not None:
        running.update(view_buffer(chunk))
    num_words = chunk.numel() // _STRIPE * _NUM_LANES
    body = chunk[: num_words * _WORD].view(torch.int64).view(-1, _NUM_LANES)
    for lane in body.sum(0).tolist():
        fingerprint = (fingerprint * _FACTOR + lane) & _MASK
    rest = bytes(chunk[num_words * _WORD :].tolist())
    for start in range(0, len(rest), _WORD):
        fingerprint = (fingerprint * _FACTOR + int.from_bytes(rest[start : start + _WORD], "little")) & _MASK
    return fingerprint
