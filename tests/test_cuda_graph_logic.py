"""What of capturing CUDA graphs is logic and not CUDA: the order of calls, the pool, and captures that fail.

CUDA is a stand-in that writes down what it is asked; that it does what it is taken to do is for `tests/gpu`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hotglm.weights import cuda_graphs
from hotglm.weights.cuda_graphs import CudaRecorder

X = torch.ones(3)


@dataclass
class Stream:
    """One stream; waits are written down."""

    name: str
    journal: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.journal.append(f"{self.name} waits for {other.name}")


class Generator:
    """A generator with the state of that name."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def clone_state(self) -> Generator:
        return Generator(f"copy of {self.state}")


@dataclass
class Cuda:
    """Stands for CUDA.

    Attributes:
        ends_badly: whether the end of a capture fails.
        captured: names of streams that somebody captures.
    """

    journal: list[str] = field(default_factory=list)
    ends_badly: bool = False
    captured: set[str] = field(default_factory=set)
    current: list[Stream] = field(default_factory=list)
    device: int = 0

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    def note(self, what: str) -> None:
        self.journal.append(f"{what} on {self.current[-1].name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A stand-in for all that a recorder asks of torch's CUDA."""
    made = Cuda()
    names, pools = itertools.cycle(["running", "capturing"]), itertools.count()
    made.current.append(Stream("current", made.journal))

    class Graph:
        def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
            self._pool = pool
            made.note(f"begin into {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            made.note("end")
            if made.ends_badly:
                raise RuntimeError("operation failed due to a previous error during capture")

        def pool(self) -> Any:
            return self._pool

        def replay(self) -> None:
            made.note("replay")

    @contextlib.contextmanager
    def leaving_alone() -> Iterator[None]:
        yield

    fakes: dict[str, Any] = {
        "device": made.on,
        "stream": made.stream,
        "current_stream": lambda device=None: made.current[-1],
        "current_device": lambda: made.device,
        "is_current_stream_capturing": lambda: made.current[-1].name in made.captured,
        "CUDAGraph": Graph,
        "default_generators": (Generator("own"),),
        "graph_pool_handle": lambda: f"pool {next(pools)}",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda_graphs, "make_stream", lambda device: Stream(next(names), made.journal))
    monkeypatch.setattr(cuda_graphs, "leaving_captures_alone", leaving_alone)

    def tell(index: int, pool: Any) -> None:
        assert index == 0
        made.journal.append(f"allocator is told of {pool}")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", tell, raising=False)
    return made


def make_recorder() -> CudaRecorder:
    return CudaRecorder(torch.device("cuda", 0))


def test_a_capture_comes_after_passes_and_waits_for_nobody_else(cuda: Cuda) -> None:
    """Passes run on one stream, the capture on another; the caller's stream comes before and after them."""

    def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        cuda.note("pass")
        return [tensor + 1 for tensor in tensors]

    recording = make_recorder().capture(run, [X])
    assert cuda.journal == [
        "running waits for current",
        *["pass on running"] * 3,
        "current waits for running",
        "capturing waits for running",
        "begin into pool 0, thread_local on capturing",
        "pass on capturing",
        "end on capturing",
    ]
    assert [tensor.shape for tensor in (*recording.inputs, *recording.outputs)] == [X.shape] * 2
    recording.replay()
    assert cuda.journal[-1] == "replay on current"


def test_a_pool_is_shared_while_a_graph_of_it_lives(cuda: Cuda) -> None:
    """A capture goes into the pool of a graph that is there; into one whose graphs are gone nothing may be captured."""
    recorder = make_recorder()
    one = recorder.capture(list, [X])
    two = recorder.capture(list, [X])
    del one
    gc.collect()
    three = recorder.capture(list, [X])
    del two, three
    gc.collect()
    recorder.capture(list, [X])
    begun = [line for line in cuda.journal if line.startswith("begin")]
    assert [line.partition(",")[0] for line in begun] == ["begin into pool 0"] * 3 + ["begin into pool 1"]


def test_passes_that_fail_are_waited_for(cuda: Cuda) -> None:
    """What they have queued may still read the weights: the caller's stream, which is waited for, comes after it."""

    def fail(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        make_recorder().capture(fail, [X])
    assert cuda.journal == ["running waits for current", "current waits for running"]


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_is_ended(ends_badly: bool, cuda: Cuda) -> None:
    """The error of the pass is raised, the capture is ended, and the allocator is told where torch does not."""

    def fail(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if cuda.current[-1].name == "capturing":
            raise ValueError("it waits for the device")
        return list(tensors)

    cuda.ends_badly = ends_badly
    recorder = make_recorder()
    with pytest.raises(ValueError, match="waits for the device"):
        recorder.capture(fail, [X])
    assert cuda.journal[-1] == ("allocator is told of pool 0" if ends_badly else "end on capturing")
    cuda.ends_badly = False
    recorder.capture(list, [X])


@pytest.mark.parametrize(("version", "state"), [("2.11.0+cu130", "copy of own"), ("2.13.1", "own")])
def test_a_capture_marks_no_generator_of_others(
    version: str, state: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.13 it begins with another state in the place of the device's, which is back before any pass."""
    generator, states = Generator("own"), []
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    begin = torch.cuda.CUDAGraph.capture_begin

    def begin_and_look(graph: Any, **options: Any) -> None:
        states.append(generator.state)
        begin(graph, **options)

    def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        states.append(generator.state)
        return list(tensors)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin_and_look)
    make_recorder().capture(run, [X])
    assert states == [*["own"] * 3, state, "own"]
    assert generator.state == "own"


def test_an_end_that_fails_is_told_to_the_allocator(cuda: Cuda) -> None:
    """A capture that torch cannot end is an error; its graph stays, because torch goes on referring to it."""
    cuda.ends_badly = True
    kept = len(cuda_graphs._failed)
    with pytest.raises(RuntimeError, match="previous error"):
        make_recorder().capture(list, [X])
    assert cuda.journal[-1] == "allocator is told of pool 0"
    assert len(cuda_graphs._failed) == kept + 1


def test_a_begin_that_fails_is_told_to_the_allocator(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator may have begun where the driver has not; the next capture goes to another pool."""
    recorder, begin = make_recorder(), torch.cuda.CUDAGraph.capture_begin

    def fail(graph: Any, **options: Any) -> None:
        begin(graph, **options)
        raise RuntimeError("operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            recorder.capture(list, [X])
    assert cuda.journal[-1] == "allocator is told of pool 0"
    recorder.capture(list, [X])
    assert "begin into pool 1, thread_local on capturing" in cuda.journal


@pytest.mark.parametrize("device", [0, 1])
def test_a_stream_that_is_captured_is_none(device: int, cuda: Cuda) -> None:
    """A pass inside somebody else's capture replays nothing, whatever device is current."""
    recorder = make_recorder()
    cuda.device = device
    found: Any = recorder.find_stream()
    assert found is cuda.current[-1]
    cuda.captured.add("current")
    assert recorder.find_stream() is None
    assert cuda.device == device


def test_streams_are_put_behind_each_other_by_an_event(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is recorded on the other stream, outside of captures, and held against the current one."""
    other = Stream("other", cuda.journal)
    event = SimpleNamespace(hold_back=lambda stream: cuda.journal.append(f"{stream.name} comes after other"))
    monkeypatch.setattr(cuda_graphs, "record_uncaptured", lambda stream: event if stream is other else None)
    make_recorder().follow(other)  # type: ignore[arg-type]
    assert cuda.journal == ["current comes after other"]
