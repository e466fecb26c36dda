"""A golden made from files: weights that were released, and the arguments of a pass, for the command line.

Rules this module keeps: the code is the registered class of the weights' own version; the weights go through a slot, as
in a service.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from hotglm.errors import ArgumentError, SourceReadError
from hotglm.model.registry import find_definitions
from hotglm.problem import describe_exception
from hotglm.release.files import open_weights
from hotglm.slot.checks import Inputs
from hotglm.slot.slot import ModuleSlot
from hotglm.testing.goldens import make_golden
from hotglm.testing.traffic import Tolerance
from hotglm.version import Version

__all__ = ["record_golden"]


def record_golden(
    weights: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    name: str | None = None,
    version: str | None = None,
    tolerance: Tolerance,
) -> Path:
    """Make a golden of released weights; return its directory.

    Args:
        weights: as `hotglm inspect` takes them.
        inputs: a safetensors file of the arguments: tensors called 0, 1 and so on are positional, others go by name.
        directory: where all goldens are kept.
        name: name of the model; what the weights carry if None.
        version: their version; likewise.
        tolerance: how far later code may be from the answer.

    Raises:
        HotglmError: a file cannot be used, no class is registered for that version, or there is such a golden already.
    """
    with open_weights(weights) as files:
        label = name or files.metadata.get("hotglm.name")
        number = version or files.metadata.get("hotglm.version")
        config = files.config
    if not label or not number:
        raise ArgumentError(
            f"Expected weights that say what they are, got name {label!r} and version {number!r}.",
            remedy="pass --model and --version, or write the weights with hotglm.save_weights.",
        )
    known = {definition.version.public: definition for definition in find_definitions(label)}
    definition = known.get(Version(number).public)
    if definition is None:
        raise ArgumentError(
            f"Expected a class registered as {label!r} {number}, got {', '.join(map(str, known)) or 'none'}.",
            remedy="name the module that declares it with --import.",
        )
    slot = ModuleSlot(definition.build(config).eval(), name=label, version=number, accept="major")
    slot.update(weights, version=number)
    with slot.acquire() as generation:
        return make_golden(
            generation.module,
            directory,
            inputs=_read_inputs(inputs),
            name=label,
            version=number,
            config=config,
            tolerance=tolerance,
        )


def _read_inputs(path: str | os.PathLike[str]) -> Inputs:
    try:
        tensors = safetensors.torch.load(Path(path).read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise SourceReadError(
            f"Expected arguments in {os.fspath(path)!a}, got {describe_exception(error)}.",
            remedy="write them with hotglm.save_weights({'ids': tensor}, path).",
        ) from error
    return _arrange(tensors)


def _arrange(tensors: Mapping[str, torch.Tensor]) -> Inputs:
    if tensors and all(name.isdecimal() for name in tensors):
        return tuple(tensors[name] for name in sorted(tensors, key=int))
    return dict(tensors)
