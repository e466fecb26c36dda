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
from hotglm.release.files import WeightFiles
from hotglm.weights.bundles import ReadingTurn, read_into
from hotglm.weights.delta_codec import decode_into
from hotglm.weights.digest import digest_tensor
from hotglm.weights.pace import rest
from hotglm.weights.proof import Loaded, LoadOptions, describe_bad_bool, is_bad_bool
from hotglm.weights.scratch import Workspace, align
from hotglm.weights.supply import SourceTensor, Supply

__all__ = ["Operands", "describe_mismatch"]


class Operands:
    """The tensors of one source, for a migration; any thread may read them."""

    def __init__(
        self,
        source: WeightFiles | Supply | Mapping[str, torch.Tensor],
        *,
        options: LoadOptions,
        loaded: Loaded,
        turn: ReadingTurn,
    ) -> None:
        """Take the source, which stays open and is not written meanwhile.

        Args:
            source: files, what a delta is made of, or tensors by name.
            options: `expected` are the digests that the source promises.
            loaded: takes what is wrong.
            turn: held while a file is read.
        """
        supply = Supply.of(source) if isinstance(source, WeightFiles) else source
        self._supply = supply if isinstance(supply, Supply) else None
        self._tensors = {} if isinstance(supply, Supply) else supply
        self._options = options
        self._loaded = loaded
        self._turn = turn
        self._lock = threading.Lock()
        self._known: set[str] = set()

    @property
    def label(self) -> str:
        """What to call the source in texts."""
        return "the mapping" if self._supply is None else self._supply.label

    def nbytes_of(self, name: str) -> int:
        """Return the bytes of one source tensor."""
        if self._supply is not None:
            return self._supply.tensors[name].nbytes
        tensor = self._tensors[name]
        return tensor.numel() * tensor.element_size()

    def count_room(self, names: Iterable[str], *, owned: bool) -> int:
        """Return how much of a workspace `read` will take."""
        is_copied = owned or self._supply is not None
        return sum(align(self.nbytes_of(name)) for name in names) if is_copied else 0

    def read(self, names: Iterable[str], *, owned: bool, work: Workspace) -> dict[str, torch.Tensor]:
        """Return source tensors by name.

        Args:
            names: which.
            owned: whether they must be memory that nobody else has.
            work: where they are put, if they are copied.

        Raises:
            SourceReadError, SourceChangedError: the bytes cannot be had.
            DeltaError, MissingExtraError: a delta cannot be applied.
        """
        found: dict[str, torch.Tensor] = {}
        for name in names:
            self._options.cancellation.raise_if_cancelled()
            if self._supply is not None:
                found[name] = self._read_one(name, self._supply.tensors[name], work)
            else:
                found[name] = self._take_one(self._tensors[name], work if owned else None)
            self._verify(name, found[name])
        return found

    def _read_one(self, name: str, source: SourceTensor, work: Workspace) -> torch.Tensor:
        tensor = work.take(source.dtype, source.shape)
        read_into(tensor, source.located, turn=self._turn, options=self._options)
        nbytes = source.nbytes
        for step in source.steps:
            decode_into(tensor, codec=step.codec, parts=step.parts, name=name, pause=self._pause)
            nbytes += sum(part.nbytes for part in step.parts)
        self._loaded.add(read_nbytes=nbytes, decoded_nbytes=source.nbytes if source.steps else 0)
        return tensor

    def _pause(self) -> None:
        self._options.cancellation.raise_if_cancelled()
        rest()

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
