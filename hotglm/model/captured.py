"""Device graphs that a module carries: found before a swap would leave them behind, and kept out of twins.

A graph is a list of kernels with the addresses they were captured with. Whoever replays it reads what is at those
addresses, whatever module holds it. Rules this module keeps:

- Where addresses take turns, a graph that a module carries is refused by the attribute that leads to it, and so is
  code that has torch record such graphs by itself (`[Note: graph trees]`). Those that hotglm captures
  (`model/graphed.py`) are bound to their memory, and are not meant.
- Where addresses stay, the live module keeps its graphs, and its twin gets none: a twin that replayed one would run the
  live weights, into the live module's own buffers, beside a pass that does the same.

[Note: graph trees]
`torch.compile(mode="reduce-overhead")` records a graph for each set of addresses that its parameters have been seen at
(`check_invariants` in torch/_inductor/cudagraph_trees.py compares them in every pass). So the first pass over an arena
records again, on the live path: some passes' time, behind two synchronisations of the whole device. That cannot be done
while staging. From torch 2.13 on recordings belong to the thread that runs (`thread_local` in `cudagraphify`,
torch/_inductor/compile_fx.py), and a stage is none of the service's threads. Before 2.13 they belong to the thread that
ran the code first and are shared by all, without a lock: a stage that ran a twin beside the service would end the path
the service is on, free the outputs of its latest pass, and change its Python state under it. Either way the twin stays
away from them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from hotglm.errors import Problem, UnswappableError, shorten_repr
from hotglm.model.compiled import COMPILED_CALL, Recipe, find_calls, find_recipe
from hotglm.model.inspection import find_state
from hotglm.model.references import CAPTURED, TooManyObjectsError, is_a, is_graph, is_inert, leads_nowhere, walk
from hotglm.weights import places

__all__ = ["AbsentGraph", "find_captures", "leave_graph_trees", "stays_behind", "verify_uncaptured"]

_CODE = "CANNOT_SWAP_CAPTURED"
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules", COMPILED_CALL})
_REMEDY = (
    "let hotglm capture passes while a version is staged: hotglm.integrations.cuda_graphs.graphed(module, inputs), "
    'with torch.compile(mode="default") or "max-autotune-no-cudagraphs" if at all; or swap in place, where addresses '
    "never change: swap=hotglm.InPlace()."
)


class AbsentGraph:
    """What a twin has in the place of a graph that stays with the live module: whatever is done with it raises."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        """Stand for the graph that the attribute `where` leads to."""
        object.__setattr__(self, "_where", where)

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentGraph:
        """Return itself: there is nothing to copy."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Raise.

        Raises:
            AttributeError: where an inspection asks for a special name.
            UnswappableError: always else.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise; see `__getattr__`."""
        self._refuse()

    def _refuse(self) -> None:
        raise UnswappableError(
            f"Expected no replay of {shorten_repr(self._where)} in a staged twin, got one: that graph was captured "
            "over the live tensors, and would run the live weights.",
            remedy="leave warm-up, goldens and checks that replay it out of the stage, or let hotglm capture passes: "
            "hotglm.integrations.cuda_graphs.graphed(module, inputs).",
        )


def verify_uncaptured(module: nn.Module) -> None:
    """Return when no graph stands between a module and tensors at other addresses.

    Raises:
        UnswappableError: naming every attribute that leads to a graph, and every part that has torch record some.
    """
    problems = [_problem(message) for message in find_captures(module)]
    if problems:
        raise UnswappableError(
            "Expected a module whose tensors may take turns at their addresses, got device graphs that hold some.",
            problems=problems,
            remedy=_REMEDY,
        )


def find_captures(module: nn.Module) -> Iterator[str]:
    """Yield for everything in `module` that replays a device graph what was found, as a sentence."""
    for name in _name_graphs(module):
        yield f"Expected no device graph behind {shorten_repr(name)}, got one: {CAPTURED}"
    for name in _name_trees(module):
        yield f"Expected {shorten_repr(name)} to be compiled without graph trees, got a graph for each address"


def _problem(message: str) -> Problem:
    return Problem(code=_CODE, message=message)


def _name_graphs(module: nn.Module) -> Iterator[str]:
    """Yield the name of every attribute that leads to a graph.

    What `torch.cuda.make_graphed_callables` leaves is such an attribute: the `forward` of the instance.
    """
    for path, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if name not in _REGISTERED and _leads_to_graph(value):
                yield f"{path}.{name}" if path else name


def stays_behind(item: object) -> bool:
    """Whether `item` is a graph, or a function that replays one."""
    return is_graph(item) or (is_a(item, FunctionType) and _leads_to_graph(item))


def _leads_to_graph(value: object) -> bool:
    """Whether a device graph can be reached from `value` without going through a module or a tensor.

    What is too large to be searched is taken for none here; whoever copies the module refuses it.
    """
    if is_inert(value):
        return False
    try:
        return any(is_graph(item) for item, _ in walk(value, is_end=_is_end))
    except TooManyObjectsError:
        return False


def _is_end(item: object) -> bool:
    return leads_nowhere(item) or is_a(item, (nn.Module, torch.Tensor))


def _name_trees(module: nn.Module) -> Iterator[str]:
    """Yield what of `module` has torch record graphs by itself, if it has tensors on a device; see `[Note]` above."""
    if all(places.active.find(entry.tensor) is None for entry in find_state(module)):
        return
    for name, call in find_calls(module):
        if records_graphs(call.recipe):
            yield name or type(module).__name__
    for path, part, name, recipe in _find_compiled_methods(module):
        del part
        if records_graphs(recipe):
            yield f"{path}.{name}" if path else name


def _find_compiled_methods(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Recipe]]:
    for path, part in module.named_modules():
        own = [(name, value) for name, value in list(vars(part).items()) if name != COMPILED_CALL]
        shared = [pair for cls in type(part).__mro__ if cls not in nn.Module.__mro__ for pair in vars(cls).items()]
        own += [(name, value) for name, value in shared if name not in vars(part)]
        for name, value in own:
            if hasattr(type(value), "__code__") and (recipe := find_recipe(value)) is not None:  # functions
                yield path, part, name, recipe


def records_graphs(recipe: Recipe) -> bool:
    """Whether code that is compiled by `recipe` replays graphs that torch has recorded, where it runs on a device."""
    settings: Any = getattr(recipe.context, "compiler_config", None)
    if settings is None:  # no inductor
        return _name_backend(recipe.context) == "cudagraphs"
    inductor = sys.modules.get("torch._inductor.config")
    is_on = bool(getattr(getattr(inductor, "triton", None), "cudagraphs", False))
    return is_on or bool(settings.get("triton.cudagraphs", False))


def _name_backend(context: object) -> str:
    """Return the name of the compiler behind a context of Dynamo, as it registered itself; empty if it has none."""
    backend: Any = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return str(getattr(getattr(backend, "compiler_fn", backend), "compiler_name", ""))


def leave_graph_trees(twin: nn.Module) -> None:
    """Have the twin of a module whose addresses stay run eagerly what would have torch record graphs."""
    for path, call in list(find_calls(twin)):
        if records_graphs(call.recipe):
            vars(twin.get_submodule(path))[COMPILED_CALL] = None
    for _, part, name, recipe in list(_find_compiled_methods(twin)):
        if records_graphs(recipe):
            vars(part)[name] = _find_plain(getattr(part, name), part)


def _find_plain(compiled: Any, part: nn.Module) -> Callable[..., Any]:
    """Return what a compiled method of `part`, its own or its class's, was made from, bound to it."""
    function: Any = compiled._torchdynamo_orig_callable
    if isinstance(compiled, MethodType):  # of the class
        return MethodType(function, part)
    plain: Callable[..., Any] = function
    return plain
