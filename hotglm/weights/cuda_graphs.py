"""CUDA graphs, as weights/graphs.py asks for them.

Rules this module keeps:

- A capture is one of its thread (`thread_local`): what threads of the service do meanwhile neither ends it nor is part
  of it. `torch.cuda.graph` is not used, because it waits for the whole device and empties torch's cache, under the
  service.
- Inputs, intermediates and outputs of a graph lie in one private pool of the recorder. Graphs of one recorder may use
  the same intermediates, so no two of them may replay at the same time, and no output may be read once another one
  replays. Whoever replays sees to both (`Graphs.run` in model/graphed.py).
- Whatever goes wrong, torch's allocator is told that the capture is over.

[Note: pools of graphs]
Memory of a private pool goes back to other captures into that pool, or by `cudaFree`, which waits for the device: never
to work that is not ordered after the replays. A pool whose graphs are all gone may not be captured into again (torch
asserts that its count is positive), so a new one is taken then.

[Note: two streams]
Both are the driver's: work that somebody else gave the stream of a capture would be captured, and torch hands its own
streams out in turns, to anybody. A capture follows passes that were run for real: they load code, tune kernels and take
workspaces. They run on another stream than the capture, so that the workspace of cuBLAS for the captured stream is
taken inside the capture, and lies in the pool, where it lives as long as the graphs do.

[Note: random numbers]
Before torch 2.13 a capture marks the generator of the device as captured, for all threads: whoever draws a random
number outside of the capture gets an error, and after a capture that failed everybody does, for ever. So another state
stands in for that of the device's generator while the capture begins, and is the one that is marked. A pass that draws
random numbers can then not be captured (torch refuses it, and so do we); what another thread draws in these
microseconds is drawn from a copy of the state. From 2.13 on each capture has a state of its own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from packaging.version import Version

from hotglm.weights.cuda import make_stream, record_uncaptured
from hotglm.weights.cuda_driver import leaving_captures_alone
from hotglm.weights.graphs import Run

__all__ = ["CudaRecorder", "CudaRecording", "find_cuda_recorder"]

_ENDS = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
"""What torch calls it; the second before 2.8."""

_NUM_WARM_UPS = 3
"""Passes before a capture, as torch's own `make_graphed_callables` has them."""


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch's allocator of pinned memory goes on asking them which allocations are theirs."""


class CudaRecording:
    """One captured pass; see `Recording`."""

    __slots__ = ("__weakref__", "graph", "inputs", "outputs")

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Keep the graph and the tensors of its pool."""
        self.graph = graph
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def replay(self) -> None:
        """Submit it to the current stream."""
        self.graph.replay()


class CudaRecorder:
    """Captures passes of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Take two streams, for as long as the process lives."""
        self._device = device
        self._running = make_stream(device)
        self._capturing = make_stream(device)
        self._lock = threading.Lock()
        self._made: weakref.WeakSet[CudaRecording] = weakref.WeakSet()

    def capture(self, run: Run, samples: Sequence[torch.Tensor]) -> CudaRecording:
        """Warm up and capture; see `Recorder.capture`."""
        with self._lock, torch.cuda.device(self._device), leaving_captures_alone():
            current = torch.cuda.current_stream()
            self._running.wait_stream(current)
            try:
                with torch.cuda.stream(self._running):
                    for _ in range(_NUM_WARM_UPS):
                        run([sample.clone() for sample in samples])
            finally:  # whoever waits for the caller's stream waits for these passes, too, however they ended
                current.wait_stream(self._running)
            self._capturing.wait_stream(self._running)
            with torch.cuda.stream(self._capturing):
                made = self._record(run, samples)
            self._made.add(made)
            return made

    def _record(self, run: Run, samples: Sequence[torch.Tensor]) -> CudaRecording:
        graph = torch.cuda.CUDAGraph()
        living = next(iter(self._made), None)  # held meanwhile, so that its pool cannot go
        pool = torch.cuda.graph_pool_handle() if living is None else living.graph.pool()
        try:
            with _sparing_generator(self._device):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except BaseException:
            self._tell_allocator(graph, pool)
            raise
        try:
            inputs = [torch.empty_like(sample) for sample in samples]
            outputs = list(run(inputs))
        except BaseException:
            self._abandon(graph, pool)
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._tell_allocator(graph, pool)
            raise
        return CudaRecording(graph, inputs, outputs)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """End a capture that has failed: torch says so once more, and that says no more than its cause does."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._tell_allocator(graph, pool)

    def _tell_allocator(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Tell torch's allocator that the capture is over, which a begin or end that fails leaves out (torch 2.11)."""
        _failed.append(graph)
        self._made = weakref.WeakSet()  # its allocator of pinned memory cannot be told: another pool from here on
        ends = (getattr(torch._C, name, None) for name in _ENDS)
        end: Callable[..., None] | None = next((end for end in ends if end is not None), None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # it knows already
                end(self._device.index, pool)

    def find_stream(self) -> torch.cuda.Stream | None:
        """Return the current stream of the device, unless it is being captured."""
        stream = torch.cuda.current_stream(self._device)
        if torch.cuda.current_device() != self._device.index:  # the question below is about the current device
            with torch.cuda.device(self._device):
                return None if torch.cuda.is_current_stream_capturing() else stream
        return None if torch.cuda.is_current_stream_capturing() else stream

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Put the current stream behind another one."""
        record_uncaptured(stream).hold_back(torch.cuda.current_stream(self._device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy on the current stream, into memory of torch's for that stream."""
        return tensor.clone()


@contextlib.contextmanager
def _sparing_generator(device: torch.device) -> Iterator[None]:
    """Begin a capture in the body of a `with` that leaves the device's generator alone ([Note: random numbers])."""
    if Version(torch.__version__).release >= _CAPTURES_HAVE_STATES:
        yield
        return
    generator = torch.cuda.default_generators[device.index]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


_CAPTURES_HAVE_STATES = (2, 13)
"""The version of torch from which on captures have random states of their own."""


def find_cuda_recorder(device: torch.device) -> CudaRecorder:
    """Return a recorder for a CUDA device, with a pool of its own."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaRecorder(torch.device("cuda", index))
