"""What leads where between Python objects, for the structural copy of a module.

Rules this module keeps: objects are only looked at; every walk is bounded.
"""

from __future__ import annotations

import gc
import inspect
import threading
import types
from collections.abc import Callable, Iterator

__all__ = ["copies_itself", "find_captured", "iterate_items", "reaches"]


def iterate_items(value: object, *, depth: int = 4) -> Iterator[object]:
    """Yield `value` itself and, where it is a plain container, what is in it, down to `depth` containers."""
    yield value
    if depth and isinstance(value, (dict, list, tuple, set)):
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from iterate_items(item, depth=depth - 1)


def copies_itself(value: object) -> bool:
    """Whether a hook knows how to follow its module into a copy (torch's own wrapper of a hook and its module does)."""
    return "__getstate__" in vars(type(value)) or hasattr(value, "__deepcopy__")


def find_captured(function: object, *, depth: int = 4) -> Iterator[object]:
    """Yield what a function brings along: the contents of its closure, functions in it included, and its defaults."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell: a name that was never bound
            continue
        yield content
        if inspect.isfunction(content) and depth:
            yield from find_captured(content, depth=depth - 1)
    yield from getattr(function, "__defaults__", None) or ()
    yield from (getattr(function, "__kwdefaults__", None) or {}).values()


def reaches(value: object, wanted: Callable[[object], bool], *, limit: int = 2000) -> bool:
    """Whether one of the first `limit` objects reachable from `value` is wanted."""
    seen: set[int] = set()
    todo: list[object] = [value]
    while todo and len(seen) < limit:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, types.FrameType, threading.Thread)):
            continue
        seen.add(id(item))
        if wanted(item):
            return True
        # Not a function's globals: they lead to everything its file has imported or made.
        todo.extend(find_captured(item) if inspect.isfunction(item) else gc.get_referents(item))
    return False
