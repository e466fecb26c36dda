"""Streams: every claim of [Note: streams] in weights/device.py, with the missing wait that would break it planted.

A small program does what staging does, over windows of a few bytes: it fills an arena through the ring, publishes it,
has passes read it on two streams, lets go of it and fills it again. The fake device carries the work out in any order
that the protocol leaves open. The program is right if every pass read its own version and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from hotglm.errors import StageFailedError
from hotglm.weights import device_arena
from hotglm.weights.device_arena import DeviceArena, DeviceLease
from hotglm.weights.ring import Ring, Window
from hotglm.weights.workers import Cancellation
from support.fake_device import Choices, FakeDevice, every_schedule

NUM_BYTES = 4
CALM = Cancellation()


class Program:
    """Fills, publishes, reads and reuses one arena of `num_windows` windows' worth, `num_swaps` times."""

    def __init__(self, choices: Choices, *, num_windows: int = 2, num_pieces: int = 3, is_coarse: bool = False) -> None:
        self.device = FakeDevice(name="fake:0", choices=choices, is_coarse=is_coarse)
        self.ring = Ring(self.device, num_windows=num_windows, window_nbytes=NUM_BYTES)
        self.arena = DeviceArena(num_pieces * NUM_BYTES, device=self.device)
        self.num_pieces = num_pieces
        self.seen: list[tuple[int, torch.Tensor]] = []

    def run(self, *, num_swaps: int, streams: tuple[str, ...] = ("default", "second")) -> bool:
        """Return whether every pass read its own version."""
        for version in range(1, num_swaps + 1):
            lease = self.arena.lease()
            self.fill(lease, version)
            lease.settle()
            view = lease.view(0, dtype=torch.uint8, shape=(self.arena.nbytes,))
            for stream in streams:
                self.read(view, version, stream)
            del lease, view
            assert self.arena.is_free  # nobody can submit work over it; what was submitted may still be queued
        self.device.finish()
        return all(found.tolist() == self.values(version) for version, found in self.seen)

    def values(self, version: int) -> list[int]:
        """Return what a version consists of: other bytes in each piece."""
        return [16 * version + index for index in range(self.num_pieces) for _ in range(NUM_BYTES)]

    def fill(self, lease: DeviceLease, version: int) -> None:
        for index in range(self.num_pieces):
            with self.ring.lend(cancellation=CALM) as window:
                window.bytes(0, NUM_BYTES)[:] = bytes([16 * version + index] * NUM_BYTES)
                window.copy(0, lease.range(index * NUM_BYTES, NUM_BYTES))

    def read(self, view: torch.Tensor, version: int, stream: str) -> None:
        """Submit a pass; the kernel holds an address, as kernels do, and not the tensor."""
        found = torch.zeros_like(view)
        address = self.arena._block[:]
        self.device.submit(lambda: found.copy_(address), stream=stream)
        self.seen.append((version, found))


def forget_to_settle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceLease, "settle", lambda lease: None)


def forget_to_drain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "_wait_drained", lambda ring, window: None)


def forget_the_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(device_arena, "begin", lambda device: None)


def forget_a_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeDevice, "record_passes", lambda device: (device.record_on("default"),))


def copy_on_another_stream(patch: pytest.MonkeyPatch) -> None:
    submit = FakeDevice.submit

    def submit_elsewhere(device: FakeDevice, run: Callable[[], object], *, stream: str = "side") -> None:
        submit(device, run, stream="copies" if stream == "side" else stream)

    patch.setattr(FakeDevice, "submit", submit_elsewhere)


def record_too_early(patch: pytest.MonkeyPatch) -> None:
    copy = Window.copy

    def copy_late(window: Window, start: int, target: torch.Tensor) -> None:
        event = window._ring.device.record()
        copy(window, start, target)
        window.is_dirty = False
        window.event = event

    patch.setattr(Window, "copy", copy_late)


def record_passes_before_they_end(patch: pytest.MonkeyPatch) -> None:
    """Record the events of the passes when the arena is lent, not when it is lent the next time."""
    lease = DeviceArena.lease

    def lend(arena: DeviceArena) -> DeviceLease:
        made = lease(arena)
        early = arena.device.record_passes()
        patch.setattr(device_arena, "begin", lambda device: device.wait_for(early))
        return made

    patch.setattr(DeviceArena, "lease", lend)


HAZARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "publish": forget_to_settle,
    "window": forget_to_drain,
    "reuse": forget_the_passes,
    "reuse, second stream": forget_a_stream,
    "copy on another stream": copy_on_another_stream,
    "early event": record_too_early,
    "early events of passes": record_passes_before_they_end,
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_missing_wait_is_caught(hazard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait that is planted to be missing makes a pass read another version in one of a few hundred schedules."""
    HAZARDS[hazard](monkeypatch)
    assert not all(Program(Choices(seed)).run(num_swaps=3) for seed in range(300))


@pytest.mark.parametrize("num_windows", [1, 2, 5])
def test_thousands_of_schedules_are_right(num_windows: int) -> None:
    """With every wait in its place, every pass reads its own version, whatever order the device chooses."""
    assert all(Program(Choices(seed), num_windows=num_windows).run(num_swaps=3) for seed in range(1000))


def test_every_schedule_of_a_small_program_is_right() -> None:
    """Three swaps over one window and one stream: not one of all schedules there are goes wrong."""
    results = [
        Program(choices, num_windows=1, num_pieces=1, is_coarse=True).run(num_swaps=3, streams=("default",))
        for choices in every_schedule()
    ]
    assert (len(results) > 1000, results.count(False)) == (True, 0)


@pytest.mark.parametrize("hazard", ["publish", "window", "reuse", "copy on another stream", "early event"])
def test_every_schedule_finds_each_missing_wait(hazard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search finds schedules in which each missing wait does harm."""
    HAZARDS[hazard](monkeypatch)
    results = (
        Program(choices, num_windows=1, num_pieces=2, is_coarse=True).run(num_swaps=2, streams=("default",))
        for choices in itertools.islice(every_schedule(), 20_000)
    )
    assert not all(results)


@contextlib.contextmanager
def failing(device: FakeDevice, call: str, *, after: int) -> Iterator[None]:
    """Make one call of a kind fail, the one after the first `after`."""
    left = after

    def fail(name: str) -> None:
        nonlocal left
        if name == call:
            left -= 1
            if left == -1:
                raise RuntimeError(f"planted in {call}")

    device.fails = fail
    yield
    device.fails = lambda name: None


@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("seed", range(20))
def test_an_error_leaves_ring_and_arena_fit(seed: int, after: int) -> None:
    """A copy that fails halfway ("error") leaves its earlier copies queued; the next stages are right all the same."""
    program = Program(Choices(seed))
    with failing(program.device, "copy", after=after), pytest.raises(RuntimeError, match="planted"):
        program.fill(program.arena.lease(), 7)
    assert program.ring.num_idle == program.ring.num_windows == 2
    assert program.run(num_swaps=3)


@pytest.mark.parametrize("seed", range(20))
def test_a_cancelled_stage_leaves_ring_and_arena_fit(seed: int) -> None:
    """A stage that is cancelled between windows ("cancelled") leaves nothing that the next one could trip over."""
    program = Program(Choices(seed))
    lease, cancellation = program.arena.lease(), Cancellation()
    with program.ring.lend(cancellation=cancellation) as window:
        window.bytes(0, NUM_BYTES)[:] = bytes([9] * NUM_BYTES)
        window.copy(0, lease.range(0, NUM_BYTES))
        cancellation.cancel(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), program.ring.lend(cancellation=cancellation):
        pass
    assert program.ring.num_idle == 2
    del lease
    assert program.run(num_swaps=3)


def test_a_window_without_an_event_is_never_lent_again() -> None:
    """Where not even the event behind a copy can be recorded, its window is lost; a ring without any says so."""
    program = Program(Choices(0))
    lease = program.arena.lease()
    for _ in range(2):
        with failing(program.device, "record", after=0), pytest.raises(RuntimeError, match="planted in record"):
            program.fill(lease, 1)
    assert (program.ring.num_windows, program.ring.num_idle) == (0, 0)
    with pytest.raises(StageFailedError, match="under all of its windows"):
        program.fill(lease, 1)


def test_a_window_that_was_not_copied_from_needs_no_event() -> None:
    """A read that fails gives its window back at once, with the event it had."""
    program = Program(Choices(0))
    with pytest.raises(OSError, match="planted"), program.ring.lend(cancellation=CALM):
        raise OSError("planted")
    assert program.ring.num_idle == 2
    assert program.run(num_swaps=1)


def test_a_drained_ring_reads_nothing_any_more() -> None:
    """After `drain` no copy is queued behind any window, so its memory may be unpinned."""
    program = Program(Choices(3))
    program.fill(program.arena.lease(), 1)
    program.ring.drain()
    assert not program.device.streams["side"]


def test_the_ring_is_pinned_once_and_to_the_byte() -> None:
    """One block of exactly the windows' bytes is pinned, however many tensors go through it."""
    program = Program(Choices(1))
    program.run(num_swaps=5)
    assert [pinned.tensor.numel() for pinned in program.device.pinned] == [2 * NUM_BYTES]


def test_a_lease_dies_with_its_last_tensor_and_not_before() -> None:
    """Views, views of views, saved tensors and storages of their own hold the lease; the watch holds nothing."""
    device = FakeDevice(name="fake:0", choices=Choices(0))
    arena = DeviceArena(4096, device=device)
    lease = arena.lease()
    weight = torch.nn.Parameter(lease.view(64, dtype=torch.float32, shape=(8, 4)).zero_())
    strided = lease.view(256, dtype=torch.bfloat16, shape=(4, 8), stride=(1, 4))
    watch = arena.watch
    assert (weight.untyped_storage().nbytes(), strided.stride(), weight.data_ptr() - arena.address) == (128, (1, 4), 64)
    del lease, strided
    graph = (weight * weight).sum()
    row = weight.detach()[3:]
    del weight
    assert (watch() is None, arena.is_free) == (False, False)
    del graph
    assert not arena.is_free
    with pytest.raises(RuntimeError, match="still lent"):
        arena.lease()
    del row
    assert (watch(), arena.is_free) == (None, True)


def test_a_block_that_was_given_up_lives_as_long_as_its_holders() -> None:
    """An arena may be dropped while tensors of it are held: they stay valid, and the block goes with the last."""
    device = FakeDevice(name="fake:0", choices=Choices(0))
    arena = DeviceArena(256, device=device)
    view = arena.lease().view(0, dtype=torch.int64, shape=(32,)).fill_(5)
    del arena
    assert (device.used_nbytes, int(view.sum())) == (256, 160)
    del view
    assert device.used_nbytes == 0
