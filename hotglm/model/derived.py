"""State that is computed from weights: declared, recomputed, or refused, never left stale.

A module may keep more than its parameters: rotary tables, cached transposes, fused or packed weights. Such state is not
in the file, so after a swap it must come from somewhere. Rules this module keeps:

- A method marked with `refresh` recomputes what it names; it runs in the spare, after the weights are in and before
  warm-up, under `torch.no_grad`, once per module, children before parents.
- What nobody declares is carried over only where its structure says that it does not depend on weights: in a module
  that holds none itself or below (a rotary embedding), or where it is an index or a mask (`[Note: indices]`).
  Everything else is refused by name (`StaleStateError`): a cache that is right only for the old weights gives wrong
  answers without any error.
- Even that is refused once passes have made or changed it since its generation was made: a cache of keys and values
  is no table. (A table that is built by the first pass has to be declared, too; the two look alike.)
- `constants` are patterns (`fnmatch`) of full names that the user vouches for.

[Note: indices]
In a module with weights, an undeclared tensor is taken for an index or a mask if it is bool or int64, and is either a
registered non-persistent buffer or a plain attribute of at most one dimension and 64 Ki elements. No format packs
weights into these dtypes (int32 and int16 hold eight or four of them in GPTQ, AWQ and Marlin, int8 and uint8 one or
two), so they are not taken for one wherever they stand. A non-persistent buffer belongs to the class's constructor,
which runs before weights are loaded; a plain attribute is anybody's, and one with the shape of a weight may be a
pruning mask.

[Note: limits of the rule]
Not seen: Python numbers and strings, and buffers without a dtype (bytes, `array.array`) that were computed from
weights; a tensor that a parent computed from its weights and put on a child that holds none; a small bool or int64
vector that was computed from weights (an order of neurons). Declare those, or make them persistent buffers.

[Note: derived state]
A view of a weight (`self.wt = self.weight.t()`) needs none of this: it is a view of the same weight in the spare, too
(see `weights/layout.py`).
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from hotglm.errors import DefinitionError, Problem, RefreshError, shorten_repr
from hotglm.problem import describe_exception
from hotglm.weights.digest import digest_tensor

__all__ = ["Marks", "find_refreshed_names", "find_refreshers", "may_carry_over", "refresh", "run_refreshers"]

_MARK = "__hotglm_refresh__"
_INDEX_DTYPES = frozenset({torch.bool, torch.int64})
_MAX_INDICES = 1 << 16


class Marks:
    """Which tensors a module had at one time, and in which state, to tell later what passes have made or changed."""

    __slots__ = ("_states",)

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note `tensors` as they are now; holds none of them alive."""
        self._states = {id(tensor): (weakref.ref(tensor), _find_state(tensor)) for tensor in tensors}

    def is_unchanged(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` was noted, and has not been written since."""
        reference, state = self._states.get(id(tensor), (None, None))
        return reference is not None and reference() is tensor and state == _find_state(tensor)


_MAX_HASHED_NBYTES = 1 << 20


def _find_state(tensor: torch.Tensor) -> tuple[int, str]:
    """Return what changes when `tensor` is written: torch's count, and, as not all of torch counts, a digest."""
    version = -1 if tensor.is_inference() else tensor._version  # inference tensors do not count their changes
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    is_small = tensor.numel() * tensor.element_size() <= _MAX_HASHED_NBYTES
    return version, digest_tensor(tensor) if is_plain and is_small else ""


Method = TypeVar("Method", bound=Callable[..., None])


def refresh(*names: str) -> Callable[[Method], Method]:
    """Mark a method of a module as the one that recomputes the attributes or buffers `names` from its weights.

    The method takes no arguments besides `self`. It runs in the spare of every stage, under `torch.no_grad`; what it
    raises fails the stage (`RefreshError`) and changes nothing. It must write only what it names, and should write
    buffers in place (`self.table.copy_(...)`), so that they stay in the arena.

    Args:
        names: attributes or buffers of that module, at least one.

    Raises:
        DefinitionError: no name, or something that is not a name.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(2, 2)
        ...         self.norm = self.weight.detach().norm()
        ...
        ...     @refresh("norm")
        ...     def _refresh_norm(self):
        ...         self.norm = self.weight.detach().norm()
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DefinitionError(
            f"Expected names of attributes in refresh(...), got {shorten_repr(names)}.",
            remedy='name what the method recomputes: @hotglm.refresh("wt_cache").',
        )

    def mark(method: Method) -> Method:
        setattr(method, _MARK, names)
        return method

    return mark


def find_refreshers(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name of each refresh method of `module` itself and what it recomputes, base classes first."""
    seen: set[str] = set()
    for cls in reversed(type(module).__mro__):
        for name in vars(cls):
            names = getattr(getattr(type(module), name, None), _MARK, None)
            if names and name not in seen:
                seen.add(name)
                yield name, names


def find_refreshed_names(module: nn.Module) -> frozenset[str]:
    """Return the attributes of `module` itself that some refresh method recomputes."""
    return frozenset(name for _, names in find_refreshers(module) for name in names)


def run_refreshers(root: nn.Module) -> tuple[str, ...]:
    """Run every refresh method below `root`, children before parents, under `no_grad`; return their full names.

    Raises:
        RefreshError: one or more raised; all are run, all failures are listed.
    """
    ran: list[str] = []
    problems: list[Problem] = []
    cause: Exception | None = None
    known: dict[type[nn.Module], list[tuple[str, tuple[str, ...]]]] = {}
    for path, module in reversed(list(root.named_modules())):
        if type(module) not in known:
            known[type(module)] = list(find_refreshers(module))
        for method, _ in known[type(module)]:
            full = f"{path}.{method}" if path else method
            ran.append(full)
            try:
                with torch.no_grad():
                    getattr(module, method)()
            except Exception as failure:  # noqa: BLE001 - the user's code may raise anything; all are reported
                cause = cause or failure
                message = f"{full}() raised {describe_exception(failure)}"
                problems.append(Problem(code="REFRESH_FAILED", message=message))
    if problems:
        raise RefreshError(
            "Expected derived state to be recomputed, got errors.",
            problems=problems,
            remedy="make the refresh method work from the module's own weights alone.",
        ) from cause
    return tuple(ran)


def may_carry_over(
    name: str,
    tensor: torch.Tensor,
    *,
    owner: nn.Module,
    constants: Sequence[str],
    marks: Marks | None = None,
    is_buffer: bool = False,
) -> bool:
    """Tell whether undeclared state may keep its value when the weights change (see the rules above).

    Args:
        name: full dotted name, matched against `constants`.
        tensor: the value.
        owner: the module that holds it.
        constants: patterns the user vouches for.
        marks: what the module had when it was made; None where no pass has run in it yet.
        is_buffer: whether it is registered as a non-persistent buffer.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in constants):
        return True
    if name.rpartition(".")[2] in find_refreshed_names(owner):
        return True
    if marks is not None and not marks.is_unchanged(tensor):
        return False
    return _is_index(tensor, is_buffer=is_buffer) or not _holds_weights(owner)


def _is_index(tensor: torch.Tensor, *, is_buffer: bool) -> bool:
    is_small = tensor.dim() <= 1 and tensor.numel() <= _MAX_INDICES
    return tensor.dtype in _INDEX_DTYPES and (is_buffer or is_small)


def _holds_weights(module: nn.Module) -> bool:
    if next(module.parameters(), None) is not None:
        return True
    return any(name not in child._non_persistent_buffers_set for child in module.modules() for name in child._buffers)
