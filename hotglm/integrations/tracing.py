"""Running somebody else's tensor code on shapes alone, and writing down which expressions it computes.

Rules this module keeps:

- Tensors are on the meta device: they have a dtype and a shape and no memory, so nothing is read, copied or allocated.
- What only moves elements about (join, stack, cut, permute, reshape), or converts them, becomes an expression. What
  computes does not: its result is not known here, and `why_unknown` says which operation was the first.
- Operations are seen below Python, as torch's dispatcher gets them, so it does not matter how the code spells them.
- Only the tensors made here are recorded, whichever thread touches them. No dispatch mode: entering one sets a flag of
  the whole process, at which Dynamo, in the thread of a pass that compiles just then, gives up compiling for ever
  (tests/test_tracing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

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


class Tracer:
    """Makes tensors that remember what they are computed as; for one run of some code.

    Attributes:
        why_unknown: the first operation that is no rearrangement; None while all of them were.
    """

    def __init__(self) -> None:
        """Start with nothing unknown."""
        self.why_unknown: str | None = None
        self._is_written = False

    def make_tensor(self, expression: Expression) -> torch.Tensor:
        """Return a tensor without memory that stands for `expression`."""
        spec = expression.spec
        return _Traced(torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta"), self, expression)

    def find(self, tensor: torch.Tensor) -> Expression | None:
        """Return what `tensor` is computed as; None where that is not known."""
        # What was written to is not what it was, nor is any view of it: after that nothing is believed.
        return tensor.expression if isinstance(tensor, _Traced) and not self._is_written else None

    def run(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run one operation on the tensors' shapes; return its results, which know what they are."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_unwrap(args), **_unwrap(options))
        rule = _RULES.get(func.overloadpacket.__name__)
        self._is_written = self._is_written or func._schema.is_mutable
        operands = self._find_operands(args[0]) if rule is not None and args else None
        made = None if rule is None or operands is None else rule(_Call(operands, args, options, result))
        if made is None:
            self.why_unknown = self.why_unknown or func.name()
        if isinstance(result, torch.Tensor):
            return _Traced(result, self, made[0] if made else None)
        if not isinstance(result, (tuple, list)):
            return result
        expressions: Sequence[Expression | None] = made or [None] * len(result)
        return [
            _Traced(part, self, expression) if isinstance(part, torch.Tensor) else part
            for part, expression in zip(result, expressions, strict=True)
        ]

    def _find_operands(self, tensors: Any) -> list[Expression] | None:
        found = [self.find(tensor) for tensor in _as_list(tensors)]
        known = [expression for expression in found if expression is not None]
        return known if len(known) == len(found) else None


class _Traced(torch.Tensor):
    """A tensor without memory, with the expression that it is computed as, if that is known."""

    bare: torch.Tensor
    tracer: Tracer
    expression: Expression | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    @staticmethod
    def __new__(cls, bare: torch.Tensor, tracer: Tracer, expression: Expression | None) -> Self:
        traced: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            bare.shape,
            strides=bare.stride(),
            storage_offset=bare.storage_offset(),
            dtype=bare.dtype,
            device=bare.device,
        )
        traced.bare, traced.tracer, traced.expression = bare, tracer, expression
        return traced

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the class
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _find_tracer((*args, *(kwargs or {}).values())).run(func, args, kwargs or {})


def _find_tracer(values: Any) -> Tracer:
    for value in values:
        if isinstance(value, _Traced):
            return value.tracer
        if isinstance(value, (tuple, list)) and any(isinstance(part, _Traced) for part in value):
            return _find_tracer(value)
    raise AssertionError("torch calls this for traced tensors only")


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Traced):
        return value.bare
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap(part) for part in value)
    return {key: _unwrap(part) for key, part in value.items()} if isinstance(value, dict) else value


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
    if call.rank < 2:  # torch transposes these, too: into themselves
        return [call.operand]
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
