"""The lines that matter: how each way of updating is written. The demo runs these and prints them as they stand here.

Rules this module keeps:

- Each function is as short as a user would write it, and each peer is what its documentation recommends.
- `read_code` takes what it shows from these very functions, so that what is printed cannot drift from what was run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

import hotglm

if TYPE_CHECKING:
    from hotglm.demo.service import Service

__all__ = ["go_back", "open_slot", "overwrite", "read_code", "restart", "swap", "try_update"]


def open_slot(model: nn.Module, example: torch.Tensor) -> hotglm.ModuleSlot:
    """Put a slot around a model; `slot(images)` then is what the service calls."""
    return hotglm.ModuleSlot(model, policy=hotglm.StagePolicy(warm_up=(example,)))


def swap(slot: hotglm.ModuleSlot, release: Path) -> hotglm.Receipt:
    """Bring a release in with hotglm."""
    staged = slot.stage(release)  # read, verified and tried out beside the live version, which goes on serving
    return slot.commit(staged)  # takes effect between two passes


def try_update(slot: hotglm.ModuleSlot, release: Path) -> hotglm.HotglmError | None:
    """Offer a release that may be bad; return what it was refused with."""
    try:
        slot.update(release)
    except hotglm.HotglmError as refusal:
        return refusal  # the live version was not touched
    return None


def go_back(slot: hotglm.ModuleSlot) -> hotglm.Receipt:
    """Return to the version before."""
    return slot.rollback()  # it is still in memory: no disk, no loading


def overwrite(model: nn.Module, release: Path) -> None:
    """Bring a release in as most services do: into the live model."""
    model.load_state_dict(load_file(release))


def restart(service: Service, release: Path) -> None:
    """Bring a release in with a restart of the process."""
    service.stop()  # SIGTERM; requests in flight are still answered
    service.start(release)  # returns once it answers


def read_code(function: Callable[..., object]) -> str:
    """Return the source of a function without its docstring.

    >>> print(read_code(overwrite))
    def overwrite(model: nn.Module, release: Path) -> None:
        model.load_state_dict(load_file(release))
    """
    text = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(text).body[0]
    lines = text.rstrip().splitlines()
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        docstring = node.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    return "\n".join(lines)
