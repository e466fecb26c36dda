"""Passes that replay device graphs: captured while a version is staged, kept with the memory they were captured over.

A `GraphedCall` stands where `torch.compile` puts its calls (`_compiled_call_impl`), so that names, class and signature
of the module stay its own, and copies and pickles leave it out, as they do with those. Rules this module keeps:

- The live path captures nothing. Graphs are captured when the call is made, and by `prepare_graphs`, which stages call.
  A pass that nothing was captured for runs without a graph, and is counted, or raises.
- A pass replays a graph over the tensors of its own module, or none: a copy of a module has no graphs before it is
  prepared (`[Note: whose graph]`).
- One pass at a time uses the memory of graphs, on the host and on the device (`[Note: turns]`).
- What a pass returns is the caller's: it is copied out of the graph's memory.

[Note: whose graph]
Arenas take turns, so the addresses of a version come again, and with them its graphs. A graph may be replayed for a
module that looks like the one it was captured for in every respect that a capture can see (`model/sight.py`): tensors
at the same addresses, equal numbers, the same code. That is asked after the weights are in and all is refreshed.
Graphs are kept by the arena (`homes`, by weak reference) and by the modules that replay them. When an arena is given
up, and the last module over it is gone, so are they. What they read is never freed under them, because whoever replays
holds the module, that the lease on the memory, and its call each tensor, should an attribute lose it. Replays that are
queued by then are waited for like any other work, by the events of whoever leases the memory next ("reuse" in
[Note: streams], weights/device.py).

[Note: turns]
Inputs are copied to where the graph reads them, the graph is replayed, outputs are copied out. A second pass that came
between would change the first one's inputs. So these three are submitted under a lock, and a pass on another stream
than the one before first puts its stream behind that one (O2). Intermediates are shared by the graphs of a module and
its twins, so one turn is for all of them. Passes on one stream pay for the lock alone. Rejected: a graph for each
stream or thread, which takes memory for each, while threads that share the default stream gain nothing.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hotglm.errors import ArgumentError, Problem, UnswappableError, WarmUpError, shorten_repr
from hotglm.model.compiled import COMPILED_CALL, CompiledCall
from hotglm.model.pass_kinds import CONSTANTS, fill, flatten, is_tensor, name_kind, unflatten
from hotglm.model.restored import read_version, restored
from hotglm.model.sight import Sight, look_at
from hotglm.problem import describe_exception
from hotglm.weights.graphs import Recorder, Recording

__all__ = ["GraphedCall", "Graphs", "find_graphed", "prepare_graphs", "verify_graphs"]

_CODE = "CANNOT_SWAP_CAPTURED"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """One captured pass: what was given, and what comes back, where its tensors are left out."""

    recording: Recording
    given: object  # how arguments are nested
    returned: Any  # how what comes back is nested; None where it is one tensor
    leaves: tuple[object, ...]  # of what comes back, with _TENSOR for tensors

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return what a pass returns."""
        if self.returned is None:
            return tensors[0]
        left = iter(tensors)
        leaves = [next(left) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.returned)


_TENSOR = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Graphs over the memory of one module, by the kinds of their inputs."""

    __hotglm_slot__ = True  # not looked into by whoever copies the module

    sight: Sight
    graphs: dict[Hashable, list[_Graph]]
    is_training: bool
    is_trained: bool  # some parameter wants a gradient

    def find(self, leaves: Sequence[Any], given: object) -> _Graph | None:
        """Return the graph for inputs of this kind."""
        for graph in self.graphs.get(name_kind(leaves), ()):
            if graph.given == given:
                return graph
        return None


class Graphs:
    """What all generations of one graphed module share: sample inputs, memory of graphs, and counts."""

    __hotglm_slot__ = True  # a copy of a module refers to the same

    def __init__(
        self, recorder: Recorder, samples: Sequence[tuple[Any, Any]], *, otherwise: Literal["eager", "error"]
    ) -> None:
        """Note what to capture: positional and keyword arguments of each kind of pass."""
        self.recorder = recorder
        self.samples = tuple(samples)
        self.otherwise = otherwise
        self.device_type = next(t.device.type for t in pytree.tree_leaves(self.samples) if is_tensor(t))
        self.autocast = _read_autocast(self.device_type)
        self.homes: weakref.WeakKeyDictionary[Any, Bound] = weakref.WeakKeyDictionary()
        self.num_captured = 0
        self.num_replayed = 0
        self.missed: Counter[str] = Counter()
        self._latest: Any = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """Return itself."""
        return self

    def rehearse(self, graph: _Graph, tensors: Sequence[torch.Tensor]) -> None:
        """Replay a new graph once: its first replay brings it to the device, and no pass is to pay for that."""
        stream = self.recorder.find_stream()
        if stream is not None:
            self.run(graph, tensors, stream, num_passes=0)

    def run(
        self, graph: _Graph, tensors: Sequence[torch.Tensor], stream: Any, *, num_passes: int = 1
    ) -> list[torch.Tensor]:
        """Replay `graph` for `tensors` on the current stream, in turn; return copies of what comes out."""
        recorder, recording = self.recorder, graph.recording
        with self._lock:
            latest, self._latest = self._latest, stream  # noted first: an interrupt may leave work behind on it
            if latest is not None and latest != stream:
                recorder.follow(latest)
            for source, target in zip(tensors, recording.inputs, strict=True):
                recorder.copy(source, target)
            recording.replay()
            self.num_replayed += num_passes
            return [recorder.clone(tensor) for tensor in recording.outputs]

    def miss(self, why: str) -> None:
        """Count a pass without a graph.

        Raises:
            ArgumentError: such passes are not wanted.
        """
        with self._lock:
            self.missed[why] += 1
        if self.otherwise == "error":
            raise ArgumentError(
                f"Expected a pass like those that were captured, got one with {why}.",
                remedy='capture inputs of that kind, too, in that mode; or pass otherwise="eager".',
            )


class GraphedCall:
    """The call of one module, by graphs where there are some.

    Attributes:
        graphs: what it shares with the calls of other generations.
        inner: the compiled call underneath; None where the module is not compiled.
        bound: graphs over this module's memory; None before it is prepared.
    """

    __slots__ = ("__weakref__", "_module", "_tensors", "bound", "graphs", "inner")

    def __init__(self, module: nn.Module, graphs: Graphs, *, inner: CompiledCall | None) -> None:
        """Stand for passes of `module`, which is held weakly."""
        self._module = weakref.ref(module)
        self.graphs = graphs
        self.inner = inner
        self.bound: Bound | None = None
        self._tensors: list[torch.Tensor] = []  # what graphs read, kept where a pass replaces an attribute

    def bind_to(self, module: nn.Module) -> GraphedCall:
        """Return a call of another module, such as a twin, with no graphs yet; one that is compiled stays it."""
        own = vars(module).get(COMPILED_CALL)
        if not isinstance(own, CompiledCall):
            own = None if self.inner is None else self.inner.bind_to(module)
        return GraphedCall(module, self.graphs, inner=own)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one pass.

        Raises:
            ArgumentError: nothing was captured for it, and such passes are not wanted.
            ReferenceError: the module is gone, and only this was kept of it.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this graphed call is gone; keep the module, not its call")
        bound, graphs = self.bound, self.graphs
        if bound is None or _is_inside():  # a twin before it is prepared, or a part of a pass that is being captured
            return self._run(module, args, kwargs)
        leaves, given = flatten(args, kwargs)
        graph, stream = bound.find(leaves, given), graphs.recorder.find_stream()
        why = "inputs of another kind" if graph is None else "a stream that is captured" if stream is None else None
        why = why or self._find_reason(bound, module, leaves)
        if graph is None or why is not None:
            graphs.miss(why or "")
            return self._run(module, args, kwargs)
        with torch.no_grad():
            return graph.rebuild(graphs.run(graph, [leaf for leaf in leaves if is_tensor(leaf)], stream))

    def _find_reason(self, bound: Bound, module: nn.Module, leaves: Sequence[Any]) -> str | None:
        """Return what keeps a pass of captured inputs from its graph, as the rest of a sentence."""
        if module.training != bound.is_training:
            return "another training flag"
        if torch.is_grad_enabled() and (bound.is_trained or _are_trained(leaves) or _are_trained(self._tensors)):
            return "gradients wanted"
        graphs = self.graphs
        return None if _read_autocast(graphs.device_type) == graphs.autocast else "another autocast mode"

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Callable[..., Any] = module._call_impl if self.inner is None else self.inner
        return call(*args, **kwargs)

    def prepare(self, home: object | None) -> int:
        """Bind the call to graphs over its module's memory: those that are there, or new ones; return how many are new.

        Args:
            home: the arena that the memory is of, which keeps them for the next module in the same place; None where it
                is nobody's.

        Raises:
            WarmUpError: a pass raised, or cannot be captured.
            UnswappableError: the module is not one that graphs can run.
        """
        module, graphs = self._module(), self.graphs
        if module is None:
            raise ReferenceError("the module of this graphed call is gone")
        tensors: list[torch.Tensor] = []
        sight = look_at(module, tensors=tensors)
        _verify_on_device(sight)
        known = None if home is None else graphs.homes.get(home)
        if known is None or not sight.is_like(known.sight):
            known = self._capture(module, sight, tensors)
            if home is not None:
                graphs.homes[home] = known
            num_new = sum(map(len, known.graphs.values()))
        else:
            num_new = 0
        self.bound, self._tensors = known, tensors
        return num_new

    def _capture(self, module: nn.Module, sight: Sight, tensors: Sequence[torch.Tensor]) -> Bound:
        captured: dict[Hashable, list[_Graph]] = {}
        weights = {name: read_version(parameter) for name, parameter in module.named_parameters()}
        with _inside(self.graphs), restored(module, tensors):
            for number, (args, kwargs) in enumerate(self.graphs.samples):
                leaves, given = flatten(args, kwargs)
                try:
                    graph = self._record(module, leaves, given, taken=sight.storages)
                except Exception as error:
                    raise WarmUpError(
                        f"Expected a pass that can be captured for sample inputs {number}, got "
                        f"{describe_exception(error)}.",
                        remedy="run it by hand; a pass that is captured may not wait for the device (.item(), .cpu()), "
                        "and takes and returns tensors in tuples, lists and dictionaries.",
                    ) from error
                captured.setdefault(name_kind(leaves), []).append(graph)
                self.graphs.num_captured += 1
        _verify_unchanged(sight, look_at(module))
        _verify_unwritten([n for n, p in module.named_parameters() if weights.get(n) != read_version(p)])
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        return Bound(sight=sight, graphs=captured, is_training=module.training, is_trained=is_trained)

    def _record(self, module: nn.Module, leaves: Sequence[Any], given: object, *, taken: frozenset[int]) -> _Graph:
        returned: list[Any] = []

        def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            versions = [tensor._version for tensor in tensors]
            args, kwargs = unflatten(list(fill(leaves, tensors)), given)
            output = self._run(module, args, kwargs)
            found, structure = pytree.tree_flatten(output)
            _verify_pass(found, changed=[tensor._version for tensor in tensors] != versions)
            leaf_marks = tuple(_TENSOR if is_tensor(leaf) else leaf for leaf in found)
            returned[:] = [None if is_tensor(output) else structure, leaf_marks]
            # A weight that is an output is copied: a graph that kept it would keep the lease on the arena.
            tensors = [leaf for leaf in found if is_tensor(leaf)]
            return [leaf.clone() if leaf.untyped_storage().data_ptr() in taken else leaf for leaf in tensors]

        samples = [leaf for leaf in leaves if is_tensor(leaf)]
        recording = self.graphs.recorder.capture(run, samples)
        graph = _Graph(recording=recording, given=given, returned=returned[0], leaves=returned[1])
        self.graphs.rehearse(graph, samples)
        return graph


def _are_trained(leaves: Sequence[Any]) -> bool:
    return any(is_tensor(leaf) and leaf.requires_grad for leaf in leaves)


def _read_autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


_thread = threading.local()


def _is_inside() -> bool:
    """Whether the calling thread captures a pass; parts of it that have graphs of their own run without them."""
    return getattr(_thread, "is_inside", False)


@contextlib.contextmanager
def _inside(graphs: Graphs) -> Iterator[None]:
    """Capture in the body of a `with`, in the modes of the passes to come.

    Autocast keeps no casts of weights meanwhile: a graph would go on reading them.
    """
    autocast = torch.autocast(
        graphs.device_type, dtype=graphs.autocast, enabled=graphs.autocast is not None, cache_enabled=False
    )
    _thread.is_inside = True
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), autocast:
            yield
    finally:
        _thread.is_inside = False


def _verify_pass(found: Sequence[Any], *, changed: bool) -> None:
    strange = [type(leaf).__name__ for leaf in found if not isinstance(leaf, (torch.Tensor, *CONSTANTS))]
    if strange:
        raise TypeError(f"a pass that returns tensors was expected, got {shorten_repr(strange[0])} among its outputs")
    if changed:
        raise ValueError("a pass that leaves its inputs as they are was expected, got one that writes them")


def _verify_on_device(sight: Sight) -> None:
    message = "Expected it on the device, got it in the processor's memory, whose values a capture uses up"
    _refuse([(name, message) for name in sight.host], remedy="move it to the device, or make it a number.")


def _verify_unchanged(before: Sight, after: Sight) -> None:
    message = "Expected a pass to leave it as it is, got another value after it, which a graph would not make"
    _refuse(
        [(name, message) for name in before.find_differences(after)],
        remedy="make in the constructor, or in a method marked @hotglm.refresh, what the first pass makes.",
    )


def _verify_unwritten(names: Sequence[str]) -> None:
    message = "Expected a pass to leave it as it is, got one that writes it, and has written it now"
    _refuse([(name, message) for name in names], remedy="keep what passes write in buffers; load the weights again.")


def _refuse(found: Sequence[tuple[str, str]], *, remedy: str) -> None:
    problems = [Problem(code=_CODE, message=message, tensor=name) for name, message in found]
    if problems:
        raise UnswappableError("Expected a module that graphs can run.", problems=problems, remedy=remedy)


def find_graphed(module: nn.Module) -> dict[str, GraphedCall]:
    """Return the graphed calls of a module's parts, by path."""
    calls = {path: vars(part).get(COMPILED_CALL) for path, part in module.named_modules()}
    return {path: call for path, call in calls.items() if isinstance(call, GraphedCall)}


def verify_graphs(module: nn.Module) -> None:
    """Return when the graphs of a module are still over its tensors.

    Raises:
        UnswappableError: tensors were moved, converted or replaced since, and a replay would read what is there now.
    """
    found = []
    for path, call in find_graphed(module).items():
        taken = frozenset() if call.bound is None else call.bound.sight.storages
        if taken - look_at(module.get_submodule(path)).storages:
            message = "Expected graphs over the tensors that the module has, got some over others, which it had before"
            found.append((path or type(module).__name__, message))
    _refuse(found, remedy="graph the module last: after it was moved, converted and loaded.")


def prepare_graphs(module: nn.Module, *, home: object | None) -> int:
    """Prepare the graphed parts of a staged module for passes; return how many graphs were captured.

    Raises:
        WarmUpError: a pass raised, or cannot be captured.
        UnswappableError: a part is not one that graphs can run.
    """
    return sum(call.prepare(home) for call in find_graphed(module).values())
