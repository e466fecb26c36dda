"""Source tensors as operands: out of files into scratch memory, or out of a mapping as they are, verified on their way.

Rules this module keeps:

- A digest that the source promises is verified on the bytes that are used, once for each tensor, in whichever thread
  reads it first; what is wrong is noted with the source tensor's name.
- Scratch memory belongs to one thread, holds the operands of one unit at a time, and is gone with the thread. Memory
  that somebody still refers to (a free function that kept its argument) is left to them and never written again.
- A tensor of a mapping is the caller's: nothing here writes it, and whoever might is given a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from hotglm.errors import DigestMismatchError, Problem
from hotglm.release.files import TensorLocation, WeightFiles
from hotglm.release.reading import read_scattered
from hotglm.weights.arena import ALIGNMENT, Arena, Lease
from hotglm.weights.digest import digest_tensor
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.loader import ReadingTurn
from hotglm.weights.plan import CHUNK_NBYTES
from hotglm.weights.proof import Loaded, LoadOptions

__all__ = ["Operands", "Scratch", "describe_mismatch"]


class Scratch:
    """One block of memory for each thread, made as large as what is asked of it."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._own = threading.local()
        self.peak_nbytes = 0

    def lease(self, nbytes: int) -> Lease:
        """Return at least `nbytes` to the calling thread; what it was lent before is overwritten unless it is held.

        Raises:
            MemoryPlanError: the system has no such memory to give.
        """
        arena: Arena | None = getattr(self._own, "arena", None)
        if arena is None or arena.nbytes < nbytes or not arena.is_free:
            self._own.arena = arena = None  # first, so that two blocks never stand beside each other
            self._own.arena = arena = Arena(nbytes)
            self.peak_nbytes = max(self.peak_nbytes, nbytes)
        return arena.lease()


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
        self.scratch = Scratch()

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

    def read(self, names: Iterable[str], *, owned: bool) -> dict[str, torch.Tensor]:
        """Return source tensors by name; those of the calling thread's previous call are void.

        Args:
            names: which.
            owned: whether they must be memory that nobody else has.

        Raises:
            SourceReadError, SourceChangedError: the bytes cannot be had. MemoryPlanError: nor can memory for them.
        """
        wanted = list(names)
        found = self._read_all(self._files, wanted) if self._files is not None else self._take_all(wanted, owned=owned)
        for name, tensor in found.items():
            self._verify(name, tensor)
        return found

    def _read_all(self, files: WeightFiles, names: list[str]) -> dict[str, torch.Tensor]:
        lease = self._lease(names)
        found: dict[str, torch.Tensor] = {}
        offset = 0
        for name in names:
            location = files.tensors[name]
            self._read_one(location, lease, offset)
            dtype = TORCH_DTYPES[location.entry.torch_dtype]
            found[name] = lease.view(offset, dtype=dtype, shape=location.entry.shape)
            offset += _align(location.nbytes)
        return found

    def _read_one(self, location: TensorLocation, lease: Lease, offset: int) -> None:
        file = location.file
        for start in range(0, location.nbytes, CHUNK_NBYTES):
            self._options.cancellation.raise_if_cancelled()
            view = lease.bytes(offset + start, min(CHUNK_NBYTES, location.nbytes - start))
            with self._turn:
                read_scattered(file.fd, [view], location.offset + start, path=file.path, size=file.size)

    def _take_all(self, names: list[str], *, owned: bool) -> dict[str, torch.Tensor]:
        self._options.cancellation.raise_if_cancelled()
        plain = {name: self._tensors[name].detach().to("cpu").resolve_conj().resolve_neg() for name in names}
        if not owned:
            return plain
        lease = self._lease(names)
        found: dict[str, torch.Tensor] = {}
        offset = 0
        for name, tensor in plain.items():
            found[name] = lease.view(offset, dtype=tensor.dtype, shape=tensor.shape)
            found[name].copy_(tensor)
            offset += _align(self.nbytes_of(name))
        return found

    def _lease(self, names: list[str]) -> Lease:
        return self.scratch.lease(sum(_align(self.nbytes_of(name)) for name in names))

    def _verify(self, name: str, tensor: torch.Tensor) -> None:
        with self._lock:
            if name in self._known:
                return
            self._known.add(name)
        expected = self._options.expected.get(name)
        if expected is not None and (digest := digest_tensor(tensor)) != expected:
            self._loaded.problems.append((DigestMismatchError, describe_mismatch(name, expected, digest)))


def describe_mismatch(name: str, expected: str, digest: str | None) -> Problem:
    """Return the problem of a source tensor whose bytes are not the promised ones."""
    message = f"Expected digest {expected}, got {digest}"
    return Problem(code="DIGEST_MISMATCH", message=message, tensor=name, expected=expected, found=digest)


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
