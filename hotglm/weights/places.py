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
from collections.abc import Iterator

import torch

from hotglm.weights.cuda import find_cuda_device, find_known_devices
from hotglm.weights.device import Device
from hotglm.weights.ring import Ring

__all__ = ["Places", "Streams", "active"]

Streams = tuple[torch.cuda.Stream, ...]
"""The streams that are current in a thread, of the devices that slots hold tensors on; new threads inherit none."""


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

    def read_streams(self) -> Streams:
        """Return the streams of the calling thread, that of its current device last."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return ()
        known = sorted(find_known_devices(), key=lambda device: device.index == torch.cuda.current_device())
        return tuple(torch.cuda.current_stream(device.index) for device in known)

    @contextlib.contextmanager
    def working(self, streams: Streams) -> Iterator[None]:
        """Work for whoever `streams` are of: what is run for them is submitted where they submit, and captures nothing.

        A warm-up on the service's own stream warms up what belongs to that stream: the blocks that the allocator keeps
        for it, and the workspaces of cuBLAS.
        """
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            for device in find_known_devices()[:1]:  # the driver's mode is the thread's, for all devices
                stack.enter_context(device.staging())
            yield


active = Places()
