"""Which bytes go where: pure arithmetic from file ranges to arena offsets.

Rules this module keeps:

- Few, large reads. Tensors that follow each other in a file are read by one scattered call, whatever their places in
  the
  arena: a Python thread that reads in small pieces loses a GIL switch interval (5 ms) per piece beside a busy service.
- A range is read once. What is hashed are the bytes in the arena, after they were read, not the file a second time.
- No call has more pieces than the system takes (IOV_MAX) and none is larger than the chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Piece", "Read", "Transfer", "plan_reads"]

IOV_MAX = 1024
"""Most buffers one `preadv` takes on Linux."""

CHUNK_NBYTES = 16 << 20
"""Largest single read, and the size at which tensors are bundled into one task: small enough for threads to end
together and for the last-level cache to hold what was just read, large enough for few calls (64 for 1 GiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One tensor's bytes: `nbytes` from `file_offset` of file number `file` to `arena_offset`."""

    name: str
    file: int
    file_offset: int
    arena_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of arena bytes that takes the next `nbytes` of a read."""

    arena_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Consecutive bytes of one file, the pieces they fill, and the tensors that are whole once they are read."""

    file: int
    file_offset: int
    pieces: tuple[Piece, ...]
    completes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes read."""
        return sum(piece.nbytes for piece in self.pieces)


def plan_reads(
    transfers: Iterable[Transfer], *, chunk_nbytes: int = CHUNK_NBYTES, max_pieces: int = IOV_MAX
) -> tuple[tuple[Read, ...], ...]:
    """Bundle transfers into tasks of reads.

    Args:
        transfers: any order; empty ones are dropped; ranges of one file must not overlap.
        chunk_nbytes: most bytes of one read.
        max_pieces: most pieces of one read.

    Returns:
        Tasks that may run in any order and in parallel. The reads of one task run in order; a tensor is never spread
        over two tasks, so that one thread can hash it as its bytes arrive.
    """
    ordered = sorted((t for t in transfers if t.nbytes), key=lambda t: (t.file, t.file_offset))
    return tuple(_plan_run(run, chunk_nbytes) for run in _bundle(ordered, chunk_nbytes, max_pieces))


def _bundle(ordered: list[Transfer], chunk_nbytes: int, max_pieces: int) -> Iterator[list[Transfer]]:
    run: list[Transfer] = []
    run_nbytes = 0
    for transfer in ordered:
        last = run[-1] if run else None
        adjoins = (
            last is not None
            and last.file == transfer.file
            and last.file_offset + last.nbytes == transfer.file_offset
            and run_nbytes + transfer.nbytes <= chunk_nbytes
            and len(run) < max_pieces
        )
        if run and not adjoins:
            yield run
            run, run_nbytes = [], 0
        run.append(transfer)
        run_nbytes += transfer.nbytes
    if run:
        yield run


def _plan_run(run: list[Transfer], chunk_nbytes: int) -> tuple[Read, ...]:
    first = run[0]
    if len(run) == 1 and first.nbytes > chunk_nbytes:
        return tuple(_split(first, chunk_nbytes))
    pieces = tuple(Piece(arena_offset=t.arena_offset, nbytes=t.nbytes) for t in run)
    names = tuple(t.name for t in run)
    return (Read(file=first.file, file_offset=first.file_offset, pieces=pieces, completes=names),)


def _split(transfer: Transfer, chunk_nbytes: int) -> Iterator[Read]:
    for start in range(0, transfer.nbytes, chunk_nbytes):
        nbytes = min(chunk_nbytes, transfer.nbytes - start)
        yield Read(
            file=transfer.file,
            file_offset=transfer.file_offset + start,
            pieces=(Piece(arena_offset=transfer.arena_offset + start, nbytes=nbytes),),
            completes=(transfer.name,) if start + nbytes == transfer.nbytes else (),
        )
