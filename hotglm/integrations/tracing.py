"""Running somebody else's tensor code on shapes alone, and writing down which expressions it computes.

Rules this module keeps:

- Tensors are on the meta device: they have a dtype and a shape and no memory, so nothing is read, copied or allocated.
- What only moves elements about (join, stack, cut, permute, reshape), or converts them, becomes an expression. What
  computes does not: its result is not known here, and `why_unknown` says which operation was the first.
- Operations are seen below Python, as torch's dispatcher gets them, so it does not matter how the code spells them.
  They are recorded in the calling thread only; other threads' tensors are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hotglm.migration.expression import (
    Expression,
    StackOf,
    convert,
    join,
    narrow,
    permute,
    reshape,
    select,
    stack,
)
from hotglm.weights.dtypes import TORCH_DTYPES, dtype_name

__all__ = ["Tracer"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its mode's constructors untyped
    """A mode under which operations on meta tensors are recorded; for one thread and one use."""

    def __init__(self) -> None:
        """Start with no tensor known."""
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.why_unknown: str | None = None
        self._known: dict[int, tuple[torch.Tensor, Expression]] = {}  # the tensor too, so that its id stays its own

    def make_tensor(self, expression: Expression) -> torch.Tensor:
        """Return a meta tensor that stands for `expression`; to be called outside the mode."""
        tensor = torch.empty(expression.spec.shape, dtype=TORCH_DTYPES[expression.spec.dtype], device="meta")
        self._known[id(tensor)] = (tensor, expression)
        return tensor

    def find(self, tensor: torch.Tensor) -> Expression | None:
        """Return what `tensor` is computed as, None where that is not known."""
        found = self._known.get(id(tensor))
        return None if found is None else found[1]

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation on the meta tensors, and write down what it makes of what is known."""
        options = dict(kwargs or {})
        result = func(*args, **options)
        rule = None if func._schema.is_mutable else _RULES.get(func.overloadpacket.__name__)
        operands = self._find_operands(args[0]) if rule is not None and args else None
        made = None if rule is None or operands is None else rule(_Call(operands, args, options, result))
        if made is None:
            self.why_unknown = self.why_unknown or func.name()
            for argument in args:  # whatever it wrote to is not what it was
                self._known.pop(id(argument), None)
            return result
        for tensor, expression in zip(_as_list(result), made, strict=True):
            self._known[id(tensor)] = (tensor, expression)
        return result

    def _find_operands(self, tensors: Any) -> list[Expression] | None:
        found = [self.find(tensor) for tensor in _as_list(tensors)]
        known = [expression for expression in found if expression is not None]
        return known if len(known) == len(found) else None


def _as_list(tensors: Any) -> list[torch.Tensor]:
    return list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]


@dataclass(frozen=True, slots=True)
class _Call:
    """One operation: what its first argument is, all arguments, and its result."""

    operands: Sequence[Expression]
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    result: Any

    @property
    def operand(self) -> Expression:
        return self.operands[0]

    @property
    def rank(self) -> int:
        return len(self.operand.spec.shape)

    def get(self, at: int, name: str, default: Any = None) -> Any:
        return self.args[at] if len(self.args) > at else self.options.get(name, default)

    def get_dim(self, at: int, name: str = "dim", default: int = 0) -> int:
        dim: int = self.get(at, name, default)
        return dim % max(1, self.rank)


def _join(call: _Call) -> list[Expression] | None:
    # torch leaves out empty tensors of one dimension, whatever the others are: nobody needs that here
    ranks = {len(operand.spec.shape) for operand in call.operands}
    return [_join_inside(call.operands, call.get_dim(1))] if len(ranks) == 1 else None


def _join_inside(operands: Sequence[Expression], dim: int) -> Expression:
    """Return stacks of tensors joined beside their stacked dimension as a stack of joined tensors, which is the same.

    The gate and up projections of experts are such stacks: said this way round, the result is whole source tensors one
    after the other, which are read to where they stay and need no memory in between.
    """
    first = operands[0]
    stacks = [part for part in operands if isinstance(part, StackOf) and isinstance(first, StackOf)]
    same = {(part.dim, len(part.operands)) for part in stacks}
    if len(stacks) < len(operands) or len(same) > 1 or stacks[0].dim == dim:
        return join(operands, dim)
    inner = dim - (dim > stacks[0].dim)
    return stack([join(parts, inner) for parts in zip(*(part.operands for part in stacks), strict=True)], stacks[0].dim)


def _stack(call: _Call) -> list[Expression]:
    return [stack(call.operands, call.get(1, "dim", 0) % (call.rank + 1))]


def _split(call: _Call) -> list[Expression]:
    dim = call.get_dim(2)
    made, start = [], 0
    for part in call.result:
        made.append(narrow(call.operand, dim, start, part.shape[dim]))
        start += part.shape[dim]
    return made


def _slice(call: _Call) -> list[Expression] | None:
    dim, size = call.get_dim(1), call.operand.spec.shape[call.get_dim(1)]
    start = call.get(2, "start") or 0
    if call.get(4, "step", 1) != 1:
        return None
    start = min(max(start + size if start < 0 else start, 0), size)
    return [narrow(call.operand, dim, start, call.result.shape[dim])]


def _select(call: _Call) -> list[Expression]:
    dim = call.get_dim(1)
    return [select(call.operand, dim, call.get(2, "index") % call.operand.spec.shape[dim])]


def _unbind(call: _Call) -> list[Expression]:
    return [select(call.operand, call.get_dim(1), index) for index in range(len(call.result))]


def _permute(call: _Call) -> list[Expression]:
    return [permute(call.operand, tuple(dim % call.rank for dim in call.get(1, "dims")))]


def _transpose(call: _Call) -> list[Expression]:
    order = list(range(call.rank))
    one, other = call.get_dim(1, "dim0", 0), call.get_dim(2, "dim1", 1)
    order[one], order[other] = order[other], order[one]
    return [permute(call.operand, tuple(order))]


def _reshape(call: _Call) -> list[Expression] | None:
    if dtype_name(call.result.dtype) != call.operand.spec.dtype:
        return None  # `view(dtype)` gives the same bytes another meaning
    return [reshape(call.operand, tuple(call.result.shape))]


def _copy(call: _Call) -> list[Expression]:
    return [convert(call.operand, dtype_name(call.result.dtype))]


_RULES: Mapping[str, Callable[[_Call], list[Expression] | None]] = {
    "cat": _join,
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "permute": _permute,
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("clone", "alias", "detach", "_to_copy"), _copy),
}
