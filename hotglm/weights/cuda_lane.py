"""Events of CUDA, and the streams that weights are exchanged on.

Rules this module keeps: as weights/cuda.py; no stream is made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hotglm.weights.cuda_blocks import keep_for_ever
from hotglm.weights.device import Event

__all__ = ["CudaEvent", "CudaLane", "hold_back"]

_LARGE_NBYTES = 1 << 20
"""What takes the device longer to copy than the driver to be told."""


class CudaEvent:
    """An event that was recorded when it was made."""

    __slots__ = ("_event", "_index")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Record it on `stream`."""
        self._index = stream.device_index
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        try:
            self._event.record(stream)
        except RuntimeError:
            keep_for_ever()  # whatever it was: memory that stays is less than a process that ends by a signal
            raise

    def is_done(self) -> bool:
        """Tell whether everything before it is done."""
        with torch.cuda.device(self._index):
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Sleep until everything before it is done."""
        with torch.cuda.device(self._index):
            self._event.synchronize()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Let what is submitted to `stream` from now on begin after it."""
        stream.wait_event(self._event)


class CudaLane:
    """A stream for exchanges; see `Stream`."""

    __slots__ = ("_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        """Take a stream of `device` that nobody else is handed, and that lives as long as the process."""
        self._stream = stream
        self._device = device

    def copy_all(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Submit large copies one by one, which the driver makes, and all small ones by a few kernels of torch."""
        small: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        with torch.no_grad(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                if source.nbytes >= _LARGE_NBYTES or source.device != target.device or not source.is_contiguous():
                    target.copy_(source, non_blocking=True)
                    continue
                group = small.setdefault(source.dtype, ([], []))  # one kernel takes what is of one type
                group[0].append(target)
                group[1].append(source)
            for to, of in small.values():
                torch._foreach_copy_(to, of)

    def record(self) -> CudaEvent:
        """Record an event on the stream."""
        with torch.cuda.device(self._device):
            return CudaEvent(self._stream)

    def wait_for(self, events: Iterable[Event]) -> None:
        """Hold the stream back until `events` are done."""
        hold_back(self._stream, events)


def hold_back(stream: torch.cuda.Stream, events: Iterable[Event]) -> None:
    """Let what is submitted to `stream` from now on begin after `events`."""
    for event in events:
        if not isinstance(event, CudaEvent):
            raise TypeError(f"an event of CUDA was expected, got {type(event).__name__}")
        event.hold_back(stream)
