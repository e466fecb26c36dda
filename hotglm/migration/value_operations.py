"""Operations on one tensor at a time: its dimensions, dtype and values. Its name stays.

Rules this module keeps:

- `name` may be a pattern, so that one operation covers all layers. A dimension may be counted from the end.
- An operation is called invertible only if going there and back gives the same bits. Where that needs something that
  only the caller knows (an old shape, an old dtype, what was cut off), it has a field for it, which is verified
  where it can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.expression import Expression, convert, is_power_of_two, narrow, pad, permute, reshape, scale
from hotglm.migration.naming import NamePattern
from hotglm.migration.operation import Operation, Report, State, find_dim, verify_number, verify_whole
from hotglm.migration.tensor_spec import COMPUTABLE_DTYPES, DTYPE_NBITS, holds_value, is_widening, normalise_dim

__all__ = ["Cast", "Pad", "Permute", "Reshape", "Scale", "Slice", "Transpose"]


_LEAST, _TOO_LARGE = 2.0**-149, 2.0**128
"""Smallest factor that float32 has, and the first that it does not: it is what all smaller dtypes are computed in."""


@dataclass(frozen=True, slots=True)
class _Alter(Operation):
    """Every tensor that `name` means becomes another under the same name."""

    name: str

    def rewrite(self, state: State, report: Report) -> None:
        """Alter every tensor that `name` means."""
        for name, _ in self._find(self.name, state, report):
            altered = self._alter(state[name], name, report)
            if altered is not None:
                state[name] = altered

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Transpose(_Alter):
    """Swap two dimensions. Invertible: itself."""

    dim0: int
    dim1: int

    def __post_init__(self) -> None:
        """Refuse what is no pattern or no dimension."""
        NamePattern.parse(self.name)
        verify_whole(self, "dim0", "dim1")

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        first, second = (find_dim(dim, tensor, name, report) for dim in (self.dim0, self.dim1))
        if first is None or second is None:
            return None
        dims = list(range(len(tensor.spec.shape)))
        dims[first], dims[second] = dims[second], dims[first]
        return permute(tensor, tuple(dims))

    def _invert(self) -> Operation | str:
        return self


@dataclass(frozen=True, slots=True)
class Permute(_Alter):
    """Put the dimensions in the order `dims`, as `torch.permute` does. Invertible."""

    dims: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse what is no permutation."""
        NamePattern.parse(self.name)
        given = list(self.dims) if isinstance(self.dims, Sequence) else [None]
        dims = [normalise_dim(dim, len(given)) if type(dim) is int else None for dim in given]
        if {*dims} != {*range(len(given))}:
            raise ArgumentError(
                f"Expected every dimension once, got {shorten_repr(self.dims)}.", remedy="give a permutation."
            )
        object.__setattr__(self, "dims", tuple(dims))

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        if len(tensor.spec.shape) != len(self.dims):
            report.add(
                "NO_DIMENSION",
                f"Expected {shorten_repr(name)} to have {len(self.dims)} dimensions, got {tensor.spec}.",
                tensor=name,
            )
            return None
        return permute(tensor, tuple(self.dims))

    def _invert(self) -> Operation | str:
        return Permute(self.name, sorted(range(len(self.dims)), key=self.dims.__getitem__), optional=self.optional)


@dataclass(frozen=True, slots=True)
class Reshape(_Alter):
    """Give the elements, in row-major order, the shape `shape`. Invertible where `was` says the old one.

    Attributes:
        name: the tensor, or a pattern.
        shape: the new shape; one size may be -1, which is then what remains.
        was: the old shape, likewise; it is verified.
    """

    shape: Sequence[int]
    was: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        NamePattern.parse(self.name)
        for field_name, shape in (("shape", self.shape), ("was", self.was)):
            if shape is None and field_name == "was":
                continue
            sizes: list[object] = list(shape) if isinstance(shape, Sequence) else [None]
            if not all(type(size) is int and size >= -1 for size in sizes) or sizes.count(-1) > 1:
                raise ArgumentError(
                    f"Expected sizes of which at most one is -1, got {shorten_repr(shape)}.", remedy="give a shape."
                )
            object.__setattr__(self, field_name, tuple(sizes))

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        spec = tensor.spec
        if self.was is not None and _resolve(self.was, spec.numel) != spec.shape:
            report.add(
                "SHAPE_DIFFERS",
                f"Expected {shorten_repr(name)} to have the shape {list(self.was)}, got {spec}.",
                tensor=name,
            )
            return None
        shape = _resolve(self.shape, spec.numel)
        if shape is None:
            report.add(
                "SHAPE_DIFFERS",
                f"Expected {shorten_repr(name)} to have the elements for the shape {list(self.shape)}, got {spec}.",
                tensor=name,
            )
            return None
        return reshape(tensor, shape)

    def _invert(self) -> Operation | str:
        if self.was is None:
            return "nothing says what the shape was (give `was`)"
        return Reshape(self.name, self.was, was=self.shape, optional=self.optional)


def _resolve(shape: Sequence[int], numel: int) -> tuple[int, ...] | None:
    """Return `shape` with what remains in place of -1, or None where `numel` elements do not fill it."""
    known = math.prod(size for size in shape if size != -1)
    if -1 not in shape:
        return tuple(shape) if known == numel else None
    if known == 0 or numel % known:
        return None
    return tuple(numel // known if size == -1 else size for size in shape)


@dataclass(frozen=True, slots=True)
class Slice(_Alter):
    """Keep the range from `start` to `stop` along `dim`, which count from the end where they are negative.

    Invertible where `restore` says what was cut off: a number, which is `Pad`ded again. That it was that number is the
    caller's claim, as for a vocabulary that had been padded with zeros. Where `stop` counts from the front, or `start`
    from the end, `was` is needed too: the old size of the dimension, which is verified.
    """

    dim: int
    start: int = 0
    stop: int | None = None
    was: int | None = None
    restore: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no pattern or no number."""
        NamePattern.parse(self.name)
        verify_whole(self, "dim", "start", may_lack=("stop", "was"))
        if self.restore is not None:
            verify_number(self, "restore")

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        dim = find_dim(self.dim, tensor, name, report)
        if dim is None:
            return None
        size = tensor.spec.shape[dim]
        start, stop = self._resolve(size)
        if not 0 <= start <= stop <= size or (self.was is not None and self.was != size):
            wanted = f"of size {self.was}" if self.was is not None else f"with a range [{self.start}, {self.stop})"
            report.add(
                "SIZE_DIFFERS",
                f"Expected {shorten_repr(name)} with a dimension {dim} {wanted}, got {tensor.spec}.",
                tensor=name,
            )
            return None
        return narrow(tensor, dim, start, stop - start)

    def _resolve(self, size: int) -> tuple[int, int]:
        start = self.start + size if self.start < 0 else self.start
        stop = size if self.stop is None else self.stop + size if self.stop < 0 else self.stop
        return start, stop

    def _invert(self) -> Operation | str:
        if self.restore is None:
            return "nothing says what was cut off (give `restore`)"
        if self.was is not None:
            start, stop = self._resolve(self.was)
            before, after = start, self.was - stop
        elif self.start >= 0 and (self.stop is None or self.stop < 0):
            before, after = self.start, -(self.stop or 0)
        else:
            return "nothing says how large the dimension was (give `was`)"
        return Pad(self.name, self.dim, before=before, after=after, value=self.restore, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Pad(_Alter):
    """Put `before` and `after` further slices of `value` at the ends of `dim`. Invertible: `Slice`."""

    dim: int
    before: int = 0
    after: int = 0
    value: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative numbers of slices."""
        NamePattern.parse(self.name)
        verify_whole(self, "dim")
        verify_number(self, "value")
        if not (type(self.before) is type(self.after) is int and self.before >= 0 and self.after >= 0):
            raise ArgumentError(
                f"Expected numbers of slices to add, got {shorten_repr((self.before, self.after))}.",
                remedy="give whole numbers of 0 or more; Slice takes away.",
            )

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        if not holds_value(tensor.spec.dtype, self.value):
            report.add(
                "DTYPE_DIFFERS",
                f"Expected {shorten_repr(name)} to hold the value {self.value}, got {tensor.spec}.",
                tensor=name,
            )
        dim = find_dim(self.dim, tensor, name, report)
        return None if dim is None else pad(tensor, dim, self.before, self.after, self.value)

    def _invert(self) -> Operation | str:
        stop = -self.after if self.after else None
        return Slice(self.name, self.dim, self.before, stop, restore=self.value, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Cast(_Alter):
    """Convert to `dtype`. Invertible where `was` says the old dtype and `dtype` holds its values (NaN's payload aside).

    Attributes:
        name: the tensor, or a pattern.
        dtype: torch's name without the prefix.
        was: the old dtype; it is verified.
    """

    dtype: str
    was: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no dtype."""
        NamePattern.parse(self.name)
        for dtype in (self.dtype, self.was):
            if dtype is not None and dtype not in DTYPE_NBITS:
                raise ArgumentError(
                    f"Expected the name of a dtype, got {shorten_repr(dtype)}.",
                    remedy=f"use one of {', '.join(sorted(DTYPE_NBITS))}.",
                )

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        if self.was is not None and tensor.spec.dtype != self.was:
            report.add("DTYPE_DIFFERS", f"Expected {shorten_repr(name)} as {self.was}, got {tensor.spec}.", tensor=name)
            return None
        return convert(tensor, self.dtype)

    def _invert(self) -> Operation | str:
        if self.was is None:
            return "nothing says what the dtype was (give `was`)"
        if self.was != self.dtype and not is_widening(self.was, self.dtype):
            return f"{self.dtype} does not hold every value of {self.was} (give the step its way down)"
        return Cast(self.name, self.was, was=self.dtype, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Scale(_Alter):
    """Multiply by `factor`. Invertible where that is a power of two, which changes exponents only.

    Values that overflow, or are so small that they lose digits (below about 1e-38 in float32 and bfloat16, 6e-5 in
    float16), do not come back; weights have neither.
    """

    factor: float

    def __post_init__(self) -> None:
        """Refuse what is no factor."""
        NamePattern.parse(self.name)
        verify_number(self, "factor")
        if not math.isfinite(self.factor) or self.factor == 0:
            raise ArgumentError(
                f"Expected a finite factor other than 0, got {shorten_repr(self.factor)}.", remedy="give a number."
            )

    def _alter(self, tensor: Expression, name: str, report: Report) -> Expression | None:
        if tensor.spec.dtype not in COMPUTABLE_DTYPES:
            report.add(
                "DTYPE_DIFFERS",
                f"Expected {shorten_repr(name)} in a floating-point dtype that torch computes in, got {tensor.spec}.",
                tensor=name,
            )
            return None
        if tensor.spec.dtype not in ("float64", "complex128") and not _LEAST <= abs(self.factor) < _TOO_LARGE:
            report.add(
                "DTYPE_DIFFERS",
                f"Expected {shorten_repr(name)} in a dtype that is computed in with the factor {self.factor}, got "
                f"{tensor.spec}, which would lose every value.",
                tensor=name,
            )
        return scale(tensor, self.factor)

    def _invert(self) -> Operation | str:
        if not is_power_of_two(self.factor) or not math.isfinite(1 / self.factor):
            return f"{self.factor} is not a power of two, so dividing by it rounds (give the step its way down)"
        return Scale(self.name, 1 / self.factor, optional=self.optional)
