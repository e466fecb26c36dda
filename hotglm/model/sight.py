"""What a capture of a module's passes could depend on: addresses of its tensors, and the values of everything else.

A captured graph holds the addresses of the tensors that were read, and has used up everything else that was looked at:
numbers in attributes, training flags, which hooks there are. Two modules that look alike here make the same graph, so
the graph of one may be replayed for the other. Rules this module keeps:

- What cannot be told to be the same is taken for different: the graph is then captured again, which costs time while
  staging, and never a wrong answer.
- Nothing that is looked at is kept alive, but code: a description outlives its module.
- What a module keeps in memory of the processor is named, because a capture would use its values up.

[Note: not seen]
Globals of the code, and what it asks of the process (environment, settings of torch): as with any captured graph, these
are what they were when it was captured.
"""

from __future__ import annotations

import enum
import functools
import struct
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hotglm.model.compiled import COMPILED_CALL, CompiledCall
from hotglm.model.references import is_a, is_slot
from hotglm.model.wrappers import find_memory
from hotglm.weights import places
from hotglm.weights.workers import yield_gil_when_due

__all__ = ["DYNAMO_NOTES", "Sight", "find_own", "look_at"]

_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)
_NUMBERS = (bool, int, float, complex, str, bytes, types.NoneType)
_SEQUENCES = (list, tuple, torch.Size)
_DICTS = (dict, OrderedDict, defaultdict)
_SETS = (set, frozenset)
DYNAMO_NOTES = frozenset({"_dynamo_static_input_type", "_dynamo_dynamic_indices"})
"""What Dynamo notes on tensors when it compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How one module looks.

    Attributes:
        parts: what is to be seen of each attribute, by its full name.
        host: names of attributes that lead to tensors in memory of the processor.
        storages: addresses of the storages of all tensors.
        unsure: names of attributes of which nobody can say whether another one is the same.
    """

    parts: dict[str, Hashable]
    host: tuple[str, ...]
    storages: frozenset[int] = frozenset()
    unsure: tuple[str, ...] = ()

    def is_like(self, other: Sight) -> bool:
        """Whether a graph of one module is one of the other, for certain."""
        return not self.unsure and self == other

    def find_differences(self, other: Sight) -> Iterator[str]:
        """Yield the names of attributes that do not look alike."""
        for name in {**self.parts, **other.parts}:
            if self.parts.get(name) != other.parts.get(name):
                yield name


def look_at(root: nn.Module, *, tensors: list[torch.Tensor] | None = None) -> Sight:
    """Return what a capture of passes through `root` could depend on; must be called where nothing changes it.

    Args:
        root: a module.
        tensors: gets all tensors that were seen.
    """
    look = _Look(paths={id(part): path for path, part in root.named_modules()})
    parts: dict[str, Hashable] = {}
    for path, part in root.named_modules():
        parts[path or type(root).__name__] = _Same(type(part))
        for name, value in list(vars(part).items()):
            look.name = f"{path}.{name}" if path else name
            parts[look.name] = _see_call(value) if name == COMPILED_CALL else look.see_all(value)
        yield_gil_when_due()
    if tensors is not None:
        tensors += look.tensors
    return Sight(parts=parts, host=tuple(look.host), storages=frozenset(look.storages) - {0}, unsure=tuple(look.unsure))


def _see_call(call: object) -> Hashable:
    """See how a module is compiled; the call itself is bound to the module."""
    call = getattr(call, "inner", call)  # that of graphs stands around it
    return call.recipe if isinstance(call, CompiledCall) else None if call is None else _Same(call)


class _Same:
    """One object, which is like itself alone, and like nothing once it is gone; it is not kept alive."""

    __slots__ = ("_id", "_reference")

    def __init__(self, value: object) -> None:
        self._id = id(value)
        self._reference = weakref.ref(value)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        found = self._reference()
        return found is not None and found is other._reference()


@dataclass(slots=True, kw_only=True)
class _Look:
    """One walk through a module's attributes; what is met again is told by when it was met first."""

    paths: dict[int, str]
    name: str = ""
    host: dict[str, None] = field(default_factory=dict)
    storages: set[int] = field(default_factory=set)
    tensors: list[torch.Tensor] = field(default_factory=list)
    unsure: dict[str, None] = field(default_factory=dict)
    _met: dict[int, int] = field(default_factory=dict)
    _keep: list[object] = field(default_factory=list)

    def see_all(self, value: object) -> Hashable:
        """Return what is to be seen of an attribute, however deep."""
        try:
            return self.see(value)
        except RecursionError:
            return self._doubt(value)

    def see(self, value: object) -> Hashable:
        """Return what is to be seen of a value."""
        if type(value) in _NUMBERS:
            return (type(value), repr(value) if isinstance(value, (float, complex)) else value)  # NaN, and both zeros
        if is_a(value, _VALUES):
            return value
        if (at := self._met.get(id(value))) is not None:
            return ("met", at)
        self._met[id(value)] = len(self._met)
        self._keep.append(value)  # as long as the walk, so that ids stay theirs
        return self._see_new(value)

    def _identify(self, value: object) -> Hashable:
        try:
            return _Same(value)
        except TypeError:  # no weak reference: who knows what will have this id next
            return self._doubt(value)

    def _doubt(self, value: object) -> Hashable:
        self.unsure[self.name] = None
        return ("id", id(value))

    def _see_new(self, value: Any) -> Hashable:
        kind = type(value)
        if is_a(value, torch.Tensor):
            return self._see_tensor(value)
        if is_a(value, nn.Module):
            return ("part", self.paths[id(value)]) if id(value) in self.paths else self._identify(value)
        if kind in _SEQUENCES:
            return (kind, tuple(self.see(item) for item in value))
        if kind in _DICTS:
            return (kind, tuple((self.see(key), self.see(item)) for key, item in list(value.items())))
        if kind in _SETS:
            return (kind, frozenset((type(item), item) for item in value) if _is_flat(value) else self._identify(value))
        return self._see_code(value) if callable(value) else self._see_object(value)

    def _see_code(self, value: Any) -> Hashable:
        if is_a(value, types.FunctionType):
            cells = tuple(_open(cell) for cell in value.__closure__ or ())
            return (self._identify(value), self.see((cells, value.__defaults__, value.__kwdefaults__, vars(value))))
        if is_a(value, types.MethodType):
            return ("method", self.see(value.__func__), self.see(value.__self__))
        if is_a(value, functools.partial):
            return ("partial", self.see((value.func, value.args, value.keywords)))
        return self._identify(value) if is_a(value, type) else self._see_object(value)

    def _see_object(self, value: Any) -> Hashable:
        if is_slot(value) or is_a(value, torch.Generator):
            return self._identify(value)  # all generations share it
        if is_a(value, weakref.ref):
            return ("weak", self.see(value()))
        if not _is_plain(type(value)):
            return self._identify(value)
        return (_Same(type(value)), self.see(find_own(value)))

    def _see_tensor(self, tensor: torch.Tensor) -> Hashable:
        own = {name: value for name, value in vars(tensor).items() if name not in DYNAMO_NOTES}
        leaves = tuple(self._see_memory(leaf) for leaf in find_memory(tensor))
        return (_Same(type(tensor)), tensor.requires_grad, leaves, self.see(own) if own else None)

    def _see_memory(self, tensor: torch.Tensor) -> Hashable:
        if places.active.find(tensor) is None:
            self.host[self.name] = None
        if tensor.layout is torch.strided:
            self.storages.add(tensor.untyped_storage().data_ptr())
        strides = tensor.stride() if tensor.layout is torch.strided else None
        self.tensors.append(tensor)
        flags = (tensor.is_conj(), tensor.is_neg(), tensor.is_inference())
        return (tensor.data_ptr(), tuple(tensor.shape), strides, tensor.dtype, str(tensor.device), flags)


def find_own(value: object) -> dict[str, object]:
    """Return the attributes of an object, those in slots, too."""
    names = (name for cls in type(value).__mro__ for name in _list_slots(cls))
    return dict(getattr(value, "__dict__", {})) | {n: getattr(value, n) for n in names if hasattr(value, n)}


def _is_flat(value: Iterable[object]) -> bool:
    return all(type(item) in _NUMBERS for item in value)


def _open(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _is_plain(cls: type) -> bool:
    """Whether all that an instance is, is in its attributes: CPython's own rule for what pickles by them."""
    size = object.__basicsize__ + _POINTER * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    size += _POINTER * sum(len(_list_slots(base)) for base in cls.__mro__)
    return cls.__basicsize__ <= size and cls.__itemsize__ == 0


def _list_slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if name not in _NO_STATE)


_POINTER = struct.calcsize("P")
_NO_STATE = ("__dict__", "__weakref__")
