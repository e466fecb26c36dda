"""Source tensors as operands: out of files into scratch memory, or out of a mapping as they are, verified there.

Rules this module keeps:

- A digest that the source promises is verified on the bytes that are used, once for each tensor, in whichever thread
  reads it first; what is wrong is noted with the source tensor's name.
- A tensor of a mapping is the caller's: nothing here writes it, and whoever might is given a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from hotglm.errors import DigestMismatchError, Problem, TensorValueError
from hotglm.release.files import TensorLocation, WeightFiles
from hotglm.release.reading import read_scattered
from hotglm.weights.digest import digest_tensor, tensor_bytes, view_buffer
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.loader import ReadingTurn
from hotglm.weights.plan import CHUNK_NBYTES
from hotglm.weights.proof import Loaded, LoadOptions, describe_bad_bool, is_bad_bool
from hotglm.weights.scratch import Workspace, align

__all__ = ["Operands", "describe_mismatch"]


class Operands:
    """The tensors of one source, for a migration; any thread may read them."""

    def __init__(
        self,
        source: WeightFiles | Mapping[str, torch.Tensor],
        *,
        options: LoadOptions,
        loaded: Loaded,
        turn: ReadingTurn,
    ) -> None:
        """Take the source, which stays open and is not written meanwhile.

        Args:
            source: files, or tensors by name.
            options: `expected` are the digests that the source promises.
            loaded: takes what is wrong.
            turn: held while a file is read.
        """
        self._files = source if isinstance(source, WeightFiles) else None
        self._tensors = {} if isinstance(source, WeightFiles) else source
        self._options = options
        self._loaded = loaded
        self._turn = turn
        self._lock = threading.Lock()
        self._known: set[str] = set()

    @property
    def label(self) -> str:
        """What to call the source in texts."""
        return "the mapping" if self._files is None else f"{self._files.path!r}"

    def nbytes_of(self, name: str) -> int:
        """Return the bytes of one source tensor."""
        if self._files is not None:
            return self._files.tensors[name].nbytes
        tensor = self._tensors[name]
        return tensor.numel() * tensor.element_size()

    def count_room(self, names: Iterable[str], *, owned: bool) -> int:
        """Return how much of a workspace `read` will take."""
        is_copied = owned or self._files is not None
        return sum(align(self.nbytes_of(name)) for name in names) if is_copied else 0

    def read(self, names: Iterable[str], *, owned: bool, work: Workspace) -> dict[str, torch.Tensor]:
        """Return source tensors by name.

        Args:
            names: which.
            owned: whether they must be memory that nobody else has.
            work: where they are put, if they are copied.

        Raises:
            SourceReadError, SourceChangedError: the bytes cannot be had.
        """
        found: dict[str, torch.Tensor] = {}
        for name in names:
            self._options.cancellation.raise_if_cancelled()
            if self._files is not None:
                found[name] = self._read_one(self._files.tensors[name], work)
            else:
                found[name] = self._take_one(self._tensors[name], work if owned else None)
            self._verify(name, found[name])
        return found

    def _read_one(self, location: TensorLocation, work: Workspace) -> torch.Tensor:
        tensor = work.take(TORCH_DTYPES[location.entry.torch_dtype], location.entry.shape)
        if not location.nbytes:
            return tensor
        file, data = location.file, view_buffer(tensor_bytes(tensor))
        for start in range(0, location.nbytes, CHUNK_NBYTES):
            self._options.cancellation.raise_if_cancelled()
            view = data[start : start + CHUNK_NBYTES]
            with self._turn:
                read_scattered(file.fd, [view], location.offset + start, path=file.path, size=file.size)
        return tensor

    def _take_one(self, tensor: torch.Tensor, work: Workspace | None) -> torch.Tensor:
        plain = tensor.detach().to("cpu").resolve_conj().resolve_neg()
        return plain if work is None else work.take(plain.dtype, plain.shape).copy_(plain)

    def _verify(self, name: str, tensor: torch.Tensor) -> None:
        with self._lock:
            if name in self._known:
                return
            self._known.add(name)
        if is_bad_bool(tensor):  # whatever it becomes, it was no truth value
            self._loaded.problems.append((TensorValueError, describe_bad_bool(name)))
        expected = self._options.expected.get(name)
        if expected is not None and (digest := digest_tensor(tensor)) != expected:
            self._loaded.problems.append((DigestMismatchError, describe_mismatch(name, expected, digest)))


def describe_mismatch(name: str, expected: str, digest: str | None) -> Problem:
    """Return the problem of a source tensor whose bytes are not the promised ones."""
    message = f"Expected digest {expected}, got {digest}"
    return Problem(code="DIGEST_MISMATCH", message=message, tensor=name, expected=expected, found=digest)
