"""A stand-in for what torch says of CUDA: it computes nothing, and notes every call with the device and stream it met.

The context managers `torch.cuda.device` and `torch.cuda.stream` stay torch's own, over primitives of ours, so that what
they do to the current device and stream is what they do on a device. Tensors are the processor's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hotglm.weights import cuda, cuda_blocks, cuda_driver

__all__ = ["FakeCuda", "FakeCudaEvent", "FakeStream"]

POOL_SIZE = 32


@dataclass(frozen=True, slots=True)
class FakeStream:
    """A stream, by its handle and the index of its device."""

    cuda: FakeCuda = field(compare=False, repr=False)
    cuda_stream: int
    device_index: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.device_index)

    def wait_event(self, event: Any) -> None:
        self.cuda.note("wait_event", self.cuda_stream, event.handle)


class FakeCudaEvent:
    """An event of the stand-in."""

    def __init__(self, cuda: FakeCuda, *, blocking: bool) -> None:
        self.cuda = cuda
        self.blocking = blocking
        self.handle = next(cuda.numbers)
        self.is_reached = True

    def record(self, stream: Any = None) -> None:
        self.cuda.fail("record")
        self.cuda.note("record", stream.cuda_stream, self.handle)

    def query(self) -> bool:
        self.cuda.fail("query")
        self.cuda.touch()
        return self.is_reached

    def synchronize(self) -> None:
        self.cuda.fail("synchronize")
        self.cuda.touch()
        self.cuda.note("synchronize", None, self.handle)


@dataclass(slots=True)
class FakeCuda:
    """The runtime, the driver and torch's allocator, as far as hotglm calls them.

    Attributes:
        log: `(call, stream, detail)`, in order.
        contexts: devices that a context was made on.
        capturing: handles of streams that are being captured.
        fail: called with the name of each call that may fail.
        used_on: handles of the streams that blocks were noted on, in order.
    """

    num_devices: int = 2
    log: list[tuple[str, int | None, object]] = field(default_factory=list)
    contexts: set[int] = field(default_factory=set)
    capturing: set[int] = field(default_factory=set)
    fail: Callable[[str], object] = lambda call: None
    used_on: list[int] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)
    free_nbytes: int = 1 << 30
    fraction: float = 1.0
    has_driver: bool = True
    modes: dict[int, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))
    threads: threading.local = field(default_factory=threading.local)
    turns: dict[tuple[int, int], int] = field(default_factory=dict)

    # -- of a thread -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> int:
        return int(getattr(self.threads, "device", 0))

    @property
    def stream(self) -> FakeStream:
        return self.find_current(self.device)

    @property
    def mode(self) -> int:
        return self.modes.get(threading.get_ident(), 0)

    def find_current(self, index: int) -> FakeStream:
        streams: dict[int, FakeStream] = self.threads.__dict__.setdefault("streams", {})
        return streams.get(index) or FakeStream(self, 0, index)

    def touch(self) -> None:
        """Do what every call of the runtime does: make a context on the thread's current device."""
        self.contexts.add(self.device)

    def note(self, call: str, stream: int | None, detail: object) -> None:
        self.log.append((call, stream, detail))

    def find(self, call: str) -> list[tuple[int | None, object]]:
        """Return stream and detail of each call of that name."""
        return [(stream, detail) for name, stream, detail in self.log if name == call]

    # -- what torch has ----------------------------------------------------------------------------------------------

    def exchange_device(self, device: int) -> int:
        before, self.threads.device = self.device, device
        self.contexts.add(device)
        return before

    def maybe_exchange_device(self, device: int) -> int:
        before, self.threads.device = self.device, device
        return before

    def set_stream(self, stream: FakeStream) -> None:
        if stream.device_index != self.device:
            self.exchange_device(stream.device_index)
        self.find_current(stream.device_index)
        self.threads.streams[stream.device_index] = stream

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.find_current(self._find_index(device))

    def default_stream(self, device: Any = None) -> FakeStream:
        return FakeStream(self, 0, self._find_index(device))

    def make_stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> FakeStream:
        assert not kwargs
        with torch.cuda.device(device):
            self.touch()
            pool = min(max(0, -priority), 3)
            turn = self.turns[self.device, pool] = self.turns.get((self.device, pool), -1) + 1
            return FakeStream(self, 0x1000 * (1 + pool) + turn % POOL_SIZE, self.device)

    def make_external(self, stream_ptr: int, device: Any = None, **kwargs: Any) -> FakeStream:
        assert not kwargs
        return FakeStream(self, stream_ptr, self._find_index(device))

    def make_event(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> FakeCudaEvent:
        assert (enable_timing, interprocess, external) == (False, False, False)
        return FakeCudaEvent(self, blocking=blocking)

    def is_current_stream_capturing(self) -> bool:
        self.fail("capturing")
        return self.stream.cuda_stream in self.capturing

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self.fail("mem_get_info")
        return self.free_nbytes, 1 << 40

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        self.fail("memory_stats")
        return self.statistics

    def empty(self, *size: Any, **options: Any) -> torch.Tensor:
        """Make a tensor of the processor; of `options` a device and pinning are only noted."""
        if options.pop("pin_memory", False):
            self.fail("pin")
        if torch.device(options.get("device", "cpu")).type == "cuda":
            self.fail("allocate")
            self.note("allocate", self.stream.cuda_stream, size[0])
            del options["device"]
        return _empty(*size, **options)

    def record_stream(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        del tensor
        self.used_on.append(stream.cuda_stream)

    def copy_(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self.fail("copy")
        self.note("copy", self.stream.cuda_stream, (source.numel(), non_blocking))
        return _copy(target, source)

    def _find_index(self, device: Any) -> int:
        if device is None:
            return self.device
        return int(device.index) if isinstance(device, torch.device) else int(device)

    # -- the runtime and the driver ----------------------------------------------------------------------------------

    def cudart(self) -> Any:
        return SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self._unregister)

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        self.touch()
        self.fail("register")
        self.note("register", None, (address, nbytes, flags, self.mode))
        return 0

    def _unregister(self, address: int) -> int:
        self.note("unregister", None, address)
        return 0

    def exchange_mode(self, mode: int) -> int | None:
        if not self.has_driver:
            return None
        before, self.modes[threading.get_ident()] = self.mode, mode
        return before

    def create_stream(self, index: int) -> int | None:
        self.note("create_stream", None, (index, self.mode))
        return 0xA000 + index if self.has_driver else None

    # -- in torch's place --------------------------------------------------------------------------------------------

    def functions(self) -> dict[str, object]:
        """Return what stands for which attribute of `torch.cuda`."""
        return {
            "Event": self.make_event,
            "ExternalStream": self.make_external,
            "_exchange_device": self.exchange_device,
            "_maybe_exchange_device": self.maybe_exchange_device,
            "cudart": self.cudart,
            "current_device": lambda: self.device,
            "current_stream": self.current_stream,
            "default_stream": self.default_stream,
            "get_per_process_memory_fraction": lambda device=None: self.fraction,
            "is_available": lambda: True,
            "is_current_stream_capturing": self.is_current_stream_capturing,
            "is_initialized": lambda: True,
            "mem_get_info": self.mem_get_info,
            "memory_stats": self.memory_stats,
            "set_stream": self.set_stream,
        }

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put this in the place of CUDA, and forget the devices that hotglm knows."""
        for name, function in self.functions().items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda, "Stream", _StreamType(self))
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch.Tensor, "record_stream", _as_method(self.record_stream))
        patch.setattr(torch.Tensor, "copy_", _as_method(self.copy_))
        patch.setattr(cuda_driver, "_exchange_capture_mode", self.exchange_mode)
        patch.setattr(cuda, "create_stream", self.create_stream)
        patch.setattr(cuda, "_devices", {})
        patch.setattr(cuda_blocks, "_all", [])


class _StreamType(type):
    """Called, it makes a stream of the stand-in; asked, it says what is one."""

    cuda: FakeCuda

    def __new__(cls, cuda: FakeCuda) -> _StreamType:
        made = super().__new__(cls, "Stream", (), {})
        made.cuda = cuda
        return made

    def __init__(cls, cuda: FakeCuda) -> None:
        super().__init__("Stream", (), {})

    def __call__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
        return cls.cuda.make_stream(device, priority, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, FakeStream)


def _as_method(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, which a class binds to the tensor it is asked on, as it does not with a method."""

    def method(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
        return call(tensor, *given, **options)

    return method


_empty, _copy = torch.empty, torch.Tensor.copy_
