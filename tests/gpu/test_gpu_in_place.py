"""CUDA: swaps in place. Each test names the hazard that it guards, and provokes it with a kernel that is held back.

`PYTHONPATH=. python3 -m pytest -m gpu tests/gpu/test_gpu_in_place.py`. A test whose provocation needs proof plants the
missing wait as well, and fails if that goes unnoticed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import DrainTimeoutError, HotglmError, UnswappableError
from hotglm.weights.cuda import CudaDevice, find_cuda_device
from hotglm.weights.cuda_lane import CudaLane
from hotglm.weights.device import Event
from hotglm.weights.device_exchange import DeviceExchange
from hotglm.weights.exchanges import Exchanges
from support.gpu import Adder, write_version

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 400_000_000
"""About 0.2 s at 2 GHz: long against anything that a commit does with the small models here."""

IMAGES = ["device", "host"]


class Layers(nn.Module):
    """Square layers, many small ones, a tie, a buffer, a table with gaps, odd sizes and dtypes."""

    def __init__(self, side: int = 512) -> None:
        super().__init__()
        self.large = nn.ModuleList(nn.Linear(side, side) for _ in range(4))
        self.small = nn.ParameterList(nn.Parameter(torch.randn(1 + index % 37)) for index in range(300))
        self.low = nn.Parameter(torch.randn(side, 33).half())
        self.norm = nn.BatchNorm1d(side)
        self.tied = nn.Linear(side, side, bias=False)
        self.tied.weight = cast(nn.Linear, self.large[0]).weight
        self.register_buffer("flags", torch.zeros(7, dtype=torch.bool))
        self.register_buffer("table", torch.randn(side, 2 * 16)[:, :16])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.large:
            x = torch.relu(layer(x))
        bias = torch.cat(list(self.small)).sum()
        found: torch.Tensor = self.tied(self.norm(x)) @ self.get_buffer("table") + bias + self.low.float().sum()
        return found


def make(seed: int) -> Layers:
    torch.manual_seed(seed)
    return Layers().eval().requires_grad_(requires_grad=False)


def make_slot(module: nn.Module, *, image: Any = "auto", **options: Any) -> hotglm.ModuleSlot:
    swap = hotglm.InPlace(timeout_s=2.0, image=image)
    return hotglm.ModuleSlot(module.cuda(), name="m", version="1.0.0", swap=swap, **options)


def read_values(found: torch.Tensor) -> list[float]:
    torch.cuda.synchronize()
    return sorted(set(found.cpu().tolist()))


def find_addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    yield find_cuda_device(torch.cuda.current_device())
    torch.cuda.synchronize()


X = torch.linspace(-1, 1, 8 * 512).view(8, 512)


# -- what goes live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("kind", ["file", "mapping", "mapping on the device"])
def test_a_swap_in_place_equals_a_cold_load(tmp_path: Path, kind: str, image: str) -> None:
    """Outputs and digests are those of a cold load, nothing has moved, and a rollback brings the first version back."""
    module, new = make(0), make(1)
    first, cold = make(0).cuda()(X.cuda()), make(1).cuda()(X.cuda())
    source: Any = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    if kind == "file":
        save_file({name: tensor.contiguous() for name, tensor in source.items()}, tmp_path / "a.safetensors")
        source = tmp_path / "a.safetensors"
    if kind == "mapping on the device":
        source = {name: tensor.cuda() for name, tensor in source.items()}
    slot = make_slot(module, image=image)
    before = find_addresses(module)
    receipt = slot.update(source, version="1.0.1")
    plain = hotglm.ModuleSlot(make(0), name="m", version="1.0.0")
    assert receipt.digest == plain.update(new.state_dict(), version="1.0.1").digest
    assert receipt.in_place is not None
    assert receipt.in_place.addresses_stable
    assert torch.equal(slot(X.cuda()), cold)
    slot.rollback()
    assert torch.equal(slot(X.cuda()), first)
    slot.rollback(to="1.0.1")
    assert torch.equal(slot(X.cuda()), cold)
    assert find_addresses(module) == before


@pytest.mark.parametrize("image", IMAGES)
def test_a_captured_graph_replays_what_is_live(image: str) -> None:
    """Hazard: a raw graph over the live module replays old, mixed or foreign memory after a swap."""
    module, x = make(0), X.cuda()
    slot = make_slot(module, image=image)
    with torch.no_grad():
        slot(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = slot(x)
        for number in (1, 2, 3):
            slot.update(make(number).state_dict(), version=f"1.0.{number}")
            with slot.acquire():
                graph.replay()
            assert torch.equal(found, slot(x))
            assert torch.equal(found, make(number).cuda()(x))
        slot.rollback()
        graph.replay()
        assert torch.equal(found, make(2).cuda()(x))


def test_derived_state_is_recomputed_and_compared() -> None:
    """A derived buffer, and one in an attribute, outside of the arena, are exchanged like weights."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64), requires_grad=False)
            self.register_buffer("norm", torch.full((), 64.0), persistent=False)
            self.columns: torch.Tensor = torch.ones(64).cuda() * 64

        @hotglm.refresh("norm", "columns")
        def _refresh(self) -> None:
            self.get_buffer("norm").copy_(self.weight.norm())
            self.columns = self.weight.sum(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight / self.get_buffer("norm") + self.columns

    slot, x = make_slot(Scaled()), torch.ones(2, 64, device="cuda")
    receipt = slot.update({"weight": torch.full((64, 64), 2.0)}, version="1.0.1")
    assert receipt.in_place is not None
    assert (receipt.in_place.derived_refreshed, len(receipt.in_place.derived)) == (True, 2)
    assert slot(x).tolist() == [[1.0 + 128.0] * 64] * 2
    slot.rollback()
    assert slot(x).tolist() == [[1.0 + 64.0] * 64] * 2


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("is_planted", [False, True])
def test_weights_are_written_while_a_kernel_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, *, is_planted: bool
) -> None:
    """Hazard: the gate is empty, and a kernel of the last pass is still queued."""
    slot, stream = make_slot(Adder(), image=image), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    staged = slot.stage(write_version(tmp_path, 1), version="1.0.1")
    zero = torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    if is_planted:
        monkeypatch.setattr(Exchanges, "wait_for_work", lambda exchange, timeout_s: None)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        found = slot(zero)
    slot.commit(staged)
    assert (read_values(found) == [0.0]) is not is_planted
    assert read_values(slot(zero)) == [1.0]


class _Never:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("is_planted", [False, True])
def test_passes_are_let_in_before_the_exchange_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard: a pass on another stream reads weights whose copies are still queued."""
    slot, zero = make_slot(Adder(), image="device"), torch.zeros((), device="cuda")
    slot(zero)
    staged = slot.stage(write_version(tmp_path, 1), version="1.0.1")
    submit = DeviceExchange.submit

    def submit_late(exchange: DeviceExchange) -> Event:
        with torch.cuda.stream(exchange._lane._stream):  # type: ignore[attr-defined]
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        event = submit(exchange)
        return _Never() if is_planted else event

    monkeypatch.setattr(DeviceExchange, "submit", submit_late)
    if is_planted:
        monkeypatch.setattr(DeviceExchange, "settle", lambda exchange: None)
    torch.cuda.synchronize()
    slot.commit(staged)
    found = slot(zero)
    assert (read_values(found) == [1.0]) is not is_planted


@pytest.mark.parametrize("image", IMAGES)
def test_no_pass_on_any_stream_is_torn(tmp_path: Path, image: str) -> None:
    """Hazard: passes of several threads and streams, with kernels queued, read two versions at once."""
    slot, paths = make_slot(Adder(), image=image), [write_version(tmp_path, number) for number in (1, 2)]
    zero, stop = torch.zeros((), device="cuda"), threading.Event()
    torn: list[list[float]] = []
    counts = [0, 0, 0]

    def serve(index: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while not stop.is_set():
                torch.cuda._sleep(SLEEP_CYCLES // 400)  # type: ignore[no-untyped-call]
                low, high = torch.aminmax(slot(zero))
                counts[index] += 1
                if (low != high).item():
                    torn.append([low.item(), high.item()])

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            slot.update(paths[number % 2], version=f"1.0.{number + 1}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert (torn, min(counts) > 0) == ([], True)


# -- failures and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failure_is_undone(monkeypatch: pytest.MonkeyPatch, image: str, nth: int) -> None:
    """A copy that fails leaves both versions whole: the old one serves, and the new one can be committed."""
    slot, x = make_slot(make(0), image=image), X.cuda()
    before = slot(x)
    staged = slot.stage(make(1).state_dict(), version="1.0.1")
    copy, left = CudaLane.copy_all, nth

    def fail(lane: CudaLane, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            copy(lane, sources[: len(sources) // 2], targets[: len(targets) // 2])
            raise MemoryError("planted")
        copy(lane, sources, targets)

    with monkeypatch.context() as patch:
        patch.setattr(CudaLane, "copy_all", fail)
        try:
            slot.commit(staged)
        except HotglmError:
            assert torch.equal(slot(x), before)
            slot.commit(staged)
    assert torch.equal(slot(x), make(1).cuda()(x))
    slot.rollback()
    assert torch.equal(slot(x), before)


def test_a_capture_elsewhere_holds_a_commit_up_and_not_for_ever() -> None:
    """Hazard: an event that is recorded in a capture ends it; the commit waits, gives up, and the graph is whole."""
    slot, x = make_slot(make(0), image="device"), X.cuda()
    before = slot(x)
    staged = slot.stage(make(1).state_dict(), version="1.0.1")
    weight = torch.ones(64, 64, device="cuda")
    torch.mm(weight, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    failures: list[BaseException] = []

    def commit() -> None:
        try:
            slot.commit(staged)
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    with torch.cuda.graph(graph):
        found = weight @ weight
        thread = threading.Thread(target=commit)
        thread.start()
        thread.join()
    graph.replay()
    assert [type(failure) for failure in failures] == [DrainTimeoutError]
    assert float(found.sum()) == 64.0**3
    assert torch.equal(slot(x), before)
    slot.commit(staged)
    assert torch.equal(slot(x), make(1).cuda()(x))


def test_where_two_copies_do_not_fit_the_host_holds_the_image(device: CudaDevice) -> None:
    """Hazard: an update of a model that fills its device is impossible, or takes memory that is not there."""
    module = nn.Linear(8192, 8192, bias=False).cuda().requires_grad_(requires_grad=False)  # 256 MiB
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + (128 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        assert device.read_free_nbytes() < 256 << 20
        slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap="auto")
        assert slot.status().swap.startswith("in place: two copies do not fit on cuda:")
        address = module.weight.data_ptr()
        receipt = slot.update({"weight": torch.full((8192, 8192), 2.0)}, version="1.0.1")
        assert receipt.plan is not None
        assert "pinned memory of the host" in receipt.plan.explain()
        assert (module.weight.data_ptr(), float(module.weight.min()), float(module.weight.max())) == (address, 2.0, 2.0)
        slot.rollback()
        assert float(module.weight.max()) < 1.0
        policy = hotglm.StagePolicy(warm_up=(torch.ones(1, 8192, device="cuda"),))
        with pytest.raises(UnswappableError, match="warm_up"):
            slot.update({"weight": torch.full((8192, 8192), 3.0)}, version="1.0.2", policy=policy)
        assert float(module.weight.max()) < 1.0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("image", IMAGES)
def test_device_memory_is_flat(image: str) -> None:
    """Hazard: swaps in place strand memory, in torch's allocator or pinned."""
    slot, reserved = make_slot(make(0), image=image, memory=hotglm.MemoryPolicy(small_nbytes=0)), []
    for number in range(12):
        slot.update(make(number % 2).state_dict(), version=f"1.0.{number + 1}")
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[3:] == reserved[3:4] * 9
