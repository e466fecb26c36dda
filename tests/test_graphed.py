"""Modules whose passes replay graphs: whose graph is replayed, when it is captured, and for how long it is kept."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import ArgumentError, UnswappableError, WarmUpError
from hotglm.integrations.cuda_graphs import count_graphs, graph_passes
from hotglm.model import graphed, sight
from hotglm.model.graphed import GraphedCall, find_graphed
from hotglm.model.sight import Sight
from hotglm.weights import places
from support.compiled_fixtures import fresh_dynamo
from support.fake_device import Choices, FakeDevice, FakePlaces, every_schedule
from support.fake_graphs import FakeRecorder, on_stream
from support.swaps import same_bits

__all__ = ["fresh_dynamo"]  # a fixture for every test here

WIDTH = 4
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
WIDE = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)


class Model(nn.Module):
    """Two layers, with a number that some tests compute from the weights."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = self.second(torch.relu(self.first(x))) * self.scale
        return found


class Scaled(Model):
    """One whose number is refreshed."""

    @hotglm.refresh("scale")
    def _refresh(self) -> None:
        self.scale = float(self.first.weight.detach()[0, 0])


class Bench:
    """A fake device with a slot on it, and what a cold start would give."""

    def __init__(self, choices: Choices | None = None) -> None:
        self.places = FakePlaces()
        self.device = self.places.add(FakeDevice("fake:0", choices or Choices(0)))
        self.recorder = FakeRecorder(self.device, owns=self._owns)

    def _owns(self, pointer: int) -> bool:
        return self.device.owns(pointer) or any(start <= pointer < end for start, end, _ in self.places._homes)

    def graph(self, module: nn.Module, inputs: Sequence[Any] = (X, WIDE), **options: Any) -> nn.Module:
        self.places.add(self.device, module)
        return graph_passes(module, inputs, recorder=self.recorder, **options)

    def slot(self, module: nn.Module | None = None, **options: Any) -> hotglm.ModuleSlot:
        made = self.graph(Model().eval() if module is None else module)
        return hotglm.ModuleSlot(made, name="m", version="1.0.0", **options)

    def run(self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = X) -> torch.Tensor:
        with torch.no_grad():
            found = call(x)
        self.device.finish()
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A fake device in the place of the processor."""
    before, made = places.active, Bench()
    places.active = made.places
    yield made
    places.active = before


def state(seed: int, kind: type[nn.Module] = Model) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(kind().state_dict())


def cold(seed: int, x: torch.Tensor = X, kind: type[nn.Module] = Model) -> torch.Tensor:
    model = kind().eval()
    model.load_state_dict(state(seed, kind))
    for method, _ in hotglm.model.derived.find_refreshers(model):
        getattr(model, method)()
    with torch.no_grad():
        found: torch.Tensor = model(x)
    return found


# -- swaps -------------------------------------------------------------------------------------------------------------


def swap_often(bench: Bench, num_swaps: int = 8, kind: type[nn.Module] = Model) -> list[int]:
    """Swap and run both kinds of passes; every output is that of a cold load. Return the receipts' captures."""
    slot = bench.slot(kind().eval())
    captured = []
    for seed in range(num_swaps):
        captured.append(slot.update(state(seed, kind), version=f"1.0.{seed + 1}").recaptures)
        before = bench.recorder.num_captured
        for x in (X, WIDE, X):
            assert same_bits(bench.run(slot, x), cold(seed, x, kind)), f"version {seed}"
        assert bench.recorder.num_captured == before, "a pass has captured"
        if seed:
            slot.rollback()
            assert same_bits(bench.run(slot), cold(seed - 1, kind=kind)), "after a rollback"
            slot.rollback(to=slot.live.number + 1)
    assert bench.recorder.num_lost == 0
    return captured


def test_swaps_give_what_a_cold_load_gives_and_capture_once_for_each_arena(bench: Bench) -> None:
    """An arena's graphs are captured in staging, and replayed whenever that arena comes round; never by a pass."""
    captured = swap_often(bench)
    assert captured == [2, 2, 2, 0, 0, 0, 0, 0]  # two kinds of inputs, three arenas for small weights
    assert bench.recorder.num_captured == 2 + 6  # the first generation's own as well


def test_a_new_graph_is_replayed_once_before_a_pass_needs_it(bench: Bench) -> None:
    """Its first replay brings it to the device: that is done while staging, with the sample inputs, and not counted."""
    slot = bench.slot()
    assert bench.recorder.num_replayed == 2
    slot.update(state(1), version="1.0.1")
    assert (bench.recorder.num_replayed, count_graphs(slot).replayed) == (4, 0)
    bench.device.finish()
    found = sorted(map(tuple, (recording.inputs[0].shape for recording in bench.recorder.made)))
    assert found == sorted([tuple(X.shape), tuple(WIDE.shape)] * 2)
    assert all(torch.isfinite(output).all() for made in bench.recorder.made for output in made.outputs)


def test_counts_say_what_was_captured_and_replayed(bench: Bench) -> None:
    """Captures, replays and passes without a graph are counted over all versions."""
    slot = bench.slot()
    slot.update(state(1), version="1.0.1")
    bench.run(slot)
    bench.run(slot, torch.ones(7, WIDTH))
    counts = count_graphs(slot)
    assert (counts.captured, counts.replayed) == (4, 1)
    assert dict(counts.missed) == {"inputs of another kind": 1}


@pytest.mark.parametrize("seed", range(4))
def test_replays_are_waited_for_before_their_arena_is_written_again(seed: int, bench: Bench) -> None:
    """Passes whose kernels are still queued when their version goes read that version, whenever they run (O2)."""
    bench.device.choices = Choices(seed)
    slot = bench.slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    found = []
    for number in range(5):
        slot.update(state(number), version=f"1.0.{number + 1}")
        with torch.no_grad(), on_stream("other"):
            found += [(number, slot(X)), (number, slot(X))]
    bench.device.finish()
    assert [same_bits(output, cold(number)) for number, output in found] == [True] * 10


def test_a_number_that_a_refresh_computed_is_not_that_of_another_version(bench: Bench) -> None:
    """A capture uses numbers up: where one differs, the graph of that arena is captured again, and never reused."""
    captured = swap_often(bench, kind=Scaled)
    assert captured == [2] * 8


def test_new_code_is_captured_as_the_live_code_is(bench: Bench) -> None:
    """A module of another class, offered as a source, gets graphs over its memory in staging."""

    class Other(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x))

    slot = bench.slot()
    new = Other().eval()
    new.load_state_dict(state(3))
    receipt = slot.update(new, version="1.1.0")
    assert receipt.recaptures == 2
    assert same_bits(bench.run(slot), torch.tanh(cold(3)))
    assert count_graphs(slot).replayed == 1


def test_compiled_code_runs_inside_the_graph(bench: Bench) -> None:
    """A compiled module is captured as it runs, and what is offered compiled or plain later stays both."""
    compiled: Any = torch.compile(Model().eval(), backend="eager")
    slot = hotglm.ModuleSlot(bench.graph(compiled), name="m", version="1.0.0")
    assert isinstance(slot.live.module, Model)
    for seed in range(5):
        receipt = slot.update(state(seed), version=f"1.0.{seed + 1}")
        assert same_bits(bench.run(slot), cold(seed))
        assert receipt.recompiles == slot.status().recompiles == 0
    call = find_graphed(slot.live.module)[""]
    assert call.inner is not None
    assert count_graphs(slot).replayed == 5


def test_in_place_the_graphs_of_the_live_module_stay(bench: Bench) -> None:
    """Addresses stay and so do graphs: nothing is captured, and replays read the weights written there."""
    policy = hotglm.StagePolicy(warm_up=(X,))
    slot = bench.slot(swap=hotglm.InPlace(timeout_s=5.0), policy=policy)
    for seed in range(4):
        receipt = slot.update(state(seed), version=f"1.0.{seed + 1}")
        assert receipt.recaptures == 0
        assert same_bits(bench.run(slot), cold(seed))
    slot.rollback()
    assert same_bits(bench.run(slot), cold(2))
    counts = count_graphs(slot)
    assert (counts.captured, counts.replayed, dict(counts.missed)) == (2, 5, {})


# -- passes without a graph --------------------------------------------------------------------------------------------


def test_passes_of_other_kinds_run_without_a_graph_and_are_counted(bench: Bench) -> None:
    """Shapes, gradients, autocast, training and captured streams that no graph is for give what the module gives."""
    slot = bench.slot(Model().eval())
    slot.update(state(1), version="1.0.1")
    assert same_bits(bench.run(slot, torch.ones(5, WIDTH)), cold(1, torch.ones(5, WIDTH)))
    slot(X).sum().backward()
    assert all(parameter.grad is not None for parameter in slot.live.module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bench.run(slot).dtype is torch.bfloat16
    with on_stream("captured"):
        assert same_bits(bench.run(slot), cold(1))
    slot.train()
    assert same_bits(bench.run(slot), cold(1))
    assert dict(count_graphs(slot).missed) == {
        "inputs of another kind": 1,
        "gradients wanted": 1,
        "another autocast mode": 1,
        "a stream that is captured": 1,
        "another training flag": 1,
    }
    assert count_graphs(slot).replayed == 0


def test_passes_of_other_kinds_can_be_refused(bench: Bench) -> None:
    """With `otherwise="error"` they raise and are counted, and those that were captured go on."""
    slot = hotglm.ModuleSlot(bench.graph(Model().eval(), otherwise="error"), name="m", version="1.0.0")
    slot.update(state(1), version="1.0.1")
    with torch.no_grad(), pytest.raises(ArgumentError, match="inputs of another kind"):
        slot(torch.ones(5, WIDTH))
    with pytest.raises(ArgumentError, match="gradients"):
        slot(X)
    assert same_bits(bench.run(slot), cold(1))


def test_arguments_and_outputs_of_any_structure(bench: Bench) -> None:
    """Keyword arguments, nested ones and constants choose the graph; outputs come back as the pass returned them."""

    class Rich(Model):
        def forward(self, x: Any, *, flip: bool = False) -> dict[str, Any]:  # type: ignore[override]
            found = super().forward(x["in"])
            return {"out": [-found if flip else found, None], "flip": flip}

    inputs = [{"x": {"in": X}, "flip": flip} for flip in (True, False)]
    module = bench.graph(Rich().eval(), inputs)
    for each in inputs:
        with torch.no_grad():
            found = module(**each)
        bench.device.finish()
        assert found["flip"] is each["flip"]
        with torch.no_grad():
            assert same_bits(found["out"][0], module.forward(**each)["out"][0])
    assert count_graphs(module).replayed == 2


def test_outputs_are_the_callers(bench: Bench) -> None:
    """What a pass returned is not changed by the next pass."""
    slot = bench.slot()
    slot.update(state(1), version="1.0.1")
    one = bench.run(slot)
    kept = one.clone()
    bench.run(slot, X + 1)
    assert same_bits(one, kept)


# -- turns -------------------------------------------------------------------------------------------------------------


class NoLock:
    """Bug: nobody takes turns."""

    def __enter__(self) -> None:
        """Let anybody in."""

    def __exit__(self, *_: object) -> None:
        """Let nobody know."""

    def acquire(self, *, blocking: bool) -> bool:
        """Be free."""
        return not blocking

    def release(self) -> None:
        """Stay free."""


@pytest.mark.parametrize("is_planted", [False, True])
def test_no_pass_comes_between_the_inputs_of_another_and_its_replay(is_planted: bool, bench: Bench) -> None:
    """Threads take turns at the memory of a graph; without a lock one computes with what the other was given."""
    module = bench.graph(Model().eval())
    graphs: Any = find_graphed(module)[""].graphs
    if is_planted:
        graphs._lock = NoLock()
    others: list[torch.Tensor] = []

    def intrude() -> None:
        if graphs._lock.acquire(blocking=False):  # as another thread would
            graphs._lock.release()
            bench.recorder.between = lambda: None
            others.append(module(X + 1))

    bench.recorder.between = intrude
    found = bench.run(module)
    with torch.no_grad():
        assert same_bits(found, module.forward(X)) == (not is_planted)
    assert len(others) == is_planted


@pytest.mark.parametrize("is_planted", [False, True])
def test_passes_on_two_streams_are_put_behind_each_other(is_planted: bool, bench: Bench) -> None:
    """Whatever the device does first, each pass gives its own output; without the wait some order mixes them up."""
    module = bench.graph(Model().eval(), [X])
    bench.device.is_coarse = True
    bench.recorder.follows = not is_planted
    with torch.no_grad():
        expected = [module.forward(X), module.forward(X + 1)]
    wrong = num_orders = 0
    for choices in every_schedule():
        bench.device.choices = choices
        with torch.no_grad():
            found = []
            for name, x in (("one", X), ("two", X + 1)):
                with on_stream(name):
                    found.append(module(x))
        bench.device.finish()
        wrong += not all(map(same_bits, found, expected))
        num_orders += 1
        if num_orders > 400:
            break
    assert num_orders > 5
    assert (wrong > 0) == is_planted


@pytest.mark.stress
@pytest.mark.parametrize("swap", [hotglm.Flip(), hotglm.InPlace(timeout_s=20.0)])
def test_threads_on_several_streams_beside_swaps(swap: Any, bench: Bench) -> None:
    """Whatever four threads on three streams run while versions change: each output is that of its version."""
    bench.device.streams.update({f"stream {number}": deque() for number in range(3)})
    slot = bench.slot(swap=swap)
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def serve(number: int) -> None:
        try:
            with torch.no_grad(), on_stream(f"stream {number % 3}"):
                while not stop.is_set():
                    x = (X, WIDE)[len(found) % 2]
                    with slot.acquire() as generation:
                        found.append((generation.version.release[2] - 1, x, generation.module(x)))
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for seed in range(12):
        slot.update(state(seed), version=f"1.0.{seed + 1}")
    stop.set()
    for thread in threads:
        thread.join(60)
    bench.device.finish()
    assert not failures
    assert all(same_bits(output, cold(seed, x)) for seed, x, output in found if seed >= 0)
    assert bench.recorder.num_lost == 0


# -- planted bugs ------------------------------------------------------------------------------------------------------


def reuse_whatever_is_there(call: GraphedCall, home: object) -> int:
    """Bug: the graphs of the first memory are replayed for all."""
    known = call.graphs.homes
    if call.bound is None and len(known):
        call.bound = next(iter(known.values()))
        return 0
    return PREPARE(call, home)


def capture_later(call: GraphedCall, home: object) -> int:
    """Bug: a stage leaves the capture to the first pass."""
    return PREPARE(call, home) if home is None else 0


PREPARE = GraphedCall.prepare
CALL = GraphedCall.__call__


def capture_when_needed(call: GraphedCall, *args: Any) -> Any:
    """Bug: a pass that finds no graphs captures some."""
    if call.bound is None:
        PREPARE(call, None)
    return CALL(call, *args)


def test_the_graph_of_another_arena_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests compare would differ if a graph were replayed for a module that it was not captured for."""
    monkeypatch.setattr(GraphedCall, "prepare", reuse_whatever_is_there)
    with pytest.raises(AssertionError, match="version"):
        swap_often(bench)


def test_a_capture_on_the_live_path_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests count would differ if a pass captured anything."""
    monkeypatch.setattr(GraphedCall, "prepare", capture_later)
    monkeypatch.setattr(GraphedCall, "__call__", capture_when_needed)
    with pytest.raises(AssertionError, match="a pass has captured"):
        swap_often(bench)


def test_a_number_that_is_left_out_of_the_comparison_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are told by addresses alone give the old version's number: what these tests compare would differ."""
    look = sight.look_at

    def look_away(module: nn.Module, **options: Any) -> Sight:
        found = look(module, **options)
        return Sight(parts={name: seen for name, seen in found.parts.items() if name != "scale"}, host=found.host)

    monkeypatch.setattr(graphed, "look_at", look_away)
    with pytest.raises(AssertionError, match="version"):
        swap_often(bench, kind=Scaled)


# -- for how long ------------------------------------------------------------------------------------------------------


def remember(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Note every recording that is made, weakly."""
    made: list[weakref.ref[Any]] = []
    plain = FakeRecorder.capture

    def capture(recorder: FakeRecorder, *args: Any) -> Any:
        recording = plain(recorder, *args)
        made.append(weakref.ref(recording))
        return recording

    monkeypatch.setattr(FakeRecorder, "capture", capture)
    return made


@pytest.mark.parametrize("is_planted", [False, True])
def test_graphs_go_with_their_memory(is_planted: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first module go with it, those of an arena with the arena and its last module; none stays."""
    made = remember(bench, monkeypatch)
    slot = bench.slot()
    if is_planted:  # Bug: graphs are kept by address for ever
        find_graphed(slot.live.module)[""].graphs.homes = {}  # type: ignore[assignment]
    graphs = find_graphed(slot.live.module)[""].graphs
    for seed in range(5):
        slot.update(state(seed), version=f"1.0.{seed + 1}")
    gc.collect()
    assert [reference() is None for reference in made[:2]] == [True, True]  # the first module is gone
    assert sum(reference() is not None for reference in made) == 6
    held = slot.live.module
    slot.close()
    del slot
    gc.collect()
    if not is_planted:
        assert sum(reference() is not None for reference in made) == 2  # somebody still runs the last one
        assert same_bits(bench.run(held), cold(4))
    del held
    gc.collect()
    assert (sum(reference() is not None for reference in made) == 0) == (not is_planted)
    del graphs


def test_an_arena_that_is_given_up_keeps_its_graphs_for_those_who_hold_it(bench: Bench) -> None:
    """A module that somebody kept replays graphs over its own memory, while the slot goes on in other memory."""
    slot = bench.slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    slot.update(state(1), version="1.0.1")
    kept = slot.live.module
    for seed in range(2, 6):
        slot.update(state(seed), version=f"1.0.{seed}")
        assert same_bits(bench.run(slot), cold(seed))
        assert same_bits(bench.run(kept), cold(1))
    assert bench.recorder.num_lost == 0


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_graphed_module_is_otherwise_what_it_was(bench: Bench) -> None:
    """Class, names and signature stay; a copy of it has no graphs, and gives what it gives."""
    module = bench.graph(Model().eval())
    assert type(module) is Model
    assert list(module.state_dict()) == list(Model().state_dict())
    copied = copy.deepcopy(module)
    assert find_graphed(copied) == {}
    replayed = bench.recorder.num_replayed
    with torch.no_grad():
        assert same_bits(copied(X), module.forward(X))
    assert bench.recorder.num_replayed == replayed


def test_graphs_are_captured_by_threads_of_stages(bench: Bench) -> None:
    """What is captured after the module was graphed is captured by no thread of the service."""
    slot = bench.slot()
    slot.update(state(1), version="1.0.1")
    assert bench.recorder.threads[:2] == [threading.get_ident()] * 2
    assert threading.get_ident() not in bench.recorder.threads[2:]


def test_a_tensor_that_an_attribute_loses_is_kept_for_the_graph(bench: Bench) -> None:
    """A pass without a graph that replaces a cache frees nothing that a graph reads; it goes with the module."""
    module: Any = Model().eval()
    module.cache = [torch.ones(WIDTH)]
    holder = nn.Module()
    holder.register_buffer("cache", module.cache[0])
    bench.places.add(bench.device, holder)
    reference = weakref.ref(module.cache[0])
    module = bench.graph(module)
    del holder
    module.cache[0] = torch.zeros(WIDTH)
    gc.collect()
    assert reference() is not None
    del module
    gc.collect()
    assert reference() is None


def test_a_weight_among_the_outputs_keeps_no_arena(bench: Bench) -> None:
    """What a pass returns of the module itself is copied: arenas come round, and outputs are those of their version."""

    class Open(Model):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.first.weight, self.first.weight[0]

    slot = bench.slot(Open().eval(), memory=hotglm.MemoryPolicy(small_nbytes=0))
    captured, kept = [], []
    for seed in range(5):
        captured.append(slot.update(state(seed), version=f"1.0.{seed + 1}").recaptures)
        with torch.no_grad():
            kept.append((seed, slot(X)))
    bench.device.finish()
    assert captured == [2, 2, 0, 0, 0]
    for seed, (output, weight, row) in kept:
        assert same_bits(output, cold(seed))
        assert same_bits(weight, state(seed)["first.weight"])
        assert same_bits(row, weight[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


class Caching(Model):
    """One that changes itself in a pass."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class Writing(Model):
    """One that writes its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1))


class Opaque(Model):
    """One that returns an object."""

    def forward(self, x: torch.Tensor) -> Any:
        return threading.local()


class OnHost(Model):
    """One that keeps a tensor in memory of the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = {"eps": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (Caching, UnswappableError, "calls"),
        (Writing, WarmUpError, "writes them"),
        (Opaque, WarmUpError, "among its outputs"),
        (OnHost, UnswappableError, "factor"),
    ],
)
def test_what_a_graph_would_not_repeat_is_refused(
    kind: type[nn.Module], error: type[Exception], words: str, bench: Bench
) -> None:
    """Passes that change the module or their inputs, or use up values of the host, are refused by name."""
    with pytest.raises(error, match=words):
        bench.graph(kind().eval())


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([], {}, "no inputs"),
        ([3], {}, "without a tensor"),
        ([(X, object())], {}, "inputs with"),
        ([X], {"otherwise": "maybe"}, "otherwise"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    inputs: list[Any], options: dict[str, Any], words: str, bench: Bench
) -> None:
    """Each is named."""
    with pytest.raises(ArgumentError, match=words):
        bench.graph(Model(), inputs, **options)


def test_a_module_is_graphed_last(bench: Bench) -> None:
    """One whose tensors were converted or replaced since is refused by the slot; writing them in place is no harm."""
    module = bench.graph(Model().eval())
    module.load_state_dict(state(1))
    assert same_bits(bench.run(hotglm.ModuleSlot(module, name="m", version="1.0.0")), cold(1))
    changes: list[Callable[[Any], object]] = [
        lambda model: model.double(),
        lambda model: setattr(model.first, "bias", nn.Parameter(torch.zeros(WIDTH))),
    ]
    for change in changes:
        moved = bench.graph(Model().eval())
        change(moved)
        bench.places.add(bench.device, moved)
        with pytest.raises(UnswappableError, match="graph the module last"):
            hotglm.ModuleSlot(moved, name="m", version="1.0.0")


def test_a_module_is_graphed_once(bench: Bench) -> None:
    """Graphs inside graphs, or twice, are refused."""
    module = bench.graph(Model().eval())
    with pytest.raises(UnswappableError, match="without graphs"):
        bench.graph(module)
    with pytest.raises(UnswappableError, match="'0'"):
        bench.graph(nn.Sequential(module))


def test_a_slot_is_not_compiled_over_its_graphs(bench: Bench) -> None:
    """`slot.compile()` would leave them out without a word; it says so, and they go on."""
    slot = bench.slot()
    with pytest.raises(UnswappableError, match="compile first"):
        slot.compile(backend="eager")
    assert same_bits(bench.run(slot), bench.run(slot.live.module.forward))
    assert count_graphs(slot).replayed == 1


def test_a_capture_that_fails_while_staging_changes_nothing(bench: Bench) -> None:
    """The stage fails and says why; the live version serves on by its graphs, bit for bit, and the next stage works."""
    slot = bench.slot()
    slot.update(state(1), version="1.0.1")

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    bench.recorder.fails = fail
    with pytest.raises(WarmUpError, match="not permitted"):
        slot.update(state(2), version="1.0.2")
    bench.recorder.fails = lambda: None
    replayed = bench.recorder.num_replayed
    assert same_bits(bench.run(slot), cold(1))
    assert bench.recorder.num_replayed == replayed + 1
    slot.update(state(3), version="1.0.3")
    assert same_bits(bench.run(slot), cold(3))


def test_running_statistics_are_as_they_were_after_a_capture(bench: Bench) -> None:
    """Passes that are only run to be captured leave no trace in buffers."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bench.graph(model, [X])
    assert all(same_bits(buffer, before[name]) for name, buffer in model.named_buffers())
