"""Calls into a live module whose weights are written in place: each is a pass, inside the gate from start to end.

Rules this module keeps: a generator or coroutine is inside for as long as it runs, not only while it is made; what is
called is otherwise what would have been called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Generator
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType, MethodType
from typing import Any

from torch import nn

from hotglm.slot.gate import Gate, Ticket

__all__ = ["Passage", "admit", "runs_module"]


class Passage:
    """A callable with a pass around each call."""

    __slots__ = ("__wrapped__", "_gate")

    def __init__(self, gate: Gate, function: Callable[..., Any]) -> None:
        """Wrap `function`."""
        self._gate = gate
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass."""
        gate = self._gate
        ticket = gate.enter()
        try:
            result = self.__wrapped__(*args, **kwargs)
            return result if type(result) not in _UNFINISHED else _stay(gate, ticket, result)
        finally:
            del ticket  # not left to the end of the frame, which the traceback of an error keeps
            if gate.closing is not None:
                gate.leave()

    def __getattr__(self, name: str) -> Any:
        """Answer as the function does."""
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        """Show what is called."""
        return f"<passage to {self.__wrapped__!r}>"


_UNFINISHED = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType})
"""What a function may return that has not run yet: one that hides what it is, behind a decorator for example."""


def _stay(gate: Gate, ticket: Ticket, result: Any) -> Any:
    """Return `result`, with the pass that it came from not ended before it has run."""
    if isinstance(result, AsyncGeneratorType):
        return _stay_in_stream(gate, ticket, result)
    if isinstance(result, CoroutineType):
        return _stay_in_coroutine(gate, ticket, result)
    return _stay_in_generator(gate, ticket, result)


def _stay_in_generator(gate: Gate, ticket: Ticket, result: Any) -> Generator[Any, Any, Any]:
    try:
        return (yield from result)
    finally:
        del ticket
        gate.leave()


async def _stay_in_coroutine(gate: Gate, ticket: Ticket, result: Any) -> Any:
    try:
        return await result
    finally:
        del ticket
        gate.leave()


async def _stay_in_stream(gate: Gate, ticket: Ticket, result: Any) -> AsyncIterator[Any]:
    try:
        async for item in result:
            yield item
    finally:
        del ticket
        gate.leave()


def runs_module(value: object) -> bool:
    """Whether a call of what a module has as an attribute runs the module: a method, compiled or partial ones too."""
    if isinstance(value, MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, functools.partial):
        return True
    return isinstance(value, FunctionType) and hasattr(value, "_torchdynamo_orig_callable")


def admit(gate: Gate, function: Callable[..., Any], *, like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return `function` with a pass around each call.

    Args:
        gate: which the passes go through.
        function: what is called.
        like: what says whether a generator or coroutine comes of it; `function` itself where None.
    """
    kind = function if like is None else like
    if inspect.isasyncgenfunction(kind):
        return functools.wraps(function)(_admit_stream(gate, function))
    if inspect.iscoroutinefunction(kind):
        return functools.wraps(function)(_admit_coroutine(gate, function))
    if inspect.isgeneratorfunction(kind):
        return functools.wraps(function)(_admit_generator(gate, function))
    return Passage(gate, function)


def _admit_generator(gate: Gate, function: Callable[..., Any]) -> Callable[..., Generator[Any, Any, Any]]:
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with gate.reading():
            return (yield from function(*args, **kwargs))

    return run


def _admit_coroutine(gate: Gate, function: Callable[..., Any]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        with gate.reading():
            return await function(*args, **kwargs)

    return run


def _admit_stream(gate: Gate, function: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    async def run(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        with gate.reading():
            async for item in function(*args, **kwargs):
                yield item

    return run
