"""Exchanging live tensors on a device with an image of them on the same device, in two copies of every byte.

Rules this module keeps:

- Once `wait_for_work` has returned, everything that is submitted comes after the passes that have left the gate; once
  the event of `submit` is done, or `undo` has returned, all of it is over. What is let in afterwards comes later still.
- Whatever it needs is made by the constructor. While it runs, nothing is allocated, on the device or here, but events.
- Few calls: tensors that are neighbours in the image go together, and so do pieces of one that is large.
- Live tensors are written through torch, which counts their versions (`[Note: version counters]`, weights/exchange.py).

[Note: exchange]
**Order.** The gate knows that passes have returned; their kernels may still be queued (O5 in [Note: streams]). So an
event is recorded on every stream that a pass may have used, and on the side stream, where a stage may still be reading
what is live, *after* the gate was seen empty; and the thread of the commit, which serves nobody, waits until the host
has seen them done (O3; "passes" and "reads of a stage" in tests/test_device_in_place.py). It could have its stream wait
on the device, which is some 50 us quicker, and would then have no way back: a kernel on any stream that does not end,
such as one that waits for another machine, would keep the gate shut for as long. So it waits here, for as long as for
passes, and gives up with nothing changed. The same holds for a graph that is being captured, on whose stream no event
can be recorded; passes that capture are inside the gate until they are done.

The other way round, whoever is let in afterwards may submit to any stream at once. So the same thread waits until the
host has seen the last copy done before it publishes and opens the gate (O3; "publish"). An event for each pass to wait
on would cost every pass for ever what a commit pays once. The stream of the exchange is one of our own: what loads of
other slots submit to the side stream meanwhile holds nobody up.

**Two copies and not three.** An exchange by way of a buffer copies each byte three times, and is as quick as two copies
only while the buffer stays in the device's cache, which depends on sizes that nobody knows here. Instead the block of
the image has room behind the image: `R` bytes, and no step takes more than `R`. Steps go from the end of the image to
its beginning. A step puts what is live aside, `R` bytes behind where it belongs, and copies the image to where it was
live. The room behind it is then used and the step's own bytes are free: the next step has room again.

    image   [ a | b | c | room ]      live x y z
    step 3  [ a | b |   | z    ]           x y c
    step 2  [ a |   | y | z    ]           x b c
    step 1  [   | x | y | z    ]           a b c

That is all that has to happen while the gate is shut. Afterwards `settle` moves the old bytes `R` bytes down, from the
beginning to the end, into the image's own tensors. Nothing but a rollback ever wants them there.

**Going back.** All copies are on one stream, so the order in which they were submitted is the order in which they are
done (O1), and `[Note: progress]` of weights/exchange.py holds with two copies for a step: one that failed may have been
done in part. With 0 ended only free room is spoilt. With 1, live is in part new, and what it was lies aside. The steps
before are taken back from the last to the first, each into what those after it have freed: image from live, live from
aside. The copies for that go to the same stream, behind whatever of the exchange is still queued ("undo").

What is derived and lies outside of the block (a tensor in an attribute) is put aside in memory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hotglm.errors import StageFailedError
from hotglm.weights.device import DEVICE_ALIGNMENT, Device, Event
from hotglm.weights.device_arena import DeviceArena
from hotglm.weights.exchange import Pair, flatten, is_dense

__all__ = ["Copies", "DeviceExchange", "find_extent", "find_room", "view_words", "wait_for_work"]

_MIN_ROOM_NBYTES = 1 << 20
_MAX_ROOM_NBYTES = 256 << 20
_ROOM_SHARE = 64
"""Room of a 64th of the weights: as many steps, few enough that a busy interpreter does not hold them up for long."""

_GAP_NBYTES = DEVICE_ALIGNMENT
"""What is less between two tensors of an arena is padding, and belongs to nobody."""

_WORD_NBYTES = 8

_MIN_PAUSE_S = 2e-5
_MAX_PAUSE_S = 1e-3


def find_room(nbytes: int) -> int:
    """Return how many bytes an image of `nbytes` has behind it: no more than itself, a multiple of 512."""
    return -(-min(max(nbytes // _ROOM_SHARE, _MIN_ROOM_NBYTES), _MAX_ROOM_NBYTES, nbytes) // 512) * 512


Copies = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
"""Sources, and a target for each."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Equal parts of a live tensor, of its image, and of where the live one is put aside; `live` is None in a gap."""

    live: torch.Tensor | None
    image: torch.Tensor
    aside: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What goes together: the copies there, the copies back, and the one that brings home what was put aside."""

    there: tuple[Copies, Copies]
    back: tuple[Copies, Copies]
    home: Copies


class DeviceExchange:
    """One exchange of pairs on one device, made ready to run."""

    def __init__(self, device: Device, pairs: Sequence[Pair], *, block: DeviceArena | None) -> None:
        """Make the views, and take the memory for what lies outside of `block`; nothing is submitted yet.

        Args:
            device: where both sides of every pair are.
            pairs: which overlap each other nowhere.
            block: in which most images lie, with room behind them; its lease lives as long as the pairs.

        Raises:
            MemoryPlanError: the device has no memory for what lies outside.
        """
        self.device = device
        self._lane = device.lane(0)
        self.nbytes = sum(pair.nbytes for pair in pairs)
        inside = [] if block is None else [pair for pair in pairs if _has_room(pair, block)]
        known = {id(pair) for pair in inside}
        outside = [pair for pair in pairs if id(pair) not in known and pair.nbytes]
        self._steps = [] if block is None or not inside else list(_find_steps(inside, block))
        self.buffer_nbytes = sum(_align(pair.nbytes) for pair in outside)
        if outside:
            scratch = device.allocate(self.buffer_nbytes)
            self._lane.wait_for((device.record(),))  # the memory is as fresh as the side stream knows it to be
            self._steps.append(_step_outside(outside, scratch))
        self._ended = 0
        self._returned = 0  # copies back of one step that have been submitted
        self._homed = 0

    def submit(self) -> Event:
        """Submit every copy, and return the event behind them. Raises what the device raises; then `undo` it."""
        for step in self._steps:
            for copies in step.there:
                self._copy(copies)
                self._ended += 1
        return self._lane.record()

    def undo(self) -> None:
        """Give each side back what it held, and wait until it has it; may be called again if it fails."""
        done, part = divmod(self._ended, 2)
        if part:
            self._copy(self._steps[done].back[1])
            self._ended -= 1
        while self._ended:
            step = self._steps[self._ended // 2 - 1]
            for copies in step.back[self._returned :]:
                self._copy(copies)
                self._returned += 1
            self._ended, self._returned = self._ended - 2, 0
        self._lane.record().wait()

    def settle(self) -> None:
        """Bring what was put aside to where the images are, and wait for it; may be called again if it fails."""
        while self._homed < len(self._steps):
            self._copy(self._steps[-1 - self._homed].home)
            self._homed += 1
        self._lane.record().wait()

    def _copy(self, copies: Copies) -> None:
        sources, targets = copies
        if sources:
            self._lane.copy_all(sources, targets)


def wait_for_work(devices: Iterable[Device], *, timeout_s: float) -> None:
    """Wait until what streams were given so far is done: all that passes use, and the side streams.

    Raises:
        StageFailedError: some of it is not done in that time, or a graph is being captured, so that nobody can tell.
    """
    deadline = time.monotonic() + timeout_s
    for device in devices:
        left_s = max(0.0, deadline - time.monotonic())
        events = [*device.record_passes(timeout_s=left_s), device.record()]
        pause_s = _MIN_PAUSE_S
        while events := [event for event in events if not event.is_done()]:
            if time.monotonic() > deadline:
                raise StageFailedError(
                    f"Expected work on {device.name} to end, got {len(events)} streams that are still busy after "
                    f"{timeout_s:.2g} s.",
                    remedy="try again when kernels that take long have ended.",
                )
            time.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)


def view_words(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return flat bytes as 64-bit words where all of them can be: a kernel reads what it is told the type of."""
    if all(not (flat.data_ptr() | flat.numel() | int(flat.storage_offset())) % _WORD_NBYTES for flat in tensors):
        return tuple(tensor.view(torch.int64) for tensor in tensors)
    return tensors


def _has_room(pair: Pair, block: DeviceArena) -> bool:
    """Whether a pair can be exchanged by way of the room behind the images.

    One with gaps goes as a whole, because parts of it may lie between each other.
    """
    offset = block.find_offset(pair.image)
    if offset is None or not pair.nbytes:
        return False
    return is_dense(pair.live) or find_extent(pair.image) <= block.room_nbytes


def find_extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first to the last element of a tensor that is not empty."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _find_steps(pairs: Iterable[Pair], block: DeviceArena) -> Iterator[_Step]:
    """Yield the steps of what lies in a block, from its end to its beginning, none larger than the room."""
    group: list[_Part] = []
    for part in sorted(_find_parts(pairs, block), key=lambda part: part.start, reverse=True):
        if group and group[0].stop - part.start > block.room_nbytes:
            yield _step_inside(group, block)
            group = []
        group.append(part)
    if group:
        yield _step_inside(group, block)


def _find_parts(pairs: Iterable[Pair], block: DeviceArena) -> Iterator[_Part]:
    """Yield the parts of pairs and of the gaps between them, which are put aside with them and come home again."""
    end = 0
    placed = sorted(((block.find_offset(pair.image) or 0, pair) for pair in pairs), key=lambda place: place[0])
    for start, pair in placed:
        yield from _find_gap(end, start, block)
        if is_dense(pair.live):
            yield from _cut(start, pair, block)
        else:
            yield _part_with_gaps(start, pair, block)
        end = start + find_extent(pair.image)
    yield from _find_gap(end, block.nbytes - block.room_nbytes, block)


def _cut(start: int, pair: Pair, block: DeviceArena) -> Iterator[_Part]:
    live, image = flatten(pair.live.detach()), flatten(pair.image.detach())
    room = block.room_nbytes
    for at in range(0, live.numel(), room):
        piece, other = live[at : at + room], image[at : at + room]
        first, stop = start + at, start + at + piece.numel()
        piece, other, aside = view_words(piece, other, block.range(first + room, piece.numel()))
        yield _Part(piece, other, aside, start=first, stop=stop)


def _part_with_gaps(start: int, pair: Pair, block: DeviceArena) -> _Part:
    live, image, nbytes = pair.live.detach(), pair.image.detach(), find_extent(pair.image)
    flat = block.range(start + block.room_nbytes, nbytes).view(image.dtype)
    return _Part(live, image, flat.as_strided(image.shape, image.stride()), start=start, stop=start + nbytes)


def _find_gap(start: int, stop: int, block: DeviceArena) -> Iterator[_Part]:
    if stop - start < _GAP_NBYTES:
        return
    room = block.room_nbytes
    for at in range(start, stop, room):
        nbytes = min(room, stop - at)
        image, aside = view_words(block.range(at, nbytes), block.range(at + room, nbytes))
        yield _Part(None, image, aside, start=at, stop=at + nbytes)


def _step_inside(parts: Sequence[_Part], block: DeviceArena) -> _Step:
    start, stop = parts[-1].start, parts[0].stop
    home = block.range(start + block.room_nbytes, stop - start), block.range(start, stop - start)
    target, source = view_words(home[1], home[0])
    return _make_step(parts, home=((source,), (target,)))


def _step_outside(pairs: Sequence[Pair], scratch: torch.Tensor) -> _Step:
    parts, start = [], 0
    for pair in pairs:
        live, image = pair.live.detach(), pair.image.detach()
        aside = scratch[start : start + pair.nbytes].view(live.dtype).view(live.shape)
        parts.append(_Part(live, image, aside, start=0, stop=0))
        start += _align(pair.nbytes)
    return _make_step(parts, home=(tuple(part.aside for part in parts), tuple(part.image for part in parts)))


def _make_step(parts: Sequence[_Part], *, home: Copies) -> _Step:
    pairs = [(part.live, part.image, part.aside) for part in parts if part.live is not None]
    live, image, aside = (tuple(side) for side in zip(*pairs, strict=True)) if pairs else ((), (), ())
    gaps = tuple(part.image for part in parts if part.live is None)
    gaps_aside = tuple(part.aside for part in parts if part.live is None)
    return _Step(
        there=(((*live, *gaps), (*aside, *gaps_aside)), (image, live)),
        back=(((*live, *gaps_aside), (*image, *gaps)), (aside, live)),
        home=home,
    )


def _align(nbytes: int) -> int:
    return -(-nbytes // _GAP_NBYTES) * _GAP_NBYTES
