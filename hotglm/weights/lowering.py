"""Expressions that are nothing but ranges of bytes of their sources: pure arithmetic, no tensor.

Rules this module keeps:

- What is lowered is exact: the bytes of the expression in row-major order are the runs, one after the other.
- What is not runs of bytes is None, never an approximation; it is computed instead (`weights/evaluation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hotglm.migration.expression import Expression, Join, Narrow, Reshaped, Select, Source, StackOf

__all__ = ["ByteRun", "find_byte_runs"]


_MAX_DEPTH = 200
"""Nodes of an expression that are followed by recursion; what is deeper is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRun:
    """Consecutive bytes of one source tensor: `nbytes` from its byte `start`."""

    source: str
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.nbytes


def find_byte_runs(expression: Expression) -> tuple[ByteRun, ...] | None:
    """Return the runs of source bytes that `expression` is made of, in order, neighbours merged; None if it is not.

    Whole sources are runs, under any name and shape, and so are ranges along the outermost dimension that has more
    than one element, and whatever is joined or stacked along such a one.
    """
    runs = _lower(expression) if expression.depth <= _MAX_DEPTH else None
    return None if runs is None else tuple(_merge(runs))


def _lower(expression: Expression) -> list[ByteRun] | None:
    match expression:
        case Source(name=name, spec=spec):
            return [ByteRun(source=name, start=0, nbytes=spec.nbytes)]
        case Reshaped(operand=operand):
            return _lower(operand)
        case Join(operands=parts, dim=dim) | StackOf(operands=parts, dim=dim):
            return _lower_all(parts) if _is_outermost(expression, dim) else None
        case Narrow(operand=operand, dim=dim, start=start, length=length):
            return _cut(operand, dim=dim, start=start, length=length)
        case Select(operand=operand, dim=dim, index=index):
            return _cut(operand, dim=dim, start=index, length=1)
    return None


def _lower_all(parts: Iterable[Expression]) -> list[ByteRun] | None:
    runs: list[ByteRun] = []
    for part in parts:
        found = _lower(part)
        if found is None:
            return None
        runs += found
    return runs


def _is_outermost(expression: Expression, dim: int) -> bool:
    return math.prod(expression.spec.shape[:dim]) == 1


def _cut(operand: Expression, *, dim: int, start: int, length: int) -> list[ByteRun] | None:
    runs = _lower(operand) if _is_outermost(operand, dim) else None
    if runs is None:
        return None
    size = operand.spec.shape[dim]
    step = operand.spec.nbytes // size if size else 0
    return list(_slice(runs, start=start * step, stop=(start + length) * step))


def _slice(runs: Iterable[ByteRun], *, start: int, stop: int) -> Iterator[ByteRun]:
    at = 0
    for run in runs:
        first, last = max(start, at), min(stop, at + run.nbytes)
        if first < last:
            yield ByteRun(source=run.source, start=run.start + first - at, nbytes=last - first)
        at += run.nbytes


def _merge(runs: Iterable[ByteRun]) -> Iterator[ByteRun]:
    held: ByteRun | None = None
    for run in runs:
        if run.nbytes == 0:
            continue
        if held is not None and held.source == run.source and held.stop == run.start:
            held = ByteRun(source=run.source, start=held.start, nbytes=held.nbytes + run.nbytes)
            continue
        if held is not None:
            yield held
        held = run
    if held is not None:
        yield held
