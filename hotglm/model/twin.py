"""Twins: structural copies of a module whose tensors lie in an arena.

Rules this module keeps:

- Every generation gets a thin module of its own over the arena's views. Whoever keeps it, one of its submodules, a
  bound method or a parameter, keeps the arena's lease with it, so nothing held outside is ever written under; there
  is no second kind of hold to look for (DESIGN section 5, "Reuse"). Compiled code is shared all the same: Dynamo
  caches by code object.
- No weight is copied here. Registered tensors become views; the copier meets no other tensor without asking.
- The class, hooks, flags and attributes are the user's own. What cannot be carried over is refused by name, all at
  once.
- The module being copied may be serving: its dictionaries are snapshot before they are walked, the GIL is given away
  between modules, and nothing in it is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from hotglm.errors import Problem, RefreshError, UncopyableError
from hotglm.model.copied import ChangedWhileCopiedError, Twin
from hotglm.model.copier import Copier
from hotglm.model.derived import Marks
from hotglm.model.extents import lay_out
from hotglm.model.inspection import find_state
from hotglm.model.scripted import copy_script, is_script
from hotglm.weights.arena import Lease
from hotglm.weights.layout import Layout
from hotglm.weights.workers import yield_gil

__all__ = ["Twin", "copy_module", "find_loose_tensors", "mark_loose_tensors", "settle_in_place", "verify_copyable"]

_NUM_ATTEMPTS = 5
"""How often a copy is tried when the serving module changes a container under the copier."""


def copy_module(
    module: nn.Module,
    *,
    layout: Layout,
    lease: Lease,
    constants: Sequence[str],
    marks: Marks | None = None,
    is_fixed: bool = False,
) -> Twin:
    """Return a structural copy of `module` whose tensors are views into `lease`; their values are whatever is there.

    Args:
        module: the module to copy; may be serving.
        layout: from `lay_out` of its state.
        lease: memory of at least `layout.nbytes`.
        constants: patterns of names of derived state that the user vouches for.
        marks: the module's loose tensors as they were before passes ran in it; None where none did.
        is_fixed: whether the module stays and the twin never serves, so that captured graphs stay with the module.

    Raises:
        StaleStateError: undeclared state that may depend on the weights.
        UncopyableError: an attribute, hook or function that cannot be carried over.
        UnswappableError: TorchScript whose code holds tensors.
    """
    if is_script(module):
        twin, views = copy_script(module, layout=layout, lease=lease, constants=constants)
        return Twin(module=twin, views=views, carried=(), loose=())
    for attempt in range(_NUM_ATTEMPTS):
        try:
            return Copier(
                module, layout=layout, lease=lease, constants=constants, marks=marks, is_fixed=is_fixed
            ).copy()
        except ChangedWhileCopiedError as failure:
            if attempt == _NUM_ATTEMPTS - 1:
                raise UncopyableError(
                    "Expected a module that stands still for the length of one attribute's copy.",
                    problems=[
                        Problem(code="CHANGING_ATTRIBUTE", message=f"{failure} kept changing while it was copied")
                    ],
                    remedy="keep per-request state out of the module, or make the attribute a registered buffer.",
                ) from failure
            yield_gil()
    raise AssertionError("unreachable")


def verify_copyable(
    module: nn.Module,
    *,
    layout: Layout,
    constants: Sequence[str] = (),
    marks: Marks | None = None,
    is_fixed: bool = False,
) -> None:
    """Raise what `copy_module` would raise, without needing memory: a dry run over empty views."""
    if is_script(module):
        copy_script(module, layout=layout, lease=None, constants=constants)
        return
    Copier(module, layout=layout, lease=None, constants=constants, marks=marks, is_fixed=is_fixed).copy()


def settle_in_place(twin: Twin) -> None:
    """Move buffers that a refresh has replaced by new tensors back to their place in the arena.

    Raises:
        RefreshError: a refresh replaced a parameter, or a buffer by one of another shape or dtype.
    """
    problems = []
    for entry in find_state(twin.module):
        view = twin.views.get(entry.name)
        if view is None or entry.tensor.data_ptr() == view.data_ptr():
            continue
        if (
            entry.kind == "parameter"
            or entry.wrapper is not None
            or (entry.tensor.shape, entry.tensor.dtype) != (view.shape, view.dtype)
        ):
            message = "Expected a refresh to write derived buffers, got one that replaced"
            problems.append(Problem(code="REFRESH_FAILED", message=message, tensor=entry.name))
            continue
        with torch.no_grad():
            view.copy_(entry.tensor)
        entry.owner._buffers[entry.name.rpartition(".")[2]] = view
    if problems:
        raise RefreshError("Expected refreshed state to stay in its place.", problems=problems, remedy=_IN_PLACE)


_IN_PLACE = "write buffers in place: self.table.copy_(...)."


def mark_loose_tensors(module: nn.Module) -> Marks:
    """Note the tensors of `module` that no file carries, as they are now, before passes run in it."""
    return Marks(find_loose_tensors(module))


def find_loose_tensors(module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return the tensors of `module` that no file carries: buffers that are not persistent, and unregistered ones.

    What cannot be walked is left out here; the first stage that copies the module says why.
    """
    if is_script(module):
        return ()
    copier = Copier(module, layout=lay_out(find_state(module)), lease=None, constants=("*",), marks=None)
    with contextlib.suppress(Exception):
        copier.copy()
    return tuple(copier.loose)
