"""The codec `xor-zstd`: what differs, bit by bit, in planes of bytes, compressed chunk by chunk (X8).

Rules this module keeps:

- Exact: bits are xor-ed, never subtracted as numbers (C11, C12).
- A chunk of the tensor is one frame of its own, and the lengths of all frames stand in front of them. So a payload that
  is cut, goes on too long or wants too much room is refused before anything is decompressed, and applying it takes
  memory for one chunk, whatever the tensor's size (C06).

In planes: the first byte of every element of a chunk, then the second of every element, and so on. Weights that drift
keep sign and exponent, and most of their leading digits, so most planes are almost all zeros; mixed with the others
they would not compress (measured on bfloat16 after fine-tuning: 0.20 in planes, 0.29 mixed).
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator

import torch

from hotglm.weights.delta_parts import Part, PayloadError, view_words
from hotglm.weights.digest import view_buffer
from hotglm.weights.zstd import FrameError, compress, decompress, limit_frame

__all__ = ["CHUNK_NBYTES", "decode_xor", "encode_xor", "verify_xor"]

CHUNK_NBYTES = 1 << 20
"""Bytes of the tensor in one frame; the last one may have fewer. Part of the format (X8)."""

_LENGTH_NBYTES = 4
_BAD = "DELTA_BAD_PAYLOAD"


def encode_xor(old: torch.Tensor, new: torch.Tensor, *, itemsize: int, limit: int) -> torch.Tensor | None:
    """Return the payload that makes `new` of `old`, or None where it would take more than `limit` bytes.

    Args:
        old: bytes, flat.
        new: bytes, flat, as many.
        itemsize: bytes of one element of the tensor.
        limit: in bytes.

    Raises:
        MissingExtraError: the extra `delta` is not installed.
    """
    frames: list[bytes] = []
    nbytes = 0
    for start in range(0, new.numel(), CHUNK_NBYTES):
        frames.append(_encode_chunk(old[start : start + CHUNK_NBYTES], new[start : start + CHUNK_NBYTES], itemsize))
        nbytes += _LENGTH_NBYTES + len(frames[-1])
        if nbytes > limit:
            return None
    lengths = torch.tensor([len(frame) for frame in frames], dtype=torch.int32).view(torch.uint8)
    return torch.cat([lengths, *map(_as_tensor, filter(None, frames))])


def _encode_chunk(old: torch.Tensor, new: torch.Tensor, itemsize: int) -> bytes:
    """Return the frame of one chunk; no byte where nothing differs."""
    words = view_words(old, itemsize) ^ view_words(new, itemsize)
    if not words.any():
        return b""
    planes = torch.empty(itemsize, words.numel(), dtype=torch.uint8)
    for index in range(itemsize):  # shifts of whole words: ten times as fast as a transposition of bytes
        planes[index].copy_(words >> (8 * index))
    return compress(view_buffer(planes.view(-1)))


def verify_xor(part: Part, *, nbytes: int) -> None:
    """Refuse a part whose header says that it is no payload for a tensor of `nbytes`.

    Raises:
        PayloadError: it is none.
    """
    chunks = list(_cut(nbytes))
    smallest = _LENGTH_NBYTES * len(chunks)
    largest = smallest + sum(limit_frame(stop - start) for start, stop in chunks)
    if part.dtype is not torch.uint8 or len(part.shape) != 1:
        raise PayloadError(_BAD, f"Expected a U8 tensor of one dimension, got {part.dtype} {list(part.shape)}.")
    if part.nbytes < smallest:
        raise PayloadError(_BAD, f"Expected at least {smallest} bytes of payload, got {part.nbytes}.")
    if part.nbytes > largest:
        message = f"Expected at most {largest} bytes of payload for {nbytes} bytes, got {part.nbytes}."
        raise PayloadError("DELTA_TOO_LARGE", message)


def decode_xor(view: torch.Tensor, part: Part, *, itemsize: int, pause: Callable[[], object]) -> None:
    """Make the new tensor of the old one, in place.

    Args:
        view: bytes of the tensor, flat, as those of the base; each chunk is written once.
        part: the payload.
        itemsize: bytes of one element.
        pause: called before each chunk; whatever it raises ends the work.

    Raises:
        PayloadError: the payload is broken; what stands in `view` then is worthless.
        MissingExtraError: the extra `delta` is not installed.
        SourceReadError, SourceChangedError: the payload cannot be read.
    """
    verify_xor(part, nbytes=view.numel())
    chunks = list(_cut(view.numel()))
    at = _LENGTH_NBYTES * len(chunks)
    table = part.read(0, at).view(torch.int32) if chunks else torch.empty(0, dtype=torch.int32)
    lengths = (table.to(torch.int64) & 0xFFFFFFFF).tolist()
    if at + sum(lengths) != part.nbytes:
        raise PayloadError(_BAD, f"Expected {at + sum(lengths)} bytes, as its frames add up to, got {part.nbytes}.")
    for (start, stop), length in zip(chunks, lengths, strict=True):
        if length > limit_frame(stop - start):
            message = f"Expected a frame of at most {limit_frame(stop - start)} bytes, got one of {length}."
            raise PayloadError("DELTA_TOO_LARGE", message)
    for (start, stop), length in zip(chunks, lengths, strict=True):
        pause()
        if length:
            _decode_chunk(view[start:stop], part.read(at, at + length), itemsize)
        at += length


def _decode_chunk(view: torch.Tensor, frame: torch.Tensor, itemsize: int) -> None:
    try:
        content = decompress(_as_bytes(frame), view.numel())
    except FrameError as error:
        raise PayloadError(_BAD, f"Expected a frame of {view.numel()} bytes, got {error}.") from error
    planes = torch.frombuffer(content, dtype=torch.uint8).view(itemsize, -1)
    words = view_words(view, itemsize)
    if itemsize == 1:
        words ^= planes[0]
        return
    flips = planes[itemsize - 1].to(words.dtype)
    for index in range(itemsize - 2, -1, -1):
        flips <<= 8
        flips |= planes[index]
    words ^= flips


def _cut(nbytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, CHUNK_NBYTES):
        yield start, min(start + CHUNK_NBYTES, nbytes)


def _as_tensor(frame: bytes) -> torch.Tensor:
    with warnings.catch_warnings():  # it is only read
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(frame, dtype=torch.uint8)


def _as_bytes(flat: torch.Tensor) -> bytes:
    return ctypes.string_at(flat.data_ptr(), flat.numel())
