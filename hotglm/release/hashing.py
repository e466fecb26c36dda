"""Digests of files, taken on all cores on the bytes that are read, and copied in the same go where that is wanted.

Rules this module keeps:

- A safetensors file whose tensors are named is cut into its header and its tensors: each is a piece of its own, so one
  large file is hashed by all cores, and its digest follows from those of its pieces (D2).
- What is copied is what was hashed: the same buffer goes to the hash and to the copy (P5).
- A file that is written to while it is read is refused. No thread outlives the call.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hotglm.errors import ThreadStartError
from hotglm.file_entry import combine_pieces
from hotglm.progress import Progress
from hotglm.release.reading import FileIdentity, read_exactly
from hotglm.release.writing import write_all, writing

__all__ = [
    "FilePieces",
    "HashMeter",
    "Piece",
    "cut_weights",
    "cut_whole",
    "hash_pieces",
    "num_hash_threads",
]

_CHUNK_NBYTES = 4 * 2**20
_SMALL_NBYTES = 16 * 2**20
"""Up to here threads cost more than they bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of a file: the whole of it, its header, or one tensor.

    Attributes:
        name: name of the tensor; None for a header or a whole file.
        offset: first byte.
        nbytes: size in bytes.
    """

    name: str | None
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePieces:
    """One open file and what it is cut into.

    Attributes:
        path: for messages, and the key of the result.
        fd: descriptor that it is read by.
        identity: what must not change meanwhile.
        pieces: in the order of the file; they cover it.
        is_weights: whether its digest is made of those of its pieces.
        copy_path: where it is copied to, for messages; None where it is not.
        copy_fd: descriptor of the copy.
    """

    path: str
    fd: int
    identity: FileIdentity
    pieces: tuple[Piece, ...]
    is_weights: bool = False
    copy_path: str | None = None
    copy_fd: int | None = None


class HashMeter:
    """Counts the bytes that are done, for whoever wants to know. Any thread may add.

    Attributes:
        is_stopped: whether the rest need not be read, because something failed.
    """

    def __init__(self, part: str, total: int, progress: Callable[[Progress], object] | None) -> None:
        """Take what it is called, how much there is, and who is told about every chunk, one at a time."""
        self.is_stopped = False
        self._part = part
        self._total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count bytes that are done, and tell."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(Progress(part=self._part, done_nbytes=self._done, total_nbytes=self._total))


def cut_whole(size: int) -> tuple[Piece, ...]:
    """Return a file of `size` bytes as one piece."""
    return (Piece(name=None, offset=0, nbytes=size),)


def cut_weights(data_start: int, tensors: Iterable[tuple[str, int, int]]) -> tuple[Piece, ...]:
    """Return header and tensors of a safetensors file; `tensors` yields name, first byte and size, in file order."""
    pieces = [Piece(name=name, offset=offset, nbytes=nbytes) for name, offset, nbytes in tensors]
    return (Piece(name=None, offset=0, nbytes=data_start), *pieces)


def num_hash_threads() -> int:
    """Return how many threads hash: as many as this process has cores, at most 16."""
    return max(1, min(16, len(os.sched_getaffinity(0))))


def hash_pieces(files: Sequence[FilePieces], *, meter: HashMeter) -> tuple[dict[str, str], dict[str, str]]:
    """Read every piece, hash it and copy it where that is wanted.

    Args:
        files: open files; their descriptors stay the caller's.
        meter: counts the bytes.

    Returns:
        The digest of every file by path, and of every tensor by name.

    Raises:
        SourceChangedError: a file ends too early.
        SourceReadError: the OS refused to read.
        StoreWriteError: the OS refused to write.
        ThreadStartError: no thread could be started.
    """
    work = [(file, piece) for file in files for piece in file.pieces]

    def hash_one(task: tuple[FilePieces, Piece]) -> str:
        return _hash_piece(*task, meter=meter)

    num_threads = 1 if sum(piece.nbytes for _, piece in work) <= _SMALL_NBYTES else num_hash_threads()
    if num_threads == 1 or len(work) == 1:
        digests = list(map(hash_one, work))
    else:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="hotglm-hash") as pool:
            try:
                digests = [future.result() for future in _submit_all(pool, hash_one, work)]
            except BaseException:
                meter.is_stopped = True
                pool.shutdown(cancel_futures=True)
                raise
    return _gather(files, iter(digests))


def _submit_all(
    pool: ThreadPoolExecutor,
    hash_one: Callable[[tuple[FilePieces, Piece]], str],
    work: Sequence[tuple[FilePieces, Piece]],
) -> list[Future[str]]:
    try:
        return [pool.submit(hash_one, task) for task in work]
    except RuntimeError as error:
        raise ThreadStartError(
            "Expected threads to hash with, got none.", remedy="free threads or memory, and try again."
        ) from error


def _gather(files: Sequence[FilePieces], digests: Iterator[str]) -> tuple[dict[str, str], dict[str, str]]:
    of_files: dict[str, str] = {}
    of_tensors: dict[str, str] = {}
    for file in files:
        found = [next(digests) for _ in file.pieces]
        of_files[file.path] = combine_pieces(found) if file.is_weights else f"sha256:{found[0]}"
        of_tensors |= {
            piece.name: f"sha256:{text}"
            for piece, text in zip(file.pieces, found, strict=True)
            if piece.name is not None
        }
    return of_files, of_tensors


def _hash_piece(file: FilePieces, piece: Piece, *, meter: HashMeter) -> str:
    digest = hashlib.sha256()
    offset, end = piece.offset, piece.offset + piece.nbytes
    while offset < end and not meter.is_stopped:
        nbytes = min(_CHUNK_NBYTES, end - offset)
        chunk = read_exactly(file.fd, nbytes=nbytes, offset=offset, path=file.path)
        digest.update(chunk)
        if file.copy_fd is not None:
            with writing(file.copy_path or ""):
                write_all(file.copy_fd, memoryview(chunk), offset=offset)
        offset += nbytes
        meter.add(nbytes)
    return digest.hexdigest()
