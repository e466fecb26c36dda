"""CUDA: proofs of what is live, fetched or looked at on the device, and copies within it, under delayed kernels.

`PYTHONPATH=. python3 -m pytest -m gpu tests/gpu`. A test whose provocation needs proof plants the missing wait as well,
and fails if that goes unnoticed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import LiveMismatchError
from hotglm.weights import device_seals, handover, places
from hotglm.weights.cuda import CudaDevice, find_cuda_device
from hotglm.weights.device import Device
from hotglm.weights.device_seals import take_fingerprints
from hotglm.weights.digest import digest_tensor, tensor_bytes
from hotglm.weights.download import digest_on_device, fetch_into
from hotglm.weights.plan import IOV_MAX
from hotglm.weights.ring import GAP_NBYTES, Ring, Window
from hotglm.weights.workers import Cancellation
from support.gpu import WIDTH, capturing, forget_to_wait

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 400_000_000
"""About 0.2 s at 2 GHz: long against anything that a proof does with the small models here."""

CALM = Cancellation()
BLOCK = device_seals._NUM_ROWS * device_seals._NUM_COLUMNS


class Host:
    """Stands in for a device whose tensors are the processor's."""

    def read_free_nbytes(self) -> int:
        return 1 << 40

    def staging(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def submitting(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


class Net(nn.Module):
    """Some large weights, a small one, and one with other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 2048)
        self.second = nn.Linear(2048, 64)
        self.conv = nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x))) + self.conv.weight.sum()
        return found


def make_state(seed: int, **other: int) -> dict[str, torch.Tensor]:
    """Return weights of a seed; those of the parts that `other` names are of another."""
    torch.manual_seed(seed)
    state = {name: tensor.contiguous() for name, tensor in Net().state_dict().items()}
    for part, number in other.items():
        state |= {name: tensor for name, tensor in make_state(number).items() if name.startswith(part)}
    return state


def save(directory: Path, number: int, state: dict[str, torch.Tensor]) -> Path:
    path = directory / f"{number}.safetensors"
    hotglm.save_weights(state, path, version=f"1.0.{number}")
    return path


def make_slot(**options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(Net().cuda(), name="m", version="1.0.0", **options)


def is_live(slot: hotglm.ModuleSlot, state: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights and outputs are those of a cold load."""
    cold = Net()
    cold.load_state_dict(state)
    x, live = torch.ones(3, 1024, device="cuda"), slot.live.module.state_dict()
    with torch.no_grad():
        is_same = torch.equal(slot(x), cold.cuda()(x))
    return is_same and all(torch.equal(live[name].cpu(), tensor) for name, tensor in state.items())


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    yield find_cuda_device(torch.cuda.current_device())
    torch.cuda.synchronize()


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_device_computes_the_fingerprints_that_the_processor_computes(device: CudaDevice) -> None:
    """Wrapping sums and products, of all sizes, halves of words with either sign and ends of words, are exact there."""
    sizes = [0, 1, 7, 8, 33_000, 4093 * 8, 4093 * 8 + 3, 8 * BLOCK, 8 * BLOCK + 40_000, 40 * 8 * BLOCK + 12]
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    tensors += [torch.full((BLOCK,), -1), torch.full((BLOCK,), 2**63 - 1), torch.randn(300, 500).bfloat16()]
    placed = [tensor.cuda() for tensor in tensors]
    torch.cuda.synchronize()
    expected = take_fingerprints(tensors, cast(Device, Host()))
    assert take_fingerprints(placed, device) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_one_flipped_bit_is_found_on_the_device(device: CudaDevice, bit: int) -> None:
    """In a block, behind it, and in the tail."""
    words = torch.randint(-(2**62), 2**62, (2 * BLOCK + 5000,), device="cuda")
    torch.cuda.synchronize()
    before = take_fingerprints([words], device)
    for at in (0, BLOCK, 2 * BLOCK + 4500, -1):
        words[at] ^= -(2**63) if bit == 63 else 1 << bit
        torch.cuda.synchronize()
        assert take_fingerprints([words], device) != before
        words[at] ^= -(2**63) if bit == 63 else 1 << bit
    torch.cuda.synchronize()
    assert take_fingerprints([words], device) == before


def test_a_look_takes_scratch_and_no_copy(device: CudaDevice) -> None:
    """Looking at half a GiB takes less than 64 MiB of the device's memory."""
    words = torch.zeros(1 << 26, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take_fingerprints([words], device)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_fetched_tensor_has_its_digest_and_its_bytes(device: CudaDevice) -> None:
    """Whatever the strides, a window at a time."""
    for tensor in (
        torch.randn(9_000_000),
        torch.randn(640, 3000).t(),
        torch.randn(2, 30, 50, 70).contiguous(memory_format=torch.channels_last),
        torch.tensor(5),
        torch.zeros(0, 4),
    ):
        placed = tensor.cuda()
        torch.cuda.synchronize()
        assert digest_on_device(placed, device, cancellation=CALM) == digest_tensor(tensor)
        view = torch.empty(tensor.shape, dtype=tensor.dtype)
        assert fetch_into(view, placed, device, cancellation=CALM) == digest_tensor(tensor)
        assert torch.equal(tensor_bytes(view), tensor_bytes(tensor))


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_window_is_read_before_the_copy_into_it_is_done(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard: the host hashes a window that the device has not filled yet."""
    ring = Ring(device, num_windows=1, window_nbytes=(1 << 20) + IOV_MAX * GAP_NBYTES)
    monkeypatch.setitem(places.active._rings, device.name, ring)
    tensor = torch.randn(100_000)
    placed = tensor.cuda()
    torch.cuda.synchronize()
    with device.submitting():
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    if is_planted:
        monkeypatch.setattr(Window, "fetch", forget_to_wait)
    assert (digest_on_device(placed, device, cancellation=CALM) == digest_tensor(tensor)) is not is_planted
    ring.drain()
    ring.pinned.release()


# -- verify_live -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_live_is_what_was_committed(tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """P12: right after a swap, and after a rollback; a quick proof fetches nothing."""
    slot = make_slot()
    receipt = slot.update(save(tmp_path, 1, make_state(1)))
    if quick:
        monkeypatch.setattr(Window, "fetch", None)
    assert slot.verify_live(quick=quick).digest == receipt.digest
    slot.update(make_state(2), version="1.0.2") if not quick else slot.update(save(tmp_path, 2, make_state(2)))
    slot.verify_live(quick=quick)
    slot.rollback()
    assert slot.verify_live(quick=quick).digest == receipt.digest


@pytest.mark.parametrize("quick", [False, True])
def test_whoever_writes_live_weights_is_found_and_named(tmp_path: Path, quick: bool) -> None:
    """G18: one element of any tensor; the tensor is named, and nothing is changed by looking."""
    slot = make_slot()
    slot.update(save(tmp_path, 1, make_state(1)))
    for name, tensor in slot.live.module.state_dict().items():
        before = tensor.reshape(-1)[-1].clone()
        tensor.view(-1)[-1:].add_(1) if tensor.is_contiguous() else tensor[-1, -1, -1, -1:].add_(1)
        with pytest.raises(LiveMismatchError) as caught:
            slot.verify_live(quick=quick)
        assert [problem.tensor for problem in caught.value.problems] == [name]
        last = tensor.view(-1)[-1:] if tensor.is_contiguous() else tensor[-1, -1, -1, -1:]
        last.copy_(before)
    assert slot.verify_live(quick=quick).digest == slot.live.digest


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("is_planted", [False, True])
def test_a_write_that_is_queued_is_part_of_what_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool, *, is_planted: bool
) -> None:
    """Hazard: a proof looks before a kernel that this thread's stream was given before it."""
    slot = make_slot()
    slot.update(save(tmp_path, 1, make_state(1)))
    slot.verify_live(quick=quick)
    if is_planted:
        monkeypatch.setattr(CudaDevice, "record_here", lambda device: ())
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    slot.live.module.get_parameter("first.weight").data[0, 0] += 1
    context = contextlib.nullcontext() if is_planted else pytest.raises(LiveMismatchError)
    with context:
        slot.verify_live(quick=quick)


def test_a_graph_that_another_thread_captures_stays_whole(tmp_path: Path) -> None:
    """Hazard: a call of a proving thread ends, or becomes part of, a capture of a thread of the service."""
    slot = make_slot()
    slot.update(save(tmp_path, 1, make_state(1)))
    with capturing():
        for number in range(10):
            slot.verify_live(quick=number % 2 == 0)


# -- reuse -------------------------------------------------------------------------------------------------------------


def test_only_what_differs_goes_to_the_device(tmp_path: Path) -> None:
    """Of a file one part of which is new, that part is read, and the rest is copied within the device, exactly."""
    slot, states = make_slot(), [make_state(1), make_state(1, second=2), make_state(3, second=2)]
    for number, state in enumerate(states, start=1):
        origins = slot.update(save(tmp_path, number, state)).origins
        assert is_live(slot, state)
        second = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("second"))
        total = sum(tensor.nbytes for tensor in state.values())
        expected = {1: (total, 0), 2: (second, total - second), 3: (total - second, second)}[number]
        assert (origins.read_nbytes, origins.copied_nbytes, origins.drifted) == (*expected, ())
        assert slot.verify_live(quick=True).digest == slot.verify_live().digest == slot.live.digest


def hold_copies_back(patch: pytest.MonkeyPatch) -> None:
    """Put a long kernel in front of every copy on the side stream."""
    copy_now = CudaDevice.copy

    def copy_late(device: CudaDevice, source: torch.Tensor, target: torch.Tensor) -> None:
        with device.submitting():
            torch.cuda._sleep(SLEEP_CYCLES // 4)  # type: ignore[no-untyped-call]
        copy_now(device, source, target)

    patch.setattr(CudaDevice, "copy", copy_late)


@pytest.mark.parametrize("is_planted", [False, True])
def test_what_is_written_before_it_is_copied_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard: live weights are written, by a pass in training mode, say, while copies of them are queued (C02)."""
    slot = make_slot(policy=hotglm.StagePolicy(finite=False))
    slot.update(save(tmp_path, 1, make_state(1)))
    path, weight = save(tmp_path, 2, make_state(1, second=2)), slot.live.module.get_parameter("first.weight")
    hold_copies_back(monkeypatch)
    copy_late = CudaDevice.copy
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def write_and_copy(device: CudaDevice, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.is_cuda:
            with torch.cuda.stream(stream):
                weight.data.fill_(7)
        copy_late(device, source, target)

    monkeypatch.setattr(CudaDevice, "copy", write_and_copy)
    if is_planted:
        monkeypatch.setattr(handover, "find_unchanged", lambda views, seals, device, *, pause: set(views))
    receipt = slot.update(path)
    torch.cuda.synchronize()
    assert (receipt.origins.drifted == ("first.weight",)) is not is_planted
    assert is_live(slot, make_state(1, second=2)) is not is_planted


def test_a_fingerprint_is_taken_after_a_copy_that_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard: copies within the device are still queued when they are looked at."""
    slot = make_slot(policy=hotglm.StagePolicy(finite=False))
    slot.update(save(tmp_path, 1, make_state(1)))
    path = save(tmp_path, 2, make_state(1, second=2))
    hold_copies_back(monkeypatch)
    assert slot.update(path).origins.drifted == ()
    assert is_live(slot, make_state(1, second=2))


def test_a_delta_needs_no_file_of_what_is_live(tmp_path: Path) -> None:
    """What a delta changes is fetched and made anew on the host; the rest never leaves the device."""
    states = [make_state(1), make_state(1)]
    states[1]["first.weight"][::50] += 1
    for number, state in enumerate(states, start=1):
        source = save(tmp_path, number, state)
        hotglm.pack(source, tmp_path / f"r{number}", name="m", version=f"1.0.{number}", sequence=number).close()
    hotglm.make_delta(tmp_path / "r1", tmp_path / "r2", tmp_path / "delta")
    slot = make_slot()
    slot.update(tmp_path / "r1")
    shutil.rmtree(tmp_path / "r1")
    slot.update(tmp_path / "delta")
    assert is_live(slot, states[1])
    assert slot.verify_live(quick=True).digest == slot.verify_live().digest == slot.live.digest


def test_what_a_refresh_writes_past_torch_is_hashed_again() -> None:
    """P12: digests are those of what is live, also of a weight that a queued kernel of a refresh writes by `.data`."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        @hotglm.refresh("weight")
        def _refresh(self) -> None:
            torch.cuda._sleep(SLEEP_CYCLES // 4)  # type: ignore[no-untyped-call]
            self.weight.data.mul_(3)

    slot = hotglm.ModuleSlot(Normed().cuda(), name="m", version="1.0.0")
    slot.update({"weight": torch.ones(WIDTH)}, version="1.0.1")
    assert slot.live.digests["weight"] == digest_tensor(torch.full((WIDTH,), 3.0))
    assert slot.verify_live(quick=True).digest == slot.live.digest
