"""Whether what a user's function has quantised is like what is live, which was quantised by the same function before.

Rules this module keeps: all differences are named at once, by wrappers where there are any, else by their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from hotglm.contract import Contract, StateSpec
from hotglm.errors import Problem, UnswappableError, shorten_repr
from hotglm.model.plain import shares_modules
from hotglm.model.wrappers import WrapperSpec, explain_difference, find_wrapper_specs, name_kind
from hotglm.slot.generation import Generation

__all__ = ["verify_own", "verify_quantized", "verify_same_but_tensors"]


def verify_quantized(made: nn.Module, contract: Contract, *, live: Generation) -> None:
    """Refuse what was made of plain weights, if it is no module of its own or not like what is live.

    Args:
        made: what `quantize` returned.
        contract: of that.
        live: the generation that serves.

    Raises:
        UnswappableError: naming every wrapper and tensor that is otherwise.
    """
    wrappers = list(_find_unlike_wrappers(live.module, made))
    named = tuple(f"{problem.tensor}." for problem in wrappers)
    problems = [*wrappers, *_find_unlike_state(live.contract.state, contract.state, named=named)]
    if problems:
        raise UnswappableError(
            "Expected quantize to make what is live of other weights, got something else.",
            problems=problems,
            remedy="quantise with the settings that the live module was quantised with; others need a new slot.",
        )


def verify_own(made: nn.Module, *, live: Generation) -> None:
    """Refuse what shares parts with the live module, and so would be written with it.

    Raises:
        UnswappableError: it does.
    """
    if shares_modules(made, live.module):
        raise UnswappableError(
            "Expected quantize to return a module of its own, got parts of the live one.",
            remedy="quantise the module that the function is given, and return that.",
        )


def verify_same_but_tensors(unlike: Sequence[str]) -> None:
    """Refuse names of what an exchange of tensors would leave as it was.

    Raises:
        UnswappableError: there are any.
    """
    if unlike:
        message = "Expected it to be as in the live module, got something else"
        raise UnswappableError(
            "Expected quantised weights that differ from the live ones in tensors alone, got more.",
            problems=[_refuse(name, message) for name in unlike],
            remedy="keep what is computed from weights in parameters and buffers; packed weights, hooks and numbers "
            "need swap=hotglm.Flip().",
        )


def _find_unlike_wrappers(live: nn.Module, made: nn.Module) -> Iterator[Problem]:
    ours, theirs = find_wrapper_specs(live), find_wrapper_specs(made)
    for name in {**ours, **theirs}:
        difference = _explain(ours.get(name), theirs.get(name))
        if difference:
            expected, found = difference
            message = f"Expected {expected}, got {found}"
            yield Problem(code="CANNOT_SWAP_WRAPPED", message=message, tensor=name, expected=expected, found=found)


def _explain(one: WrapperSpec | None, other: WrapperSpec | None) -> tuple[str, str] | None:
    if one is None or other is None:
        return name_kind(one), name_kind(other)
    return explain_difference(one, other)


def _find_unlike_state(
    ours: Mapping[str, StateSpec], theirs: Mapping[str, StateSpec], *, named: tuple[str, ...]
) -> Iterator[Problem]:
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if one != other and not f"{name}.".startswith(named):
            yield _refuse(name, f"Expected {_describe(one)}, got {_describe(other)}")


def _describe(spec: StateSpec | None) -> str:
    if spec is None:
        return "none"
    kind = spec.kind if spec.persistent else f"non-persistent {spec.kind}"
    tied = "" if spec.tied in (None, spec.name) else f", tied to {shorten_repr(spec.tied)}"
    return f"a {kind} of {spec.dtype} {list(spec.shape)}{tied}"


def _refuse(name: str, message: str) -> Problem:
    return Problem(code="CANNOT_SWAP_QUANTIZED", message=message, tensor=name)
