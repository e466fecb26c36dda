"""TorchScript modules, traced or scripted: twins of them, and what their code has swallowed.

Rules this module keeps:

- Such a module can be swapped in place only: its code is compiled for the one object.
- Tensors that became constants of the code would keep their values for ever. Where they may depend on the weights, the
  module is refused, with the line they come from; as everywhere, an index is taken for one (`model/derived.py`).
- A frozen module has no weights left to swap, and is refused.
- Every buffer is one that files carry: TorchScript keeps neither which were not persistent nor methods to refresh
  them.

[Note: twins of TorchScript]
`copy.deepcopy` copies such a module with all its tensors, which then make way for views: the memory of one more copy is
taken for that moment. `setattr` on the C++ object is how torch's own wrappers write parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hotglm.errors import Problem, UnswappableError
from hotglm.model.extents import overlaps_itself
from hotglm.model.inspection import find_state
from hotglm.weights.arena import Lease
from hotglm.weights.layout import Layout

__all__ = ["copy_script", "is_script", "verify_script"]

_INDEX_DTYPES = frozenset({torch.bool, torch.int64})


def is_script(module: object) -> bool:
    """Whether a module is TorchScript as a whole."""
    return isinstance(module, torch.jit.ScriptModule)


def verify_script(module: nn.Module, *, constants: Sequence[str]) -> None:
    """Return when other weights can be given to a TorchScript module.

    Args:
        module: traced or scripted.
        constants: patterns of names that the user vouches for; constants of code have no names, so `"*"` covers them.

    Raises:
        UnswappableError: it is frozen, or its code holds tensors of its own.
    """
    problems = [] if any(True for _ in find_state(module)) else [_problem("no parameters: it was frozen")]
    if "*" not in constants:
        problems += [_problem(what) for what in dict.fromkeys(_find_swallowed(module))]
    if problems:
        raise UnswappableError(
            "Expected TorchScript that takes its weights from the module, got some that has its own.",
            problems=problems,
            remedy="register what is computed from weights as buffers before tracing; do not freeze; or pass "
            'constants="*" if no constant of the code depends on the weights.',
        )


def _problem(what: str) -> Problem:
    return Problem(code="CANNOT_SWAP", message=f"Expected weights in the module, got {what}")


def _find_swallowed(module: nn.Module) -> Iterator[str]:
    script: Any = module
    for name in script._c._method_names():
        yield from _find_in_block(getattr(script._c, name).graph if name != "forward" else script.inlined_graph)


def _find_in_block(block: Any) -> Iterator[str]:
    for node in block.nodes():
        value = node.output().toIValue() if node.kind() == "prim::Constant" else None
        if isinstance(value, torch.Tensor) and not (value.dtype in _INDEX_DTYPES and value.dim() <= 1):
            where = node.sourceRange().strip().splitlines()
            line = f", from {where[0].strip()}" if where else ""
            yield f"a constant {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}{line}"
        for inner in node.blocks():
            yield from _find_in_block(inner)


def copy_script(
    module: nn.Module, *, layout: Layout, lease: Lease | None, constants: Sequence[str]
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a copy of a TorchScript module over `lease`, and its tensors by name.

    Without a lease nothing is copied; only what would be refused is.

    Raises:
        UnswappableError: as `verify_script`.
    """
    verify_script(module, constants=constants)
    entries = list(find_state(module))
    if lease is None:
        return module, {}
    with torch.inference_mode(mode=False), torch.no_grad():
        twin: nn.Module = copy.deepcopy(module)
        owners: dict[str, Any] = dict(twin.named_modules())
        views: dict[str, torch.Tensor] = {}
        for entry in entries:
            source = entry.tensor
            plain = source.is_contiguous() or overlaps_itself(source)
            stride = None if plain else source.stride()
            view = lease.view(layout.offsets[entry.name], dtype=source.dtype, shape=source.shape, stride=stride)
            path, _, leaf = entry.name.rpartition(".")
            held = nn.Parameter(view, requires_grad=source.requires_grad) if entry.kind == "parameter" else view
            owners[path]._c.setattr(leaf, held)
            views[entry.name] = view.detach()
    return twin, views
