"""Where each tensor of a load comes from: a file, the live generation, and what is applied to it there.

Rules this module keeps:

- Data only: what is open is closed, and what is held is let go of, by whoever made it.
- Every tensor that is loaded has a place in a file or in the live generation, and it may have both: then memory is
  asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hotglm.release.files import TensorLocation, WeightFile, WeightFiles
from hotglm.weights.delta_parts import Part
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.seals import Seal

__all__ = ["Application", "Kept", "SourceTensor", "Supply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A tensor that is in memory already, and may still be what is wanted.

    Attributes:
        tensor: on the processor or a device; somebody else's, and not written by us.
        seal: what is known of its bytes; the digest is the one that is wanted.
    """

    tensor: torch.Tensor
    seal: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One application of a delta to a tensor.

    Attributes:
        codec: name of the codec.
        parts: of the payload.
    """

    codec: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """One tensor of a source.

    Attributes:
        dtype: in the source.
        shape: its sizes.
        location: where it, or what it is made of, stands in a file.
        kept: where it, or what it is made of, is in memory.
        steps: what is applied to that, in order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    location: TensorLocation | None = None
    kept: Kept | None = None
    steps: tuple[Application, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def located(self) -> TensorLocation:
        """Its place in a file.

        Raises:
            ValueError: it has none (a bug in the caller, never a user's mistake).
        """
        if self.location is None:
            raise ValueError("a tensor that is in no file")
        return self.location


def _verify_nothing() -> None:
    """Find nothing that could have changed."""


def _refill_nothing(names: Sequence[str]) -> Supply:
    raise ValueError(f"nothing else has {names!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Everything that one load takes its bytes from.

    Attributes:
        label: what to call it in texts.
        files: the open files that locations are in.
        tensors: every tensor by name, in the order in which files have them.
        verify_unchanged: raises if one of the files was written to or cut since it was opened.
        refill: given names whose tensors in memory are not what they should be, returns a supply of them from
            elsewhere, whose `verify_unchanged` speaks for both; raises where there is none.
    """

    label: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, SourceTensor]
    verify_unchanged: Callable[[], None] = field(default=_verify_nothing)
    refill: Callable[[Sequence[str]], Supply] = field(default=_refill_nothing)

    @classmethod
    def of(cls, files: WeightFiles, kept: Mapping[str, Kept] | None = None) -> Supply:
        """Return the supply of open files, of which some tensors may be in memory already."""
        kept = kept or {}
        tensors = {
            name: SourceTensor(
                dtype=TORCH_DTYPES[location.entry.torch_dtype],
                shape=location.entry.shape,
                location=location,
                kept=kept.get(name),
            )
            for name, location in files.tensors.items()
        }
        supply = cls(
            label=f"{files.path!r}", files=files.files, tensors=tensors, verify_unchanged=files.verify_unchanged
        )
        return replace(supply, refill=supply.without_memory)

    def without_memory(self, names: Sequence[str]) -> Supply:
        """Return the supply of some tensors that all stand in its files, as if none of them were in memory."""
        return replace(self, tensors={name: replace(self.tensors[name], kept=None) for name in names})

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def reuses(self) -> bool:
        """Whether anything of it is in memory already."""
        return any(tensor.kept is not None for tensor in self.tensors.values())
