"""What each tensor of the new state is made of: expressions over the tensors of the old one.

Rules this module keeps:

- An expression is a value: immutable, hashable, comparable. It names tensors and never holds one; no torch here.
- Every node knows its dtype and shape, so that a whole migration is checked on headers alone.
- The functions in lower case build nodes and leave out what cancels bit for bit (a range of a joined tensor is its
  operand again). They are what operations use; the classes are for whoever evaluates. Nothing is left out that rounding
  could notice: a conversion there and back cancels only if it widens first, a factor only if it is a power of two.
- Operands are checked by the operations, which know the names to say; the functions here assume that they fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hotglm.migration.initialisers import Initialiser
from hotglm.migration.node import Expression, OfNone, OfOne
from hotglm.migration.tensor_spec import TensorSpec, is_widening

__all__ = [
    "Called",
    "Converted",
    "Expression",
    "Filled",
    "Join",
    "Narrow",
    "Padded",
    "Permuted",
    "Reshaped",
    "Same",
    "Scaled",
    "Select",
    "Source",
    "StackOf",
    "TensorSpec",
    "convert",
    "find_nodes",
    "find_sources",
    "is_power_of_two",
    "join",
    "narrow",
    "pad",
    "permute",
    "reshape",
    "same",
    "scale",
    "select",
    "stack",
]


@dataclass(frozen=True, slots=True, eq=False)
class Source(OfNone):
    """A whole tensor of the source."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Narrow(OfOne):
    """The range of `length` from `start` along `dim` (`torch.narrow`); a view."""

    operand: Expression
    dim: int
    start: int
    length: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Select(OfOne):
    """The slice number `index` along `dim`, without that dimension (`torch.select`); a view."""

    operand: Expression
    dim: int
    index: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Join(Expression):
    """The operands one after the other along `dim` (`torch.cat`)."""

    operands: tuple[Expression, ...]
    dim: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class StackOf(Expression):
    """The operands along a new dimension `dim` (`torch.stack`)."""

    operands: tuple[Expression, ...]
    dim: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Permuted(OfOne):
    """The dimensions in another order (`torch.permute`); a view."""

    operand: Expression
    dims: tuple[int, ...]
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Reshaped(OfOne):
    """The same elements in row-major order in another shape (`torch.reshape`); the shape is that of `spec`."""

    operand: Expression
    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """The new shape."""
        return self.spec.shape


@dataclass(frozen=True, slots=True, eq=False)
class Padded(OfOne):
    """With `before` and `after` further slices of `value` along `dim`."""

    operand: Expression
    dim: int
    before: int
    after: int
    value: float
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Converted(OfOne):
    """Converted to the dtype of `spec` (`Tensor.to`)."""

    operand: Expression
    spec: TensorSpec

    @property
    def dtype(self) -> str:
        """The new dtype."""
        return self.spec.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(OfOne):
    """Every element times `factor`, computed in the operand's own dtype."""

    operand: Expression
    factor: float
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Filled(OfNone):
    """A tensor that no source has, filled by `initialiser`; `name` is part of what a random one is seeded with."""

    name: str
    initialiser: Initialiser
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Same(Expression):
    """The first operand, where all operands are bitwise equal; where they are not, evaluation fails."""

    operands: tuple[Expression, ...]
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Called(Expression):
    """One output of a free function; all outputs of one call share `function` and `operands`.

    Attributes:
        function: takes a dict of tensors by `reads`, returns a dict of tensors by the names in `writes`.
        operands: the tensors it reads, in the order of `reads`.
        reads: the key that the function finds each operand under.
        writes: the key and the declared spec of every tensor that the function returns.
        index: which of `writes` this is.
        label: what to call the function in texts.
        step: the step that it belongs to, likewise; empty where it belongs to none.
    """

    function: Callable[[dict[str, Any]], Mapping[str, Any]]
    operands: tuple[Expression, ...]
    reads: tuple[str, ...]
    writes: tuple[tuple[str, TensorSpec], ...]
    index: int
    label: str
    step: str = ""

    @property
    def spec(self) -> TensorSpec:
        """The declared dtype and shape."""
        return self.writes[self.index][1]


def narrow(operand: Expression, dim: int, start: int, length: int) -> Expression:
    """Return the range of `length` from `start` along `dim`."""
    if start == 0 and length == operand.spec.shape[dim]:
        return operand
    if isinstance(operand, Narrow) and operand.dim == dim:
        return narrow(operand.operand, dim, operand.start + start, length)
    if isinstance(operand, Join) and operand.dim == dim and length:  # nothing is no operand's part
        covered = tuple(_find_covered(operand, start, length))
        return join(covered, dim) if covered else narrow(operand.operands[0], dim, 0, 0)
    if isinstance(operand, Padded) and operand.dim == dim and start >= operand.before:
        inside = start - operand.before
        if inside + length <= operand.operand.spec.shape[dim]:
            return narrow(operand.operand, dim, inside, length)
    return Narrow(operand, dim, start, length, _resized(operand.spec, dim, length))


def _find_covered(joined: Join, start: int, length: int) -> Iterator[Expression]:
    at = 0
    for operand in joined.operands:
        size = operand.spec.shape[joined.dim]
        first, last = max(start, at), min(start + length, at + size)
        if first < last:
            yield narrow(operand, joined.dim, first - at, last - first)
        at += size


def join(operands: Iterable[Expression], dim: int) -> Expression:
    """Return the operands one after the other along `dim`; neighbouring ranges of one tensor become one range."""
    parts: list[Expression] = []
    for operand in operands:
        for part in operand.operands if isinstance(operand, Join) and operand.dim == dim else (operand,):
            before = parts[-1] if parts else None
            if (
                isinstance(before, Narrow)
                and isinstance(part, Narrow)
                and before.dim == part.dim == dim
                and before.start + before.length == part.start
                and before.operand == part.operand
            ):
                parts[-1] = narrow(before.operand, dim, before.start, before.length + part.length)
            else:
                parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return Join(tuple(parts), dim, _resized(parts[0].spec, dim, sum(part.spec.shape[dim] for part in parts)))


def stack(operands: Iterable[Expression], dim: int) -> Expression:
    """Return the operands along a new dimension `dim`."""
    parts = tuple(operands)
    first = parts[0]
    if isinstance(first, Select) and first.dim == dim and first.operand.spec.shape[dim] == len(parts):
        whole = first.operand
        if all(part == Select(whole, dim, index, first.spec) for index, part in enumerate(parts)):
            return whole
    shape = first.spec.shape
    spec = TensorSpec(dtype=first.spec.dtype, shape=(*shape[:dim], len(parts), *shape[dim:]))
    return StackOf(parts, dim, spec)


def select(operand: Expression, dim: int, index: int) -> Expression:
    """Return the slice number `index` along `dim`, without that dimension."""
    if isinstance(operand, StackOf) and operand.dim == dim:
        return operand.operands[index]
    shape = operand.spec.shape
    spec = TensorSpec(dtype=operand.spec.dtype, shape=(*shape[:dim], *shape[dim + 1 :]))
    return Select(operand, dim, index, spec)


def permute(operand: Expression, dims: tuple[int, ...]) -> Expression:
    """Return the dimensions in the order `dims`."""
    while isinstance(operand, Permuted):
        dims = tuple(operand.dims[dim] for dim in dims)
        operand = operand.operand
    if dims == tuple(range(len(dims))):
        return operand
    shape = operand.spec.shape
    return Permuted(operand, dims, TensorSpec(dtype=operand.spec.dtype, shape=tuple(shape[dim] for dim in dims)))


def reshape(operand: Expression, shape: tuple[int, ...]) -> Expression:
    """Return the same elements in `shape`, which has no -1 in it."""
    while isinstance(operand, Reshaped):
        operand = operand.operand
    if operand.spec.shape == shape:
        return operand
    return Reshaped(operand, TensorSpec(dtype=operand.spec.dtype, shape=shape))


def pad(operand: Expression, dim: int, before: int, after: int, value: float) -> Expression:
    """Return it with `before` and `after` further slices of `value` along `dim`."""
    if before == after == 0:
        return operand
    if isinstance(operand, Padded) and operand.dim == dim and repr(operand.value) == repr(value):  # 0.0 == -0.0
        return pad(operand.operand, dim, operand.before + before, operand.after + after, value)
    size = operand.spec.shape[dim] + before + after
    return Padded(operand, dim, before, after, value, _resized(operand.spec, dim, size))


def convert(operand: Expression, dtype: str) -> Expression:
    """Return it converted to `dtype`."""
    if operand.spec.dtype == dtype:
        return operand
    if isinstance(operand, Converted) and is_widening(operand.operand.spec.dtype, operand.spec.dtype):
        return convert(operand.operand, dtype)  # what widened first lost nothing, so one conversion is enough
    return Converted(operand, TensorSpec(dtype=dtype, shape=operand.spec.shape))


def scale(operand: Expression, factor: float) -> Expression:
    """Return every element times `factor`; there and back by a power of two is nothing."""
    if factor == 1:
        return operand
    if isinstance(operand, Scaled) and is_power_of_two(factor) and operand.factor * factor == 1:
        return operand.operand
    return Scaled(operand, factor, operand.spec)


def same(operands: Iterable[Expression]) -> Expression:
    """Return the first operand, where all are bitwise equal."""
    distinct = tuple(dict.fromkeys(operands))
    return distinct[0] if len(distinct) == 1 else Same(distinct, distinct[0].spec)


def is_power_of_two(factor: float) -> bool:
    """Tell whether multiplying by `factor` changes exponents only.

    >>> is_power_of_two(0.125), is_power_of_two(-4), is_power_of_two(3)
    (True, True, False)
    """
    return math.isfinite(factor) and abs(math.frexp(factor)[0]) == 0.5


def find_nodes(roots: Iterable[Expression]) -> Iterator[Expression]:
    """Yield every distinct node under `roots`, each after all its operands."""
    seen: set[Expression] = set()
    stack_: list[tuple[Expression, bool]] = [(root, False) for root in roots][::-1]
    while stack_:
        node, is_ready = stack_.pop()
        if node in seen:
            continue
        if is_ready or not node.operands:
            seen.add(node)
            yield node
        else:
            stack_.append((node, True))
            stack_.extend((operand, False) for operand in reversed(node.operands))


def find_sources(*roots: Expression) -> tuple[str, ...]:
    """Return the names of the source tensors under `roots`, each once, in the order of evaluation."""
    if len(roots) == 1 and isinstance(roots[0], Source):
        return (roots[0].name,)
    return tuple(dict.fromkeys(node.name for node in find_nodes(roots) if isinstance(node, Source)))


def _resized(spec: TensorSpec, dim: int, size: int) -> TensorSpec:
    return TensorSpec(dtype=spec.dtype, shape=(*spec.shape[:dim], size, *spec.shape[dim + 1 :]))
