"""FAULTS K06: the Nth call of every kind to the operating system fails, for every N until an update comes through.

After each failure the universal post-conditions hold (`support.universal`): the live generation serves, bit for bit.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hotglm
from hotglm.errors import HotglmError, MemoryPlanError, SourceChangedError, SourceReadError, ThreadStartError
from hotglm.testing.seams import KINDS, fail_with, hooked, only_nth, read_one_byte
from support.shards import write_sharded
from support.universal import World, universal

READING = ("close", "fstat", "listdir", "open", "pread", "preadv")
ERRNOS = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ESTALE, errno.EACCES)
WRITING = ("create", "flock", "fsync", "link", "lstat", "mkdir", "pwrite", "rename", "rmdir", "unlink")
"""Calls of releases and stores; tests/test_store_faults.py sweeps them."""

MAX_CALLS = 60


def os_error(number: int) -> Callable[[], BaseException]:
    return lambda: OSError(number, "planted")


FAULTS: dict[str, Callable[[], BaseException]] = {
    **{errno.errorcode[number]: os_error(number) for number in ERRNOS},
    "MemoryError": lambda: MemoryError("planted"),
    "RuntimeError": lambda: RuntimeError("planted"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("seam"), policy=hotglm.StagePolicy(num_threads=2)) as made:
        yield made


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load as large weights are loaded: by workers, whose start is one more call that can fail."""
    monkeypatch.setattr("hotglm.weights.proof._SMALL_NBYTES", 0)


def test_a_sharded_release_uses_every_kind_of_reading_call(world: World) -> None:
    """The sweeps below mean something: a sharded release from a directory goes through every kind of reading call."""
    number, source = write_sharded(world)
    world.publish(number)
    with hooked(lambda kind, count, args: None) as seen:
        world.slot.update(source)
    assert set(READING) <= set(seen.counts)
    assert seen.counts["start_thread"] >= 2
    others = {"keep_from_children", "map_anonymous", "populate", "reach", "start_thread"}
    assert set(KINDS) == {*READING, *WRITING, *others}


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "RuntimeError"])  # no reading call raises that
@pytest.mark.parametrize("kind", READING)
def test_the_nth_reading_call_that_fails_is_a_typed_refusal(world: World, kind: str, fault: str) -> None:
    """K06, D07, D14, D19: each reading call in turn fails; every time the refusal is typed and nothing has changed.

    Closing may fail without harm, and a stale handle is opened again; then the update comes through whole.
    """
    if kind == "close" and fault == "MemoryError":
        pytest.skip("the system has no such answer to close")
    harmless = kind == "close" or (kind, fault) == ("open", "ESTALE")
    kinds = (SourceReadError, MemoryPlanError)
    for number in range(1, MAX_CALLS):
        version, source = write_sharded(world)
        world.publish(version)
        with (
            universal(world, kinds, may_pass=True) as outcome,
            hooked(only_nth(kind, number, fail_with(kind, FAULTS[fault]))) as seen,
        ):
            world.slot.update(source)
        if seen.counts[kind] < number:
            assert number > 1
            return
        assert (outcome.error is None) is harmless, (number, outcome.error)
    pytest.fail("the sweep did not come to its end")


@pytest.mark.parametrize("kind", READING)
def test_the_nth_reading_call_that_is_interrupted_is_made_again(world: World, kind: str) -> None:
    """D07: EINTR at any call is not an error; the update comes through."""
    for number in range(1, MAX_CALLS):
        version, source = write_sharded(world)
        world.publish(version)
        with (
            universal(world, HotglmError, may_pass=True) as outcome,
            hooked(only_nth(kind, number, fail_with(kind, os_error(errno.EINTR)))) as seen,
        ):
            world.slot.update(source)
        if seen.counts[kind] < number:
            return
        if kind in ("open", "pread", "preadv", "close"):
            assert outcome.error is None, (number, outcome.error)
    pytest.fail("the sweep did not come to its end")


def test_every_read_may_be_one_byte_short_of_everything(world: World) -> None:
    """D07: reads that always bring one byte only bring the whole version in the end."""
    version, source = write_sharded(world)
    world.publish(version)
    with hooked(lambda kind, count, args: read_one_byte(args) if kind in ("pread", "preadv") else None):
        world.slot.update(source)
    assert world.answer().equal(world.expected(version))


@pytest.mark.parametrize("kind", ["pread", "preadv"])
def test_the_nth_read_that_meets_the_end_says_that_the_source_changed(world: World, kind: str) -> None:
    """D02: a read that meets the end of the file names file and offset; it is never taken for data."""
    for number in range(1, MAX_CALLS):
        version, source = write_sharded(world)
        world.publish(version)
        end = b"" if kind == "pread" else 0
        hook = lambda args, end=end: end  # noqa: E731 - one expression
        with (
            universal(world, SourceChangedError, code="SOURCE_CHANGED", may_pass=True) as outcome,
            hooked(only_nth(kind, number, hook)) as seen,
        ):
            world.slot.update(source)
        if seen.counts[kind] < number:
            return
        assert outcome.refusal.offset is not None
        assert outcome.refusal.file is not None
    pytest.fail("the sweep did not come to its end")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_thread_that_does_not_start_is_a_typed_refusal(world: World, fault: str) -> None:
    """K07: no thread can be had for the stage, or for any of its workers; the refusal is typed, no thread is left."""
    for number in range(1, MAX_CALLS):
        version, source = write_sharded(world)
        world.publish(version)
        with (
            universal(world, ThreadStartError, code="THREAD_START", may_pass=True) as outcome,
            hooked(only_nth("start_thread", number, fail_with("start_thread", FAULTS[fault]))) as seen,
        ):
            world.slot.update(source)
        if seen.counts["start_thread"] < number:
            assert number > 1
            return
        assert outcome.error is not None
    pytest.fail("the sweep did not come to its end")


@pytest.mark.parametrize("fault", ["ENOMEM", "EACCES", "MemoryError"])
@pytest.mark.parametrize("kind", ["map_anonymous", "populate"])
def test_memory_that_is_not_given_is_a_typed_refusal(tmp_path: Path, kind: str, fault: str) -> None:
    """D20: memory for the spare cannot be mapped or faulted in: a typed refusal; the next stage finds memory."""
    with World(tmp_path, memory=hotglm.MemoryPolicy(max_copies=6)) as world:
        for number in range(1, MAX_CALLS):
            version, source = world.write()
            world.publish(version)
            with (
                universal(world, HotglmError, may_pass=True) as outcome,
                hooked(only_nth(kind, number, fail_with(kind, FAULTS[fault]))) as seen,
            ):
                world.slot.update(source)
            if seen.counts[kind] < number:
                break
            expected = MemoryPlanError if kind == "map_anonymous" or fault == "MemoryError" else HotglmError
            assert isinstance(outcome.error, expected), outcome.error
        else:
            pytest.fail("the sweep did not come to its end")
        assert number > 1
