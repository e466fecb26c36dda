"""Modules that carry device graphs: refused where addresses take turns, left with the live module where they stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import UnswappableError, WarmUpError
from hotglm.model.compilations import count_captured, listen
from hotglm.model.compiled import find_calls
from hotglm.weights import places
from support.compiled_fixtures import fresh_dynamo
from support.fake_device import Choices, FakeDevice, FakePlaces
from support.swaps import same_bits

__all__ = ["fresh_dynamo"]  # a fixture for every test here

WIDTH = 4
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


class Graph(torch.cuda.CUDAGraph):
    """An object of torch's own type for graphs, which builds without CUDA have, but do not construct."""

    def __new__(cls) -> Any:
        """Leave the base out."""
        return object.__new__(cls)

    def __init__(self) -> None:
        """Capture nothing."""

    def replay(self) -> None:
        """Fail: no twin may come here."""
        raise RuntimeError("a graph of the live module was replayed")


def make_graph() -> Any:
    """Return a graph."""
    if torch.cuda.is_available():
        return torch.cuda.CUDAGraph()
    if torch.version.cuda is not None:
        pytest.skip("this torch constructs graphs on devices alone")
    return Graph()


class Carrying(nn.Module):
    """A model that replays a graph of its own for what it was captured with, and computes the rest eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.graphs: dict[int, Any] = {16: make_graph()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] in self.graphs:
            self.graphs[x.shape[0]].replay()
        found: torch.Tensor = self.linear(x)
        return found


def graph_forward(module: nn.Module) -> nn.Module:
    """Do what `torch.cuda.make_graphed_callables` does to a module: its `forward` is a closure over a graph."""
    graph, params, plain = make_graph(), tuple(module.parameters()), module.forward

    def make() -> Callable[[torch.Tensor], torch.Tensor]:
        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, *inputs: torch.Tensor) -> torch.Tensor:
                graph.replay()
                return inputs[0]

        def graphed(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = Graphed.apply(x, *params)  # type: ignore[no-untyped-call]
            return found

        def forward(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = graphed(x) if module.training else plain(x)
            return found

        return forward

    module.forward = make()
    return module.eval()


class Runner:
    """An object that keeps a graph."""

    def __init__(self, graph: Any) -> None:
        """Keep it."""
        self.inner = graph


def state(value: float) -> dict[str, torch.Tensor]:
    return {"linear.weight": torch.full((WIDTH, WIDTH), value), "linear.bias": torch.full((WIDTH,), value)}


@pytest.mark.parametrize("kind", ["attribute", "container", "object", "function", "graphed callable"])
def test_a_graph_is_refused_by_name_where_addresses_take_turns(kind: str) -> None:
    """However it hangs on a part, the slot is not made; the text names the attribute and both ways out."""
    part = nn.Linear(WIDTH, WIDTH)
    graph = make_graph()
    makers: dict[str, Callable[[], object]] = {
        "attribute": lambda: setattr(part, "graph", graph),
        "container": lambda: setattr(part, "graph", {"by size": [(1, graph)]}),
        "object": lambda: setattr(part, "graph", Runner(graph)),
        "function": lambda: setattr(part, "graph", lambda: graph.replay()),  # noqa: PLW0108 - it is to close over it
        "graphed callable": lambda: graph_forward(part),
    }
    makers[kind]()
    with pytest.raises(UnswappableError) as caught:
        hotglm.ModuleSlot(nn.Sequential(part), name="m", version="1.0.0")
    assert caught.value.code == "CANNOT_SWAP_CAPTURED"
    name = "0.forward" if kind == "graphed callable" else "0.graph"
    assert name in str(caught.value)
    assert "hotglm.integrations.cuda_graphs" in str(caught.value)
    assert "InPlace" in str(caught.value)


def test_a_graph_that_came_later_or_with_new_code_is_refused_and_the_live_one_serves() -> None:
    """One that is put on the live module, and one that a new module brings, are found by the next stage."""
    slot = hotglm.ModuleSlot(nn.Sequential(nn.Linear(WIDTH, WIDTH)), name="m", version="1.0.0")
    before = slot(X)
    new = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    new.graph = make_graph()
    with pytest.raises(UnswappableError, match="graph"):
        slot.update(new, version="1.0.1")
    slot.live.module.graph = make_graph()
    with pytest.raises(UnswappableError, match="graph"):
        slot.update(slot.live.module.state_dict(), version="1.0.1")
    assert same_bits(slot(X), before)
    assert slot.version == hotglm.Version("1.0.0")


def test_the_planner_takes_in_place_for_what_carries_a_graph() -> None:
    """`swap="auto"` sees the graph and says so."""
    slot = hotglm.ModuleSlot(Carrying(), name="m", version="1.0.0", swap="auto")
    assert slot.status().swap.startswith("in place: ")
    assert "'graphs'" in slot.status().swap


def test_in_place_the_graph_stays_with_the_live_module() -> None:
    """Its addresses hold the new weights; the twin that was proved had no graph to replay, and gave right outputs."""
    module = Carrying()
    graph, address = module.graphs[16], module.linear.weight.data_ptr()
    golden = hotglm.Golden(inputs=X, outputs=nn.functional.linear(X, *state(2.0).values()))
    policy = hotglm.StagePolicy(goldens=(golden,))
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=hotglm.InPlace(), policy=policy)
    slot.update(state(2.0), version="1.0.1")
    assert slot.live.module is module
    assert module.graphs[16] is graph
    assert module.linear.weight.data_ptr() == address
    assert same_bits(slot(X), golden.outputs)


def test_a_twin_that_is_made_to_replay_a_graph_says_so() -> None:
    """A warm-up of the shape that is captured would run live weights: the stage fails, and the live version serves."""
    slot = hotglm.ModuleSlot(Carrying(), name="m", version="1.0.0", swap=hotglm.InPlace())
    before = slot(X)
    policy = hotglm.StagePolicy(warm_up=(torch.ones(16, WIDTH),))
    with pytest.raises(WarmUpError, match="captured over"):
        slot.stage(state(2.0), version="1.0.1", policy=policy)
    assert same_bits(slot(X), before)


def test_in_place_a_graphed_callable_has_an_eager_twin() -> None:
    """What `make_graphed_callables` put on the live module is not on the twin, which runs the forward of its class."""
    module = graph_forward(nn.Linear(WIDTH, WIDTH))
    forward = vars(module)["forward"]
    weight = torch.full((WIDTH, WIDTH), 3.0)
    kinds: list[bool] = []

    def look(twin: nn.Module) -> bool:
        kinds.append("forward" in vars(twin))
        return same_bits(twin(X), nn.functional.linear(X, weight, torch.zeros(WIDTH)))

    policy = hotglm.StagePolicy(checks=(look,))
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=hotglm.InPlace(), policy=policy)
    slot.update({"weight": weight, "bias": torch.zeros(WIDTH)}, version="1.0.1")
    assert kinds == [False]
    assert vars(module)["forward"] is forward


# -- graph trees -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_device(*modules: nn.Module) -> Iterator[None]:
    """Say that the tensors of `modules` are on a fake device."""
    before, places.active = places.active, FakePlaces()
    try:
        places.active.add(FakeDevice("fake:0", Choices(0)), *modules)
        yield
    finally:
        places.active = before


class Plain(nn.Sequential):
    """A model with a method that is yet to be compiled."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        found: torch.Tensor = self(x)
        return found


class WithMethod(nn.Sequential):
    """A model of whose class a method is compiled with graph trees."""

    @torch.compile(mode="reduce-overhead")
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        found: torch.Tensor = self(x)
        return found


def compile_in_place(model: nn.Module, part: nn.Module, **options: Any) -> nn.Module:
    part.compile(**options)
    return model


def keep_compiled(model: Plain) -> Plain:
    model.encode = torch.compile(model.encode, mode="reduce-overhead")  # type: ignore[method-assign]
    return model


TREES: dict[str, Callable[[nn.Sequential], Any]] = {
    "module": lambda model: torch.compile(model, mode="reduce-overhead"),
    "in place": lambda model: compile_in_place(model, model, mode="max-autotune"),
    "part": lambda model: compile_in_place(model, model[0], options={"triton.cudagraphs": True}),
    "backend": lambda model: torch.compile(model, backend="cudagraphs"),
    "method": lambda model: keep_compiled(Plain(*model)),
    "class": lambda model: WithMethod(*model),
}


@pytest.mark.parametrize("kind", TREES)
def test_graph_trees_are_refused_on_a_device_and_taken_elsewhere(kind: str) -> None:
    """They would record again for each arena, on the live path; on the processor they are no graphs at all."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    compiled = TREES[kind](model)
    with on_device(model), pytest.raises(UnswappableError, match="graph trees") as caught:
        hotglm.ModuleSlot(compiled, name="m", version="1.0.0")
    assert caught.value.code == "CANNOT_SWAP_CAPTURED"
    assert hotglm.ModuleSlot(compiled, name="m", version="1.0.0").version == hotglm.Version("1.0.0")


@pytest.mark.parametrize("options", [{}, {"mode": "max-autotune-no-cudagraphs"}, {"backend": "eager"}])
def test_what_records_no_graphs_is_taken_on_a_device(options: dict[str, Any]) -> None:
    """Other ways of compiling have code that takes its weights wherever they are."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    compiled: Any = torch.compile(model, **options)
    with on_device(model):
        hotglm.ModuleSlot(compiled, name="m", version="1.0.0")


def test_graphs_for_all_of_inductor_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting that turns them on for every compilation is asked as well, at each stage."""
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with on_device(model):
        compiled: Any = torch.compile(model)
        slot = hotglm.ModuleSlot(compiled, name="m", version="1.0.0")
        config: Any = torch._inductor.config
        with config.patch({"triton.cudagraphs": True}), pytest.raises(UnswappableError, match="graph trees"):
            slot.update(model.state_dict(), version="1.0.1")


@pytest.mark.parametrize("kind", ["module", "part", "method", "class"])
def test_in_place_twins_stay_away_from_the_trees(kind: str) -> None:
    """The twin that is proved runs eagerly, so that nothing is recorded beside the service; the live one stays."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    compiled = TREES[kind](model)
    seen: list[bool] = []

    def look(twin: Any) -> bool:
        seen.append(any(True for _ in find_calls(twin)))
        call = getattr(twin, "encode", twin)
        before = torch._dynamo.utils.counters["stats"]["calls_captured"]
        assert torch.isfinite(call(X)).all()
        return bool(torch._dynamo.utils.counters["stats"]["calls_captured"] == before)

    policy = hotglm.StagePolicy(checks=(look,))
    slot = hotglm.ModuleSlot(compiled, name="m", version="1.0.0", swap=hotglm.InPlace(), policy=policy)
    slot.update({name: torch.ones_like(tensor) for name, tensor in slot.state_dict().items()}, version="1.0.1")
    assert seen == [False]
    assert any(True for _ in find_calls(slot.live.module)) == (kind in ("module", "part"))


def test_what_passes_have_recorded_is_counted() -> None:
    """A graph that torch records in a pass is in the status of the live generation, apart from what it compiles."""

    def record(model: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            callback: Any = torch._dynamo.callback
            with callback.callback_handler.install_callbacks(callback.CallbackTrigger.CUDAGRAPH_RECORDING, "0/0"):
                return model(*args)

        return run

    compiled: Any = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH)), backend=record)
    slot = hotglm.ModuleSlot(compiled, name="m", version="1.0.0")
    listen()
    slot(X)
    slot(X)
    assert slot.status().recaptures == 2 == count_captured(slot.live.module)
    assert slot.status().recompiles > 0
    slot.update({name: tensor + 1 for name, tensor in slot.state_dict().items()}, version="1.0.1")
    assert slot.status().recaptures == 0
