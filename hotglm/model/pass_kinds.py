"""The kinds of passes that graphs are told by: how a pass is called, with tensors of which shapes, and which values.

Rules this module keeps: it is on the way of every pass, so tensors that are passed one beside the other go the short
way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch.utils import _pytree as pytree

__all__ = ["CONSTANTS", "fill", "flatten", "is_tensor", "name_kind", "unflatten"]

CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
"""What a capture uses up: passes with other values are of another kind."""


def is_tensor(leaf: object) -> TypeGuard[torch.Tensor]:
    """Whether `leaf` is a tensor."""
    return isinstance(leaf, torch.Tensor)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], object]:
    """Return what a pass is given, one after the other, and how it is nested: something that can be compared."""
    if not kwargs and all(map(is_tensor, args)):
        return args, len(args)
    return pytree.tree_flatten((args, kwargs))


def unflatten(leaves: Sequence[Any], given: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments; `unflatten(*flatten(args, kwargs)) == (args, kwargs)`."""
    if isinstance(given, int):
        return tuple(leaves), {}
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(list(leaves), given)  # type: ignore[arg-type]
    return found


def fill(leaves: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Yield `leaves` with other tensors in the places of those that are there."""
    left = iter(tensors)
    for leaf in leaves:
        yield next(left) if is_tensor(leaf) else leaf


def name_kind(leaves: Sequence[Any]) -> Hashable:
    """Return what tells inputs of one graph from those of another, but for how they are nested."""
    return tuple(
        (type(leaf), leaf.shape, leaf.dtype, leaf.device)
        if is_tensor(leaf)
        else (type(leaf), repr(leaf) if isinstance(leaf, CONSTANTS) else None)
        for leaf in leaves
    )
