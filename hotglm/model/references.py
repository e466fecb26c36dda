"""What leads where between Python objects, for the structural copy of a module.

Rules this module keeps:

- Objects are only looked at. What leads to the rest of the process (imported modules, globals, threads) is not
  followed; nor are slots, which have nothing to do with one version.
- A walk that has met `MAX_OBJECTS` objects ends with an error. It never answers that something is not there.

[Note: what is followed]
`gc.get_referents` knows what an object of any kind holds: attributes, slots, items of containers of any class, the
factory of a defaultdict, arguments of partials, caches. Functions are followed into closures, defaults and attributes;
classes made inside functions into what they hold, because they may close over anything; arrays of objects into these.
Plain numbers and strings are neither followed nor counted, nor is what holds only such, so vocabularies are cheap.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn

from hotglm.weights.workers import yield_gil_when_due

__all__ = [
    "CAPTURED",
    "CONTAINERS",
    "MAX_OBJECTS",
    "PACKAGE",
    "SCRIPT",
    "TooManyObjectsError",
    "copies_itself",
    "describes_quantised",
    "has_plain_state",
    "holds",
    "is_a",
    "is_array",
    "is_fake",
    "is_graph",
    "is_inert",
    "is_local_class",
    "is_slot",
    "leads_nowhere",
    "reaches",
    "turn_reference",
    "walk",
    "why_uncopyable",
]

MAX_OBJECTS = 500_000
"""How many objects that lead on one walk may meet."""

_PROCESS = (types.ModuleType, types.FrameType, types.CodeType, threading.Thread, logging.Logger)
"""What leads to the rest of the process."""

_WEAK_CONTAINERS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_SCRIPTS = (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptMethod)
_PACKAGES = tuple(
    kind
    for name in ("AOTIModelPackageLoader", "AOTIModelContainerRunner", "AOTIModelContainerRunnerCpu")
    if isinstance(kind := getattr(getattr(torch._C, "_aoti", None), name, None), type)
)
SCRIPT = "it is TorchScript, whose tensors are fixed"
PACKAGE = "it is an AOTInductor package, which has the weights it was built with (see hotglm.integrations.aoti)"
_GRAPHS = (torch.cuda.CUDAGraph, getattr(torch._C, "_CUDAGraph", torch.cuda.CUDAGraph))
CAPTURED = "it leads to a captured device graph, which goes on reading the addresses it was captured with"
_ATOMS = frozenset({bool, int, float, complex, str, bytes, types.NoneType, torch.dtype})
CONTAINERS: frozenset[type] = frozenset({dict, collections.OrderedDict, list, set})
Kind = TypeVar("Kind")

_CONSTRUCTORS = frozenset({"__init__", "__new__"})
_LARGE = 64
_YIELD_EVERY = 512


class TooManyObjectsError(Exception):
    """A walk met more objects than it may."""


def is_a(value: object, kind: type[Kind] | tuple[type[Kind], ...]) -> TypeGuard[Kind]:
    """Whether `value` is of that kind; does not ask `value` itself, as `isinstance` does, which proxies answer."""
    return issubclass(type(value), kind)


def is_array(value: object) -> TypeGuard[Any]:
    """Whether `value` is a numpy array of numbers; does not import numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and is_a(value, numpy.ndarray) and value.dtype.kind in "biufcV"


def is_inert(value: object) -> bool:
    """Whether `value` leads nowhere: a plain immutable value, or a plain container with nothing in it."""
    kind = type(value)
    return kind in _ATOMS or (kind in CONTAINERS and not value)


def is_slot(value: object) -> bool:
    """Whether `value` is a slot."""
    return hasattr(type(value), "__hotglm_slot__")


def is_local_class(value: object) -> TypeGuard[type]:
    """Whether `value` is a class that was made inside a function."""
    return is_a(value, type) and "<locals>" in value.__qualname__


def copies_itself(value: object) -> bool:
    """Whether a hook knows how to follow its module into a copy (torch's own wrapper of a hook and its module does)."""
    return "__getstate__" in vars(type(value)) or hasattr(value, "__deepcopy__")


def has_plain_state(cls: type[nn.Module]) -> bool:
    """Whether an instance of `cls` is its `__dict__` and nothing else, to be copied attribute by attribute."""
    plain = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__slots__")
    for base in cls.__mro__:
        if base is nn.Module:
            return True
        if any(name in vars(base) for name in plain):
            return False
    return False


def leads_nowhere(item: object) -> bool:
    """Whether a walk stops at `item` whatever it looks for; see the rules above."""
    return is_slot(item) or is_a(item, _PROCESS) or (is_a(item, type) and not is_local_class(item))


def walk(
    value: object,
    *,
    is_end: Callable[[object], bool] = leads_nowhere,
    seen: dict[int, object] | None = None,
    limit: int | None = None,
) -> Iterator[tuple[object, Callable[..., Any] | None]]:
    """Yield `value` and everything that can be reached from it, each with the function it was found in, if any.

    Args:
        value: where to begin.
        is_end: asked about an object after it was yielded; true means that what it holds is not looked at.
        seen: objects by their id that are neither yielded nor followed again; those met are added.
        limit: how many objects that hold others may be met; None means `MAX_OBJECTS`.

    Raises:
        TooManyObjectsError: there are more; whatever has not been yielded yet may be anywhere.
    """
    seen = {} if seen is None else seen
    room = MAX_OBJECTS if limit is None else limit
    todo: list[tuple[object, Callable[..., Any] | None]] = [(value, None)]
    num_looked_at = 0
    while todo:
        item, function = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        num_looked_at += 1
        if num_looked_at % _YIELD_EVERY == 0:
            yield_gil_when_due()
        yield item, function
        if is_end(item):
            continue
        found = _find_referents(item)
        if not found or (len(found) > _LARGE and _ATOMS.issuperset(map(type, found))):
            continue
        inside = item if is_a(item, types.FunctionType) else function
        before = len(todo)
        todo.extend((other, inside) for other in found if type(other) not in _ATOMS and not _is_flat(other))
        room -= len(todo) > before
        if room < 0:
            raise TooManyObjectsError


def _is_flat(item: object) -> bool:
    return type(item) in (tuple, list) and _ATOMS.issuperset(map(type, item))  # type: ignore[call-overload]


def _find_referents(item: object) -> list[Any]:
    if is_a(item, types.FunctionType):  # not its globals: they lead to everything its file has imported or made
        return [item.__closure__, item.__defaults__, item.__kwdefaults__, vars(item)]
    if is_a(item, type):
        return [*(vars(item)[name] for name in vars(item).keys() - _CONSTRUCTORS), *item.__bases__]
    numpy = sys.modules.get("numpy")
    if numpy is not None and is_a(item, numpy.ndarray):
        return list(item.flat) if item.dtype.hasobject else []
    return gc.get_referents(item)


def reaches(value: object, wanted: Callable[[object], bool], *, known: dict[int, object] | None = None) -> bool:
    """Whether something wanted is reachable from `value`; true also where there is too much to tell.

    Args:
        value: where to begin.
        wanted: the question.
        known: objects by id from which nothing wanted can be reached; what is found out is added.
    """
    known = {} if known is None else known
    seen: dict[int, object] = {}
    try:
        if any(wanted(item) for item, _ in walk(value, seen=seen, is_end=lambda o: id(o) in known or leads_nowhere(o))):
            return True
    except TooManyObjectsError:
        return True
    known.update(seen)
    return False


def holds(value: object, wanted: object) -> bool:
    """Whether `wanted` itself is soon met on the way from `value`."""
    with contextlib.suppress(TooManyObjectsError):
        return any(item is wanted for item, _ in walk(value, limit=2000))
    return False


def describes_quantised(name: str, value: object) -> bool:
    """Whether the attribute `name` of a module is what torchao puts there for printing quantised weights.

    It is a method over a partial, which no copy of the module copies: the partial has the method of the module that was
    quantised among its arguments, and so all of its weights. Nothing but `repr` uses it.
    """
    return name == "extra_repr" and is_a(value, types.MethodType) and is_a(value.__func__, functools.partial)


def turn_reference(reference: Any, twin: Any) -> object | None:
    """Return a weak reference of the same kind to `twin`; None for a kind that nobody knows, or a dead one."""
    if type(reference) in weakref.ProxyTypes:
        return weakref.proxy(twin)
    if type(reference) is weakref.ref:
        return weakref.ref(twin)
    if is_a(reference, weakref.WeakMethod) and (method := reference()) is not None:
        return weakref.WeakMethod(types.MethodType(method.__func__, twin))
    return None


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` only stands for one, in a graph that was traced: no memory, no values."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and is_a(tensor, fake.FakeTensor)


def is_graph(item: object) -> bool:
    """Whether `item` is a captured graph of a CUDA device; builds of torch without CUDA have the type, too."""
    return is_a(item, _GRAPHS)


def why_uncopyable(item: object, is_inside: Callable[[object], bool]) -> str | None:
    """Return what keeps `item` from following its module into a copy; `is_inside` knows the module's parts."""
    if is_a(item, _SCRIPTS):
        return SCRIPT
    if is_a(item, _PACKAGES):
        return PACKAGE
    if is_graph(item):
        return CAPTURED
    if is_a(item, _WEAK_CONTAINERS) and any(map(is_inside, _list_weak(item))):
        return f"a {type(item).__name__} goes on referring to the parts of the module it was made for"
    if is_a(item, functools._lru_cache_wrapper) and reaches(item, is_inside):
        return "its cache is bound to this module and would be shared by all versions"
    return None


def _list_weak(item: Any) -> Iterable[object]:
    return [*item, *getattr(item, "values", list)()]
