"""Arguments and outputs of a pass as data: a tree that JSON can hold, and the tensors in it by name.

Rules this module keeps:

- Nothing is pickled: a tree is tensors, mappings, tuples, lists, None, booleans, numbers and text. The fields of a
  dataclass are kept as a mapping, and so is a mapping of any class: what callers read is compared, not its class.
- `unpack(*pack(x)) == plain(x)`, tensors bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hotglm.errors import ArgumentError, Problem, shorten_repr

__all__ = ["pack", "plain", "unpack"]


def plain(value: Any) -> Any:
    """Return `value` with every mapping and dataclass in it as a dict, and tensors without their history."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def pack(value: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the tree of `value`, and its tensors under names that begin with `prefix`.

    Raises:
        ArgumentError: something in it cannot be kept as data; everything of that kind is named.
    """
    tensors: dict[str, torch.Tensor] = {}
    bad: list[Problem] = []
    tree = _pack(plain(value), prefix, tensors, bad)
    if bad:
        raise ArgumentError(
            "Expected arguments and outputs that can be kept as data.",
            problems=bad,
            remedy="give tensors, numbers, text, None, and tuples, lists or mappings of those.",
        )
    return tree, tensors


def _pack(value: Any, where: str, tensors: dict[str, torch.Tensor], bad: list[Problem]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[where] = value.contiguous()
        return {"tensor": where}
    if isinstance(value, dict):
        keys = [key for key in value if not isinstance(key, str)]
        bad += [_problem(where, f"the key {shorten_repr(key)}") for key in keys]
        return {"mapping": {str(key): _pack(item, f"{where}.{key}", tensors, bad) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{where}.{index}", tensors, bad) for index, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(_problem(where, repr(value)))
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    bad.append(_problem(where, shorten_repr(type(value).__name__)))
    return None


def _problem(where: str, got: str) -> Problem:
    return Problem(code="BAD_GOLDEN", message=f"Expected data at {shorten_repr(where)}, got {got}")


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `pack` was given, in its plain form.

    Raises:
        KeyError, TypeError, ValueError: `pack` did not make that.
    """
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: unpack(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = _unpack_all(content, tensors)
        return list(items) if kind == "list" else tuple(items)
    if kind == "value":
        return content
    raise ValueError(f"no such kind: {kind}")


def _unpack_all(content: list[Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    return (unpack(item, tensors) for item in content)
