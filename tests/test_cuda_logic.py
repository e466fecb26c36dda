"""What of the CUDA implementation is logic and not CUDA: pinning and its fallback, listing streams, captures.

The driver is a stand-in of a few lines; that CUDA does what it is taken to do is for `tests/gpu`.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hotglm.errors import MemoryPlanError
from hotglm.weights import cuda, cuda_blocks, cuda_driver, pinning
from hotglm.weights.pinning import PinnedMemory

PAGE = 4096


class Driver:
    """Registers memory, or refuses; notes who asked, and in which thread."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.registered: dict[int, int] = {}
        self.threads: set[int] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's own name
        self.threads.add(threading.get_ident())
        if self.refuses:
            return 801
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's own name
        del self.registered[address]
        return 0


@pytest.fixture
def make_driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    def make(**options: bool) -> Driver:
        driver = Driver(**options)
        monkeypatch.setattr(pinning, "_cudart", lambda: driver)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        return driver

    return make


def test_memory_is_registered_to_the_byte_and_unlocked_before_it_goes(make_driver: Callable[..., Driver]) -> None:
    """Exactly what was asked for is registered, written through windows, and unregistered once, before the map goes."""
    driver, entered = make_driver(), []

    @contextlib.contextmanager
    def within() -> Any:
        entered.append(threading.get_ident())
        yield

    pinned = PinnedMemory(5 * PAGE, index=0, within=within)
    assert list(driver.registered.values()) == [5 * PAGE]
    pinned.bytes(PAGE, 3)[:] = b"abc"
    assert pinned.tensor[PAGE : PAGE + 3].tolist() == list(b"abc")
    pinned.release()
    pinned.release()
    assert driver.registered == {}
    assert pinned.tensor.numel() == 0
    assert threading.get_ident() not in {*driver.threads, *entered}  # a refusal stays behind in the thread that asked


def test_a_refusal_falls_back_to_torch(make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver registers nothing, torch's own pinned memory is taken; without any, the error is typed."""
    make_driver(refuses=True)
    with pytest.raises(MemoryPlanError, match="bytes of pinned memory, got none"):  # this torch has no CUDA
        PinnedMemory(PAGE, index=0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda nbytes, *, dtype, **_: empty(nbytes, dtype=dtype))
    pinned = PinnedMemory(PAGE, index=0)
    pinned.bytes(8, 2)[:] = b"xy"
    assert pinned.tensor[8:10].tolist() == list(b"xy")
    pinned.release()


def test_pools_are_listed_whole_while_others_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream of every pool is found, although somebody else asks for streams at the same time."""
    turns = {priority: itertools.cycle(range(32)) for priority in cuda._PRIORITIES}
    others = random.Random(0)

    def ask(*, device: object, priority: int) -> SimpleNamespace:
        for _ in range(others.choice((1, 1, 1, 2)) if priority == -1 else 0):  # somebody else, mostly in step with us
            next(turns[priority])
        return SimpleNamespace(cuda_stream=1000 * (1 - priority) + next(turns[priority]))

    monkeypatch.setattr(torch.cuda, "Stream", ask)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    found = cuda._list_streams(torch.device("cpu"))
    assert {handle // 1000 for handle in found} == {0, 1, 2, 3, 4}
    assert all(stream.cuda_stream == handle for handle, stream in found.items())
    assert len(found) == 1 + 4 * 32


@pytest.mark.parametrize("answers", [[False, False], [True, True, False, False], [False, True, False, False]])
def test_an_event_is_never_part_of_a_capture(monkeypatch: pytest.MonkeyPatch, answers: list[bool]) -> None:
    """A stream that is being captured is waited for, also where its capture begins while the event is recorded."""
    asked, made = iter(answers), []

    def record(stream: object) -> str:
        made.append(stream)
        return f"event {len(made)}"

    monkeypatch.setattr(cuda, "is_captured", lambda stream: next(asked))
    monkeypatch.setattr(cuda, "CudaEvent", record)
    event: object = cuda.record_uncaptured(SimpleNamespace())  # type: ignore[arg-type]
    assert event == f"event {len(made)}"
    assert (next(asked, None), len(made)) == (None, 1 + (answers[:2] == [False, True]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_threads_are_as_they_were() -> None:
    """Where there is no driver, what a thread of a stage works in does nothing."""
    assert cuda_driver._exchange_capture_mode(1) is None
    assert cuda_driver.create_stream(0) is None


def test_no_block_is_forgotten_of_two_that_are_noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots stage on one device: each block is known afterwards, and was used on streams noted meanwhile."""
    blocks, tensors = cuda_blocks.Blocks(), [torch.zeros(16) for _ in range(3)]
    expired = StorageWeakRef.expired

    def note_another(reference: Any) -> Any:
        monkeypatch.setattr(StorageWeakRef, "expired", expired)
        blocks.add(tensors[2], list)  # as another thread would between any two steps
        return expired(reference)  # type: ignore[no-untyped-call]

    seen: list[int] = []

    def find_streams() -> list[torch.cuda.Stream]:
        seen.append(len(list(blocks.find())))
        return []

    try:
        blocks.add(tensors[0], find_streams)
        monkeypatch.setattr(StorageWeakRef, "expired", note_another)
        blocks.add(tensors[1], find_streams)
        assert seen == [1, 3]  # whoever notes a stream from here on finds the block
        addresses = {storage.data_ptr() for storage in blocks.find()}
        assert addresses == {tensor.data_ptr() for tensor in tensors}
        del tensors[1:]
        blocks.add(tensors[0], list)
        assert len(blocks._storages) == 2  # what has gone is not kept in mind
    finally:
        cuda_blocks._all.remove(blocks)
