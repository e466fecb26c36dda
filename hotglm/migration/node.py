"""What all expressions have in common: they are values, and comparing or hashing one costs the same however deep it is.

Rules this module keeps: hash and depth are worked out once, when a node is made, from those of its operands. Worked out
anew each time, they would take time exponential in the length of a chain of steps whose functions each read what the
last one wrote, and recurse as deep as the chain is long.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hotglm.migration.tensor_spec import TensorSpec

__all__ = ["Expression", "OfNone", "OfOne"]


class Expression:
    """One tensor of a new state; the classes of `expression.py` are all there are.

    Attributes:
        spec: its dtype and shape.
        operands: the expressions that it is made of; empty for a source and for what an initialiser fills.
        depth: how many nodes the longest way down to a leaf has, itself included.
    """

    __slots__ = ("_hash", "depth")
    __match_args__: tuple[str, ...] = ()
    _hash: int
    depth: int

    if TYPE_CHECKING:  # a real property here would be taken for the default of the fields that replace it

        @property
        def spec(self) -> TensorSpec:
            """Its dtype and shape."""

        @property
        def operands(self) -> tuple[Expression, ...]:
            """The expressions that it is made of."""

    def __post_init__(self) -> None:
        """Work out what the operands know of themselves already."""
        depth = 0
        for operand in self.operands:
            depth = max(depth, operand.depth)
        object.__setattr__(self, "depth", depth + 1)
        kind: Any = type(self)  # mypy takes the hash of its objects for its own
        object.__setattr__(self, "_hash", hash(_getter(kind)(self)))

    def _fields(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)

    def __eq__(self, other: object) -> bool:
        """Compare class and fields."""
        if self is other:
            return True
        if type(self) is not type(other) or not isinstance(other, Expression) or self._hash != other._hash:
            return False
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        """Return what was worked out when it was made."""
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the fields alone: hashes of texts differ from process to process."""
        return (type(self), self._fields())


@functools.cache
def _getter(kind: type[Expression]) -> Callable[[Expression], object]:
    """Return what tells the fields of a node that its hash is made of; the spec nearly always follows from these."""
    return operator.attrgetter(*(name for name in kind.__match_args__ if name != "spec"))


class OfNone(Expression):
    """An expression that is made of no other."""

    __slots__ = ()

    @property
    def operands(self) -> tuple[Expression, ...]:
        """Nothing."""
        return ()


class OfOne(Expression):
    """An expression that is made of one other."""

    __slots__ = ()
    operand: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The one operand."""
        return (self.operand,)
