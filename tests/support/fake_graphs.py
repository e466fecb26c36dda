"""A recorder of graphs without a device: it notes what a pass does, by address, and does it again at these addresses.

A replay is work of the fake device: it waits in the queue of a stream, and is carried out whenever the device goes on.
It knows its module's tensors by address alone, as a graph of CUDA does. So it reads the old weights where somebody
replays the graph of another arena, and says so where the memory was given up.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hotglm.weights.graphs import Run
from support.fake_device import FakeDevice, Work

__all__ = ["FakeRecorder", "FakeRecording", "on_stream"]

_stream = threading.local()


@contextmanager
def on_stream(name: str) -> Iterator[None]:
    """Make a stream of fake devices current in this thread."""
    before, _stream.name = getattr(_stream, "name", "default"), name
    try:
        yield
    finally:
        _stream.name = before


def current_stream() -> str:
    return getattr(_stream, "name", "default")


@dataclass(frozen=True, slots=True)
class Address:
    """A tensor that a graph has seen, without its memory."""

    pointer: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Address:
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def open(self) -> torch.Tensor:
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        memory = (ctypes.c_char * (extent * self.dtype.itemsize)).from_address(self.pointer)
        return torch.frombuffer(memory, dtype=self.dtype, count=extent).as_strided(self.shape, self.stride)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation of a pass; what the pass has made itself is kept, the rest is an address."""

    def __init__(self, made: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = {tensor.untyped_storage().data_ptr(): tensor for tensor in made}
        self.steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        noted = pytree.tree_map(self._note, (args, kwargs or {}))
        found = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage().data_ptr() not in given]
        self.made |= {tensor.untyped_storage().data_ptr(): tensor for tensor in fresh}
        self.steps.append((func, *noted, fresh))
        return found

    def _note(self, leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        return leaf.detach() if leaf.untyped_storage().data_ptr() in self.made else Address.of(leaf)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


@dataclass(eq=False, slots=True, weakref_slot=True)
class FakeRecording:
    """One captured pass."""

    recorder: FakeRecorder
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    steps: list[tuple[Any, Any, Any, list[torch.Tensor]]]

    def replay(self) -> None:
        self.recorder.num_replayed += 1
        self.recorder.submit(self._run)

    def _run(self) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            for func, args, kwargs, outputs in self.steps:
                opened, named = pytree.tree_map(self._open, (args, kwargs))
                found = [leaf for leaf in pytree.tree_leaves(func(*opened, **named)) if _is_tensor(leaf)]
                for kept, value in zip(outputs, found, strict=False):
                    kept.copy_(value)

    def _open(self, leaf: Any) -> Any:
        if not isinstance(leaf, Address):
            return leaf
        if not self.recorder.owns(leaf.pointer):
            self.recorder.num_lost += 1
            return torch.full(leaf.shape, torch.nan, dtype=leaf.dtype)
        return leaf.open()


@dataclass(slots=True)
class FakeRecorder:
    """Captures passes over memory of a fake device, or of the processor.

    Attributes:
        device: whose streams replays are queued on.
        owns: tells whether memory at an address is still somebody's.
        follows: whether streams are put behind each other; False plants a missing wait.
        fails: called in the middle of a capture; may raise.
        between: called when the inputs of a pass were copied, before it is replayed.
        num_lost: how often a replay read memory that had been given up.
        threads: those that captured.
    """

    device: FakeDevice
    owns: Callable[[int], bool] = lambda pointer: True
    follows: bool = True
    fails: Callable[[], object] = lambda: None
    between: Callable[[], object] = lambda: None
    num_captured: int = 0
    num_replayed: int = 0
    num_lost: int = 0
    threads: list[int] = field(default_factory=list)
    made: weakref.WeakSet[FakeRecording] = field(default_factory=weakref.WeakSet)

    def capture(self, run: Run, samples: Sequence[torch.Tensor]) -> FakeRecording:
        run([sample.clone() for sample in samples])
        inputs = tuple(torch.full_like(sample, -1) for sample in samples)
        self.fails()
        with Tape(inputs) as tape:
            outputs = tuple(run(list(inputs)))
        self.num_captured += 1
        self.threads.append(threading.get_ident())
        recording = FakeRecording(self, inputs, outputs, tape.steps)
        self.made.add(recording)
        return recording

    def find_stream(self) -> str | None:
        return None if current_stream() == "captured" else current_stream()

    def follow(self, stream: str) -> None:
        if self.follows:
            self.device.put(current_stream(), Work(after=self.device.record_on(stream)))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.submit(lambda: target.copy_(source))
        self.between()

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        found = torch.full_like(tensor, torch.nan)
        self.submit(lambda: found.copy_(tensor))
        return found

    def submit(self, work: Callable[[], object]) -> None:
        def run() -> None:
            with torch.inference_mode(mode=False), torch.no_grad():
                work()

        self.device.submit(run, stream=current_stream())
