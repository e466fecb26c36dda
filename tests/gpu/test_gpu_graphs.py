"""CUDA: graphs in a slot. Each test names the hazard that it guards; what needs proof plants the missing wait too."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import UnswappableError, WarmUpError
from hotglm.integrations.cuda_graphs import count_graphs, graphed
from hotglm.model.graphed import find_graphed
from hotglm.weights.cuda_graphs import CudaRecorder

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 400_000_000
"""About 0.2 s at 2 GHz: long against a stage of the small models here."""

WIDTH = 256
TIGHT = hotglm.MemoryPolicy(small_nbytes=0)


class Model(nn.Module):
    """Two layers and a norm, in bfloat16."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.to(dtype=torch.bfloat16).eval().requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = self.norm(x + self.layers(x))
        return found


def draw(batch: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, WIDTH, generator=generator).bfloat16().cuda()


INPUTS = (8, 16)


def open_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def hold_back() -> None:
    """Put a long kernel in front of what the current stream is given."""
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]


def plain(module: nn.Module) -> nn.Module:
    return module


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module)
    found: nn.Module = made
    return found


def make(seed: int = 0, way: Callable[[nn.Module], nn.Module] = plain) -> nn.Module:
    return graphed(way(Model(seed).cuda()), [draw(batch) for batch in INPUTS], otherwise="error")


def start_cold(seed: int, x: torch.Tensor, way: Callable[[nn.Module], nn.Module] = plain) -> torch.Tensor:
    """Return what a module gives that is started with these weights and captured by itself."""
    found: torch.Tensor = make(seed, way)(x)
    return found


@pytest.mark.parametrize("way", [plain, compiled])
def test_a_swap_gives_what_a_cold_load_gives_and_no_pass_captures(way: Callable[[nn.Module], nn.Module]) -> None:
    """Outputs are equal, bit for bit; each arena is captured once; rollbacks replay the graphs of their arena."""
    slot = hotglm.ModuleSlot(make(way=way), name="m", version="1.0.0")
    captured = []
    for seed in range(1, 7):
        receipt = slot.update(Model(seed).state_dict(), version=f"1.0.{seed}")
        captured.append(receipt.recaptures)
        before = count_graphs(slot)
        for batch in INPUTS:
            x = draw(batch)
            assert torch.equal(slot(x), start_cold(seed, x, way))
        after = count_graphs(slot)
        assert (after.captured, after.replayed) == (before.captured, before.replayed + 2)
        assert receipt.recompiles == slot.status().recompiles == 0
        if seed > 1:
            slot.rollback()
            assert torch.equal(slot(draw()), start_cold(seed - 1, draw(), way))
            slot.rollback(to=slot.live.number + 1)
    assert captured == [2, 2, 2, 0, 0, 0]


def test_queued_replays_read_their_own_version() -> None:
    """Hazard: an arena is written again while a replay over it is still queued behind a long kernel."""
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0", memory=TIGHT)
    stream = open_stream()
    found = []
    for seed in range(1, 6):
        slot.update(Model(seed).state_dict(), version=f"1.0.{seed}")
        with torch.cuda.stream(stream):
            hold_back()
            found.append((seed, slot(draw())))
    torch.cuda.synchronize()
    assert [torch.equal(output, start_cold(seed, draw())) for seed, output in found] == [True] * 5


@pytest.mark.parametrize("is_planted", [False, True])
def test_passes_on_two_streams_do_not_mix_up_their_inputs(is_planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard: a pass copies its inputs to where another one's replay, on another stream, has yet to read them."""
    module, x, y = make(), draw(seed=1), draw(seed=2)
    expected = [module(x).clone(), module(y).clone()]
    torch.cuda.synchronize()
    copy_now = CudaRecorder.copy
    streams = (open_stream(), open_stream())

    def copy_and_dally(recorder: CudaRecorder, source: torch.Tensor, target: torch.Tensor) -> None:
        copy_now(recorder, source, target)
        if torch.cuda.current_stream() == streams[0]:
            hold_back()

    monkeypatch.setattr(CudaRecorder, "copy", copy_and_dally)
    if is_planted:
        monkeypatch.setattr(CudaRecorder, "follow", lambda recorder, stream: None)
    found = []
    for stream, inputs in zip(streams, (x, y), strict=True):
        with torch.cuda.stream(stream):
            found.append(module(inputs))
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected)) == (not is_planted)


def test_a_capture_beside_the_service_disturbs_nobody() -> None:
    """Hazard: what threads of the service do ends a capture of a stage, becomes part of it, or is ended by it."""
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0", memory=TIGHT)
    outputs = {seed: start_cold(seed, draw()) for seed in range(9)}
    versions = {seed: Tagged(seed) for seed in range(1, 9)}  # before others draw random numbers
    stop, wrong, failures = threading.Event(), [], []
    torch.cuda.synchronize()

    def serve() -> None:
        try:
            with torch.cuda.stream(open_stream()):
                while not stop.is_set():
                    with slot.acquire() as generation:
                        found = generation.module(draw())
                        torch.rand(1 << 20, device="cuda").add_(1.0)  # eager work, allocations and random numbers
                        torch.cuda.current_stream().synchronize()
                        seed = int(str(generation.version).rpartition(".")[2])
                        wrong.append(not torch.equal(found, outputs[seed]))
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for seed, new in versions.items():
        receipt = slot.update(new, version=f"1.1.{seed}")
        assert receipt.recaptures == 2
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert len(wrong) > 0
    assert not any(wrong)


def test_reserved_memory_is_flat_and_comes_back() -> None:
    """Hazard: graphs, their pools and workspaces add up over swaps, or outlive the slot."""
    gc.collect()
    torch.cuda.empty_cache()
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0")
    reserved = []
    for seed in range(30):
        slot.update(Model(seed).state_dict(), version=f"1.0.{seed + 1}")
        slot(draw())
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[9]
    allocated = torch.cuda.memory_allocated()
    slot.close()
    del slot
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < allocated


def test_casts_of_autocast_are_those_of_the_version() -> None:
    """Hazard: a graph reads the casts that autocast kept of weights while it was captured."""

    def start(seed: int) -> nn.Module:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return graphed(Model(seed).float().cuda().requires_grad_(requires_grad=True), [x], otherwise="error")

    x = torch.randn(8, WIDTH, device="cuda")
    slot = hotglm.ModuleSlot(start(0), name="m", version="1.0.0")
    for seed in range(1, 6):
        slot.update(Model(seed).float().state_dict(), version=f"1.0.{seed}")
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(slot(x), start(seed)(x))


# -- graphs that are not hotglm's --------------------------------------------------------------------------------------


class Tagged(Model):
    """A model with another number in an attribute for each version, each of which is captured anew."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.tag = seed


class Carrying(Model):
    """A model that has captured a pass of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.graph: Any = None

    def capture(self) -> Carrying:
        self.static_in = draw()
        stream = open_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().forward(self.static_in)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.static_out = super().forward(self.static_in)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.graph is None or x.shape != self.static_in.shape:
            return super().forward(x)
        self.static_in.copy_(x)
        self.graph.replay()
        found: torch.Tensor = self.static_out.clone()
        return found


@pytest.mark.parametrize("kind", ["raw", "make_graphed_callables"])
def test_graphs_of_the_module_are_refused_under_flip_and_read_new_weights_in_place(kind: str) -> None:
    """Hazard: a graph that was captured over an address goes on reading it after the weights have moved."""
    module: Any
    if kind == "raw":
        module = Carrying().cuda().capture()
    else:
        module = torch.cuda.make_graphed_callables(Model().cuda(), (draw(),))
    with pytest.raises(UnswappableError, match="graph") as caught:
        hotglm.ModuleSlot(module, name="m", version="1.0.0")
    assert caught.value.code == "CANNOT_SWAP_CAPTURED"
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap="auto", constants=["static_*"])
    assert slot.status().swap.startswith("in place")
    for seed in range(1, 4):
        slot.update(Model(seed).state_dict(), version=f"1.0.{seed}")
        cold: Any = Carrying(seed).cuda().capture()
        if kind != "raw":
            cold = torch.cuda.make_graphed_callables(Model(seed).cuda(), (draw(),))
        assert torch.equal(slot(draw(seed=9)), cold(draw(seed=9)))


def test_graph_trees_are_refused_under_flip_and_never_record_again_in_place() -> None:
    """Hazard: torch records anew for new addresses in a pass, or a staged twin records beside the service."""

    def start(seed: int) -> Any:
        made: Any = torch.compile(Model(seed).cuda(), mode="reduce-overhead")
        return made

    def run_often(model: Any) -> torch.Tensor:
        outputs: list[torch.Tensor] = [model(draw()).clone() for _ in range(4)]
        return outputs[-1]

    with pytest.raises(UnswappableError, match="graph trees"):
        hotglm.ModuleSlot(start(0), name="m", version="1.0.0")
    slot = hotglm.ModuleSlot(start(0), name="m", version="1.0.0", swap="auto")
    run_often(slot)
    assert slot.status().recaptures >= 1
    policy = hotglm.StagePolicy(warm_up=(draw(),))
    for seed in range(1, 5):
        receipt = slot.update(Model(seed).state_dict(), version=f"1.0.{seed}", policy=policy)
        found = slot(draw()).clone()
        assert (receipt.recompiles, receipt.recaptures) == (0, 0)
        assert (slot.status().recompiles, slot.status().recaptures) == (0, 0)
        assert torch.equal(found, run_often(start(seed)))


def test_graphs_of_hotglm_take_swaps_in_place() -> None:
    """Addresses stay, and so do graphs: nothing is captured, and replays read the new weights."""
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0", swap=hotglm.InPlace())
    for seed in range(1, 4):
        receipt = slot.update(Model(seed).state_dict(), version=f"1.0.{seed}")
        assert receipt.recaptures == 0
        assert torch.equal(slot(draw()), start_cold(seed, draw()))
    assert count_graphs(slot).captured == 2


# -- the last one: it makes a capture fail -----------------------------------------------------------------------------


class Asking(Model):
    """A model that waits for the device in its pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        return found if float(found.sum()) > -1e30 else -found


def test_a_capture_that_fails_leaves_the_service_and_the_device_as_they_were() -> None:
    """Hazard: after a capture that failed, torch's allocator goes on as if it went on (torch 2.11 and before)."""
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0")
    slot.update(Model(1).state_dict(), version="1.0.1")
    before = slot(draw()).clone()
    with pytest.raises(WarmUpError, match="captured"):
        slot.update(Asking(2), version="1.1.0")
    assert torch.equal(slot(draw()), before)
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.isfinite(torch.rand(4, device="cuda")).all()  # the generator is not taken for captured
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    slot.update(Model(3).state_dict(), version="1.0.3")
    assert torch.equal(slot(draw()), start_cold(3, draw()))
    assert find_graphed(slot.live.module)[""].bound is not None
