"""CUDA graphs in a slot: captured while a version is staged, one set for each arena, and replayed by its passes.

Rules this module keeps: see `hotglm.model.graphed`, which does the work; here is what a user calls, and what is refused
before anything is captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hotglm.errors import ArgumentError, UnswappableError, shorten_repr
from hotglm.model.captured import verify_uncaptured
from hotglm.model.compiled import COMPILED_CALL, CompiledCall, settle
from hotglm.model.graphed import GraphedCall, Graphs, find_graphed
from hotglm.model.inspection import find_state
from hotglm.weights.cuda_graphs import find_cuda_recorder
from hotglm.weights.graphs import Recorder

__all__ = ["GraphCounts", "count_graphs", "graph_passes", "graphed"]

Otherwise = Literal["eager", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCounts:
    """What a graphed module and all its later versions have done so far.

    Attributes:
        captured: graphs captured, when the module was graphed and while versions were staged; no pass captures any.
        replayed: passes that were replays.
        missed: passes that ran without a graph, by reason.
    """

    captured: int
    replayed: int
    missed: Mapping[str, int]


def graphed(module: nn.Module, inputs: Sequence[Any], *, otherwise: Otherwise = "eager") -> nn.Module:
    """Capture passes of `module` in CUDA graphs, and have it replay them; give it to a slot, or use it as it is.

    Every version that a slot stages from then on is captured before it is committed, or gets the graphs that an earlier
    version in the same memory had. Names of tensors, class and signature stay as they are. The grad mode is none:
    passes that want gradients run without a graph. The autocast mode is that of the caller.

    Args:
        module: all of it on one CUDA device; compiled or not, but not by a mode that records graphs itself. It may not
            change itself in a pass. Changed: its calls replay graphs.
        inputs: one item for each kind of pass: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments, with tensors on the device; kept, to capture later versions with. A pass is of that kind if it is
            called in the same way, with tensors of equal class, shape and dtype, and equal values for all else.
        otherwise: what becomes of other passes: `"eager"` runs them without a graph and counts them, `"error"` raises.

    Returns:
        The module; what stands behind it, where it was what `torch.compile` returns.

    Raises:
        ArgumentError: `inputs` or `otherwise` cannot be meant, or there is no CUDA device.
        UnswappableError: the module is not one that graphs can run; everything is named.
        WarmUpError: a pass raised, or cannot be captured.
    """
    device = next((t.device for t in pytree.tree_leaves(list(inputs)) if isinstance(t, torch.Tensor)), None)
    if device is None or device.type != "cuda":
        raise ArgumentError(
            f"Expected sample inputs with tensors on a CUDA device, got {'none' if device is None else device}.",
            remedy="pass what the service passes: graphed(model, inputs=[torch.zeros(8, 64, device='cuda')]).",
        )
    return graph_passes(module, inputs, otherwise=otherwise, recorder=find_cuda_recorder(device))


def graph_passes(
    module: nn.Module, inputs: Sequence[Any], *, otherwise: Otherwise = "eager", recorder: Recorder
) -> nn.Module:
    """Do what `graphed` does, with a recorder for whatever device.

    Raises:
        ArgumentError, UnswappableError, WarmUpError: as `graphed`.
    """
    samples = [_read_sample(item) for item in inputs]
    module = settle(module)
    _verify_meant(module, samples, otherwise)
    verify_uncaptured(module)
    _verify_one_device(module, samples)
    inner = vars(module).get(COMPILED_CALL)
    call = GraphedCall(
        module,
        Graphs(recorder, samples, otherwise=otherwise),
        inner=inner if isinstance(inner, CompiledCall) else None,
    )
    call.prepare(None)
    vars(module)[COMPILED_CALL] = call
    return module


def count_graphs(module: nn.Module) -> GraphCounts:
    """Return what a graphed module, or the slot that holds it, has done so far; parts are added up.

    Args:
        module: a module that is graphed or has parts that are, or a slot around one.
    """
    live = getattr(module, "live", None)
    found = [call.graphs for call in find_graphed(module if live is None else live.module).values()]
    missed = [item for graphs in found for item in graphs.missed.items()]
    return GraphCounts(
        captured=sum(graphs.num_captured for graphs in found),
        replayed=sum(graphs.num_replayed for graphs in found),
        missed={why: sum(count for other, count in missed if other == why) for why, _ in missed},
    )


def _read_sample(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments, as everywhere where inputs of one pass are given."""
    if isinstance(item, Mapping):
        return (), dict(item)
    return (item if isinstance(item, tuple) else (item,)), {}


def _verify_meant(module: nn.Module, samples: Sequence[Any], otherwise: str) -> None:
    leaves = pytree.tree_leaves(list(samples))
    strange = [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None)))]
    problems = [
        *(["no inputs"] if not samples else []),
        *(["inputs without a tensor"] if not any(isinstance(leaf, torch.Tensor) for leaf in leaves) else []),
        *([f"inputs with {shorten_repr(strange[0])}"] if strange else []),
        *([f"otherwise={otherwise!r}"] if otherwise not in ("eager", "error") else []),
        *(["a module with a __call__ of its own"] if type(module).__call__ is not nn.Module.__call__ else []),
    ]
    if problems:
        raise ArgumentError(
            f"Expected a module, inputs of each kind of pass, and 'eager' or 'error', got {', '.join(problems)}.",
            remedy="pass inputs as the service does: tensors, tuples, lists, mappings and plain values.",
        )
    if found := list(find_graphed(module)):
        where = shorten_repr(found[0] or type(module).__name__)
        raise UnswappableError(
            f"Expected a module without graphs of hotglm's, got one that has some at {where}.",
            remedy="graph the module as a whole, or its parts; once.",
        )


def _verify_one_device(module: nn.Module, samples: Sequence[Any]) -> None:
    found = [("inputs", leaf.device) for leaf in pytree.tree_leaves(list(samples)) if isinstance(leaf, torch.Tensor)]
    found += [(entry.name, entry.tensor.device) for entry in find_state(module)]
    _, wanted = found[0]
    for name, device in found:
        if device != wanted:
            raise UnswappableError(
                f"Expected a module and inputs on one device, got {shorten_repr(name)} on {device}, not {wanted}.",
                remedy="graph the parts of a module by themselves where they are on several devices.",
            )
