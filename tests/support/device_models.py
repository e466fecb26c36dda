"""Modules whose tensors are on fake devices, and which are swapped in place there."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

import hotglm
from support.fake_device import Choices, FakeDevice, FakePlaces

__all__ = ["Queued", "Spread", "make_spread", "make_spread_state", "put_on_devices"]


class Queued(nn.Module):
    """Its forward queues a kernel that holds the addresses of two weights and a derived buffer, and no more."""

    device: FakeDevice
    weight: nn.Parameter
    bias: nn.Parameter
    twice: torch.Tensor

    def __init__(self, *, numel: int = 100) -> None:
        super().__init__()
        device = self.device
        for name, size in (("weight", numel), ("bias", 3)):
            memory = device.allocate(4 * size).view(torch.float32).zero_()
            self.register_parameter(name, nn.Parameter(memory, requires_grad=False))
        self.register_buffer("twice", device.allocate(4 * numel).view(torch.float32).zero_(), persistent=False)

    @hotglm.refresh("twice")
    def _refresh(self) -> None:
        self.twice.copy_(2 * self.weight)

    def forward(self, stream: str) -> torch.Tensor:
        device = self.device
        parts = [torch.full((tensor.numel(),), torch.nan) for tensor in (self.weight, self.bias, self.twice)]
        if stream != "default":
            device.delay(stream, 30)
        for part, tensor in zip(parts, (self.weight, self.bias, self.twice), strict=True):
            device.submit(device.reading(tensor, part), stream=stream)
        return cast(torch.Tensor, parts)


class Spread(nn.Module):
    """Parts on two devices and on the processor, a tie, an empty tensor, other strides, and small dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 40)
        self.second = nn.Linear(40, 8, bias=False)
        self.second.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.second.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
        self.second.register_buffer("nothing", torch.zeros(0, 3))
        self.last = nn.Linear(8, 8)
        self.last.register_buffer("mask", torch.ones(8), persistent=False)
        self.tied = nn.Linear(8, 40, bias=False)
        self.tied.weight = self.first.weight
        self.first.bias.data = torch.zeros(80)[::2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.second(torch.relu(self.first(x) + self.tied(x)))) * self.last.mask
        return found


def make_spread(fakes: FakePlaces, seed: int) -> tuple[Spread, list[FakeDevice]]:
    """Return a module of known weights, and the two devices that parts of it are on."""
    torch.manual_seed(0)
    module = Spread()
    return module, put_on_devices(fakes, seed, module.first, module.second)


def put_on_devices(fakes: FakePlaces, seed: int, *parts: nn.Module) -> list[FakeDevice]:
    """Put each part on a fake device of its own, and return these."""
    devices = [FakeDevice(name=f"fake:{index}", choices=Choices(seed + index)) for index in range(len(parts))]
    for device, part in zip(devices, parts, strict=True):
        fakes.add(device, part)
    return devices


def make_spread_state(seed: int) -> dict[str, torch.Tensor]:
    """Return the state of a version."""
    torch.manual_seed(seed)
    state = Spread().state_dict()
    new = {name: torch.rand(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    new["tied.weight"] = new["first.weight"]
    flags = torch.tensor([bool(seed >> bit & 1) for bit in range(5)])
    return {**state, **new, "second.count": torch.tensor(seed), "second.flags": flags}
