"""Tensor subclasses that wrap other tensors, such as those of quantisation libraries (torchao).

Rules this module keeps:

- A wrapper has no memory; what it wraps has. It is taken apart and put together again by the two methods that torch's
  own compiler uses (`__tensor_flatten__`, `__tensor_unflatten__`), down to plain tensors, whatever lies between.
- Nothing is computed through a wrapper here: no `.data`, no `data_ptr`, no copy, each of which may go to a temporary.
- Wrappers are alike if class, inner names, context (block size and the like), outer shape, strides and dtype are. Bytes
  of one that is not alike would be read wrongly, so they are never put into it.
- Wrappers of torch's own (distributed, nested, sparse tensors) are none: their contexts are handles and symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hotglm.errors import shorten_repr
from hotglm.weights.dtypes import dtype_name

__all__ = [
    "PLAIN",
    "WrapperSpec",
    "describe_wrapper",
    "explain_difference",
    "find_leaves",
    "find_memory",
    "find_wrapper_specs",
    "flatten_mapping",
    "is_wrapper",
    "name_kind",
    "rebuild",
    "shares_memory",
]

PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
"""Classes of tensors that are their own memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrapperSpec:
    """What tells one wrapper from another, apart from the bytes inside.

    Attributes:
        kind: its class.
        shape: outer sizes.
        stride: outer strides.
        dtype: outer dtype.
        context: what its class needs beside the inner tensors to make it again.
        inner: for each inner name the wrapper that it is, or None for a tensor.
    """

    kind: type[torch.Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    context: object
    inner: Mapping[str, WrapperSpec | None]


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether `tensor` wraps others and can be made again from them."""
    kind = type(tensor)
    if kind in PLAIN or kind.__module__.partition(".")[0] == "torch" or not hasattr(kind, "__tensor_unflatten__"):
        return False
    try:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of the subclass
        parts = [getattr(tensor, name) for name in names]
    except Exception:  # noqa: BLE001 - the subclass's code may raise anything; then it is one that cannot be held
        return False
    holds_tensors = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(context))
    return bool(parts) and not holds_tensors and all(isinstance(part, torch.Tensor) for part in parts)


def _take_apart(wrapper: Any) -> tuple[dict[str, torch.Tensor], object]:
    names, context = wrapper.__tensor_flatten__()
    return {name: getattr(wrapper, name) for name in names}, context


def find_leaves(wrapper: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors with memory that are inside, by dotted inner name."""
    for name, part in _take_apart(wrapper)[0].items():
        if is_wrapper(part):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in find_leaves(part))
        else:
            yield name, part


def find_memory(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that have the memory of `tensor`: what is inside a wrapper, else itself."""
    return tuple(leaf for _, leaf in find_leaves(tensor)) if is_wrapper(tensor) else (tensor,)


def rebuild(wrapper: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a wrapper like `wrapper` over `leaves`, which are not copied.

    Args:
        wrapper: the one it is to be like; a parameter gives a parameter.
        leaves: tensors for all names of `find_leaves(wrapper)`.

    Raises:
        ValueError: what its class made of them is something else, or is over other memory.
    """
    made = _assemble(wrapper, leaves, prefix="")
    if isinstance(wrapper, nn.Parameter):
        made = nn.Parameter(made, requires_grad=wrapper.requires_grad)
    else:
        made.requires_grad_(wrapper.requires_grad)
    if difference := explain_difference(describe_wrapper(wrapper), describe_wrapper(made)):
        raise ValueError(f"made again it is another: expected {difference[0]}, got {difference[1]}")
    if any(not _is_same_place(leaves[name], leaf) for name, leaf in find_leaves(made)):
        raise ValueError("made again it is over a copy of what it was given")
    return made


def _assemble(wrapper: Any, leaves: Mapping[str, torch.Tensor], *, prefix: str) -> torch.Tensor:
    parts, context = _take_apart(wrapper)
    inner = {
        name: _assemble(part, leaves, prefix=f"{prefix}{name}.") if is_wrapper(part) else leaves[prefix + name]
        for name, part in parts.items()
    }
    made = type(wrapper).__tensor_unflatten__(inner, context, wrapper.shape, wrapper.stride())
    if type(made) is not type(wrapper):
        raise ValueError(f"made again it is a {type(made).__name__}")
    found: torch.Tensor = made
    return found


def _is_same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape or one.stride() != other.stride():
        return False
    return one.numel() == 0 or one.data_ptr() == other.data_ptr()


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes read the same way, wrapped or not."""
    if is_wrapper(one) != is_wrapper(other):
        return False
    if not is_wrapper(one):
        return one.data_ptr() == other.data_ptr() and one.dtype is other.dtype
    mine, theirs = dict(find_leaves(one)), dict(find_leaves(other))
    return mine.keys() == theirs.keys() and all(_is_same_place(leaf, theirs[name]) for name, leaf in mine.items())


# -- comparing ---------------------------------------------------------------------------------------------------------


def describe_wrapper(wrapper: torch.Tensor) -> WrapperSpec:
    """Return what tells `wrapper` from others."""
    parts, context = _take_apart(wrapper)
    return WrapperSpec(
        kind=type(wrapper),
        shape=tuple(wrapper.shape),
        stride=tuple(wrapper.stride()),
        dtype=wrapper.dtype,
        context=context,
        inner={name: describe_wrapper(part) if is_wrapper(part) else None for name, part in parts.items()},
    )


def find_wrapper_specs(module: nn.Module) -> dict[str, WrapperSpec]:
    """Return what every wrapper among the parameters and persistent buffers of `module` is, under each of its names."""
    state: dict[str, torch.Tensor] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        kept = [(n, t) for n, t in owner._buffers.items() if n not in owner._non_persistent_buffers_set]
        for name, tensor in (*owner._parameters.items(), *kept):
            if tensor is not None:
                state[f"{path}.{name}" if path else name] = tensor
    return {name: describe_wrapper(tensor) for name, tensor in state.items() if is_wrapper(tensor)}


def flatten_mapping(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, WrapperSpec]]:
    """Return a mapping with what is inside wrappers in their place, and what the wrappers were."""
    flat: dict[str, torch.Tensor] = {}
    specs: dict[str, WrapperSpec] = {}
    for name, tensor in tensors.items():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor) and is_wrapper(tensor):
            specs[name] = describe_wrapper(tensor)
            flat |= {f"{name}.{inner}": leaf for inner, leaf in find_leaves(tensor)}
        else:
            flat[name] = tensor
    return flat, specs


def explain_difference(one: WrapperSpec, other: WrapperSpec) -> tuple[str, str] | None:
    """Return what is expected and what there is instead, as words; None where the two are alike."""
    if one.kind is not other.kind:
        return name_kind(one), name_kind(other)
    if list(one.inner) != list(other.inner):
        return f"{name_kind(one)} of {', '.join(one.inner)}", f"one of {', '.join(other.inner)}"
    for what in ("shape", "dtype", "stride"):
        if getattr(one, what) != getattr(other, what):
            return f"{name_kind(one)} of {what} {_spell(getattr(one, what))}", _spell(getattr(other, what))
    if difference := _compare(one.context, other.context):
        return f"{name_kind(one)} with {difference[0]}", difference[1]
    differences = (_explain_inner(name, spec, other.inner[name]) for name, spec in one.inner.items())
    return next((difference for difference in differences if difference), None)


def _explain_inner(name: str, one: WrapperSpec | None, other: WrapperSpec | None) -> tuple[str, str] | None:
    if one is None or other is None:
        return None if one is other else (f"{name} to be {name_kind(one)}", name_kind(other))
    difference = explain_difference(one, other)
    return None if difference is None else (f"{name} to be {difference[0]}", difference[1])


def _compare(one: object, other: object) -> tuple[str, str] | None:
    """Return where two contexts differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key, value in one.items():
            if not _is_equal(value, other[key]):
                return f"{shorten_repr(key)} {shorten_repr(value)}", shorten_repr(other[key])
        return None
    return None if _is_equal(one, other) else (f"context {shorten_repr(one)}", shorten_repr(other))


def _is_equal(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(value, other[key]) for key, value in one.items())
    try:
        if one == other:
            return True
    except Exception:  # noqa: BLE001 - its own comparison; what cannot be compared is not alike
        return False
    # Plain objects that do not say when they are equal are by what they hold.
    says = type(one).__eq__ is not object.__eq__
    return not says and hasattr(one, "__dict__") and bool(vars(one)) and _is_equal(vars(one), vars(other))


def name_kind(spec: WrapperSpec | None) -> str:
    """Return what it is, in words; None is a tensor that wraps nothing."""
    return "a plain tensor" if spec is None else f"the subclass {spec.kind.__name__}"


def _spell(value: object) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return shorten_repr(list(value) if isinstance(value, tuple) else value)
