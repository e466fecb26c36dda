"""The model as it is before it is quantised, built for its structure alone.

Rules this module keeps:

- What is built is never written: it may be a module that its owner keeps. Parameters and persistent buffers on the meta
  device are replaced in a copy; what no file carries needs a value from its constructor.
- A module that is quantised already, or that is the live one, is refused: it is what became of a model that was
  quantised in place after somebody had kept it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hotglm.errors import DefinitionError, NotMaterializedError, Problem, UnswappableError, shorten_repr
from hotglm.model.building import unfilled
from hotglm.model.compiled import unwrap
from hotglm.model.derived import find_refreshed_names
from hotglm.model.inspection import find_state, verify_holdable
from hotglm.model.registry import find_definition, read_config
from hotglm.model.wrappers import find_wrapper_specs
from hotglm.problem import describe_exception

__all__ = ["build_plain", "shares_modules"]

_REMEDY = "let build() construct the model anew: Requantize(build=Model, ...)."


def build_plain(
    build: Callable[[], nn.Module] | None,
    *,
    live: nn.Module,
    model: type[nn.Module] | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the structure of the plain model that belongs to `live`.

    Args:
        build: makes it; None for the registered class of `live`, from its config.
        live: the quantised module that serves.
        model: the class of the plain model that `live` was quantised from, where a release has brought another one.
        config: what that was built from.

    Raises:
        DefinitionError: it cannot be built, or is no module.
        NotMaterializedError: state that no file carries is on the meta device.
        UnswappableError: it is quantised already, or is the live module.
        ModuleError: no slot could hold it.
    """
    made = _build(build, live)
    if model is not None and (type(made) is not model or _differs(read_config(made), config)):
        made = _build_registered(model, config)  # the live one came of another class, or of another config
    _verify_plain(made, live)
    plain = _materialize(made)
    verify_holdable(plain)
    return plain


def shares_modules(one: nn.Module, other: nn.Module) -> bool:
    """Whether they are one, or some part with tensors is a part of both; others (an activation) may well be."""
    parts = {id(part) for part in one.modules() if part._parameters or part._buffers}
    return one is other or any(id(part) in parts for part in other.modules())


def _build(build: Callable[[], nn.Module] | None, live: nn.Module) -> nn.Module:
    if build is None:
        return _build_registered(type(live), read_config(live))
    try:
        with unfilled():
            made = build()
    except Exception as error:
        raise DefinitionError(
            f"Expected build() to make the plain model, got {describe_exception(error)}.",
            remedy="make Requantize.build a function without arguments that returns the model before it is quantised.",
        ) from error
    if not isinstance(made, nn.Module):
        raise DefinitionError(
            f"Expected build() to return a module, got {shorten_repr(type(made).__name__)}.", remedy=_REMEDY
        )
    return unwrap(made)


def _build_registered(model: type[nn.Module], config: Mapping[str, Any] | None) -> nn.Module:
    definition = find_definition(model)
    if definition is None:
        raise DefinitionError(
            f"Expected a way to build {model.__qualname__} before it is quantised, got none.",
            remedy="pass Requantize(build=...), or declare the class with @hotglm.versioned.",
        )
    with unfilled():
        return definition.build(config)


def _differs(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    return other is not None and one != other


def _verify_plain(made: nn.Module, live: nn.Module) -> None:
    wrapped = find_wrapper_specs(made)
    problems = [
        Problem(
            code="CANNOT_SWAP_WRAPPED",
            message=f"Expected a plain tensor, got the subclass {spec.kind.__name__}",
            tensor=name,
        )
        for name, spec in wrapped.items()
    ]
    if shares_modules(made, live):
        problems.append(
            Problem(code="CANNOT_SWAP_QUANTIZED", message="Expected a module of its own, got parts of the live one")
        )
    if problems:
        raise UnswappableError(
            "Expected build() to return the model as it is before it is quantised, got one that is.",
            problems=problems,
            remedy=_REMEDY,
        )


def _materialize(made: nn.Module) -> nn.Module:
    """Return `made`, or where it is on the meta device a copy with memory, which nothing has touched yet.

    Raises:
        NotMaterializedError: naming the buffers whose values would have to come from somewhere.
    """
    entries = [entry for entry in find_state(made) if entry.tensor.is_meta]
    missing = [
        Problem(code="NOT_MATERIALIZED", message="Expected a value, because no file carries it", tensor=entry.name)
        for entry in entries
        if not entry.persistent and entry.name.rpartition(".")[2] not in find_refreshed_names(entry.owner)
    ]
    if missing:
        raise NotMaterializedError(
            "Expected build() to give values to what no file carries, got some on the meta device.",
            problems=missing,
            remedy="build on the processor: parameters are not initialised there either, which costs neither time nor "
            "memory.",
        )
    if not entries:
        return made
    return copy.deepcopy(made, {id(entry.tensor): _allocate(entry.tensor) for entry in entries})


def _allocate(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
