"""Exchanging the contents of two sets of tensors: what lay here lies there afterwards, and no tensor has moved.

Rules this module keeps:

- After `run` each side holds what the other one held, bit for bit. After a failure and `undo`, each holds what it held
  before. Nothing is lost on the way, so the one copy that is needed for going back is the one that was staged from.
- Whatever it needs is made by the constructor: views, and one buffer for each thread, touched. While it runs nothing is
  allocated, so that nothing can be refused.
- Tensors are written through torch, which counts their versions: a backward pass whose saved tensors were written
  raises (`[Note: version counters]`).

[Note: progress]
A lane counts the copies it has ended, three for each piece: buffer from one side, that side from the other, the other
from the buffer. A copy that failed may have written a part of its target. Of a piece with 0 copies ended only the
buffer is spoilt; with 1 the first side is in the buffer; with 2 the buffer has what the first side held and the first
side what the second held. So the count alone says how to go back, and it may be one too low (tests/test_exchange.py).

[Note: version counters]
`detach`, `view` and `as_strided` share the counter of what they are views of, and `copy_` counts there; `.data` does
not. Tensors made under inference mode have no counter, no graph can have saved them, and torch lets only inference
mode write them; they are written by way of another tensor over the same memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented, and not in the stub

from hotglm import seam
from hotglm.weights.workers import Cancellation, count_cores, run_tasks

__all__ = ["PIECE_NBYTES", "Exchange", "Pair", "flatten", "is_dense"]

PIECE_NBYTES = 1 << 20
"""Bytes that go at a time, by way of a buffer of this size: it stays in the cache. (Two cores, 1 GiB, one thread: 6.1
GB/s with 256 KiB, 8.1 with 1 MiB, 7.1 with 4 MiB, 5.1 with 16 MiB; a plain copy 13.5, which moves half as much.)"""

_MAX_THREADS = 4
_SMALL_NBYTES = 4 << 20
"""What is exchanged sooner than a thread starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tensors of one shape, dtype and order of elements in memory, which overlap nothing else.

    Attributes:
        name: full dotted name.
        live: the one whose address must not change.
        image: the other one.
        is_derived: whether no file carries it.
    """

    name: str
    live: torch.Tensor
    image: torch.Tensor
    is_derived: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.live.numel() * self.live.element_size()


_Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A part of the live tensor, the same part of the image, and the buffer."""


class Exchange:
    """One exchange of many pairs, made ready to run without asking for anything."""

    def __init__(self, pairs: Sequence[Pair], *, num_threads: int | None) -> None:
        """Make the views and buffers; nothing is written yet.

        Args:
            pairs: which overlap each other nowhere.
            num_threads: None means one for each core, at most four, and one for little.
        """
        self.nbytes = sum(pair.nbytes for pair in pairs)
        wanted = num_threads or min(_MAX_THREADS, count_cores())
        count = 1 if self.nbytes < _SMALL_NBYTES else wanted
        pieces = [piece for pair in pairs for piece in _find_pieces(pair)]
        size = max((live.numel() * live.element_size() for live, _ in pieces), default=0)
        self._lanes = [Lane(lane, buffer_nbytes=size) for lane in _deal(pieces, count)]

    @property
    def buffer_nbytes(self) -> int:
        """Bytes it holds beside the tensors."""
        return sum(lane.buffer_nbytes for lane in self._lanes)

    def run(self) -> None:
        """Exchange all pairs. Raises what torch raises; then `undo` it."""
        run_tasks(
            [lane.run for lane in self._lanes],
            num_threads=len(self._lanes),
            nice=0,
            cancellation=Cancellation(),
            name="hotglm-exchange",
        )

    def undo(self) -> None:
        """Give each side back what it held, after a `run` that ended or failed; may be called again if it fails."""
        for lane in self._lanes:
            lane.undo()


class Lane:
    """The pieces that one thread exchanges, in order, and how far it is (see `[Note: progress]`)."""

    __slots__ = ("_ended", "_pieces", "_returned", "buffer_nbytes")

    def __init__(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], *, buffer_nbytes: int) -> None:
        """Take parts of tensors, and make the buffer they go by."""
        buffer = torch.zeros(buffer_nbytes, dtype=torch.uint8)  # touched: its pages are there
        self._pieces: list[_Piece] = [(live, image, _shape_buffer(buffer, live)) for live, image in pieces]
        self._ended = 0
        self._returned = 0  # copies of the way back of one piece that have ended
        self.buffer_nbytes = buffer_nbytes

    def run(self) -> None:
        """Exchange every piece."""
        for live, image, buffer in self._pieces:
            self._copy(buffer, live)
            self._copy(live, image)
            self._copy(image, buffer)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        seam.active.reach("exchange.copy")
        target.copy_(source)
        self._ended += 1

    def undo(self) -> None:
        """Exchange back what has been exchanged, the last first."""
        self._settle()
        while self._ended:
            live, image, buffer = self._pieces[self._ended // 3 - 1]
            # Each side goes home by the same three copies; which of them have ended is counted here as well, so that a
            # second call goes on where the first one failed.
            way = ((buffer, live), (live, image), (image, buffer))
            for target, source in way[self._returned :]:
                target.copy_(source)
                self._returned += 1
            self._ended, self._returned = self._ended - 3, 0

    def _settle(self) -> None:
        """Go back to where the piece in the middle of which it failed was untouched."""
        done, part = divmod(self._ended, 3)
        if part == 0:
            return
        live, image, buffer = self._pieces[done]
        if part == 2:
            image.copy_(live)
            self._ended -= 1
        live.copy_(buffer)
        self._ended -= 1


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of `tensor` fill the memory from its first to its last byte, each byte once."""
    if tensor.numel() == 0:
        return True
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if reach + 1 != tensor.numel():
        return False
    steps = sorted((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    expected = [math.prod(size for _, size in steps[:index]) for index in range(len(steps))]
    return [step for step, _ in steps] == expected


def _find_pieces(pair: Pair) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    live, image = pair.live.detach(), pair.image.detach()
    if live.numel() == 0:
        return
    if not is_dense(live):
        yield from _find_rows(live, image)
        return
    sides = (flatten(live), flatten(image))
    yield from zip(*(torch.split(side, PIECE_NBYTES) for side in sides), strict=True)


def _find_rows(live: torch.Tensor, image: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of tensors with gaps in them, which belong to somebody else, and are not touched."""
    if not live.dim():
        yield live, image
        return
    row_nbytes = live[0].numel() * live.element_size()
    if row_nbytes > PIECE_NBYTES:
        for row, other in zip(live.unbind(), image.unbind(), strict=True):
            yield from _find_rows(row, other)
        return
    rows = PIECE_NBYTES // row_nbytes
    yield from zip(*(torch.split(side, rows) for side in (live, image)), strict=True)


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a dense tensor in the order of memory, as a view that counts its versions with it."""
    if tensor.is_inference() and not tensor.is_cpu:
        return from_dlpack(to_dlpack(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)))  # holds the memory
    if tensor.is_inference():
        memory = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
        # Keeps the storage for as long as the view lives, which `from_address` does not.
        memory.owner = tensor  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _shape_buffer(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    nbytes = like.numel() * like.element_size()
    return buffer[:nbytes].view(like.dtype).view(like.shape)


def _deal(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Deal pieces to lanes, so that each has about as many bytes and goes through memory in order."""
    total = sum(live.numel() * live.element_size() for live, _ in pieces)
    lanes: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(count)]
    done = 0
    for piece in pieces:
        lanes[min(count - 1, done * count // max(total, 1))].append(piece)
        done += piece[0].numel() * piece[0].element_size()
    return [lane for lane in lanes if lane]
