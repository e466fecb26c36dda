"""What the CUDA implementation calls, in which order, on which stream and device: over a stand-in that notes it all.

That CUDA does what it is taken to do is for `tests/gpu`; the stand-in is held against torch's own signatures here.
"""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import MemoryPlanError, SlotStateError, StageFailedError
from hotglm.weights import cuda_blocks, cuda_driver
from hotglm.weights.cuda import CudaDevice, CudaEvent, find_cuda_device
from hotglm.weights.cuda_driver import create_stream, leaving_captures_alone
from hotglm.weights.device_arena import DeviceArena
from hotglm.weights.pinning import PinnedMemory
from hotglm.weights.places import Places
from hotglm.weights.ring import Ring
from hotglm.weights.workers import Cancellation
from support.fake_cuda import FakeCuda, FakeStream

PAGE = 4096
REAL = {name: getattr(torch.cuda, name) for name in FakeCuda().functions()}
REAL_STREAM = torch.cuda.Stream


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    made.install(monkeypatch)
    return made


@pytest.fixture
def device(fake: FakeCuda) -> CudaDevice:
    made = find_cuda_device(1)
    made._find_streams()
    fake.log.clear()
    return made


SIDE = 0xA001


def make_stream(cuda: FakeCuda, handle: int, index: int) -> Any:
    return FakeStream(cuda, handle, index)


def find_parameters(function: Any) -> list[tuple[str, Any]]:
    """Return the parameters that can be named, with their defaults, of a function or of the class it stands for."""
    made = function.__new__ if inspect.isclass(function) else function
    found = inspect.signature(made).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("cls", "self")]


@pytest.mark.parametrize("name", sorted(set(REAL) - {"_exchange_device", "_maybe_exchange_device"}))
def test_the_stand_in_takes_what_torch_takes(name: str) -> None:
    """Each function of the stand-in has the parameters, and the defaults, of torch's own of that name."""
    theirs, ours = find_parameters(REAL[name]), find_parameters(FakeCuda().functions()[name])
    assert ours == theirs or (name == "Event" and ours[:-1] == theirs)  # `external` came with torch 2.7


def test_streams_of_the_stand_in_take_what_those_of_torch_take() -> None:
    """A stream is asked for by device and priority, and waits for an event by the method that torch has."""
    assert find_parameters(REAL_STREAM) == find_parameters(FakeCuda().make_stream)
    assert find_parameters(REAL_STREAM.wait_event)[0][0] == "event"
    assert {"record", "query", "synchronize", "wait"} <= set(dir(REAL["Event"]))
    assert {"device_index", "cuda_stream", "device"} <= set(dir(FakeStream))


# -- streams and devices -----------------------------------------------------------------------------------------------


def test_the_side_stream_is_nobody_elses(fake: FakeCuda) -> None:
    """The driver makes it, outside of captures; it is none that torch hands out, so nobody can capture it."""
    device = find_cuda_device(1)
    assert fake.find("create_stream") == [(None, (1, 1))]
    assert device._side.cuda_stream == SIDE
    asked = {fake.make_stream(torch.device("cuda", 1), priority).cuda_stream for priority in range(-3, 1)}
    assert SIDE not in asked | {stream.cuda_stream for stream in device._find_streams()}
    assert find_cuda_device(1) is device


def test_without_a_driver_the_side_stream_is_one_of_torch(fake: FakeCuda) -> None:
    """Where the driver makes no stream, torch's pool is asked, with the right device current."""
    fake.has_driver = False
    assert find_cuda_device(1)._side.cuda_stream == 0x1000
    assert fake.contexts == {1}


def test_no_call_touches_another_device(fake: FakeCuda, device: CudaDevice) -> None:
    """A slot on the second device makes no context on the first, whichever thread works for it."""

    def work() -> None:
        with device.staging():
            event = device.record()
            event.wait()
            assert event.is_done()
            device.copy(torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))
        event.wait()
        assert event.is_done()
        device.wait_for((*device.record_passes(), *device.record_here()))
        device.allocate(64)
        device.read_free_nbytes()
        device.pin(PAGE).release()
        with device.submitting():
            assert (fake.device, fake.stream.cuda_stream) == (1, SIDE)
        assert (fake.device, fake.stream.cuda_stream) == (0, 0)

    run_in_thread(work)
    assert fake.contexts == {1}


def run_in_thread(work: Callable[[], object]) -> None:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - raised below
            problems.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


def test_every_stream_of_torch_is_recorded(fake: FakeCuda, device: CudaDevice) -> None:
    """The events of passes cover the default stream, all pools and what was noted; the side stream waits for each."""
    hotglm.note_stream(make_stream(fake, 0xB000, 1))
    events = device.record_passes()
    recorded = [stream for stream, _ in fake.find("record") if stream is not None]
    pools = [0x1000 * pool + number for pool in range(1, 5) for number in range(32)]
    assert sorted(recorded) == sorted([0, 0xB000, *pools])
    device.wait_for(events)
    assert fake.find("wait_event") == [(SIDE, event._event.handle) for event in events]  # type: ignore[attr-defined]
    assert all(event._event.blocking for event in events)  # type: ignore[attr-defined]  # sleeps, and does not spin


def test_a_captured_stream_is_recorded_after_its_capture(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event is recorded on a stream that is being captured; one whose capture ends is recorded then."""
    fake.capturing.add(0x1003)
    slept: list[float] = []

    def sleep(duration_s: float) -> None:
        if duration_s:
            assert 0x1003 not in {stream for stream, _ in fake.find("record")}
            slept.append(duration_s)
        if len(slept) == 3:
            fake.capturing.clear()

    monkeypatch.setattr("hotglm.weights.cuda.time.sleep", sleep)
    device.record_passes()
    assert (len(slept), [stream for stream, _ in fake.find("record")].count(0x1003)) == (3, 1)


def test_a_thread_records_where_it_works(fake: FakeCuda, device: CudaDevice) -> None:
    """The event of a thread is on its current stream of that device, and none where it captures that."""
    with torch.cuda.device(1), torch.cuda.stream(make_stream(fake, 0x1009, 1)):
        (event,) = device.record_here()
        assert fake.find("record") == [(0x1009, event._event.handle)]  # type: ignore[attr-defined]
        fake.capturing.add(0x1009)
        assert device.record_here() == ()


def test_a_capture_without_an_end_is_a_typed_error(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream whose capture nobody ends does not hold a stage for ever."""
    fake.capturing.add(0x1003)
    clock = itertools.count(0.0, 7.0)
    monkeypatch.setattr("hotglm.weights.cuda.time.sleep", lambda duration_s: None)
    monkeypatch.setattr("hotglm.weights.cuda.time.monotonic", lambda: next(clock))
    with pytest.raises(StageFailedError, match="gone on for 60 s"):
        device.record_passes()


def test_only_events_of_cuda_are_waited_for(device: CudaDevice) -> None:
    """The side stream cannot wait for an event of another kind of device."""
    with pytest.raises(TypeError, match="an event of CUDA was expected, got object"):
        device.wait_for([object()])  # type: ignore[list-item]


def test_a_copy_goes_in_pieces_before_its_event(fake: FakeCuda, device: CudaDevice) -> None:
    """A window is copied in pieces of 4 MiB, asynchronously, on the side stream, and the event comes behind them."""
    source = torch.arange(256, dtype=torch.uint8).repeat(9 << 12)
    target = torch.zeros_like(source)
    fake.log.clear()
    device.copy(source, target)
    event = device.record()
    piece = 4 << 20
    assert fake.log == [
        ("copy", SIDE, (piece, True)),
        ("copy", SIDE, (piece, True)),
        ("copy", SIDE, (source.numel() - 2 * piece, True)),
        ("record", SIDE, event._event.handle),  # type: ignore[attr-defined]
    ]
    assert torch.equal(source, target)


def test_nothing_is_copied_of_nothing(fake: FakeCuda, device: CudaDevice) -> None:
    """A copy of no bytes submits none."""
    device.copy(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8))
    assert fake.find("copy") == []


# -- captures of others ------------------------------------------------------------------------------------------------


def test_staging_restores_the_mode_and_the_device_after_an_error(fake: FakeCuda, device: CudaDevice) -> None:
    """A thread of a stage is outside of captures, on its device; after an error it is what it was before."""
    found: list[tuple[int, int]] = []

    def stage() -> None:
        with device.staging():
            found.append((fake.mode, fake.device))
            raise OSError("planted")

    with leaving_captures_alone():
        with pytest.raises(OSError, match="planted"):
            stage()
        found.append((fake.mode, fake.device))
    found.append((fake.mode, fake.device))
    assert found == [(1, 1), (1, 0), (0, 0)]


def test_a_thread_that_captures_is_told_to_update_elsewhere(fake: FakeCuda, device: CudaDevice) -> None:
    """A stage asked for inside a capture of its own thread is refused, where it would wait for itself."""
    fake.capturing.add(0x1005)
    stream = make_stream(fake, 0x1005, 1)
    with torch.cuda.device(1), torch.cuda.stream(stream), pytest.raises(SlotStateError, match="on cuda:1"):
        Places().read_streams()
    assert Places().read_streams().device == 0


def test_a_stage_works_where_its_caller_does(fake: FakeCuda, device: CudaDevice) -> None:
    """Streams and current device of the caller are those of the stage's thread, which is then left as it was."""
    stream = make_stream(fake, 0x1007, 1)
    with torch.cuda.device(1), torch.cuda.stream(stream):
        streams = Places().read_streams()
    assert (streams.streams, streams.device) == ((stream,), 1)
    found: list[object] = []

    def work() -> None:
        with Places().working(streams):
            found.append((fake.device, fake.stream.cuda_stream, fake.mode))
        found.append((fake.device, fake.find_current(1).cuda_stream, fake.mode))

    run_in_thread(work)
    assert found == [(1, 0x1007, 1), (0, 0, 0)]


def test_an_idle_device_that_is_current_stays_idle(fake: FakeCuda, device: CudaDevice) -> None:
    """Who works on the second device while the first is current, as it is in every new thread, uses only the second."""
    fake.contexts.clear()
    streams = Places().read_streams()
    found: list[int] = []

    def work() -> None:
        with Places().working(streams):
            found.append(fake.device)

    run_in_thread(work)
    assert (found, fake.contexts - {1}) == ([0], set())


def test_without_cuda_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of a slot on the processor asks neither runtime nor driver; so does one in a forked child."""

    def ask(mode: int) -> None:
        raise AssertionError("nobody is to be asked")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(cuda_driver, "_exchange_capture_mode", ask)
    places = Places()
    with places.working(places.read_streams()), places.aside():
        pass


def test_sources_are_waited_for_on_their_own_devices(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offered from a device is read after all that was submitted there, once for each device."""
    places, tensors = Places(), [torch.zeros(1) for _ in range(3)]
    found = {id(tensors[0]): find_cuda_device(0), id(tensors[1]): find_cuda_device(0), id(tensors[2]): None}
    monkeypatch.setattr(places, "find", lambda tensor: found[id(tensor)])
    fake.log.clear()
    places.wait_for_sources(tensors)
    recorded, awaited = fake.find("record"), fake.find("synchronize")
    assert [event for _, event in recorded] == [event for _, event in awaited]
    assert len(recorded) == 1 + 4 * 32


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_block_is_noted_on_every_stream(fake: FakeCuda, device: CudaDevice) -> None:
    """A block is allocated on the side stream, noted on each stream there is, and on each that is told of later."""
    block = device.allocate(100)
    assert fake.find("allocate") == [(SIDE, 100)]
    assert fake.used_on == [stream.cuda_stream for stream in device._find_streams()]
    fake.used_on.clear()
    device._device = torch.device("cpu")
    hotglm.note_stream(make_stream(fake, 0xB000, 1))
    assert fake.used_on == [0xB000]
    del block
    hotglm.note_stream(make_stream(fake, 0xC000, 1))
    assert fake.used_on == [0xB000]


def test_blocks_are_kept_at_the_end_and_in_forked_children() -> None:
    """A process that ends, or was forked, drops no block that the driver would have to record events for."""
    script = (
        "import atexit, os\n"
        "import torch\n"
        "from hotglm.weights import cuda_blocks\n"
        "blocks, tensors = cuda_blocks.Blocks(), [torch.zeros(8), torch.zeros(8)]\n"
        "blocks.add(tensors[0], list)\n"
        "if os.fork() == 0:\n"
        "    tensors.clear()\n"
        "    os._exit(len(list(blocks.find())))\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), len(list(blocks.find())))\n"
        "atexit.unregister(cuda_blocks.keep_for_ever)\n"
        "def look(): tensors.clear(); print(len(list(blocks.find())))\n"
        "atexit.register(look)\n"
        "atexit.register(cuda_blocks.keep_for_ever)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1", "1", "1"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA driver error: out of memory")],
)
def test_a_device_without_memory_is_a_plan_error(fake: FakeCuda, device: CudaDevice, error: RuntimeError) -> None:
    """Whatever torch calls it, no memory is a `MemoryPlanError` that names bytes and device."""
    fake.fail = raising("allocate", error)
    with pytest.raises(MemoryPlanError, match="Expected 100 bytes on cuda:1 for the spare, got none"):
        device.allocate(100)


def raising(call: str, error: BaseException) -> Callable[[str], object]:
    def fail(name: str) -> None:
        if name == call:
            raise error

    return fail


def test_another_error_of_an_allocation_stays_what_it_is(fake: FakeCuda, device: CudaDevice) -> None:
    """A device that has failed is not taken for one that is full."""
    fake.fail = raising("allocate", RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        device.allocate(100)


def test_free_memory_counts_what_torch_would_give_back(fake: FakeCuda, device: CudaDevice) -> None:
    """Whole blocks that torch keeps are free; pieces of blocks in use are not; another allocator says nothing."""
    fake.free_nbytes = 1000
    fake.statistics = {
        "reserved_bytes.all.current": 700,
        "allocated_bytes.all.current": 400,
        "inactive_split_bytes.all.current": 100,
    }
    assert device.read_free_nbytes() == 1200
    fake.statistics["inactive_split_bytes.all.current"] = 10_000
    assert device.read_free_nbytes() == 1000
    fake.fraction = 800 / (1 << 40)  # of which 700 are taken
    assert device.read_free_nbytes() == 100
    fake.fraction = 1.0
    fake.fail = raising("memory_stats", RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats"))
    assert device.read_free_nbytes() == 1000


def test_memory_is_pinned_in_a_thread_that_is_outside_of_captures(fake: FakeCuda, device: CudaDevice) -> None:
    """Registering takes the runtime's portable flag, the exact size, and a thread that no capture can be ended by."""
    pinned = device.pin(3 * PAGE)
    address = pinned.tensor.data_ptr()
    assert fake.find("register") == [(None, (address, 3 * PAGE, 1, 1))]
    pinned.release()
    pinned.release()
    assert fake.find("unregister") == [(None, address)]


@pytest.mark.parametrize("fails", ["register", "nothing"])
def test_a_device_that_fails_while_memory_is_pinned(
    fake: FakeCuda, device: CudaDevice, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that raises instead of refusing falls back as well; without a fallback the error is typed."""
    uncaught: list[object] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    fake.fail = raising("register", RuntimeError("CUDA error: unknown error"))
    if fails == "nothing":
        assert device.pin(PAGE).tensor.numel() == PAGE  # torch's own
    else:
        failing = fake.fail

        def fail(call: str) -> None:
            failing(call)
            if call == "pin":
                raise RuntimeError("CUDA error: unknown error")

        fake.fail = fail
        with pytest.raises(MemoryPlanError, match=r"bytes of pinned memory, got none: .*unknown error"):
            PinnedMemory(PAGE, index=1, within=device.staging)
    assert uncaught == []


# -- a device that has failed ------------------------------------------------------------------------------------------


def test_blocks_of_a_device_that_has_failed_are_kept(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no event can be recorded any more no block may go: torch would end the process in a destructor."""
    kept: list[object] = []
    monkeypatch.setattr("hotglm.weights.cuda_lane.keep_for_ever", lambda: kept.append(1))
    fake.fail = raising("record", RuntimeError("CUDA error: device-side assert triggered"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device-side assert"):
            device.record_passes()
    assert kept == [1, 1]


def test_an_arena_that_goes_asks_whether_blocks_may_go(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of a device that works goes with its arena; one of a device that has failed since is kept."""
    kept: list[object] = []
    monkeypatch.setattr("hotglm.weights.cuda_lane.keep_for_ever", lambda: kept.append(1))
    arena = DeviceArena(64, device=device)
    del arena
    assert kept == []
    arena = DeviceArena(64, device=device)
    fake.fail = raising("record", RuntimeError("CUDA error: device-side assert triggered"))
    del arena
    assert kept == [1]
    fake.fail = raising("allocate", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryPlanError):
        DeviceArena(64, device=device)


def test_a_device_that_has_failed_is_a_typed_error_before_a_stage(fake: FakeCuda, device: CudaDevice) -> None:
    """Whoever stages on a device that has failed is told so, by an error of ours."""
    fake.fail = raising("capturing", RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(StageFailedError, match="got RuntimeError: CUDA error: device-side assert"):
        Places().read_streams()


def test_kept_blocks_outlive_every_reference() -> None:
    """A block that is kept stays, whoever lets go of it; one that has gone before is not brought back."""
    blocks = cuda_blocks.Blocks()
    try:
        one, other = torch.zeros(16), torch.zeros(16)
        blocks.add(one, list)
        blocks.add(other, list)
        del other
        assert len(list(blocks.find())) == 1
        cuda_blocks.keep_for_ever()
        del one
        assert len(list(blocks.find())) == 1
    finally:
        cuda_blocks._all.remove(blocks)


def test_windows_that_fail_in_many_threads_are_all_counted(fake: FakeCuda, device: CudaDevice) -> None:
    """A device that fails under every window at once leaves a ring that says so, and nobody waiting for ever."""
    ring = Ring(device, num_windows=4, window_nbytes=PAGE)
    fake.fail = raising("record", RuntimeError("CUDA error: an illegal memory access was encountered"))
    barrier, errors = threading.Barrier(4), []

    def work() -> None:
        try:
            with ring.lend(cancellation=Cancellation()) as window:
                window.is_dirty = True
                barrier.wait(10)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(errors), ring.num_windows) == (4, 0)
    with pytest.raises(StageFailedError, match="restart the process"), ring.lend(cancellation=Cancellation()):
        pass


def test_an_arena_is_begun_before_anything_is_submitted_to_it(fake: FakeCuda, device: CudaDevice) -> None:
    """Lending a block records every stream and holds the side stream back; a copy to it comes after."""
    arena = DeviceArena(4096, device=device)
    fake.log.clear()
    lease = arena.lease()
    device.copy(torch.ones(16, dtype=torch.uint8), lease.range(0, 16))
    lease.settle()
    calls = [name for name, _ in itertools.groupby(fake.log, key=lambda entry: entry[0])]
    assert calls == ["record", "wait_event", "copy", "record", "synchronize"]
    assert fake.find("synchronize") == [(None, fake.find("record")[-1][1])]


# -- the driver --------------------------------------------------------------------------------------------------------


class Library:
    """A driver that notes the calls, and fails from one of them on."""

    def __init__(self, *, refuses: str = "") -> None:
        self.calls: list[str] = []
        self.refuses = refuses

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == self.refuses.removeprefix("no "):
            if self.refuses.startswith("no "):
                raise AttributeError(name)
            return self._answer(name, 801)
        return self._answer(name, 0)

    def _answer(self, name: str, code: int) -> Callable[..., int]:
        def call(*given: Any) -> int:
            self.calls.append(name)
            if name == "cuStreamCreate" and code == 0:
                given[0]._obj.value = 0x7F00_1234_5678
            return code

        return call


STREAM_CALLS = [
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuStreamCreate",
    "cuCtxPopCurrent_v2",
]


def test_a_stream_is_made_in_the_primary_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context that torch uses is made current for as long as the stream is made; a handle has all of its bits."""
    library = Library()
    monkeypatch.setattr(cuda_driver, "_driver", library)
    assert create_stream(0) == 0x7F00_1234_5678
    assert library.calls == STREAM_CALLS


@pytest.mark.parametrize("refuses", [*STREAM_CALLS[:4], *(f"no {name}" for name in STREAM_CALLS[:4])])
def test_a_driver_that_makes_no_stream(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    """Whichever call fails, or is missing, there is no stream, and no context is left current."""
    library = Library(refuses=refuses)
    monkeypatch.setattr(cuda_driver, "_driver", library)
    assert create_stream(0) is None
    assert library.calls.count("cuCtxPopCurrent_v2") == (refuses.endswith("cuStreamCreate"))


def test_a_driver_without_capture_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that refuses, or does not know, the mode leaves the thread as it was."""
    for refuses in ("cuThreadExchangeStreamCaptureMode", "no cuThreadExchangeStreamCaptureMode"):
        library = Library(refuses=refuses)
        monkeypatch.setattr(cuda_driver, "_driver", library)
        with leaving_captures_alone():
            pass
        assert len(library.calls) <= 1


def test_events_wait_on_their_own_device(fake: FakeCuda, device: CudaDevice) -> None:
    """Asking an event of the second device, in a thread of the first, makes no context on the first."""
    event = CudaEvent(device._side)
    fake.contexts.clear()
    assert event.is_done()
    event.wait()
    assert fake.contexts == {1}
