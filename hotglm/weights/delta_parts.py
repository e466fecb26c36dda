"""The parts of a tensor in a delta's payload, wherever they lie, and what is wrong with one.

Rules this module keeps:

- A part is read piece by piece, into memory that is the reader's own; how large it is, is known before.
- What is wrong with a payload is a `PayloadError`, which knows no tensor; who applies the delta names it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hotglm.release.files import TensorLocation
from hotglm.release.reading import read_scattered
from hotglm.weights.digest import tensor_bytes, view_buffer
from hotglm.weights.dtypes import TORCH_DTYPES

__all__ = ["FilePart", "Part", "PayloadError", "TensorPart", "view_words"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PayloadError(ValueError):
    """A payload that cannot be applied; the text is a sentence.

    Attributes:
        code: which rule it breaks.
    """

    def __init__(self, code: str, message: str) -> None:
        """Take the code and the sentence."""
        super().__init__(message)
        self.code = code


class Part(Protocol):
    """One tensor of a payload: its header, and its bytes piece by piece."""

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the bytes from `start` to `stop`, flat; nobody writes them; `0 <= start <= stop <= nbytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """A part that is in memory, as `encode` made it."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a view of its bytes."""
        return tensor_bytes(self.tensor)[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """A part that stands in an open file.

    Attributes:
        location: where.
        turn: what a thread holds while it reads.
    """

    location: TensorLocation
    turn: contextlib.AbstractContextManager[object] = field(default_factory=contextlib.nullcontext)

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return TORCH_DTYPES[self.location.entry.torch_dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.location.entry.shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.location.nbytes

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read some of its bytes.

        Raises:
            SourceReadError: the system refused. SourceChangedError: the file ends before them.
        """
        found = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            file = self.location.file
            with self.turn:
                offset = self.location.offset + start
                read_scattered(file.fd, [view_buffer(found)], offset, path=file.path, size=file.size)
        return found


def view_words(flat: torch.Tensor, itemsize: int) -> torch.Tensor:
    """Return flat uint8 bytes as integers of `itemsize` bytes, which no operation takes for numbers (C12)."""
    return flat.view(_WORDS[itemsize])
