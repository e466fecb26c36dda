"""Exchanging live tensors on a device with an image in pinned memory of the host, in both directions at once.

Rules this module keeps: those of weights/device_exchange.py; and the device gives no more than a few windows for it,
because it has no room, or the image would be there.

[Note: duplex]
The image goes to the device in windows while what was live goes to the host, because a device has a copy engine for
either direction. Of each step the first stream copies what is live aside (1), the image into a window beside (2), and
that to where it was live (3); the second stream then copies what lies aside over the image (4).

- 4 of a step comes after 1 and 2 of it: it reads what 1 wrote, and writes what 2 reads ("host image").
- A step uses the windows of the one two before it, so 1 comes after 4 of that one ("windows").
- 3 needs no event: it is on the stream of 2. Nothing else is ordered, so 4 of one step and 2 of the next overlap.

Going back waits, on the device, until the second stream has nothing left to do, and then does everything on the first.
Of the step that failed, both windows are as they were: with 2 copies ended live is in part new, and what it was lies
aside; with 3 the image is in part old, and what it was lies in the window. The steps before are exchanged once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hotglm.weights.arena import ALIGNMENT
from hotglm.weights.device import Device, Event
from hotglm.weights.device_exchange import find_extent, view_words
from hotglm.weights.exchange import Pair, flatten, is_dense
from hotglm.weights.pinned_arena import PinnedArena

__all__ = ["WINDOW_NBYTES", "HostExchange", "find_windows"]

WINDOW_NBYTES = 16 << 20
"""Bytes that go at a time: some 300 us of the bus, long against telling the driver."""

NUM_WINDOWS = 4
"""Two for each of two steps: one is filled from the host while the other is drained to it."""

_NUM_COPIES = 4

Copies = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a live tensor and where its image begins and ends; `like` is that part of the image."""

    live: torch.Tensor
    like: torch.Tensor
    start: int
    stop: int


def find_windows(nbytes: int) -> int:
    """Return how many bytes of a device it takes to exchange an image of `nbytes`."""
    return NUM_WINDOWS * -(-min(nbytes, WINDOW_NBYTES) // ALIGNMENT) * ALIGNMENT


class HostExchange:
    """One exchange of pairs on one device with images in one pinned arena, made ready to run."""

    def __init__(self, device: Device, pairs: Sequence[Pair], *, arena: PinnedArena) -> None:
        """Make the views, and take the windows; nothing is submitted yet.

        Args:
            device: where the live side of every pair is.
            pairs: which overlap each other nowhere; those with gaps are no larger than a window.
            arena: where all images lie; its lease lives as long as the pairs.

        Raises:
            MemoryPlanError: the device has no memory for the windows.
        """
        self.device = device
        self._there, self._back = device.lane(0), device.lane(1)
        self.nbytes = sum(pair.nbytes for pair in pairs)
        groups = list(_find_groups(pairs, arena))
        size = max((group[-1].stop - group[0].start for group in groups), default=0)
        self.buffer_nbytes = find_windows(size)
        self._steps: list[tuple[Copies, ...]] = []
        self._ended = 0
        self._returned = 0  # copies back of one step that have been submitted
        if groups:
            memory = device.allocate(self.buffer_nbytes)
            self._there.wait_for((device.record(),))  # the memory is as fresh as the side stream knows it to be
            windows = torch.split(memory, self.buffer_nbytes // NUM_WINDOWS)
            self._steps = [
                _make_step(group, arena, windows[index % 2 * 2], windows[index % 2 * 2 + 1])
                for index, group in enumerate(groups)
            ]

    def submit(self) -> Event:
        """Submit every copy, and return the event behind them. Raises what the device raises; then `undo` it."""
        drained: list[Event] = []
        for index, (aside, fill, give, drain) in enumerate(self._steps):
            if index >= 2:
                self._there.wait_for((drained[index - 2],))
            for copies in (aside, fill, give):
                self._there.copy_all(*copies)
                self._ended += 1
            self._back.wait_for((self._there.record(),))
            self._back.copy_all(*drain)
            self._ended += 1
            drained.append(self._back.record())
        self._there.wait_for(drained[-1:])
        return self._there.record()

    def undo(self) -> None:
        """Give each side back what it held, and wait until it has it; may be called again if it fails."""
        self._there.wait_for((self._back.record(),))
        done, part = divmod(self._ended, _NUM_COPIES)
        if part == _NUM_COPIES - 1:
            self._there.copy_all(*_turn(self._steps[done][1]))
            self._ended -= 1
        if part >= 2:
            self._there.copy_all(*_turn(self._steps[done][0]))
        self._ended = done * _NUM_COPIES
        while self._ended:
            step = self._steps[self._ended // _NUM_COPIES - 1]
            for copies in step[self._returned :]:
                self._there.copy_all(*copies)
                self._returned += 1
            self._ended, self._returned = self._ended - _NUM_COPIES, 0
        self._there.record().wait()

    def settle(self) -> None:
        """Return at once: the image is where it belongs."""


def _turn(copies: Copies) -> Copies:
    """Return the same copies the other way."""
    return copies[1], copies[0]


def _find_groups(pairs: Sequence[Pair], arena: PinnedArena) -> Iterator[list[_Part]]:
    """Yield parts whose images follow each other without a gap, as many as go into a window."""
    group: list[_Part] = []
    for part in sorted(_find_parts(pairs, arena), key=lambda part: part.start):
        is_next = group and part.start - group[-1].stop < ALIGNMENT and part.stop - group[0].start <= WINDOW_NBYTES
        if group and not is_next:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _find_parts(pairs: Sequence[Pair], arena: PinnedArena) -> Iterator[_Part]:
    for pair in pairs:
        live, image = pair.live.detach(), pair.image.detach()
        start = arena.find_offset(image)
        if not pair.nbytes:
            continue
        if start is None:
            raise ValueError(f"the image of {pair.name!r} is not in pinned memory")
        if not is_dense(live):
            yield _Part(live, image, start, start + find_extent(image))
            continue
        sides = flatten(live), flatten(image)
        for at in range(0, pair.nbytes, WINDOW_NBYTES):
            piece, other = (side[at : at + WINDOW_NBYTES] for side in sides)
            yield _Part(piece, other, start + at, start + at + piece.numel())


def _make_step(
    parts: Sequence[_Part], arena: PinnedArena, aside: torch.Tensor, window: torch.Tensor
) -> tuple[Copies, ...]:
    start, nbytes = parts[0].start, parts[-1].stop - parts[0].start
    seen = [_see(part, aside, window, start) for part in parts]
    live, put, given = (tuple(side) for side in zip(*seen, strict=True))
    image, into, out = view_words(arena.range(start, nbytes), window[:nbytes], aside[:nbytes])
    return (live, put), ((image,), (into,)), (given, live), ((out,), (image,))


def _see(
    part: _Part, aside: torch.Tensor, window: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a live part, where it is put aside, and where its image is given to it from."""
    first, last = part.start - start, part.stop - start
    if part.like.dtype is torch.uint8 and part.live.is_contiguous() and part.live.dim() == 1:
        live, put, given = view_words(part.live, aside[first:last], window[first:last])
        return live, put, given
    sides = (side[first:last].view(part.like.dtype) for side in (aside, window))
    put, given = (side.as_strided(part.like.shape, part.like.stride()) for side in sides)
    return part.live, put, given
