"""A small program that does what a commit in place does, between passes that are queued on a fake device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hotglm.weights.device_arena import DeviceArena
from hotglm.weights.device_exchange import DeviceExchange
from hotglm.weights.exchange import Pair
from hotglm.weights.exchanges import Exchanges
from hotglm.weights.host_exchange import HostExchange
from hotglm.weights.pinned_arena import PinnedArena
from support.fake_device import Choices, FakeDevice, FakeLane
from support.swaps import same_bits

__all__ = ["Failing", "HostProgram", "Program", "start", "values"]

STREAMS = ("default", "second")


ROOM_NBYTES = 64
"""Room behind the image in these tests, so that small tensors take several steps."""


def values(version: int, tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return what a tensor of a version is, other bytes in each."""
    return torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) + 1000.0 * version + 100.0 * index


class Program:
    """Swaps a few tensors in place, `num_swaps` times, between passes that are queued on several streams."""

    def __init__(self, choices: Choices, *, sizes: tuple[int, ...] = (3, 0, 40, 7, 1), is_coarse: bool = False) -> None:
        self.device = FakeDevice(name="fake:0", choices=choices, is_coarse=is_coarse)
        self.live = [self.device.allocate(4 * size).view(torch.float32) for size in sizes]
        self.live += [] if is_coarse else [self.device.allocate(40).view(torch.float32)[::2]]
        starts = list(itertools.accumulate((-(-8 * live.numel() // 64) * 64 for live in self.live), initial=0))
        nbytes = starts.pop() + (0 if is_coarse else 576)  # what stands for a buffer that is not exchanged
        self.arena, lease = self.lend(nbytes)
        self.image = [
            lease.view(start, dtype=torch.float32, shape=live.shape, stride=live.stride())
            for start, live in zip(starts, self.live, strict=True)
        ]
        self.seen: list[tuple[int, int, torch.Tensor]] = []

    def lend(self, nbytes: int) -> tuple[Any, Any]:
        arena = DeviceArena(nbytes + ROOM_NBYTES, device=self.device, room_nbytes=ROOM_NBYTES)
        return arena, arena.lease()

    def pairs(self) -> list[Pair]:
        return [
            Pair(name=str(index), live=live, image=image)
            for index, (live, image) in enumerate(zip(self.live, self.image, strict=True))
        ]

    def exchange(self) -> Any:
        return DeviceExchange(self.device, self.pairs(), block=self.arena)

    def passes(self, version: int, streams: tuple[str, ...] = STREAMS) -> None:
        for stream in streams:
            if stream != "default":  # some passes begin at once, others when the service has found the time
                self.device.delay(stream, 80 if stream == "second" else 300)
            for index, live in enumerate(self.live):
                if live.is_contiguous() and live.numel():
                    found = torch.full_like(live, torch.nan)
                    self.seen.append((version, index, found))
                    self.device.submit(self.device.reading(live, found), stream=stream)

    def stage(self, version: int) -> None:
        for index, image in enumerate(self.image):
            image.copy_(values(version, image, index))  # settled, as a stage is before it is committed

    def run(self, *, num_swaps: int, streams: tuple[str, ...] = STREAMS) -> bool:
        """Return whether every pass read its own version, and every image got the one before."""
        is_right = True
        for index, live in enumerate(self.live):
            live.copy_(values(0, live, index))
        self.passes(0, streams)
        for version in range(1, num_swaps + 1):
            self.stage(version)
            exchange = Exchanges(NOTHING, [self.exchange()])
            exchange.wait_for_work(timeout_s=10.0)
            exchange.run()
            self.passes(version, streams)
            exchange.settle()
            is_right &= self.holds(self.image, version - 1)
        self.device.finish()
        return is_right and all(same_bits(found, values(v, found, index)) for v, index, found in self.seen)

    def holds(self, tensors: list[torch.Tensor], version: int) -> bool:
        return all(same_bits(tensor, values(version, tensor, index)) for index, tensor in enumerate(tensors))


class Nothing:
    """What the processor exchanges of a module that is on a device alone."""

    nbytes = buffer_nbytes = 0

    def run(self) -> None:
        pass

    undo = run


NOTHING: Any = Nothing()


class HostProgram(Program):
    """The same with the image in pinned memory of the host."""

    def lend(self, nbytes: int) -> tuple[Any, Any]:
        arena = PinnedArena(nbytes, device=self.device)
        return arena, arena.lease()

    def exchange(self) -> Any:
        return HostExchange(self.device, self.pairs(), arena=self.arena)


def start(choices: Choices, kind: type[Program] = Program) -> Program:
    """Return a program whose live tensors are of version 0, its image of version 1, with passes queued."""
    program = kind(choices)
    for index, live in enumerate(program.live):
        live.copy_(values(0, live, index))
    program.passes(0)
    program.stage(1)
    return program


class Failing:
    """Fails at the nth copy of a device: before it, or after half of its tensors and half of the next one."""

    _copy_all = FakeLane.copy_all

    def __init__(self, nth: int, *, is_half: bool) -> None:
        """Count down from `nth`."""
        self._left = nth
        self._is_half = is_half

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put it in the place of the fake's own copy."""

        def copy_all(lane: FakeLane, sources: Any, targets: Any) -> None:  # a function, which is bound to the lane
            self._fail(lane, sources, targets)

        patch.setattr(FakeLane, "copy_all", copy_all)

    def _fail(self, lane: FakeLane, sources: Any, targets: Any) -> None:
        self._left -= 1
        if self._left:
            Failing._copy_all(lane, sources, targets)
            return
        if self._is_half:
            middle = len(sources) // 2
            halves = [
                [one[: -(-len(one) // 2)] for one in side[middle : middle + 1] if one.dim()]
                for side in (sources, targets)
            ]
            for part in ((sources[:middle], targets[:middle]), halves):
                if part[0]:
                    Failing._copy_all(lane, *part)
        raise MemoryError("planted")
