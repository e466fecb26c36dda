"""Where tensors live: which device stands behind one, and the ring of each.

Rules this module keeps:

- The processor is no `Device`: None stands for it, and what concerns it alone goes the way it went before there were
  devices, at the same cost.
- There is one object and one ring for each device in a process, made when they are first needed and kept.
- Nothing in production assigns `active`; tests do, to put a fake in the place of a device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from hotglm.errors import SlotStateError, StageFailedError
from hotglm.problem import describe_exception
from hotglm.weights.cuda import find_cuda_device, find_known_devices, is_captured
from hotglm.weights.cuda_driver import leaving_captures_alone
from hotglm.weights.device import Device
from hotglm.weights.ring import Ring

__all__ = ["Places", "Streams", "active"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Where a thread submits its work; new threads inherit none of it.

    Attributes:
        streams: those that are current, of the devices that slots hold tensors on.
        device: the index of the current device; None where CUDA is not in use.
    """

    streams: tuple[torch.cuda.Stream, ...] = ()
    device: int | None = None


class Places:
    """The devices of this process."""

    def __init__(self) -> None:
        """Know none yet, and pin nothing."""
        self._lock = threading.Lock()
        self._rings: dict[str, Ring] = {}

    def supports(self, tensor: torch.Tensor) -> bool:
        """Tell whether a slot can hold a tensor where it is."""
        return tensor.device.type in ("cpu", "cuda")

    def find(self, tensor: torch.Tensor) -> Device | None:
        """Return the device that `tensor` is on; None for the processor."""
        place = tensor.device
        return find_cuda_device(place.index or 0) if place.type == "cuda" else None

    def ring(self, device: Device) -> Ring:
        """Return the ring of a device, pinned when it is first asked for.

        Raises:
            MemoryPlanError: there is no pinned memory to be had.
        """
        with self._lock:
            if device.name not in self._rings:
                self._rings[device.name] = Ring(device)
            return self._rings[device.name]

    def wait_for_sources(self, tensors: Iterable[torch.Tensor]) -> None:
        """Wait until what was submitted so far to the devices of `tensors` is done; then any stream may read them (O3).

        What is offered may still be being computed, on a stream, and on a device, that no arena of the slot is on.
        """
        devices = {id(device): device for device in map(self.find, tensors) if device is not None}
        for event in [event for device in devices.values() for event in device.record_passes()]:
            event.wait()

    def read_streams(self) -> Streams:
        """Return where the calling thread submits.

        Raises:
            SlotStateError: to a graph that it captures: a stage waits for the end of captures.
            StageFailedError: a device has failed.
        """
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return Streams()
        streams = tuple(torch.cuda.current_stream(device.index) for device in find_known_devices())
        try:
            captured = next(filter(is_captured, streams), None)
        except RuntimeError as error:
            raise StageFailedError(
                f"Expected devices that work, got {describe_exception(error)}.",
                remedy="restart the process; a device that has failed once does not come back in it.",
            ) from error
        if captured is not None:
            raise SlotStateError(
                f"Expected a thread that captures no CUDA graph, got one that does, on {captured.device}.",
                remedy="update before the capture begins, or after it has ended.",
            )
        return Streams(streams=streams, device=torch.cuda.current_device())

    @contextlib.contextmanager
    def working(self, streams: Streams) -> Iterator[None]:
        """Work for whoever `streams` are of: what is run for them is submitted where they submit, and captures nothing.

        A warm-up on the service's own stream warms up what belongs to that stream: the blocks that the allocator keeps
        for it, and the workspaces of cuBLAS.
        """
        if streams.device is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(leaving_captures_alone())  # the driver's mode is the thread's, for all devices
            for stream in streams.streams:
                stack.enter_context(_using(stream))
            if streams.device != torch.cuda.current_device():  # else the guard would make a context on an idle device
                stack.enter_context(torch.cuda.device(streams.device))
            yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work in a thread whose calls must end no graph capture of another thread, whatever is read in it."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            yield
            return
        with leaving_captures_alone():
            yield


@contextlib.contextmanager
def _using(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream that of its device, and leave the current device what it is."""
    before = torch.cuda.current_stream(stream.device_index)
    _set_stream(stream)
    try:
        yield
    finally:
        _set_stream(before)


def _set_stream(stream: torch.cuda.Stream) -> None:
    with torch.cuda.device(stream.device_index):
        torch.cuda.set_stream(stream)


active = Places()
