"""FAULTS group D, the reading side: files that change, shrink, vanish or fail while they are read and after.

Rows of the writing side (D09 to D13, D16 to D18: publishing, crashes, stores) belong to releases on disk: not here.
D08 (a sealed copy) is answered by having none: weights lie in private anonymous memory, which nobody can open.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm.errors import (
    DigestMismatchError,
    HotglmError,
    SourceChangedError,
    SourceError,
    SourceReadError,
    StageTimeoutError,
)
from hotglm.slot import stager
from hotglm.testing.seams import Hook, fail_with, hooked, only_nth
from support.bytes_maker import make_file, split_file
from support.shards import write_sharded
from support.universal import World, universal

MAX_CALLS = 80
STEP = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("reading"), policy=hotglm.StagePolicy(num_threads=2)) as made:
        yield made


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"other")
    path.with_suffix(".new").replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


# -- after it was loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [truncate, overwrite, replace, append, os.unlink])
def test_a_source_that_is_spoilt_after_it_was_loaded_changes_nothing(
    world: World, spoil: Callable[[Path], object]
) -> None:
    """D01, D03, D04: once loaded, the source may be cut, overwritten, replaced or removed; passes go on alike."""
    number, path = world.write(name="spoilt.safetensors")
    world.publish(number)
    world.slot.update(path)
    spoil(path)
    world.wait_for_passes(5)
    assert world.answer().equal(world.expected(number))
    path.unlink(missing_ok=True)
    with universal(world, SourceReadError, code="NOT_FOUND", file=path):
        world.slot.update(path)


def lies_in(address: int, span: str) -> bool:
    """Tell whether `address` lies in a span as /proc writes it."""
    start, stop = (int(end, 16) for end in span.split("-"))
    return start <= address < stop


def test_live_weights_are_private_memory_that_no_file_backs(world: World) -> None:
    """D08, P5: every live tensor lies in a private anonymous mapping, and no mapping of a source is left."""
    world.update()
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    for parameter in world.slot.live.module.parameters():
        own = next(parts for parts in lines if lies_in(parameter.data_ptr(), parts[0]))
        assert own[1].endswith("p")
        assert own[5:] in ([], ["[anon]"])
    assert not any(str(world.directory) in part for parts in lines for part in parts)


# -- while it is read --------------------------------------------------------------------------------------------------


def read_little(args: tuple[Any, ...]) -> object:
    """Answer `preadv` with at most `STEP` bytes, so that one file takes many calls."""
    fd, views, offset = args
    return os.preadv(fd, [views[0][:STEP]], offset)


def at_call(number: int, meddle: Callable[[], object], *, seen: list[int]) -> Hook:
    """Return a hook that meddles before the `number`th call of any kind, notes it in `seen`, and makes reads small."""
    lock, total = threading.Lock(), [0]

    def hook(kind: str, count: int, args: tuple[Any, ...]) -> object:
        with lock:
            total[0] += 1
            is_now = total[0] == number
        if is_now:
            seen.append(number)
            meddle()
        return read_little(args) if kind == "preadv" else None

    return hook


def keep_times(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file and give it its old times back: what a write within one tick of a coarse clock looks like."""
    status = path.stat()
    change(path)
    if path.exists():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_other(data: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(data)

    return change


SPOILS: dict[str, Callable[[bytes], Callable[[Path], object]]] = {
    "truncated": lambda other: truncate,
    "overwritten with noise": lambda other: overwrite,
    "overwritten with another version": write_other,
    "overwritten within one tick": lambda other: lambda path: keep_times(path, write_other(other)),
    "replaced": lambda other: replace,
    "unlinked": lambda other: Path.unlink,
    "appended to": lambda other: append,
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_source_that_is_spoilt_at_any_moment_is_refused_or_loaded_whole(world: World, spoil: str) -> None:
    """D02, D05: before every single call of a load in turn, the file is spoilt.

    Each time the update is refused with a typed error, or brings one whole version, the old bytes or the new ones,
    never a mixture: what overwrites a file and leaves size and time as they were is caught by the file's digests.
    """
    outcomes = set()
    for call in range(1, MAX_CALLS):
        other, other_path = world.write(name="other.safetensors")
        number, path = world.write(name="spoilt.safetensors")
        change = SPOILS[spoil](other_path.read_bytes())
        world.publish(number)
        world.publish(other)
        seen: list[int] = []
        hook = at_call(call, functools.partial(change, path), seen=seen)
        with (
            universal(world, HotglmError, may_pass=True) as outcome,
            hooked(hook),
        ):
            world.slot.update(path)
            answer = world.answer()
            assert answer.equal(world.expected(number)) or answer.equal(world.expected(other))
        outcomes.add(type(outcome.error))
        path.unlink(missing_ok=True)
        if not seen:
            break
        assert outcome.error is None or isinstance(outcome.error, SourceError), outcome.error
    else:
        pytest.fail("the sweep did not come to its end")
    refusing = outcomes - {type(None)}
    assert type(None) in outcomes
    assert refusing or spoil in ("unlinked", "replaced")


def test_digests_of_the_caller_catch_what_the_clock_cannot(world: World) -> None:
    """D05: a file without digests, overwritten within one tick of the clock, is caught by the caller's digests."""
    number, path = world.write(name="spoilt.safetensors")
    digests = hotglm.save_weights(world.state(number), world.directory / "whole.tmp")
    header, data = split_file(path.read_bytes())
    plain = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
    for call in range(1, MAX_CALLS):
        path.write_bytes(make_file(plain, data))
        seen: list[int] = []
        meddle = functools.partial(keep_times, path, write_other(make_file(plain, bytes(len(data)))))

        with universal(world, SourceError, may_pass=True) as outcome:
            world.publish(number)
            with hooked(at_call(call, meddle, seen=seen)):
                world.slot.update(path, version=f"1.1.{number}", digests=digests)
        if not seen:
            return
        assert outcome.error is None or isinstance(outcome.error, DigestMismatchError)
    pytest.fail("the sweep did not come to its end")


@pytest.mark.parametrize("spoil", ["truncated", "overwritten within one tick", "replaced"])
def test_a_shard_that_is_spoilt_at_any_moment_is_refused_or_loaded_whole(world: World, spoil: str) -> None:
    """D02, D05 for shards: one shard changes while the other is read; never two versions in one generation."""
    for call in range(1, MAX_CALLS):
        other, source = write_sharded(world)
        other_bytes = (source / "b.safetensors").read_bytes()
        number, source = write_sharded(world)
        world.publish(number)
        seen: list[int] = []
        change = SPOILS[spoil](other_bytes)
        hook = at_call(call, functools.partial(change, source / "b.safetensors"), seen=seen)
        with (
            universal(world, SourceError, may_pass=True) as outcome,
            hooked(hook),
        ):
            world.slot.update(source)
            assert world.answer().equal(world.expected(number))
        assert other != number
        if not seen:
            assert outcome.error is None
            return
    pytest.fail("the sweep did not come to its end")


# -- what is not the weights that were promised ------------------------------------------------------------------------


def test_a_hole_in_the_file_is_found_by_its_digest(world: World) -> None:
    """D06: a sparse file of the right size, zeros where a tensor was, is refused by the name of that tensor."""
    _, path = world.write(name="spoilt.safetensors")
    data = path.read_bytes()
    start = 8 + len(split_file(data)[0])
    with path.open("r+b") as file:
        file.truncate(start)
        file.truncate(len(data))
    with universal(world, DigestMismatchError, code="DIGEST_MISMATCH", file=None, tensor="layers.0.bias") as outcome:
        world.slot.update(path)
    assert len(outcome.refusal.problems) == 6
    assert all(str(problem.expected).startswith("sha256:") for problem in outcome.refusal.problems)


def test_what_is_no_regular_file_is_refused_at_once(world: World, tmp_path: Path) -> None:
    """B18: a FIFO that nobody writes to blocks nobody."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with universal(world, SourceReadError, code="NOT_REGULAR", file=tmp_path / "pipe.safetensors"):
        world.slot.update(tmp_path / "pipe.safetensors")


# -- an operating system that cannot -----------------------------------------------------------------------------------


def test_a_read_slower_than_the_policy_allows_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """D07: a disk that hangs ends in LOAD_TIMEOUT; the thread in the read stops when the disk wakes."""
    monkeypatch.setattr(stager, "_STOP_GRACE_S", 0.01)
    _, path = world.write()
    wakes = threading.Event()
    policy = hotglm.StagePolicy(timeout_s=0.05)
    with (
        universal(world, StageTimeoutError, code="LOAD_TIMEOUT"),
        hooked(only_nth("preadv", 1, lambda args: wakes.wait(30) and None)),
    ):
        try:
            world.slot.update(path, policy=policy)
        finally:
            wakes.set()


def test_an_error_in_the_middle_names_the_offset_it_had_come_to(world: World) -> None:
    """D07: EIO at the kth chunk names file and offset."""
    _, path = world.write()
    start = 8 + len(split_file(path.read_bytes())[0])

    def hook(kind: str, count: int, args: tuple[Any, ...]) -> object:
        if kind != "preadv":
            return None
        if count == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fd, views, offset = args
        return os.preadv(fd, [views[0][:10]], offset)

    with universal(world, SourceReadError, code="IO_ERROR", file=path, offset=start + 20) as outcome, hooked(hook):
        world.slot.update(path)
    assert outcome.refusal.errno == errno.EIO  # type: ignore[attr-defined]


def test_no_descriptors_left_is_a_typed_refusal(world: World) -> None:
    """D14: with every descriptor taken, the refusal says so; the next try, with one to spare, succeeds."""
    _, path = world.write()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with universal(world, SourceReadError, code="NO_DESCRIPTORS", file=path):
        taken = [os.dup(0)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
        try:
            while True:
                try:
                    taken.append(os.dup(0))
                except OSError:
                    break
            world.slot.update(path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything; the sweep of test_faults_seam.py answers EACCES")
def test_a_file_that_may_not_be_read_is_a_typed_refusal(world: World) -> None:
    """D15: mode 000."""
    _, path = world.write(name="spoilt.safetensors")
    path.chmod(0)
    with universal(world, SourceReadError, code="PERMISSION", file=path):
        world.slot.update(path)


def test_a_stale_handle_is_tried_again_and_then_refused(world: World) -> None:
    """D19: ESTALE on opening is tried again; a handle that stays stale is a typed refusal."""
    number, path = world.write()
    world.publish(number)
    with hooked(only_nth("open", 1, fail_with("open", lambda: OSError(errno.ESTALE, "stale")))):
        world.slot.update(path)
    assert world.answer().equal(world.expected(number))
    always = fail_with("open", lambda: OSError(errno.ESTALE, "stale"))
    with (
        universal(world, SourceReadError, code="STALE_HANDLE", file=path),
        hooked(lambda kind, count, args: always(args) if kind == "open" else None),
    ):
        world.slot.update(path)


@pytest.mark.parametrize("change", [-8, 8, -100_000])
def test_a_size_that_a_file_system_remembered_wrongly_is_refused(world: World, change: int) -> None:
    """D19: a cached size that is not the file's own is refused, whichever way it is wrong."""
    _, path = world.write()

    def hook(kind: str, count: int, args: tuple[Any, ...]) -> object:
        if kind != "fstat":
            return None
        status = list(os.fstat(args[0]))
        status[6] = max(0, status[6] + change)
        return os.stat_result(status)

    with universal(world, SourceError, file=path), hooked(hook):
        world.slot.update(path)


def test_changed_while_read_says_how_to_publish(world: World) -> None:
    """The remedy for a source that changes under the reader is to rename a new file into its place."""
    _, path = world.write()
    with (
        universal(world, SourceChangedError, code="SOURCE_CHANGED", file=path) as outcome,
        hooked(only_nth("preadv", 1, lambda args: append(path))),
    ):
        world.slot.update(path)
    assert "renam" in outcome.refusal.remedy
