"""Recording what a module gives back, for its contract.

Rules this module keeps:

- A copy of the module runs, in evaluation mode and without gradients; the module, its buffers, its flags and the
  generators of random numbers are as they were.
- Only layouts are kept; no tensor outlives the recording.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hotglm.errors import ArgumentError, Problem, UncopyableError
from hotglm.output_spec import OutputSpec
from hotglm.problem import describe_exception

__all__ = ["call_with", "record_outputs"]


def call_with(module: nn.Module, inputs: Any) -> Any:
    """Run one pass of `module`: with one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def record_outputs(module: nn.Module, inputs: Iterable[Any]) -> OutputSpec | None:
    """Return the layout of what `module` gives back for each of `inputs`; None for none.

    Raises:
        ArgumentError: it does not take some of them; all are named.
        UncopyableError: the module cannot be copied.
    """
    given = list(inputs)
    if not given:
        return None
    try:
        copied = copy.deepcopy(module).eval()
    except Exception as error:
        raise UncopyableError(
            f"Expected a module that can be copied, got {describe_exception(error)}.",
            remedy="record its outputs yourself: OutputSpec.of([(inputs, module(*inputs))]).",
        ) from error
    calls, problems = [], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for place, arguments in enumerate(given):
            try:
                calls.append((arguments, call_with(copied, arguments)))
            except Exception as error:  # noqa: BLE001 - the model's code may raise anything
                message = f"inputs {place}: expected an output, got {describe_exception(error)}"
                problems.append(Problem(code="BAD_INPUTS", message=message))
    if problems:
        raise ArgumentError(
            "Expected inputs that the module takes.",
            problems=problems,
            remedy="pass one tensor, a tuple of positional arguments, or a mapping of keyword arguments for each call.",
        )
    return OutputSpec.of(calls)
