"""CUDA, as weights/device.py asks for it.

Rules this module keeps:

- Nothing of CUDA is touched before a tensor on a CUDA device was seen; importing this starts no context.
- Every call is made with the right device current, and none makes another one current without the guard that torch
  leaves without a trace: the runtime would make a context on device 0 for a thread that has none.
- No call here waits for the device but `CudaEvent.wait`, which gives the GIL and the core away.
- A stream that is being captured is left alone, and a thread of a stage tells the driver that its calls belong to no
  capture (`staging`); what a thread of the service captures meanwhile stays whole.

[Note: streams of torch]
Torch makes its streams once, in pools, and hands them out in turns: asking a pool often enough names them all, and
asking costs nothing but the turn. The side stream is none of them. A service that is handed the same stream may capture
it, and every copy that hotglm submits meanwhile would become part of that graph, and be made again, from windows that
hold something else, at each replay. So the driver is asked for one; only where it gives none is torch's taken.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import torch

from hotglm.errors import ArgumentError, MemoryPlanError, StageFailedError, shorten_repr
from hotglm.problem import describe_exception
from hotglm.weights.cuda_blocks import Blocks
from hotglm.weights.cuda_driver import create_stream, leaving_captures_alone
from hotglm.weights.cuda_lane import CudaEvent, CudaLane, hold_back
from hotglm.weights.device import Event
from hotglm.weights.pinning import PinnedMemory
from hotglm.weights.workers import yield_gil_when_due

__all__ = [
    "CudaDevice",
    "CudaEvent",
    "find_cuda_device",
    "find_known_devices",
    "is_captured",
    "make_stream",
    "note_stream",
    "record_uncaptured",
]

_PRIORITIES = (0, -1, -2, -3)
"""Those for which torch has a pool of its own; others mean the nearest of them."""

_POOL_SIZE = 32
"""Streams of one of torch's pools. One that is larger is seen whole too: asking ends with a row of known ones."""

_NUM_REPEATS = 64
"""How many known streams in a row end the asking, once as many as a pool has were seen."""

_MAX_ASKS = 10_000
"""How often is asked where fewer are seen: others who ask beside us take streams out of our turns, but not for ever."""

_COPY_NBYTES = 4 << 20
"""Largest single copy: the service's own copies to the device wait for one of them, 80 us, and not for a window."""

_MOVE_NBYTES = 64 << 20
"""Largest single copy within the device, some 30 us of its memory's time."""

_CAPTURE_POLL_S = 0.001

_CAPTURE_LIMIT_S = 60.0
"""How long the end of a capture is waited for. One whose thread has died ends never."""


class CudaDevice:
    """One CUDA device; see `Device`."""

    def __init__(self, index: int) -> None:
        """Make the side stream."""
        self.index = index
        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)
        self._side = make_stream(self._device)
        self._blocks = Blocks()
        self._lock = threading.Lock()
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._lanes: dict[int, CudaLane] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of torch's memory that torch reuses only when every stream is done with it."""
        try:
            with torch.inference_mode(mode=False), self.submitting():
                block = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise MemoryPlanError(
                f"Expected {nbytes} bytes on {self.name} for the spare, got none: {describe_exception(error)}.",
                remedy="free device memory (torch.cuda.empty_cache()), or let go of old generations.",
            ) from error
        self._blocks.add(block, self._find_streams)
        return block

    def let_go(self) -> None:
        """Keep all blocks where the device has failed: with one that goes, torch would end the process."""
        with contextlib.suppress(RuntimeError):
            self.record()  # which keeps them where it cannot

    def read_free_nbytes(self) -> int:
        """Return what the driver has free and torch may take, and what it keeps in whole blocks and would give back.

        What torch keeps for graphs counts as free, too, and is not: then `allocate` refuses what was planned.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        kept = _read_statistics(self._device)
        reusable = (
            kept.get("reserved_bytes.all.current", 0)
            - kept.get("allocated_bytes.all.current", 0)
            - kept.get("inactive_split_bytes.all.current", 0)
        )
        allowed = _read_limit(self._device, total) - kept.get("reserved_bytes.all.current", 0)
        return max(0, min(int(free), int(allowed))) + max(0, int(reusable))

    def pin(self, nbytes: int) -> PinnedMemory:
        """Return exactly `nbytes` of pinned host memory."""
        return PinnedMemory(nbytes, index=self.index, within=self.staging)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Submit a copy, in pieces between which other streams' copies find room."""
        step = _MOVE_NBYTES if source.is_cuda and target.is_cuda else _COPY_NBYTES
        with self.submitting():
            for start in range(0, target.numel(), step):
                end = start + step
                target[start:end].copy_(source[start:end], non_blocking=True)

    def record(self) -> CudaEvent:
        """Record an event on the side stream."""
        return CudaEvent(self._side)

    def record_passes(self, *, timeout_s: float | None = None) -> tuple[CudaEvent, ...]:
        """Record an event on every stream that torch has, and on those it was told of.

        Raises:
            StageFailedError: one of them has been captured for a minute, or for `timeout_s`.
        """
        limit_s = _CAPTURE_LIMIT_S if timeout_s is None else timeout_s
        with torch.cuda.device(self._device):
            return tuple(record_uncaptured(stream, limit_s=limit_s) for stream in self._find_streams())

    def lane(self, number: int) -> CudaLane:
        """Return one of the streams for exchanges."""
        with self._lock:
            if number not in self._lanes:
                self._lanes[number] = CudaLane(make_stream(self._device), self._device)
            return self._lanes[number]

    def record_here(self) -> tuple[CudaEvent, ...]:
        """Record an event on the current stream of this thread; none where that is being captured."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            return () if is_captured(stream) else (CudaEvent(stream),)

    def wait_for(self, events: Iterable[Event]) -> None:
        """Hold the side stream back until `events` are done."""
        hold_back(self._side, events)

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Make the side stream, and its device, current in this thread."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):  # in this order; see the module's rules
            yield

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Make the device current, and keep what this thread does out of the captures of others."""
        with torch.cuda.device(self._device), leaving_captures_alone():
            yield

    def note(self, stream: torch.cuda.Stream) -> None:
        """Count a stream that is not torch's own among those that passes use."""
        self._find_streams()
        with self._lock:
            self._streams[stream.cuda_stream] = stream
        self._blocks.note(stream)

    def _find_streams(self) -> tuple[torch.cuda.Stream, ...]:
        with self._lock:
            if not self._streams:
                self._streams = _list_streams(self._device)
            return tuple(self._streams.values())


def note_stream(stream: torch.cuda.Stream) -> None:
    """Tell hotglm of a CUDA stream that is not torch's own and on which passes run (`torch.cuda.ExternalStream`).

    Weights that such a pass may still read are then not written again before it has ended. Streams that torch made, by
    `torch.cuda.Stream()` or as the default one, are known. Call it once, before the first pass; the stream must live as
    long as the process.

    Args:
        stream: of any CUDA device.

    Raises:
        ArgumentError: it is not a CUDA stream.
    """
    if not isinstance(stream, torch.cuda.Stream):
        raise ArgumentError(
            f"Expected a torch.cuda.Stream, got {shorten_repr(stream)}.",
            remedy="wrap a raw one: torch.cuda.ExternalStream(pointer).",
        )
    find_cuda_device(stream.device_index).note(stream)


def find_cuda_device(index: int) -> CudaDevice:
    """Return the one object that stands for a CUDA device in this process."""
    with _lock:
        if index not in _devices:
            _devices[index] = CudaDevice(index)
        return _devices[index]


def find_known_devices() -> tuple[CudaDevice, ...]:
    """Return the CUDA devices that slots hold tensors on."""
    return tuple(_devices.values())


_lock = threading.Lock()
_devices: dict[int, CudaDevice] = {}


def make_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nobody else is handed ([Note: streams of torch]); it lives as long as the process."""
    with torch.cuda.device(device), leaving_captures_alone():
        handle = create_stream(device.index)
    if handle is None:
        return torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
    return torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]


def _read_limit(device: torch.device, total_nbytes: int) -> int:
    """Return how much of a device's memory torch may take (`set_per_process_memory_fraction`)."""
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return total_nbytes if read is None else int(read(device) * total_nbytes)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _read_statistics(device: torch.device) -> dict[str, int]:
    """Return those of torch's allocator; none where somebody put another one in its place."""
    try:
        return torch.cuda.memory_stats(device)
    except RuntimeError:
        return {}


def _list_streams(device: torch.device) -> dict[int, torch.cuda.Stream]:
    """Return every stream that torch can hand out for `device`, by its handle ([Note: streams of torch])."""
    default = torch.cuda.default_stream(device)
    found = {default.cuda_stream: default}
    for priority in _PRIORITIES:
        pool: set[int] = set()
        num_asks = num_repeats = 0
        while num_asks < _MAX_ASKS and (num_repeats < _NUM_REPEATS or len(pool) < _POOL_SIZE):
            stream = torch.cuda.Stream(device=device, priority=priority)  # type: ignore[no-untyped-call]
            num_repeats = num_repeats + 1 if stream.cuda_stream in pool else 0
            num_asks += 1
            pool.add(stream.cuda_stream)
            found.setdefault(stream.cuda_stream, stream)
    return found


def record_uncaptured(stream: torch.cuda.Stream, *, limit_s: float = _CAPTURE_LIMIT_S) -> CudaEvent:
    """Record an event on `stream` while it is not being captured.

    An event that is recorded in a capture is part of the graph, and says nothing of the work that was queued before.
    The capture may begin between the question and the record, so it is asked again.
    """
    deadline = time.monotonic() + limit_s
    while True:
        yield_gil_when_due()
        if not is_captured(stream):
            event = CudaEvent(stream)
            if not is_captured(stream):
                return event
        if time.monotonic() > deadline:
            raise StageFailedError(
                f"Expected the capture of a CUDA graph to end, got one that has gone on for {limit_s:g} s.",
                remedy="stage outside of captures, and end those whose thread was interrupted.",
            )
        time.sleep(_CAPTURE_POLL_S)


def is_captured(stream: torch.cuda.Stream) -> bool:
    """Tell whether a graph is being captured on `stream`."""
    with torch.cuda.device(stream.device_index), torch.cuda.stream(stream):
        return bool(torch.cuda.is_current_stream_capturing())
