"""What an exchange asks of CUDA: on which stream and device, in how many calls; over a stand-in that notes it all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotglm.errors import StageFailedError
from hotglm.weights import cuda_lane
from hotglm.weights.cuda import CudaDevice, find_cuda_device
from hotglm.weights.device_exchange import DeviceExchange, wait_for_work
from hotglm.weights.exchange import Pair
from hotglm.weights.host_exchange import HostExchange
from hotglm.weights.pinned_arena import PinnedArena
from support.fake_cuda import FakeCuda

LANE = 0xA001
"""What the driver makes for the second device: one handle here, one stream each there."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    made.install(monkeypatch)
    copy = torch._foreach_copy_

    def copy_all(targets: Any, sources: Any) -> None:
        made.note("foreach", made.stream.cuda_stream, [source.dtype for source in sources])
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", copy_all)
    return made


@pytest.fixture
def device(fake: FakeCuda) -> CudaDevice:
    return find_cuda_device(1)


def test_a_lane_is_made_once_and_is_nobody_elses(fake: FakeCuda, device: CudaDevice) -> None:
    """The driver makes it, outside of captures, as it makes the side stream; it is none of those that passes use."""
    assert device.lane(0) is device.lane(0)
    assert device.lane(0) is not device.lane(1)
    assert fake.find("create_stream") == [(None, (1, 1))] * 3
    assert LANE not in {stream.cuda_stream for stream in device._find_streams()}


def test_small_tensors_of_one_type_go_together_and_large_ones_alone(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for the small ones of each dtype, one for each large one or one with gaps, all on the lane."""
    monkeypatch.setattr(cuda_lane, "_LARGE_NBYTES", 100)
    sources = [torch.ones(3), torch.ones(100), torch.ones(5).double(), torch.ones(2), torch.ones(8)[::2]]
    targets = [torch.zeros_like(source) for source in sources[:-1]]
    targets.append(torch.zeros(8)[::2])
    device.lane(0).copy_all(sources, targets)
    assert all(torch.equal(source, target) for source, target in zip(sources, targets, strict=True))
    assert fake.find("copy")[:2] == [(LANE, (100, True)), (LANE, (4, True))]
    assert fake.find("foreach") == [(LANE, [torch.float32, torch.float32]), (LANE, [torch.float64])]
    assert fake.contexts == {1}


def test_a_write_of_a_lane_is_counted(fake: FakeCuda, device: CudaDevice) -> None:
    """A backward pass whose saved tensors were exchanged raises, whichever way they were copied."""
    weight, large = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1 << 19))
    before = weight._version, large._version
    pairs = [Pair(name="w", live=weight, image=torch.ones(4)), Pair(name="l", live=large, image=torch.ones(1 << 19))]
    DeviceExchange(device, pairs, block=None).submit().wait()
    assert (float(weight.detach().sum()), float(large.detach().sum())) == (4.0, float(1 << 19))
    assert (weight._version > before[0], large._version > before[1]) == (True, True)


@pytest.mark.parametrize("numel", [4, 1 << 19])
def test_both_exchanges_stay_on_their_device(fake: FakeCuda, device: CudaDevice, numel: int) -> None:
    """No call of an exchange, its undo included, makes a context on another device."""
    live = torch.zeros(numel)
    arena = PinnedArena(4 * numel, device=device)
    image = arena.lease().view(0, dtype=torch.float32, shape=(numel,)).fill_(2)
    pairs = [Pair(name="w", live=live, image=image)]
    for value in (2.0, 0.0, 2.0):
        is_odd = value == 2.0
        exchange = DeviceExchange(device, pairs, block=None) if is_odd else HostExchange(device, pairs, arena=arena)
        wait_for_work([exchange.device], timeout_s=10.0)
        exchange.submit().wait()
        exchange.settle()
        assert (float(live.max()), float(image.max())) == (value, 2.0 - value)
    undone = HostExchange(device, pairs, arena=arena)
    undone.submit()
    undone.undo()
    assert (float(live.max()), float(image.max())) == (2.0, 0.0)
    assert fake.contexts == {1}


def test_a_capture_is_waited_for_as_long_as_is_said(fake: FakeCuda, device: CudaDevice) -> None:
    """With no time left an event is recorded where nothing is captured; where something is, that is said."""
    assert device.record_passes(timeout_s=0.0)
    fake.capturing.add(0x1003)
    with pytest.raises(StageFailedError, match=r"gone on for 0.01 s"):
        device.record_passes(timeout_s=0.01)
