"""How the pieces of a read lie in a window of the ring, so that few copies bring them to an arena.

Rules this module keeps: pure. No two pieces share a byte of the window, and no copy touches anything in the arena but
its pieces and the padding between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hotglm.weights.plan import Piece
from hotglm.weights.ring import GAP_NBYTES

__all__ = ["Placed", "place_pieces"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A run of pieces that lie in a window as they lie in the arena, and are copied there as one.

    Attributes:
        start: where it begins in the window.
        arena_offset: where it goes.
        nbytes: of all of it, with the padding between its pieces.
        pieces: where each begins in the window, and itself.
    """

    start: int
    arena_offset: int
    nbytes: int
    pieces: tuple[tuple[int, Piece], ...]


def place_pieces(pieces: Iterable[Piece]) -> Iterator[Placed]:
    """Lay the pieces of a read out in a window, in order, so that few copies bring them to the arena.

    Pieces with less than `GAP_NBYTES` between them in the arena are copied together: whatever lies between two tensors
    of a device takes as much, so what is less is padding, and belongs to nobody.
    """
    start = 0
    run: list[tuple[int, Piece]] = []
    for piece in pieces:
        if run and not 0 <= piece.arena_offset - _end(run) < GAP_NBYTES:
            yield _make_run(run)
            start, run = _align(_window_end(run)), []
        at = run[0][0] + piece.arena_offset - run[0][1].arena_offset if run else start
        run.append((at, piece))
    if run:
        yield _make_run(run)


def _end(run: list[tuple[int, Piece]]) -> int:
    return run[-1][1].arena_offset + run[-1][1].nbytes


def _window_end(run: list[tuple[int, Piece]]) -> int:
    return run[-1][0] + run[-1][1].nbytes


def _align(offset: int) -> int:
    return -(-offset // GAP_NBYTES) * GAP_NBYTES


def _make_run(run: list[tuple[int, Piece]]) -> Placed:
    first = run[0]
    return Placed(
        start=first[0],
        arena_offset=first[1].arena_offset,
        nbytes=_end(run) - first[1].arena_offset,
        pieces=tuple(run),
    )
