"""Computing the expressions of a migration: source tensors in, one tensor of the new layout written where it goes.

Rules this module keeps:

- The destination is handed down: parts of a join are written into their ranges of it, so that nothing is put together
  elsewhere first. Only what an operation has to have whole stands in memory of its own.
- Nothing here writes an operand. A free function that does is refused, with its name, where torch counts the write: one
  by way of numpy or `.data` goes unseen, and is against what `Apply` asks of it.
- The same expression over the same bytes gives the same bytes, whatever the destination is: on disk or in an arena.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from hotglm.errors import MigrationStepError, Problem, TensorValueError, shorten_repr
from hotglm.migration.expression import (
    Called,
    Converted,
    Expression,
    Filled,
    Join,
    Narrow,
    Padded,
    Permuted,
    Reshaped,
    Same,
    Scaled,
    Select,
    Source,
    StackOf,
    find_nodes,
)
from hotglm.migration.initialisers import Constant, Normal, Ones, Zeros
from hotglm.problem import describe_exception
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.dtypes import TORCH_DTYPES, dtype_name
from hotglm.weights.scratch import Workspace, align

__all__ = ["Evaluation", "count_room", "has_call"]

_NATIVE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Floating-point dtypes that torch multiplies on the CPU; others are multiplied as float32, which holds them."""

_DRAWN_NUMEL = 1 << 18
"""Random numbers that are drawn at a time; each is made of 24 bytes."""

_MAX_DEPTH = 50
"""Nodes of an expression that are computed by recursion; each takes up to four of Python's frames, of about 1000."""


class Evaluation:
    """The expressions over one set of source tensors; in one thread."""

    def __init__(self, operands: Mapping[str, torch.Tensor], *, work: Workspace) -> None:
        """Take the operands.

        Args:
            operands: the source tensors by name: on the CPU, without gradient, not to be written.
            work: memory for what is computed on the way, of `count_room` bytes.
        """
        self._operands = operands
        self._work = work
        self._called: dict[object, Mapping[str, torch.Tensor]] = {}
        self._deep: dict[Expression, torch.Tensor] = {}

    def write(self, expression: Expression, view: torch.Tensor) -> None:
        """Write the value of `expression` to `view`, which has its shape; another dtype is converted at the end.

        Raises:
            MigrationStepError: a free function failed, or returned something else than it declared.
            TensorValueError: tensors that must be equal to be tied are not; both are named.
        """
        mark = self._work.mark()
        with torch.no_grad():
            self._compute_deep(expression)
            self._write(expression, view)
        if not self._called:  # what a function returned may be a view of what it was given
            self._work.reset(mark)

    def compute(self, expression: Expression) -> torch.Tensor:
        """Return the value of `expression`, which may be a view of an operand; errors are those of `write`."""
        with torch.no_grad():
            self._compute_deep(expression)
            return self._value(expression)

    def _compute_deep(self, expression: Expression) -> None:
        """Compute what lies deep inside first, so that Python does not recurse as far as a chain of steps is long."""
        self._deep.clear()  # what stood in the workspace for the output before may be written over by now
        for node in find_nodes([expression]) if expression.depth > _MAX_DEPTH else ():
            if node is not expression and node.depth % _MAX_DEPTH == 0:
                self._deep[node] = self._value(node)

    def _write(self, expression: Expression, view: torch.Tensor) -> None:
        match expression:
            case _ if expression in self._deep:
                view.copy_(self._deep[expression])
            case Join(operands=parts, dim=dim):
                start = 0
                for part in parts:
                    length = part.spec.shape[dim]
                    self._write(part, view.narrow(dim, start, length))
                    start += length
            case StackOf(operands=parts, dim=dim):
                for index, part in enumerate(parts):
                    self._write(part, view.select(dim, index))
            case Permuted(operand=operand, dims=dims):
                self._write(operand, view.permute(sorted(range(len(dims)), key=dims.__getitem__)))
            case Reshaped(operand=operand) if view.is_contiguous():
                self._write(operand, view.view(operand.spec.shape))
            case Padded(operand=operand, dim=dim, before=before, after=after, value=value) if _is_of_dtype(
                view, expression
            ):
                length = operand.spec.shape[dim]
                view.narrow(dim, 0, before).fill_(value)
                view.narrow(dim, before + length, after).fill_(value)
                self._write(operand, view.narrow(dim, before, length))
            case _:
                self._write_leaf(expression, view)

    def _write_leaf(self, expression: Expression, view: torch.Tensor) -> None:
        if not _is_of_dtype(view, expression):  # computed in its own dtype, so that every path to it rounds alike
            view.copy_(self._value(expression))
            return
        match expression:
            case Scaled(operand=operand, factor=factor):
                _multiply(self._value(operand), factor, view)
            case Converted(operand=operand):
                view.copy_(self._value(operand))
            case Filled():
                _fill(expression, view)
            case _:
                view.copy_(self._value(expression))

    def _value(self, expression: Expression) -> torch.Tensor:
        """Return the value of `expression`: a view of an operand where there is one, else memory of its own."""
        if expression in self._deep:
            return self._deep[expression]
        value = self._find_value(expression)
        if value is None:
            value = self._work.take(TORCH_DTYPES[expression.spec.dtype], expression.spec.shape)
            self._write(expression, value)
        return value

    def _find_value(self, expression: Expression) -> torch.Tensor | None:
        match expression:
            case Source(name=name):
                return self._operands[name]
            case Same(operands=operands):
                return self._find_same(operands)
            case Called(writes=writes, index=index):
                return self._call(expression)[writes[index][0]]
            case Narrow() | Select() | Permuted():
                return _look_at(expression, self._value(expression.operand))
            case Reshaped(operand=operand, shape=shape):
                return self._reshape(self._value(operand), shape)
        return None

    def _reshape(self, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if not value.is_contiguous():
            value = self._work.take(value.dtype, value.shape).copy_(value)
        return value.view(shape)

    def _find_same(self, operands: tuple[Expression, ...]) -> torch.Tensor:
        first, *others = [self._value(operand) for operand in operands]
        problems = [
            Problem(
                code="TIE_CONFLICT",
                message=f"Expected the values of {_describe(operands[0])}, with which it is to be tied, got others",
                tensor=_find_name(expression),
                expected=_find_name(operands[0]),
            )
            for expression, other in zip(operands[1:], others, strict=True)
            if not torch.equal(tensor_bytes(first), tensor_bytes(other))
        ]
        if problems:
            raise TensorValueError(
                "Expected equal tensors to tie, got different ones.",
                problems=problems,
                remedy="keep them untied, or make them equal before they are saved.",
            )
        return first

    def _call(self, call: Called) -> Mapping[str, torch.Tensor]:
        """Return what the free function of a call returned; it is called once for all of its outputs."""
        key = (call.function, call.operands, call.reads, call.writes)
        found = self._called.get(key)
        if found is None:
            given = dict(zip(call.reads, map(self._value, call.operands), strict=True))
            found = self._called[key] = _run_function(call, given, call.step)
        return found


def count_room(outputs: Iterable[Expression], *, has_calls: bool) -> int:
    """Return the workspace that writing `outputs` takes, beside their operands.

    One output after the other, and the most that one needs: every inner expression that is no view of its operand.
    With free functions all of them stay until the last output is written.
    """
    rooms = [
        sum(align(node.spec.nbytes) for node in find_nodes([root]) if _is_computed(node, root)) for root in outputs
    ]
    return sum(rooms) if has_calls else max(rooms, default=0)


def _is_computed(node: Expression, root: Expression) -> bool:
    return node is not root and not isinstance(node, Source | Narrow | Select | Permuted | Same | Called)


def has_call(expression: Expression) -> bool:
    """Tell whether a free function is part of `expression`."""
    return any(isinstance(node, Called) for node in find_nodes([expression]))


def _look_at(expression: Narrow | Select | Permuted, value: torch.Tensor) -> torch.Tensor:
    match expression:
        case Narrow(dim=dim, start=start, length=length):
            return value.narrow(dim, start, length)
        case Select(dim=dim, index=index):
            return value.select(dim, index)
        case Permuted(dims=dims):
            return value.permute(dims)


def _multiply(value: torch.Tensor, factor: float, view: torch.Tensor) -> None:
    if value.is_complex():  # number by number: torch would multiply by a complex one, and lose the signs of zeros
        torch.mul(torch.view_as_real(value), factor, out=torch.view_as_real(view))
    elif value.dtype in _NATIVE:
        torch.mul(value, factor, out=view)
    elif value.is_floating_point():
        view.copy_(value.to(torch.float32) * factor)
    else:
        torch.mul(value, int(factor), out=view)


def _fill(expression: Filled, view: torch.Tensor) -> None:
    match expression.initialiser:
        case Zeros():
            view.fill_(0)
        case Ones():
            view.fill_(1)
        case Constant(value=value):
            view.fill_(value)
        case Normal(std=std, seed=seed):
            _draw(expression, view, std=std, seed=seed)


def _draw(expression: Filled, view: torch.Tensor, *, std: float, seed: int) -> None:
    """Write sums of twelve uniform numbers, in row-major order: bit for bit the same wherever they go.

    Not torch's `normal_`, whose last digits depend on the vector instructions of the CPU. Twelve uniform numbers of
    16 bits have a variance of 2**32, and whole numbers and powers of two are exact everywhere.
    """
    key = hashlib.sha256(f"{seed}\0{expression.name}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    flat = view.view(-1) if view.is_contiguous() else torch.empty(view.numel())
    for start in range(0, flat.numel(), _DRAWN_NUMEL):
        part = flat[start : start + _DRAWN_NUMEL]
        drawn = torch.empty(part.numel(), 3, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        sums = drawn.view(torch.int16).to(torch.float32).sum(dim=1)  # below 2**24, and so exact
        part.copy_((sums + 6) / 65536 * std)
    if not view.is_contiguous():
        view.copy_(flat.view(view.shape))


def _is_of_dtype(view: torch.Tensor, expression: Expression) -> bool:
    return dtype_name(view.dtype) == expression.spec.dtype


# -- free functions ----------------------------------------------------------------------------------------------------


def _run_function(call: Called, given: dict[str, torch.Tensor], step: str | None) -> Mapping[str, torch.Tensor]:
    versions = {name: _count_writes(tensor) for name, tensor in given.items()}
    try:
        found = call.function(dict(given))
        found = dict(found) if isinstance(found, Mapping) else found  # whatever kind of mapping it is: read once
    except Exception as error:
        raise _step_error(call, step, f"it raised {describe_exception(error)}", list(call.reads)) from error
    if written := [name for name, tensor in given.items() if _count_writes(tensor) != versions[name]]:
        raise _step_error(call, step, "it wrote what it was given", written)
    if not isinstance(found, Mapping):
        raise _step_error(
            call, step, f"it returned {shorten_repr(type(found).__name__)} and no mapping", _find_writes(call)
        )
    wrong = {name: why for name, spec in call.writes if (why := _why_wrong(found.get(name), spec.dtype, spec.shape))}
    wrong |= {str(name): "a tensor that it did not declare" for name in found if name not in _find_writes(call)}
    if wrong:
        said = "; ".join(f"{why} as {shorten_repr(name)}" for name, why in wrong.items())
        raise _step_error(call, step, f"it returned {said}", list(wrong))
    return found


def _count_writes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what was made in inference mode is not counted by torch


def _find_writes(call: Called) -> list[str]:
    return [name for name, _ in call.writes]


def _why_wrong(tensor: object, dtype: str, shape: tuple[int, ...]) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return "nothing" if tensor is None else shorten_repr(type(tensor).__name__)
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return f"a {tensor.layout} tensor on {tensor.device.type}"
    if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (dtype, shape):
        found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        return f"{found} in place of the declared {dtype} {list(shape)}"
    return None


def _step_error(call: Called, step: str | None, what: str, names: list[str]) -> MigrationStepError:
    problems = [
        Problem(code="MIGRATION_STEP", message=f"Expected {call.label} to run, got this: {what}", tensor=name)
        for name in names
    ]
    where = f" in the step {step}" if step is not None else ""
    error = MigrationStepError(
        f"Expected {call.label}{where} to give the tensors that it declares, but {what}.",
        problems=problems,
        remedy="correct the function of that step; nothing has used these weights.",
    )
    error.step, error.operation = step, call.label
    return error


def _find_name(expression: Expression) -> str | None:
    return next((node.name for node in find_nodes([expression]) if isinstance(node, Source | Filled)), None)


def _describe(expression: Expression) -> str:
    return f"tensor {shorten_repr(_find_name(expression))}"
