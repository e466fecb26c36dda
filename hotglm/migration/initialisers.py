"""What a tensor that no source has is filled with.

Rules this module keeps: an initialiser is data, and says the same values on every machine every time: a random one is
seeded with a number and the name of the tensor, never with the state of a generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hotglm.errors import ArgumentError, shorten_repr

__all__ = ["Constant", "Copy", "Initialiser", "Normal", "Ones", "Zeros"]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros, or False."""


@dataclass(frozen=True, slots=True)
class Ones:
    """Ones, or True."""


@dataclass(frozen=True, slots=True)
class Constant:
    """`value` everywhere."""

    value: float

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        if not isinstance(self.value, int | float | complex):
            raise ArgumentError(f"Expected a number, got {shorten_repr(self.value)}.", remedy="give an int or float.")


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal numbers of mean 0 and standard deviation `std`, the same for the same `seed` and name of the tensor.

    They are sums of twelve uniform numbers, which differ from normal ones in the tails: none is beyond 6 `std`.
    """

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no standard deviation."""
        if not (isinstance(self.std, int | float) and math.isfinite(self.std) and self.std >= 0):
            raise ArgumentError(
                f"Expected a standard deviation of 0 or more, got {shorten_repr(self.std)}.",
                remedy="give a finite number.",
            )


@dataclass(frozen=True, slots=True)
class Copy:
    r"""The value of the tensor `name` of the same layout, at that moment (`\1` as in the pattern of `each`)."""

    name: str


Initialiser = Zeros | Ones | Constant | Normal | Copy
"""Every kind of initialiser. `Copy` becomes the expression of the copied tensor and never reaches an evaluator."""
