"""Dtype and shape of a tensor, as far as migrations need to know dtypes.

Rules this module keeps: dtypes are torch's names without the prefix; a conversion is widening only if every value
of the one dtype, NaN's payload aside, comes back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.header import DTYPES

__all__ = ["COMPUTABLE_DTYPES", "DTYPE_NBITS", "TensorSpec", "holds_value", "is_widening", "normalise_dim"]

DTYPE_NBITS: Mapping[str, int] = MappingProxyType(
    {info.torch_name: info.nbits for info in DTYPES.values() if info.torch_name} | {"complex128": 128}
)
"""Size of one element of each dtype, in bits."""

_INTEGERS = {
    "bool": (0, 1),
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
}
_SIGNIFICAND_NBITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
_LARGEST = {
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
    "float16": 65504.0,
    "bfloat16": 2.0**128 - 2.0**120,
    "float32": 2.0**128 - 2.0**104,
    "complex64": 2.0**128 - 2.0**104,
}
COMPUTABLE_DTYPES = frozenset({*_SIGNIFICAND_NBITS, "complex64", "complex128"})
"""Dtypes in which torch multiplies on every device."""
_FLOAT_WIDENINGS = {
    "float8_e4m3fn": {"float16", "bfloat16", "float32", "float64"},
    "float8_e5m2": {"float16", "bfloat16", "float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float16": {"float32", "float64"},
    "float32": {"float64"},
    "complex64": {"complex128"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Dtype and shape of one tensor.

    Attributes:
        dtype: torch's name without the prefix, e.g. `"bfloat16"`.
        shape: sizes of its dimensions; `()` for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Store the shape as a tuple, whatever sequence it is given as."""
        if type(self.shape) is not tuple:
            object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its elements, in bytes.

        Raises:
            ArgumentError: nobody knows how large an element of that dtype is.
        """
        nbits = DTYPE_NBITS.get(self.dtype)
        if nbits is None:
            raise ArgumentError(
                f"Expected a dtype of known size, got {shorten_repr(self.dtype)}.",
                remedy=f"use one of {', '.join(sorted(DTYPE_NBITS))}.",
            )
        return self.numel * nbits // 8

    def __str__(self) -> str:
        """Format as `float32 [3, 4]`."""
        return f"{self.dtype} {list(self.shape)}"


def holds_value(dtype: str, value: complex) -> bool:
    """Tell whether `dtype` has something for `value`: that whole number, or one that is rounded but not infinite.

    >>> holds_value("uint8", 300), holds_value("int64", 1.5), holds_value("float16", 0.1), holds_value("float16", 1e6)
    (False, False, True, False)
    """
    if isinstance(value, complex):
        return dtype.startswith("complex")
    if dtype in _INTEGERS:
        low, high = _INTEGERS[dtype]
        return low <= value <= high and value == int(value)
    return not math.isfinite(value) or abs(value) <= _LARGEST.get(dtype, math.inf)


def is_widening(narrow: str, wide: str) -> bool:
    """Tell whether every value of `narrow` survives the way to `wide` and back, NaN's payload aside.

    >>> is_widening("bfloat16", "float32"), is_widening("bfloat16", "float16"), is_widening("int32", "float32")
    (True, False, False)
    """
    if narrow in _INTEGERS:
        low, high = _INTEGERS[narrow]
        if wide in _INTEGERS:
            return wide != narrow and _INTEGERS[wide][0] <= low and high <= _INTEGERS[wide][1]
        return wide in _SIGNIFICAND_NBITS and max(-low, high) <= 1 << _SIGNIFICAND_NBITS[wide]
    return wide in _FLOAT_WIDENINGS.get(narrow, ())


def normalise_dim(dim: int, rank: int) -> int | None:
    """Return `dim` counted from the front, or None where a tensor of `rank` dimensions has none such."""
    return dim % rank if -rank <= dim < rank else None
