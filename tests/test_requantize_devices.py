"""Plain weights for a quantised module on a device: quantised on the host or there, on a fake that leaves all open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import MemoryPlanError
from hotglm.weights import device_arena, places
from hotglm.weights.plan import IOV_MAX
from hotglm.weights.ring import GAP_NBYTES
from hotglm.weights.split_arena import SplitLease
from support.fake_device import Choices, FakeDevice, FakePlaces

WIDTH = 100
CHUNK = 256
SEEDS = 12


class Queued(nn.Module):
    """A module whose forward queues a kernel that holds the address of the weight, and no more."""

    device: FakeDevice

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, stream: str) -> torch.Tensor:
        found = torch.full((WIDTH,), torch.nan)
        self.device.submit(self.device.reading(self.weight, found), stream=stream)
        return found


def double_here(model: Any) -> None:
    """Stand for a quantiser of the host: the processor writes."""
    model.weight.mul_(2)


class World:
    """A slot around a module on a device, and how plain weights get there."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int, *, is_built_there: bool) -> None:
        self.fakes = FakePlaces(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)
        patch.setattr(places, "active", self.fakes)
        self.device = Queued.device = FakeDevice(name="fake:0", choices=Choices(seed))
        self.is_built_there = is_built_there
        module = Queued()
        self.fakes.add(self.device, module)
        quantize = self.double_there if is_built_there else double_here
        self.slot = hotglm.ModuleSlot(
            module,
            name="m",
            version="1.0.0",
            memory=hotglm.MemoryPolicy(small_nbytes=0),
            requantize=hotglm.Requantize(build=self.build, quantize=quantize),
        )

    def build(self) -> nn.Module:
        model = Queued()
        if self.is_built_there:
            self.fakes.add(self.device, model)
        return model

    def double_there(self, model: Any) -> None:
        """Stand for a quantiser of the device: a kernel reads the plain weight, and writes memory that is made new."""
        made = Queued()
        made.weight.fill_(7)  # finite, so that only its answers tell
        self.fakes.add(self.device, made)
        self.device.submit(self.device.reading(model.weight, made.weight, times=2), stream="default")
        model.weight = made.weight

    def run(self, directory: Path) -> bool:
        """Swap by file and mapping; return whether each pass read its own version."""
        seen = []
        for number in range(1, 5):
            state = {"weight": torch.full((WIDTH,), float(number))}
            source: Any = state
            if number % 2:
                source = directory / f"{number}.safetensors"
                save_file(state, source)
            with self.slot.acquire() as before:
                self.slot.update(source, version=f"1.0.{number}")
                if number > 1:  # the fake has no block for the module that the slot was made with
                    seen.append((2 * (number - 1), before.module("second")))
            del before
            seen.append((2 * number, self.slot("default")))
            assert self.fakes.find(self.slot.live.module.weight) is self.device  # type: ignore[arg-type]
        self.device.finish()
        return all(bool((found == value).all()) for value, found in seen)


@pytest.mark.parametrize("is_built_there", [False, True], ids=["on the host", "on the device"])
def test_what_is_quantised_goes_where_the_live_one_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_built_there: bool
) -> None:
    """Whatever the device does when, every queued pass reads the quantised weights of its own generation."""
    for seed in range(SEEDS):
        assert World(monkeypatch, seed, is_built_there=is_built_there).run(tmp_path)


def test_a_spare_that_does_not_wait_for_the_quantiser_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The planted bug: what kernels still compute is copied before they have."""
    monkeypatch.setattr(FakePlaces, "wait_for_sources", lambda *_: None)
    monkeypatch.setattr(device_arena, "begin", lambda _: None)  # which orders whatever is written after it, too
    monkeypatch.setattr(SplitLease, "settle_passes", lambda _: None)
    assert not all(World(monkeypatch, seed, is_built_there=True).run(tmp_path) for seed in range(SEEDS))


@pytest.mark.parametrize(("is_built_there", "num_beside"), [(False, 1), (True, 2)])
def test_device_memory_is_planned_for_all_that_will_be_there(
    monkeypatch: pytest.MonkeyPatch, is_built_there: bool, num_beside: int
) -> None:
    """What it becomes, and the plain copy where that is there, are held against what is free before any is taken."""
    world = World(monkeypatch, 0, is_built_there=is_built_there)
    receipt = world.slot.update({"weight": torch.ones(WIDTH)}, version="1.0.1")
    assert receipt.plan is not None
    (part,) = receipt.plan.devices
    world.slot.update({"weight": torch.ones(WIDTH)}, version="1.0.2")
    world.device.finish()
    # The spare takes the arena of the version before.
    world.device.free_nbytes = world.device.used_nbytes + num_beside * part.nbytes - 1
    with pytest.raises(MemoryPlanError, match="fake:0"):
        world.slot.update({"weight": torch.ones(WIDTH)}, version="1.0.3")
    found = world.slot("default")
    world.device.finish()
    assert bool((found == 2).all())
    world.slot.rollback()
    world.device.free_nbytes += 1
    world.slot.update({"weight": torch.zeros(WIDTH)}, version="1.0.3")
