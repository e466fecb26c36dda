"""What may be meant as a number in a setting: counts, and amounts such as times, rates and shares.

Rules this module keeps: pure; whatever it is asked about, it answers, and never raises. A truth value is no number.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

__all__ = ["is_amount", "is_count", "is_limit"]


def is_count(value: object, *, least: int = 1) -> bool:
    """Tell whether `value` is a whole number of `least` or more.

    Example:
        >>> [is_count(value) for value in (1, 0, True, 1.5, float("nan"), "1", None)]
        [True, False, False, False, False, False, False]
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_amount(value: Any) -> bool:
    """Tell whether `value` is a number of 0 or more, of the size of a `float`; infinity is one, NaN is none.

    Example:
        >>> [is_amount(value) for value in (0, 0.5, float("inf"), float("nan"), -1, True, "1", 10**400)]
        [True, True, True, False, False, False, False, False]
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and (value == math.inf or bool(0 <= value <= sys.float_info.max))


def is_limit(value: Any) -> bool:
    """Tell whether `value` is an amount above 0, or None, which limits nothing."""
    return value is None or (is_amount(value) and value > 0)
