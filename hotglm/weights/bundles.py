"""Reading: bundles of file ranges into an arena, hashed as they arrive, and whose turn it is.

Rules this module keeps:

- Nothing here maps a file: a read past a truncated end comes back short and becomes a typed error, never a signal.
- The bytes that are hashed are the ones in the arena.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from hotglm.release.files import TensorLocation, WeightFile
from hotglm.release.reading import read_scattered
from hotglm.weights.arena import Lease
from hotglm.weights.digest import format_digest, tensor_bytes, view_buffer
from hotglm.weights.pace import rest
from hotglm.weights.plan import CHUNK_NBYTES, Read
from hotglm.weights.proof import LoadOptions
from hotglm.weights.yielding import Work

__all__ = [
    "ReadingTurn",
    "bundle_names",
    "copy_in_pieces",
    "count_nbytes",
    "cut_pairs",
    "make_turn",
    "read_bundle",
    "read_into",
]


ReadingTurn = contextlib.AbstractContextManager[object]
"""What a thread holds while it reads."""


def bundle_names(names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield `names` in tasks of at least the size of one large read, but for the last; `sizes` are in bytes."""
    bundle: list[str] = []
    nbytes = 0
    for name in names:
        bundle.append(name)
        nbytes += sizes[name]
        if nbytes >= CHUNK_NBYTES:
            yield bundle
            bundle, nbytes = [], 0
    if bundle:
        yield bundle


def count_nbytes(bundle: tuple[Read, ...]) -> int:
    """Return the bytes that a task of reads brings."""
    return sum(read.nbytes for read in bundle)


def read_bundle(
    reads: tuple[Read, ...], files: Sequence[WeightFile], *, lease: Lease, turn: ReadingTurn, options: LoadOptions
) -> Iterator[tuple[str, str | None]]:
    """Read one task into the arena; yield each name that is complete, with its digest where that is known already."""
    wants_digest = options.digest or bool(options.expected)
    running = hashlib.sha256() if len(reads) > 1 and wants_digest else None
    for read in reads:
        options.cancellation.raise_if_cancelled()
        options.budget.take(read.nbytes, cancellation=options.cancellation)
        views = [lease.bytes(piece.arena_offset, piece.nbytes) for piece in read.pieces]
        file = files[read.file]
        rest(Work.READ, read.nbytes)
        with turn:
            read_scattered(file.fd, views, read.file_offset, path=file.path, size=file.size)
        if running is not None:
            rest(Work.HASH, read.nbytes)
            running.update(views[0])
        for name in read.completes:
            yield name, format_digest(running.hexdigest()) if running is not None else None
        if not read.completes:
            options.report(0)


def read_into(tensor: torch.Tensor, location: TensorLocation, *, turn: ReadingTurn, options: LoadOptions) -> None:
    """Read one tensor into another one of its size, which is contiguous and on the CPU.

    Raises:
        SourceReadError: the system refused. SourceChangedError: the file ends before it does.
    """
    if not location.nbytes:
        return
    file, data = location.file, view_buffer(tensor_bytes(tensor))
    for start in range(0, location.nbytes, options.pace.chunk_nbytes):
        options.cancellation.raise_if_cancelled()
        part = data[start : start + options.pace.chunk_nbytes]
        options.budget.take(part.nbytes, cancellation=options.cancellation)
        rest(Work.READ, part.nbytes)
        with turn:
            read_scattered(file.fd, [part], location.offset + start, path=file.path, size=file.size)


def copy_in_pieces(view: torch.Tensor, tensor: torch.Tensor, options: LoadOptions) -> None:
    """Copy a tensor into a view of its shape, at the budget and the pace of a load."""
    for into, piece in cut_pairs(view, tensor, options.pace.chunk_nbytes):
        options.budget.take(piece.nbytes, cancellation=options.cancellation)
        rest(Work.COPY, piece.nbytes)
        into.copy_(piece)


def cut_pairs(
    view: torch.Tensor, tensor: torch.Tensor, chunk_nbytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the same parts of two tensors of one shape, none larger than a chunk unless a single row is."""
    if tensor.nbytes <= chunk_nbytes or not tensor.dim():
        yield view, tensor
        return
    if view.is_contiguous() and tensor.is_contiguous():
        view, tensor = view.view(-1), tensor.view(-1)
    num_rows = max(1, chunk_nbytes * len(tensor) // tensor.nbytes)
    for start in range(0, len(tensor), num_rows):
        yield view[start : start + num_rows], tensor[start : start + num_rows]


def make_turn(options: LoadOptions) -> ReadingTurn:
    """Return what a thread holds while it reads.

    Where bytes are hashed as well, threads take turns at reading: one of them fills the memory bus, or the disk, and
    the others have hashing to do, which needs neither. Without turns they read at the same time and hash at the same
    time (measured on two cores: 27 % over hashing alone instead of 13 %; a cold GiB 1.3 s, not 0.9 s).
    """
    return threading.Lock() if options.digest or options.expected else contextlib.nullcontext()
