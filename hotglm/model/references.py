"""What leads where between Python objects, for the structural copy of a module.

Rules this module keeps: objects are only looked at; every walk is bounded.
"""

from __future__ import annotations

import collections
import functools
import gc
import inspect
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import nn

__all__ = [
    "copies_itself",
    "find_captured",
    "has_plain_state",
    "is_array",
    "is_inert",
    "iterate_items",
    "name_tensor",
    "reaches",
    "why_uncopyable",
]


_IGNORED = (type, types.ModuleType, types.FrameType, threading.Thread, logging.Logger)
"""What leads to the rest of the process."""

_WEAK_CONTAINERS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


def is_array(value: object) -> TypeGuard[Any]:
    """Whether `value` is a numpy array of numbers; does not import numpy."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return type(value).__module__ == "numpy" and hasattr(value, "__array_interface__") and kind in "biufc"


_ATOMS = frozenset({bool, int, float, complex, str, bytes, types.NoneType, torch.dtype})
_CONTAINERS = frozenset({dict, collections.OrderedDict, list, set})


def is_inert(value: object) -> bool:
    """Whether `value` leads nowhere: a plain immutable value, or a plain container with nothing in it."""
    kind = type(value)
    return kind in _ATOMS or (kind in _CONTAINERS and not value)


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


def has_plain_state(cls: type[nn.Module]) -> bool:
    """Whether an instance of `cls` is its `__dict__` and nothing else, to be copied attribute by attribute."""
    plain = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__slots__")
    for base in cls.__mro__:
        if base is nn.Module:
            return True
        if any(name in vars(base) for name in plain):
            return False
    return False


def reaches(value: object, wanted: Callable[[object], bool], *, limit: int = 2000) -> bool:
    """Whether one of the first `limit` objects reachable from `value` is wanted."""
    seen: set[int] = set()
    todo: list[object] = [value]
    while todo and len(seen) < limit:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _IGNORED) or hasattr(type(item), "__hotglm_slot__"):
            continue  # a slot, too, has nothing to do with one version
        seen.add(id(item))
        if wanted(item):
            return True
        # Not a function's globals: they lead to everything its file has imported or made.
        todo.extend(find_captured(item) if inspect.isfunction(item) else gc.get_referents(item))
    return False


def name_tensor(path: str, owner: nn.Module, tensor: torch.Tensor) -> str:
    """Return the full name of the attribute of `owner`, at `path`, that is or holds `tensor`."""
    prefix = f"{path}." if path else ""
    for name, value in list(vars(owner).items()):
        if value is tensor:
            return prefix + name
    for name, value in list(vars(owner).items()):
        if name not in ("_modules", "_parameters", "_buffers") and reaches(value, lambda item: item is tensor):
            return f"{prefix}{name}"
    return f"{prefix}<inside {type(owner).__name__}>"


def why_uncopyable(item: object, is_inside: Callable[[object], bool]) -> str | None:
    """Return what keeps `item` from following its module into a copy; `is_inside` knows the module's parts."""
    if isinstance(item, (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptMethod)):
        return "it is TorchScript, whose tensors are fixed"
    if isinstance(item, _WEAK_CONTAINERS) and any(map(is_inside, [*item, *getattr(item, "values", list)()])):
        return f"a {type(item).__name__} goes on referring to the parts of the module it was made for"
    if isinstance(item, functools._lru_cache_wrapper) and reaches(item, is_inside):
        return "its cache is bound to this module and would be shared by all versions"
    return None
