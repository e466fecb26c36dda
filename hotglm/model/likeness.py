"""Whether two modules are the same but for the values of their parameters and persistent buffers.

Rules this module keeps:

- Only what is seen to be the same is taken for the same. Packed weights, numbers that were computed from weights,
  functions that have captured something, and whatever else cannot be compared, differ.
- A plain value that is what the constructor gave it, in the live module when that came to be as in the new one, has
  nothing to do with weights, whatever passes have made of it since (a counter): that goes on, as in a swap of weights
  alone. So does one that the live module has got since. What a version had when it came to be is noted then: a number
  that was computed from weights may well be the constructor's for other weights.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hotglm.model.compiled import COMPILED_CALL
from hotglm.model.references import describes_quantised, is_inert
from hotglm.model.sight import DYNAMO_NOTES, find_own
from hotglm.model.wrappers import is_wrapper
from hotglm.weights.digest import tensor_bytes

__all__ = ["find_unlike", "note_values"]

_OWN_NAMES = frozenset(vars(nn.Module())) | {COMPILED_CALL, "_is_torch_compile"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def note_values(module: nn.Module) -> dict[str, str]:
    """Return the plain values of a module that comes to be, by full name, to tell later what has been set since."""
    return {
        f"{path}.{name}" if path else name: _describe(value)
        for path, part in module.named_modules()
        for name, value in _find_attributes(part).items()
        if is_inert(value)
    }


def find_unlike(live: nn.Module, made: nn.Module, *, built: nn.Module, born: Mapping[str, str] | None) -> Iterator[str]:
    """Yield the names of what `made` has otherwise than `live`, beside weights; hooks of `live` alone are none of it.

    Args:
        live: the module that serves; hooks and compiled code may have been added to it since it was made.
        made: the module that is to take its place, of the same contract.
        built: what `made` was made from, before it had any weights.
        born: `note_values` of what `live` was when it came to be; None where nobody knows.
    """
    return _Comparison(live, made, built, born).find()


class _Comparison:
    """Modules, and which parts of them have the same place."""

    def __init__(self, live: nn.Module, made: nn.Module, built: nn.Module, born: Mapping[str, str] | None) -> None:
        self._born = born
        self._built = dict(built.named_modules())
        self._live = dict(live.named_modules())
        self._made = dict(made.named_modules())
        self._root = type(live).__name__
        self._paths = {id(part): path for parts in (self._live, self._made) for path, part in parts.items()}

    def find(self) -> Iterator[str]:
        """Yield the full names of what differs."""
        for path in {**self._live, **self._made}:
            one, other = self._live.get(path), self._made.get(path)
            if one is None or other is None or type(one) is not type(other):
                yield path or self._root
            else:
                names = (*_find_in_state(one, other), *self._find_in_attributes(path, one, other))
                yield from (f"{path}.{name}" if path else name for name in names)

    def _find_in_attributes(self, path: str, one: nn.Module, other: nn.Module) -> Iterator[str]:
        ours, theirs = _find_attributes(one), _find_attributes(other)
        first = self._built.get(path)
        before = _find_attributes(first) if type(first) is type(other) else {}
        for name in {**ours, **theirs}:
            full = f"{path}.{name}" if path else name
            if name not in theirs:  # a pass or its owner has put it there since, and no weights
                goes_on = is_inert(ours[name]) and self._born is not None and full not in self._born
            elif name not in ours:
                goes_on = False
            else:
                goes_on = self._is_surely_same(ours[name], theirs[name]) or (
                    name in before and self._is_untouched(full, before[name], theirs[name])
                )
            if not goes_on:
                yield name

    def _is_untouched(self, name: str, before: object, after: object) -> bool:
        if self._born is None or not is_inert(after) or type(before) is not type(after):
            return False
        return _describe(before) == _describe(after) == self._born.get(name)

    def _is_surely_same(self, one: object, other: object) -> bool:
        try:
            return self._is_same(one, other)
        except RecursionError:  # what leads back to itself
            return False

    def _is_same(self, one: object, other: object) -> bool:
        if one is other or type(one) is not type(other):
            return one is other
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return _has_same_bytes(one, other)
        if isinstance(one, nn.Module):
            return id(one) in self._paths and self._paths[id(one)] == self._paths.get(id(other))
        if isinstance(one, types.MethodType) and isinstance(other, types.MethodType):
            return one.__func__ is other.__func__ and self._is_same(one.__self__, other.__self__)
        return self._has_same_items(one, other)

    def _has_same_items(self, one: object, other: object) -> bool:
        own = find_own(one)  # its own comparison may leave some of them out
        if own and not self._has_same_items(own, find_own(other)):
            return False
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(self._is_same, one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            return list(one) == list(other) and all(self._is_same(value, other[key]) for key, value in one.items())
        return _is_equal(one, other)


def _find_in_state(one: nn.Module, other: nn.Module) -> Iterator[str]:
    yield from (name for name in _HOOKS if vars(other)[name])
    yield from (name for name in ("_parameters", "_buffers") if vars(one)[name].keys() != vars(other)[name].keys())
    for name in sorted(one._non_persistent_buffers_set | other._non_persistent_buffers_set):
        if not _is_same_buffer(one._buffers.get(name), other._buffers.get(name)):
            yield name


def _is_same_buffer(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and _has_same_bytes(one, other))


def _describe(value: object) -> str:
    return f"{type(value).__name__} {value!r}"


def _find_attributes(module: nn.Module) -> dict[str, object]:
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in _OWN_NAMES and not describes_quantised(name, value)
    }
    return own | dict(_find_attributes_of_tensors(module))


def _find_attributes_of_tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what has been set on parameters and buffers; what is inside wrappers is compared by their contexts."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and not is_wrapper(tensor):
            yield from ((f"{name}.{own}", value) for own, value in vars(tensor).items() if own not in DYNAMO_NOTES)


def _is_equal(one: object, other: object) -> bool:
    try:
        return type(one).__eq__ is not object.__eq__ and bool(one == other)
    except Exception:  # noqa: BLE001 - its own comparison may raise anything; what cannot be compared is not the same
        return False


def _has_same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    if any(t.layout is not torch.strided or t.is_quantized or t.is_meta or is_wrapper(t) for t in (one, other)):
        return False
    return torch.equal(tensor_bytes(one).cpu(), tensor_bytes(other).cpu())
