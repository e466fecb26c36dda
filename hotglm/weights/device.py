"""Where streams meet: what hotglm asks of a device, and what is ordered by what when it does.

This is the hard file of the weights; `weights/cuda.py` implements it, `tests/support/fake_device.py` implements it too,
and does everything that it leaves open in every order. Each claim names the test that fails without it.

[Note: streams]
**The order is what is written here, and nothing else.** A device has one long-lived *side stream*, made once and kept
(fresh streams per update strand memory in torch's allocator), and any number of streams of the service, of which
hotglm knows nothing but that torch can name them.

O1  Work submitted to one stream takes effect in the order in which it was submitted.
O2  An event that was recorded on a stream is done when all work submitted to that stream before is done; work
    submitted to a stream after `wait_for(events)` begins when these are done.
O3  Once `is_done` has said True, or `wait` has returned, that work is over for the host as well: memory it read may be
    written, what it wrote may be read, and anything submitted to any stream from then on comes after it.
O4  A copy reads its host memory at some time between its submission and its event, in pieces, in any order.
O5  Everything else may happen in any order: work on two streams, work and the host, and, above all, a reference that
    was dropped and a kernel that still reads what it referred to.

From these follow the six things that staging has to do:

- **A window of the ring is written again only after the event of its last copy** (O3, O4; `weights/ring.py`). The event
  is recorded after the last copy of the window, on the stream of the copy: recorded before it, or on another stream,
  it says nothing (`tests/test_device_hazards.py`, "early event", "copy on another stream", "window").
- **A window that the device copies to is read by the host only after the event of that copy** (O3; `Window.fetch`),
  and what it reads is what was there when all work was done that the side stream was put behind: the work of the stream
  whose thread asks for a proof (`record_here`), and of every stream where the tensors came with the module, and were
  published by nobody ("fetch" and "proof" in `tests/test_device_proof.py` and `tests/test_device_reuse.py`).
- **A generation is published only after the event of its copies was seen to be done by the host** (`settle`). Then any
  pass, on any stream, that is submitted later reads what was copied (O3), and no pass needs to wait for anything; one
  event wait per pass would be the alternative ("publish").
- **An arena is written again only after the work of the last pass that may read it.** A lease that is dead
  (`[Note: lease]` in weights/arena.py) says that nobody can *submit* work over the arena any more; what was submitted
  may still be queued (O5). So whoever takes the next lease records, *after* the old one was seen dead, one event on
  every stream that a pass may have used (`record_passes`), and has the side stream wait for them (`begin`): all work
  over the arena was submitted before those events were recorded, and is done when they are (O1, O2) ("reuse").
- **Nothing waits on a serving thread, and no pass records anything.** Events of passes are recorded by the thread that
  stages, at the moment they are needed, and waited for by the side stream on the device. A pass pays nothing, not even
  a flag, on any device. Rejected: an event per pass (2 us each, and none for passes through a session or a kept
  module); `cudaDeviceSynchronize` (it waits for the new work as well, and ends a graph capture in any thread);
  `cuCtxRecordEvent` (one event for all streams, but it, too, ends captures).
- **Memory goes back to torch's allocator only behind the same events.** The allocator knows the allocating stream
  alone; blocks are noted as used on every stream (`Tensor.record_stream`), so that it defers their reuse itself.

**Which streams.** A pass runs on the stream that is current in its thread. Torch hands out the default stream and those
of its pools, which can be listed at any time; a stream that is not torch's own (`torch.cuda.ExternalStream`) is told to
hotglm once (`hotglm.note_stream`). A raw CUDA graph that was captured over an arena holds addresses and no lease: it is
no holder that anybody can see, and wants the policy that keeps addresses.

**In place** the order is turned round: what is written is live, and what reads it are passes that have returned to the
host with kernels still queued. weights/device_exchange.py has that argument, [Note: exchange].

**After an error.** Copies that were submitted before a stage failed or was cancelled go on. They are on the side
stream, and so is every later write to that arena (O1); their windows come back with an event each. So nothing has to be
waited for, and ring and arena are fit for the next stage ("error", "cancelled").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

__all__ = ["DEVICE_ALIGNMENT", "Device", "Event", "Pinned", "Stream"]

DEVICE_ALIGNMENT = 512
"""Bytes to which every tensor in a device's arena is aligned: as torch's own allocations are.

cuBLAS and others choose a kernel by the alignment of what it reads. A tensor that is aligned to less than a cold load's
may be multiplied by another kernel, and the outputs are then not equal bit for bit (P12).
"""


class Event(Protocol):
    """A point in the work of one stream."""

    def is_done(self) -> bool:
        """Tell whether everything before it is done (O3); never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling thread, without the GIL, until everything before it is done (O3)."""
        ...


class Pinned(Protocol):
    """Host memory that a device copies from without the processor; page-locked once, and kept.

    Attributes:
        tensor: all of it as a flat uint8 tensor on the CPU.
    """

    tensor: torch.Tensor

    def bytes(self, start: int, nbytes: int) -> memoryview:
        """Return a writable window; the memory lives as long as it does."""
        ...

    def release(self) -> None:
        """Unlock and return the memory; no copy may be reading it. May be called twice."""
        ...


class Stream(Protocol):
    """A long-lived stream of ours beside the side stream, on which nothing but an exchange is submitted."""

    def copy_all(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Submit a copy of each source to its target (O1); among themselves they are done in any order.

        The pairs have one shape and dtype each and are on the device or in pinned memory of the host; no target
        overlaps anything else.
        """
        ...

    def record(self) -> Event:
        """Record an event on this stream (O2)."""
        ...

    def wait_for(self, events: Iterable[Event]) -> None:
        """Let work that is submitted to this stream from now on begin after `events` (O2); does not block."""
        ...


class Device(Protocol):
    """One device other than the processor. Any thread may call any method.

    Attributes:
        name: as torch writes it, `cuda:0`.
    """

    name: str

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of the device's memory as a flat uint8 tensor, with whatever values.

        Raises:
            MemoryPlanError: the device has no such memory to give.
        """
        ...

    def let_go(self) -> None:
        """Be told that an arena lets go of its block, which goes when nobody holds it any more; never raises."""
        ...

    def read_free_nbytes(self) -> int:
        """Return how many bytes could be allocated now, those that torch keeps for reuse included."""
        ...

    def pin(self, nbytes: int) -> Pinned:
        """Return exactly `nbytes` of pinned host memory.

        Raises:
            MemoryPlanError: there is none to be had.
        """
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Submit a copy of flat uint8 `source` to `target`, of the same size, to the side stream (O1, O4).

        Each of them is this device's, or pinned memory.
        """
        ...

    def record(self) -> Event:
        """Record an event on the side stream (O2)."""
        ...

    def record_passes(self, *, timeout_s: float | None = None) -> tuple[Event, ...]:
        """Record an event on every stream that a pass may have used (O2); blocks at most while a graph is captured.

        Args:
            timeout_s: how long it may block, in seconds; None for as long as a capture may take.

        Raises:
            StageFailedError: a capture does not end.
        """
        ...

    def lane(self, number: int) -> Stream:
        """Return one of the streams for exchanges, 0 or 1; the same one each time."""
        ...

    def record_here(self) -> tuple[Event, ...]:
        """Record an event on the stream that the calling thread works on (O2); none while that is captured by it."""
        ...

    def wait_for(self, events: Iterable[Event]) -> None:
        """Let work that is submitted to the side stream from now on begin after `events` (O2); does not block."""
        ...

    def submitting(self) -> AbstractContextManager[object]:
        """Return a context in which what torch does with this device's tensors goes to the side stream."""
        ...

    def staging(self) -> AbstractContextManager[object]:
        """Return what a thread of a stage works in: this device is current, and captures of other threads are safe."""
        ...
