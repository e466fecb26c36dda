"""Calls into a live module whose weights are written in place: each is a pass, inside the gate from start to end.

Rules this module keeps:

- A generator or coroutine is inside for as long as it runs, not only while it is made.
- What can wait for a commit without its thread, a coroutine, does; its event loop goes on.
- What is called is otherwise what would have been called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
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
    ticket.mark.is_call = False
    held = [ticket]

    def hand_over() -> Ticket:
        try:
            gate.extend(held[0].mark)
            return held.pop()
        finally:
            held.clear()

    async def hand_over_async() -> Ticket:
        return hand_over()

    if isinstance(result, AsyncGeneratorType):
        return _admit_stream(gate, lambda: result, enter=hand_over_async)()
    if isinstance(result, CoroutineType):
        return _admit_coroutine(gate, lambda: result, enter=hand_over_async)()
    return _admit_generator(gate, lambda: result, enter=hand_over)()


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
    what = f"pass in {getattr(kind, '__qualname__', type(kind).__name__)}"
    if inspect.isasyncgenfunction(kind):
        return functools.wraps(function)(_admit_stream(gate, function, enter=lambda: gate.enter_async(what)))
    if inspect.iscoroutinefunction(kind):
        return functools.wraps(function)(_admit_coroutine(gate, function, enter=lambda: gate.enter_async(what)))
    if inspect.isgeneratorfunction(kind):
        return functools.wraps(function)(_admit_generator(gate, function, enter=lambda: gate.enter_extended(what)))
    return Passage(gate, function)


def _admit_generator(
    gate: Gate, function: Callable[..., Any], *, enter: Callable[[], Ticket]
) -> Callable[..., Generator[Any, Any, Any]]:
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        ticket = enter()
        try:
            return (yield from function(*args, **kwargs))
        finally:
            del ticket  # not left to the end of the frame, which the traceback of an error keeps
            gate.leave()

    return run


def _admit_coroutine(
    gate: Gate, function: Callable[..., Any], *, enter: Callable[[], Awaitable[Ticket]]
) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        ticket = await enter()
        try:
            return await function(*args, **kwargs)
        finally:
            del ticket
            gate.leave()

    return run


def _admit_stream(
    gate: Gate, function: Callable[..., Any], *, enter: Callable[[], Awaitable[Ticket]]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        ticket = await enter()
        try:
            async with contextlib.aclosing(function(*args, **kwargs)) as stream:  # its `finally` runs the module, too
                step = stream.asend(None)
                while True:  # as `yield from` does with a generator
                    try:
                        item = await step
                    except StopAsyncIteration:
                        return
                    try:
                        step = stream.asend((yield item))
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 - whatever is thrown in is for the stream to take
                        step = stream.athrow(error)
                    gate.extend(ticket.mark)  # the next step may be another task's
        finally:
            del ticket
            gate.leave()

    return run
