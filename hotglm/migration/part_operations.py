"""Operations that cut tensors into parts and put parts together.

Rules this module keeps:

- A dimension may be counted from the end; ranks and sizes are checked on every tensor that is concerned.
- `name` may be a pattern; other names are then templates over its groups, so that one operation covers all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.expression import Expression, join, narrow, select, stack
from hotglm.migration.naming import NamePattern, NameTemplate, turn_round
from hotglm.migration.operation import Operation, Report, State, as_names, find_dim, replace_by_name, verify_whole
from hotglm.migration.tensor_spec import normalise_dim

__all__ = ["Concatenate", "Split", "Stack", "Unstack"]


@dataclass(frozen=True, slots=True)
class _Divide(Operation):
    """One tensor becomes several."""

    name: str
    into: Sequence[str]
    dim: int = 0

    def rewrite(self, state: State, report: Report) -> None:
        """Divide every tensor that `name` means."""
        pattern = NamePattern.parse(self.name)
        templates = [NameTemplate.parse(name, pattern) for name in self.into]
        for name, match in self._find(self.name, state, report):
            names = [pattern.expand(template, match) for template in templates]
            tensor = state[name]
            dim = find_dim(self.dim, tensor, name, report)
            parts = None if dim is None else self._divide(tensor, dim, name, report)
            if len(set(names)) < len(names):
                report.add("NAME_TWICE", f"Expected different tensors, got {shorten_repr(names)}.", tensor=name)
            elif parts is not None:
                replace_by_name(state, [name], dict(zip(names, parts, strict=True)), report)

    def _divide(self, tensor: Expression, dim: int, name: str, report: Report) -> list[Expression] | None:
        raise NotImplementedError

    def _turn(self) -> tuple[tuple[str, ...], str] | str:
        """Return the new names and the old one, as pattern and templates of the inverse."""
        pattern = NamePattern.parse(self.name)
        turned = turn_round(pattern, [NameTemplate.parse(name, pattern) for name in self.into], anchor=0)
        return turned if isinstance(turned, str) else ((turned.pattern, *turned.others), turned.origin)


@dataclass(frozen=True, slots=True)
class _Unite(Operation):
    """Several tensors become one."""

    names: Sequence[str]
    into: str
    dim: int = 0

    def rewrite(self, state: State, report: Report) -> None:
        """Unite every group of tensors."""
        pattern = NamePattern.parse(self.names[0])
        template = NameTemplate.parse(self.into, pattern)
        for names, match in list(self._find_groups(self.names, state, report)):
            tensors = [state[name] for name in names]
            united = self._unite(tensors, names, report)
            if united is not None:
                replace_by_name(state, names, {pattern.expand(template, match): united}, report)

    def _unite(self, tensors: list[Expression], names: Sequence[str], report: Report) -> Expression | None:
        raise NotImplementedError

    def _turn(self) -> tuple[str, tuple[str, ...]] | str:
        """Return the new name and the old ones, as pattern and templates of the inverse."""
        pattern = NamePattern.parse(self.names[0])
        templates = [NameTemplate.parse(name, pattern) for name in (*self.names[1:], self.into)]
        turned = turn_round(pattern, templates, anchor=len(templates) - 1)
        return turned if isinstance(turned, str) else (turned.pattern, (turned.origin, *turned.others))


@dataclass(frozen=True, slots=True)
class Split(_Divide):
    r"""Cut a tensor into parts along `dim`. Invertible: `Concatenate`.

    Attributes:
        name: the tensor, or a pattern.
        into: names of the parts, in order.
        dim: the dimension that is cut.
        sizes: how large the parts are, in proportion: (4096, 1024, 1024) and (4, 1, 1) say the same. None: all equal.

    >>> Split(r"(.*)\.qkv", (r"\1.q", r"\1.k", r"\1.v")).inverse()
    Concatenate(optional=False, names=('(.*)\\.q', '\\1.k', '\\1.v'), into='\\1.qkv', dim=0, sizes=None)
    """

    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that are not one positive number for each part."""
        verify_whole(self, "dim")
        pattern = NamePattern.parse(self.name)
        for name in as_names(self, "into"):
            NameTemplate.parse(name, pattern)
        _store_sizes(self, len(self.into))

    def _divide(self, tensor: Expression, dim: int, name: str, report: Report) -> list[Expression] | None:
        sizes = _reduce(self.sizes, len(self.into))
        size, total = tensor.spec.shape[dim], sum(sizes)
        if size % total:
            report.add(
                "SIZE_DIFFERS",
                f"Expected dimension {dim} of {shorten_repr(name)} to divide as {list(sizes)}, got size {size}.",
                tensor=name,
            )
            return None
        parts, start = [], 0
        for share in sizes:
            length = share * (size // total)
            parts.append(narrow(tensor, dim, start, length))
            start += length
        return parts

    def _invert(self) -> Operation | str:
        turned = self._turn()
        if isinstance(turned, str):
            return turned
        return Concatenate(*turned, dim=self.dim, sizes=self.sizes, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Concatenate(_Unite):
    """Put tensors one after the other along `dim`. Invertible: `Split`.

    Attributes:
        names: the tensors, in order; the first may be a pattern, the others are templates over its groups.
        into: name of the whole.
        dim: the dimension that grows.
        sizes: how large the parts are, in proportion, as for `Split`. None: all equal. It is verified, since going back
            cuts by it.
    """

    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that are not one positive number for each part."""
        _verify_united(self)
        _store_sizes(self, len(self.names))

    def _unite(self, tensors: list[Expression], names: Sequence[str], report: Report) -> Expression | None:
        first = tensors[0]
        dim = find_dim(self.dim, first, names[0], report)
        if dim is None:
            return None
        shapes = [(t.spec.dtype, *t.spec.shape[:dim], *t.spec.shape[dim + 1 :]) for t in tensors]
        for name, tensor, shape in zip(names, tensors, shapes, strict=True):
            if shape != shapes[0] or len(tensor.spec.shape) != len(first.spec.shape):
                report.add(
                    "SPEC_DIFFERS",
                    f"Expected {shorten_repr(name)} to fit {shorten_repr(names[0])} ({first.spec}) except in dimension "
                    f"{dim}, got {tensor.spec}.",
                    tensor=name,
                )
                return None
        lengths = [tensor.spec.shape[dim] for tensor in tensors]
        sizes = _reduce(self.sizes, len(lengths))
        if any(length * sizes[0] != lengths[0] * size for length, size in zip(lengths, sizes, strict=True)):
            report.add(
                "SIZE_DIFFERS",
                f"Expected {shorten_repr(tuple(names))} in the proportion {list(sizes)} along dimension {dim}, got "
                f"{lengths} (give sizes={tuple(lengths)}).",
                tensor=names[0],
            )
        return join(tensors, dim)

    def _invert(self) -> Operation | str:
        turned = self._turn()
        if isinstance(turned, str):
            return turned
        return Split(*turned, dim=self.dim, sizes=self.sizes, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Stack(_Unite):
    """Put tensors of equal shape along a new dimension `dim`. Invertible: `Unstack`."""

    def __post_init__(self) -> None:
        """Refuse names that are no templates of the first."""
        _verify_united(self)

    def _unite(self, tensors: list[Expression], names: Sequence[str], report: Report) -> Expression | None:
        first = tensors[0]
        differing = [name for name, tensor in zip(names, tensors, strict=True) if tensor.spec != first.spec]
        for name in differing:
            report.add(
                "SPEC_DIFFERS",
                f"Expected {shorten_repr(name)} to be {first.spec} like the others, got another.",
                tensor=name,
            )
        dim = normalise_dim(self.dim, len(first.spec.shape) + 1)
        if dim is None:
            report.add(
                "NO_DIMENSION",
                f"Expected a place for a new dimension of {shorten_repr(names[0])} ({first.spec}), got {self.dim}.",
                tensor=names[0],
            )
        return None if dim is None or differing else stack(tensors, dim)

    def _invert(self) -> Operation | str:
        turned = self._turn()
        return turned if isinstance(turned, str) else Unstack(*turned, dim=self.dim, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Unstack(_Divide):
    """Take a tensor apart along `dim`, which goes. Invertible: `Stack`."""

    def __post_init__(self) -> None:
        """Refuse names that are no templates of the pattern."""
        verify_whole(self, "dim")
        pattern = NamePattern.parse(self.name)
        for name in as_names(self, "into"):
            NameTemplate.parse(name, pattern)

    def _divide(self, tensor: Expression, dim: int, name: str, report: Report) -> list[Expression] | None:
        size = tensor.spec.shape[dim]
        if size != len(self.into):
            report.add(
                "SIZE_DIFFERS",
                f"Expected dimension {dim} of {shorten_repr(name)} to have size {len(self.into)}, got {size}.",
                tensor=name,
            )
            return None
        return [select(tensor, dim, index) for index in range(size)]

    def _invert(self) -> Operation | str:
        turned = self._turn()
        return turned if isinstance(turned, str) else Stack(*turned, dim=self.dim, optional=self.optional)


def _verify_united(operation: _Unite) -> None:
    verify_whole(operation, "dim")
    names = as_names(operation, "names")
    pattern = NamePattern.parse(names[0])
    for name in (*names[1:], operation.into):
        NameTemplate.parse(name, pattern)


def _store_sizes(operation: Split | Concatenate, num_parts: int) -> None:
    sizes = operation.sizes
    if sizes is None:
        return
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != num_parts
        or not all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ArgumentError(
            f"Expected {num_parts} positive sizes, got {shorten_repr(sizes)}.", remedy="give one size for each part."
        )
    object.__setattr__(operation, "sizes", tuple(sizes))


def _reduce(sizes: Sequence[int] | None, num_parts: int) -> tuple[int, ...]:
    if sizes is None:
        return (1,) * num_parts
    divisor = math.gcd(*sizes)
    return tuple(size // divisor for size in sizes)
