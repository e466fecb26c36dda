"""A device that does everything the protocol leaves open, in every order: memory is the CPU's, work is queued.

Copies and kernels wait in the queues of their streams and are carried out at *some* time: whenever the host calls the
device, a `Choices` decides whether work goes on, and on which stream. Only what [Note: streams] in
hotglm/weights/device.py orders is kept in order. Fresh memory is full of NaN, and a copy is carried out in two pieces,
so that whoever looks too soon sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from hotglm.errors import MemoryPlanError, StageFailedError
from hotglm.weights.device import Device, Event
from hotglm.weights.device_arena import watch_storage
from hotglm.weights.places import Places
from hotglm.weights.ring import Ring

__all__ = ["Choices", "FakeDevice", "FakeEvent", "FakeLane", "FakePlaces", "Listed", "every_schedule"]

POISON = 0xFF
"""Every floating-point number made of these bytes is NaN."""


class Choices:
    """Decisions at random, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, num_ways: int) -> int:
        """Return one of 0 to `num_ways` - 1."""
        return self._random.randrange(num_ways)


class Listed(Choices):
    """Decisions from a list, the first way beyond its end; remembers how many ways there were."""

    def __init__(self, prefix: list[int]) -> None:
        super().__init__(0)
        self._prefix = prefix
        self.taken: list[tuple[int, int]] = []

    def choose(self, num_ways: int) -> int:
        at = len(self.taken)
        way = self._prefix[at] if at < len(self._prefix) else 0
        self.taken.append((way, num_ways))
        return way


def every_schedule() -> Iterator[Listed]:
    """Yield one `Listed` for every sequence of decisions that the program run with it can meet, depth first."""
    prefix: list[int] = []
    while True:
        choices = Listed(prefix)
        yield choices
        taken = choices.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix = [way for way, _ in taken]
        prefix[-1] += 1


class FakeEvent:
    """An event on one stream of a fake device."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.reached = False

    def is_done(self) -> bool:
        self.device.go_on()
        return self.reached

    def wait(self) -> None:
        self.device.run_until(lambda: self.reached)


@dataclass(slots=True)
class Work:
    """One entry of a stream: what to do, or an event to reach, once another event was reached."""

    run: Callable[[], object] | None = None
    reaches: FakeEvent | None = None
    after: FakeEvent | None = None


class FakePinned:
    """Pinned memory that remembers whether it was released."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)
        self.tensor = torch.frombuffer(self.data, dtype=torch.uint8)
        self.is_released = False

    def bytes(self, start: int, nbytes: int) -> memoryview:
        return memoryview(self.data)[start : start + nbytes]

    def release(self) -> None:
        self.is_released = True


@dataclass(frozen=True, slots=True)
class Block:
    """Memory that was allocated, and what tells whether somebody still holds it."""

    watch: Callable[[], object | None]
    memory: torch.Tensor


@dataclass(slots=True)
class FakeDevice:
    """One fake device.

    Attributes:
        name: what a device of torch would be called.
        choices: decide what is carried out when.
        free_nbytes: size of its memory.
        fails: called with the name of each call; may raise in its place.
        is_coarse: carry copies out in one piece, and reach events as soon as they can be. Every outcome that differs
            for the host is still met, and there are few enough schedules to try them all.
    """

    name: str
    choices: Choices
    free_nbytes: int = 1 << 40
    fails: Callable[[str], object] = lambda call: None
    is_coarse: bool = False
    streams: dict[str, deque[Work]] = field(default_factory=lambda: {"side": deque(), "default": deque()})
    blocks: list[Block] = field(default_factory=list)
    pinned: list[FakePinned] = field(default_factory=list)
    num_staging: int = 0
    lanes: dict[int, FakeLane] = field(default_factory=dict)
    is_captured: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    # -- the protocol ------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.fails("allocate")
        if nbytes > self.read_free_nbytes():
            raise MemoryPlanError(f"Expected {nbytes} bytes on {self.name}, got none.", remedy="free some.")
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        block = from_dlpack(to_dlpack(memory))
        self.blocks.append(Block(watch_storage(block), memory))
        return block

    def let_go(self) -> None:
        pass

    def read_free_nbytes(self) -> int:
        return self.free_nbytes - self.used_nbytes

    def pin(self, nbytes: int) -> FakePinned:
        self.fails("pin")
        self.pinned.append(FakePinned(nbytes))
        return self.pinned[-1]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.fails("copy")
        assert source.numel() == target.numel()
        half = 0 if self.is_coarse else source.numel() // 2
        for part in (slice(0, half), slice(half, None)):
            if source[part].numel():
                self.submit(self._move(source[part], target[part]))

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        """Return a copy that holds addresses and no tensors, as queued work does; where a block is gone, no more."""
        to, start, nbytes = target.data_ptr(), source.data_ptr(), target.numel()
        blocks = [address for address in (to, start) if self.owns(address)]
        return lambda: ctypes.memmove(to, start, nbytes) if all(map(self.owns, blocks)) else None

    def record(self) -> Event:
        self.fails("record")
        return self.record_on("side")

    def record_passes(self, *, timeout_s: float | None = None) -> tuple[Event, ...]:
        self.fails("record_passes")
        if self.is_captured and timeout_s is not None:
            raise StageFailedError("Expected a capture to end, got one that goes on.", remedy="end it.")
        ours = ("side", *(lane.stream for lane in self.lanes.values()))
        return tuple(self.record_on(name) for name in self.streams if name not in ours)

    def record_here(self) -> tuple[Event, ...]:
        return (self.record_on("default"),)

    def wait_for(self, events: Iterable[Event]) -> None:
        self.hold_back("side", events)

    def hold_back(self, stream: str, events: Iterable[Event]) -> None:
        for event in events:
            assert isinstance(event, FakeEvent)
            self.put(stream, Work(after=event))

    def lane(self, number: int) -> FakeLane:
        return self.lanes.setdefault(number, FakeLane(self, f"lane {number}"))

    def submitting(self) -> AbstractContextManager[object]:
        """Wait for the stream: what torch itself does is done at once here."""
        self.record_on("side").wait()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        self.num_staging += 1
        yield
        self.num_staging -= 1

    # -- the service -------------------------------------------------------------------------------------------------

    def submit(self, run: Callable[[], object], *, stream: str = "side") -> None:
        """Queue a kernel."""
        self.put(stream, Work(run=run))

    def delay(self, stream: str, num_steps: int) -> None:
        """Have what is submitted to a stream next wait for a kernel that takes long."""
        with self.lock:
            self.streams.setdefault(stream, deque()).extend(Work(run=lambda: None) for _ in range(num_steps))

    def reading(self, weight: torch.Tensor, found: torch.Tensor, *, times: int = 1) -> Callable[[], object]:
        """Return a kernel that reads `weight` by its address, and writes it, `times` times, to `found` by its own."""
        source, count, target = weight.data_ptr(), weight.numel(), found.data_ptr()
        keep = None if self.owns(target) else found  # memory of the host lives as long as somebody holds it

        def run() -> None:
            values = (ctypes.c_float * count).from_address(source)
            numbers = [times * value for value in values] if self.owns(source) else [float("nan")] * count
            ctypes.memmove(target, (ctypes.c_float * count)(*numbers), 4 * count)

        run.keep = keep  # type: ignore[attr-defined]
        return run

    def record_on(self, stream: str) -> FakeEvent:
        """Record an event on a stream."""
        event = FakeEvent(self)
        self.put(stream, Work(reaches=event))
        return event

    # -- the machine -------------------------------------------------------------------------------------------------

    @property
    def used_nbytes(self) -> int:
        return sum(block.memory.numel() for block in self.blocks if block.watch() is not None)

    def owns(self, address: int) -> bool:
        """Tell whether an address lies in a block that still exists.

        One that was let go of exists until no work is queued any more, as torch keeps what `record_stream` noted.
        """
        return any(0 <= address - block.memory.data_ptr() < block.memory.numel() for block in self.blocks)

    def put(self, stream: str, work: Work) -> None:
        with self.lock:
            if not any(self.streams.values()):
                self.blocks = [block for block in self.blocks if block.watch() is not None]
            self.streams.setdefault(stream, deque()).append(work)
            self._reach_events()
        self.go_on()

    def go_on(self) -> None:
        """Carry out as much work as the choices say, none included."""
        with self.lock:
            while (ready := self._find_ready()) and self.choices.choose(2):
                self._step(ready)

    def _reach_events(self) -> None:
        while self.is_coarse and (ready := [queue for queue in self._find_ready() if queue[0].run is None]):
            self._carry_out(ready[0].popleft())

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Carry out work until something has happened; it must be possible."""
        with self.lock:
            while not is_over():
                self._step(self._find_ready())

    def finish(self) -> None:
        """Carry out everything."""
        self.run_until(lambda: not any(self.streams.values()))

    def _find_ready(self) -> list[deque[Work]]:
        heads = [queue for queue in self.streams.values() if queue]
        return [queue for queue in heads if queue[0].after is None or queue[0].after.reached]

    def _step(self, ready: list[deque[Work]]) -> None:
        assert ready, "the device waits for an event that nobody has recorded"
        self._carry_out(ready[self.choices.choose(len(ready)) if len(ready) > 1 else 0].popleft())
        self._reach_events()

    def _carry_out(self, work: Work) -> None:
        if work.run is not None:
            work.run()
        if work.reaches is not None:
            work.reaches.reached = True


@dataclass(frozen=True, slots=True)
class FakeLane:
    """A stream for exchanges of a fake device."""

    device: FakeDevice
    stream: str

    def copy_all(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Queue the copies in an order of the device's own, each in pieces."""
        self.device.fails("copy_all")
        moves = [
            move
            for source, target in zip(sources, targets, strict=True)
            for move in _find_moves(source, target, is_coarse=self.device.is_coarse)
        ]
        while moves:
            self.device.submit(moves.pop(self.device.choices.choose(len(moves))), stream=self.stream)

    def record(self) -> Event:
        self.device.fails("record")
        return self.device.record_on(self.stream)

    def wait_for(self, events: Iterable[Event]) -> None:
        self.device.hold_back(self.stream, events)


def _find_moves(source: torch.Tensor, target: torch.Tensor, *, is_coarse: bool) -> Iterator[Callable[[], object]]:
    """Yield moves between addresses that together copy `source` to `target`."""
    assert (source.shape, source.dtype) == (target.shape, target.dtype)
    if not (source.is_contiguous() and target.is_contiguous()):
        for row, other in zip(source.unbind(), target.unbind(), strict=True):
            yield from _find_moves(row, other, is_coarse=is_coarse)
        return
    half = 0 if is_coarse else source.nbytes // 2
    for start, end in ((0, half), (half, source.nbytes)):
        if end > start:
            yield functools.partial(ctypes.memmove, target.data_ptr() + start, source.data_ptr() + start, end - start)


class FakePlaces(Places):
    """Puts tensors of the CPU on fake devices: those of a module that is handed over, and those in their blocks."""

    def __init__(self, *, num_windows: int = 3, window_nbytes: int | None = None) -> None:
        super().__init__()
        self.devices: list[FakeDevice] = []
        self._homes: list[tuple[int, int, FakeDevice]] = []
        self._keep: list[torch.Tensor] = []
        self._num_windows = num_windows
        self._window_nbytes = window_nbytes

    def add(self, device: FakeDevice, *modules: nn.Module) -> FakeDevice:
        """Say that the tensors of `modules` are on `device`; they are kept, so that their addresses stay theirs."""
        if device not in self.devices:
            self.devices.append(device)
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._homes.append((tensor.data_ptr(), tensor.data_ptr() + max(1, tensor.nbytes), device))
                self._keep.append(tensor.detach())
        return device

    def find(self, tensor: torch.Tensor) -> Device | None:
        if tensor.is_meta:
            return None
        address = tensor.data_ptr()
        for device in self.devices:
            if device.owns(address):
                return device
        return next((device for start, end, device in self._homes if start <= address < end), None)

    def ring(self, device: Device) -> Ring:
        with self._lock:
            if device.name not in self._rings:
                size = {} if self._window_nbytes is None else {"window_nbytes": self._window_nbytes}
                self._rings[device.name] = Ring(device, num_windows=self._num_windows, **size)
            return self._rings[device.name]
