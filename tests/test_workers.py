"""Workers of a stage compute alone, yield when it is due, leave the service a core, and take turns at reading."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import ThreadStartError
from hotglm.release.files import open_weights
from hotglm.slot import loading, stage_request
from hotglm.slot.stager import clear_frames
from hotglm.testing.seams import hooked
from hotglm.weights import workers
from hotglm.weights.finite import find_nonfinite
from hotglm.weights.loader import load_files, load_tensors
from hotglm.weights.pace import AtWill
from hotglm.weights.proof import LoadOptions
from hotglm.weights.workers import Cancellation, computing_alone, run_tasks, yield_gil_when_due
from support.spares import Spare


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    """Have torch compute on two threads, as a service on two cores has by default."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_torch_threads")
@pytest.mark.skipif(workers._omp is None, reason="torch was built without OpenMP, or hides it")
def test_a_worker_computes_alone_and_nobody_else_notices() -> None:
    """In every thread of a task torch computes on one thread; the caller gets its own number back, others keep it."""
    inside: list[int] = []
    elsewhere: list[int] = []

    def task() -> None:
        inside.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()

    run_tasks([task] * 6, num_threads=2, nice=0, cancellation=Cancellation(), name="test")
    assert inside == [1] * 6
    assert elsewhere == [2] * 6
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_torch_threads")
def test_a_worker_that_fails_gives_the_number_of_threads_back() -> None:
    """An error inside leaves the calling thread's number of threads as it was."""

    def fail() -> None:
        with computing_alone():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.get_num_threads() == 2


def test_without_openmp_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenMP is not to be found, torch computes as it always did."""
    monkeypatch.setattr(workers, "_omp", None)
    before = torch.get_num_threads()
    with computing_alone():
        assert torch.get_num_threads() == before


def test_the_gil_is_yielded_by_time_and_not_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is called, it yields once in half a millisecond of the calling thread's time."""
    now, yields = [100.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(workers, "yield_gil", lambda: yields.append(now[0]))
    monkeypatch.setattr(workers, "_latest", threading.local())
    for _ in range(1000):
        yield_gil_when_due()
        now[0] += 0.00001
    assert len(yields) == pytest.approx(1000 * 0.00001 / 0.0005, abs=1)


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (3, 2), (64, 4)])
def test_a_stage_leaves_one_core_to_the_service(
    num_cores: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a stage reads on all cores but one, at least one, at most four; the policy may say otherwise."""
    found: list[int] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["options"].num_threads)
        return loaded(*args, **kwargs)

    loaded = load_tensors
    monkeypatch.setattr(loading, "load_tensors", record)
    monkeypatch.setattr(stage_request, "count_cores", lambda: num_cores)
    slot = hotglm.ModuleSlot(nn.Linear(2, 2))
    weights = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    slot.update(weights)
    slot.update(weights, policy=hotglm.StagePolicy(num_threads=7))
    assert found == [num_threads, 7]


def test_threads_that_hash_take_turns_at_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread reads, no other does, where the bytes are hashed too; without hashing they may."""
    monkeypatch.setattr(AtWill, "chunk_nbytes", 1 << 20)
    path = tmp_path / "model.safetensors"
    weights = {f"layer{index}": torch.full((1 << 18,), float(index)) for index in range(4)}
    save_file(weights, path)
    assert _find_reads_that_met(path, Spare(weights), digest=True) == 0
    assert _find_reads_that_met(path, Spare(weights), digest=False) > 0


def _find_reads_that_met(path: Path, spare: Spare, *, digest: bool) -> int:
    """Load with two threads, each read lingering until another one has come or 50 ms have passed; count those met."""
    reading, met, came = threading.Semaphore(1), [], threading.Event()

    def read(kind: str, number: int, args: tuple[Any, ...]) -> object:
        if kind != "preadv":
            return None
        if not reading.acquire(blocking=False):
            met.append(number)
            came.set()
            return os.preadv(*args)
        try:
            came.wait(0.05)
            return os.preadv(*args)
        finally:
            reading.release()

    with hooked(read), open_weights(path) as files:
        load_files(files, spare.targets, lease=spare.lease, options=LoadOptions(digest=digest, num_threads=2))
    assert [float(spare[f"layer{index}"].mean()) for index in range(4)] == [0.0, 1.0, 2.0, 3.0]
    return len(met)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_sum_that_overflows_is_no_alarm(dtype: torch.dtype) -> None:
    """Finite values whose sum is infinite are finite, and one infinity among them is found."""
    values = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(values.sum())
    assert find_nonfinite(values) is None
    values[63] = float("-inf")
    found = find_nonfinite(values)
    assert found is not None
    assert (found.num_elements, found.first_index) == (1, 63)


def test_a_thread_that_dies_before_it_begins_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """K05, K07: without memory for its first frame a thread never begins; that is said, and waited for with a bound."""
    ran: list[int] = []
    monkeypatch.setattr(workers, "_START_S", 0.01)
    monkeypatch.setattr(workers.Worker, "_bootstrap", lambda self: None)
    with pytest.raises(ThreadStartError, match="did not begin"):
        workers.start_thread(lambda: ran.append(1), name="stillborn")
    assert ran == []


@pytest.mark.parametrize("nice", [0, 5])
@pytest.mark.parametrize("is_entered", [False, True])
def test_a_thread_that_cannot_begin_its_work_is_a_failure(nice: int, is_entered: bool) -> None:
    """Tasks are done, or the caller hears of it: also where what surrounds them fails, before or after."""

    @contextlib.contextmanager
    def failing(cancellation: Cancellation) -> Iterator[None]:
        if is_entered:
            yield
        raise MemoryError

    with pytest.raises(MemoryError):
        run_tasks([lambda: None], num_threads=2, nice=nice, cancellation=Cancellation(), name="test", within=failing)


def test_a_thread_whose_priority_cannot_be_lowered_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are done, or the caller hears of it: also where a thread fails before it has come to its first task."""

    def fail(nice: int) -> None:
        raise MemoryError

    monkeypatch.setattr(workers, "lower_priority", fail)
    with pytest.raises(MemoryError):
        run_tasks([lambda: None], num_threads=2, nice=5, cancellation=Cancellation(), name="test")

    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="ranker", version="1.0.0")
    before = slot(torch.ones(2))
    with pytest.raises(hotglm.HotglmError):
        slot.update({"weight": torch.eye(2), "bias": torch.zeros(2)}, version="1.0.1")
    assert torch.equal(slot(torch.ones(2)), before)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_tasks_that_no_thread_is_to_run_are_run_by_one(num_threads: int) -> None:
    """Whatever number of threads is asked for, no task is left out."""
    ran: list[int] = []
    run_tasks([lambda: ran.append(1)], num_threads=num_threads, nice=5, cancellation=Cancellation(), name="test")
    assert ran == [1]


def test_a_thread_that_dies_unheard_of_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that nobody did are no success, however it came to that."""
    monkeypatch.setattr(workers.Worker, "run", lambda self: None)
    with pytest.raises(ThreadStartError, match="got 0 before they died"):
        run_tasks([lambda: None], num_threads=1, nice=5, cancellation=Cancellation(), name="test")


def _write(memory: object) -> None:
    """Stand for a task that writes."""


@pytest.mark.parametrize("nice", [0, 5])
def test_a_failure_that_is_kept_keeps_no_task(nice: int) -> None:
    """Memory of tasks, failed or not begun, goes with the frames of the failure, without a collection of garbage."""

    class Memory:
        """Stands for what a task writes."""

    reasons = Cancellation()
    reason = KeyboardInterrupt()
    reasons.cancel(reason)
    memory = [Memory() for _ in range(4)]
    watched = [weakref.ref(one) for one in memory]
    tasks: list[Callable[[], None]] = [functools.partial(_write, one) for one in memory]
    memory.clear()
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(tasks, num_threads=2, nice=nice, cancellation=reasons, name="test")
        tasks.clear()
        clear_frames(reason)
        assert [one() for one in watched] == [None] * 4
    finally:
        gc.enable()
