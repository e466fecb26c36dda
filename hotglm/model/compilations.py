"""Counts what torch compiles and records: in one thread, and in the passes of one generation.

Rules this module keeps:

- The counts are torch's own: Dynamo says when it begins to compile (`torch._dynamo.callback`, in the thread that
  compiles and under its one lock), and from torch 2.8 on also when a CUDA graph is recorded.
- Nothing is measured on the way of a pass. Who caused a compilation is found from the stack of the thread that
  compiles, which takes seconds anyway.
- `torch._dynamo.reset()` forgets whoever listens; every stage listens anew.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hotglm.model.compiled import CompiledCall, find_calls

__all__ = ["Compilations", "count_captured", "count_compiled", "counting", "forget_compiled", "listen"]

_PASS = CompiledCall.__call__.__code__


@dataclass(slots=True)
class Compilations:
    """What one thread had torch do: frames compiled, and graphs recorded."""

    num_compiled: int = 0
    num_captured: int = 0


_threads: dict[int, list[Compilations]] = {}


def listen() -> None:
    """Have Dynamo tell of every compilation from now on, if anybody has imported it; may be called again."""
    dynamo = sys.modules.get("torch._dynamo.callback")
    handler = getattr(dynamo, "callback_handler", None)
    if handler is not None and _note not in handler.start_callbacks:
        handler.register_start_callback(_note)
        CompiledCall.epoch += 1


@contextlib.contextmanager
def counting() -> Iterator[Compilations]:
    """Count in the body of a `with` what the calling thread has torch compile and record."""
    listen()
    found = Compilations()
    mine = _threads.setdefault(threading.get_ident(), [])
    mine.append(found)
    try:
        yield found
    finally:
        mine.remove(found)
        if not mine:
            _threads.pop(threading.get_ident(), None)


def count_compiled(module: nn.Module) -> int:
    """Return how often passes through the compiled parts of `module` have had something compiled."""
    return sum(call.num_compiled for _, call in find_calls(module))


def count_captured(module: nn.Module) -> int:
    """Return how often torch has recorded a device graph in passes through the compiled parts of `module`."""
    return sum(call.num_captured for _, call in find_calls(module))


def forget_compiled(calls: Iterable[CompiledCall]) -> None:
    """Begin to count anew, when warm-up is over and passes are to come."""
    for call in calls:
        call.num_compiled = call.num_captured = 0


def _note(*args: Any) -> None:
    """Take note that this thread begins to compile; older versions of torch do not say why."""
    trigger = getattr(getattr(args[0] if args else None, "callback_trigger", None), "name", "DYNAMO")
    is_capture = trigger == "CUDAGRAPH_RECORDING"
    for found in _threads.get(threading.get_ident(), ()):
        found.num_captured += is_capture
        found.num_compiled += not is_capture
    call = _find_pass()
    if call is not None and is_capture:
        call.num_captured += 1
    elif call is not None:
        call.num_compiled += 1
        call.recipe.note_compiling()


def _find_pass() -> CompiledCall | None:
    """Return the innermost compiled call on the stack of the calling thread."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _PASS:
        frame = frame.f_back  # type: ignore[assignment]  # the outermost has none
    return None if frame is None else frame.f_locals.get("self")
