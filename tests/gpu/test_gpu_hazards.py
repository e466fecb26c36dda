"""CUDA: each test names the hazard that it guards, and provokes it with a kernel that is held back.

`PYTHONPATH=. python3 -m pytest -m gpu tests/gpu`. A test whose provocation needs proof plants the missing wait as well,
and fails if that goes unnoticed.
"""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.weights import device_arena, places
from hotglm.weights.cuda import CudaDevice, find_cuda_device
from hotglm.weights.device_arena import DeviceArena
from hotglm.weights.pinning import PinnedMemory
from hotglm.weights.plan import IOV_MAX
from hotglm.weights.ring import GAP_NBYTES, Ring
from hotglm.weights.split_arena import SplitLease
from support.gpu import WIDTH, Adder, capturing, write_version

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 1_000_000_000
"""About 0.5 s at 2 GHz: long against anything that a stage does with the small models here."""

TIGHT = hotglm.MemoryPolicy(small_nbytes=0)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    yield find_cuda_device(torch.cuda.current_device())
    torch.cuda.synchronize()


def make_slot(**options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(Adder().cuda(), name="m", version="1.0.0", **options)


def read_values(found: torch.Tensor) -> list[float]:
    torch.cuda.synchronize()
    values: list[float] = found.cpu().nan_to_num(nan=-1.0).unique().tolist()  # type: ignore[no-untyped-call]
    return values


def hold_copies_back(patch: pytest.MonkeyPatch) -> None:
    """Put a long kernel in front of every copy on the side stream."""
    copy_now = CudaDevice.copy

    def copy_late(device: CudaDevice, source: torch.Tensor, target: torch.Tensor) -> None:
        with device.submitting():
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        copy_now(device, source, target)

    patch.setattr(CudaDevice, "copy", copy_late)


@pytest.mark.parametrize("is_planted", [False, True])
def test_publish_before_the_copy_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool) -> None:
    """Hazard: a pass reads a generation whose copies are still queued."""
    slot = make_slot(policy=hotglm.StagePolicy(finite=False, digest=False))  # both look at what has arrived
    number = 4 if is_planted else 3  # the memory may still have what the other case has left in it
    path, zero = write_version(tmp_path, number), torch.zeros((), device="cuda")
    hold_copies_back(monkeypatch)
    if is_planted:
        monkeypatch.setattr(SplitLease, "settle", lambda lease: None)
        monkeypatch.setattr(SplitLease, "settle_passes", lambda lease: None)
    slot.update(path, version="1.0.1")
    found = slot(zero)
    assert (read_values(found) == [number]) is not is_planted


@pytest.mark.parametrize("kind", ["default", "pool", "high priority", "external, noted"])
@pytest.mark.parametrize("is_planted", [False, True])
def test_reuse_while_a_kernel_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: CudaDevice, kind: str, *, is_planted: bool
) -> None:
    """Hazard: an arena is written again while a kernel of the version that was there is still queued."""
    slot, stream = make_slot(memory=TIGHT), make_stream(kind)
    paths = [write_version(tmp_path, number) for number in range(4)]
    slot.update(paths[1], version="1.0.1")
    with slot.acquire() as generation:
        slot.update(paths[2], version="1.0.2")
        with torch.cuda.stream(stream):
            zero = torch.zeros((), device="cuda")
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            found = generation.module(zero)
    del generation
    if is_planted:
        monkeypatch.setattr(device_arena, "begin", lambda device: None)
    slot.update(paths[3], version="1.0.3")
    assert (read_values(found) == [1.0]) is not is_planted


def make_stream(kind: str) -> torch.cuda.Stream:
    if kind == "default":
        return torch.cuda.default_stream()
    if kind == "pool":
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]
    if kind == "high priority":
        return torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
    handle = ctypes.c_void_p()
    assert int(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))) == 0  # type: ignore[no-untyped-call]
    stream = torch.cuda.ExternalStream(handle.value)  # type: ignore[no-untyped-call]
    hotglm.note_stream(stream)
    return stream


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_window_is_written_before_it_is_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: CudaDevice, *, is_planted: bool
) -> None:
    """Hazard: a reader fills a window that the copy engine has not drained."""
    ring = Ring(device, num_windows=1, window_nbytes=(1 << 20) + IOV_MAX * GAP_NBYTES)
    monkeypatch.setitem(places.active._rings, device.name, ring)
    path, state = tmp_path / "a.safetensors", torch.arange(WIDTH, dtype=torch.float32)
    save_file({"weight": state}, path)
    slot = make_slot(policy=hotglm.StagePolicy(finite=False))
    hold_copies_back(monkeypatch)
    if is_planted:
        monkeypatch.setattr(Ring, "_wait_drained", lambda ring, window: None)
    slot.update(path, version="1.0.1")
    torch.cuda.synchronize()
    assert torch.equal(slot.state_dict()["weight"].cpu(), state) is not is_planted
    ring.drain()
    ring.pinned.release()


def test_a_mapping_that_is_still_being_computed(device: CudaDevice) -> None:
    """Hazard: weights of a trainer are copied before the kernel that makes them has run, on whichever stream."""
    slot = make_slot()
    trainer = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    weight = torch.zeros(WIDTH, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(trainer):
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        weight.fill_(5)
        slot.update({"weight": weight}, version="1.0.1")
    assert read_values(slot(torch.zeros((), device="cuda"))) == [5.0]


def test_an_update_on_another_stream_than_the_passes(tmp_path: Path) -> None:
    """Hazard: who updates and who serves are on different streams, and nothing orders these."""
    slot, streams = make_slot(), [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
    zero = torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    for number in range(1, 9):
        with torch.cuda.stream(streams[number % 3]):
            torch.cuda._sleep(SLEEP_CYCLES // 20)  # type: ignore[no-untyped-call]
            slot.update(write_version(tmp_path, number), version=f"1.0.{number}")
        with torch.cuda.stream(streams[(number + 1) % 3]):
            found = slot(zero)
        assert read_values(found) == [float(number)]


def test_a_graph_that_another_thread_captures_stays_whole(tmp_path: Path) -> None:
    """Hazard: a call of a staging thread ends, or becomes part of, a capture that a thread of the service has begun."""
    slot, paths = make_slot(), [write_version(tmp_path, number) for number in range(1, 4)]
    slot.update(paths[0], version="1.0.1")
    with capturing():
        for number in range(12):
            slot.update(paths[number % 3], version=f"1.1.{number}")
    assert read_values(slot(torch.zeros((), device="cuda"))) == [3.0]


def test_a_graph_is_replayed_after_a_swap(tmp_path: Path) -> None:
    """Hazard: a raw graph is replayed when its arena belongs to another generation; a session prevents that."""
    slot, static = make_slot(memory=TIGHT), torch.zeros((), device="cuda")
    slot.update(write_version(tmp_path, 1), version="1.0.1")
    with slot.acquire() as generation:
        generation.module(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = generation.module(static)
        for number in (2, 3, 4):
            slot.update(write_version(tmp_path, number), version=f"1.0.{number}")
            graph.replay()
            assert read_values(found) == [1.0]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_lease_lives_as_long_as_its_tensors(device: CudaDevice) -> None:
    """Hazard: device memory is reused under a tensor, a view, a saved tensor or a copy that somebody keeps."""
    arena = DeviceArena(1 << 20, device=device)
    lease = arena.lease()
    weight = nn.Parameter(lease.view(4096, dtype=torch.bfloat16, shape=(64, 32)).fill_(2))
    assert (weight.device.type, weight.data_ptr() - arena.address) == ("cuda", 4096)
    assert weight.untyped_storage().nbytes() == 64 * 32 * 2
    saved = io.BytesIO()
    torch.save(weight.detach(), saved)
    assert saved.tell() < 16_384  # its own bytes, not the arena's
    copied = copy.deepcopy(weight)
    loss = (weight * weight).sum()
    del lease, weight
    assert not arena.is_free
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    assert (arena.is_free, float(copied.detach().sum())) == (True, 2.0 * 64 * 32)


def test_pinned_memory_is_exact_and_given_back(device: CudaDevice) -> None:
    """Hazard: pinning rounds up to a power of two, or stays behind when the memory goes."""
    nbytes = 5 * (1 << 20) + 4096
    for _ in range(3):
        pinned = PinnedMemory(nbytes, index=device.index)
        assert (pinned.tensor.numel(), pinned.tensor.is_pinned()) == (nbytes, True)
        target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        pinned.bytes(0, 4)[:] = b"abcd"
        device.copy(pinned.tensor, target)
        device.record().wait()
        assert bytes(target[:4].cpu().tolist()) == b"abcd"
        pinned.release()
        pinned.release()


def test_a_refused_registration_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch, device: CudaDevice) -> None:
    """Hazard: the driver's refusal is raised later, at another kernel; torch's pinned memory is taken instead."""
    monkeypatch.setattr("hotglm.weights.pinning._PORTABLE", 1 << 20)  # no such flag
    pinned = PinnedMemory(1 << 20, index=device.index)
    assert pinned.tensor.is_pinned()
    assert float(torch.ones(8, device="cuda").sum()) == 8.0


def test_device_memory_is_flat(tmp_path: Path, device: CudaDevice) -> None:
    """Hazard: updates strand memory in torch's allocator; at most two models are ever allocated beside the ring."""
    paths = [write_version(tmp_path, number) for number in (1, 2)]
    slot, zero, reserved = make_slot(memory=TIGHT), torch.zeros((), device="cuda"), []
    for number in range(30):
        slot.update(paths[number % 2], version=f"1.0.{number + 1}")
        slot(zero)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
        if number == 3:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            assert base <= 2 * 4 * WIDTH + (64 << 20)
    assert reserved[4:] == reserved[4:5] * 26


def test_the_pools_of_torch_are_listed_whole(device: CudaDevice) -> None:
    """Hazard: a pass runs on a stream of torch that `record_passes` does not know."""
    known = {stream.cuda_stream for stream in device._find_streams()}
    asked = {
        torch.cuda.Stream(priority=priority).cuda_stream  # type: ignore[no-untyped-call]
        for priority in (0, -1, -2, -5)
        for _ in range(200)
    }
    assert asked | {torch.cuda.default_stream().cuda_stream} <= known
