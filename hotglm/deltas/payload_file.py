"""A payload as it is written: a safetensors file whose parts come one by one, before all of them are known.

Rules this module keeps:

- The header stands in front of the data, so room is left for the longest that it can become, filled with spaces.
- Whole tensors are written once, in their place, those of large elements first, so that all are aligned; what is
  encoded is small, waits in a file beside it, and is appended. The same parts in the same order give the same file.
- Only one thread writes. Digests are taken by whoever made the parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from hotglm import seam
from hotglm.file_entry import FileEntry, combine_pieces
from hotglm.header import DTYPES, PREFIX_NBYTES, TensorEntry, format_header, parse_header
from hotglm.release.reading import close_quietly, open_regular, read_exactly
from hotglm.release.writing import write_all
from hotglm.weights.digest import view_buffer

__all__ = ["PayloadWriter", "measure_header"]

_ALIGNMENT = 64
_ENTRY_NBYTES = 160
"""More than an entry of one dimension takes, its name of up to 16 characters included."""

_CHUNK_NBYTES = 4 * 2**20
_FORMAT_NAMES = {info.torch_name: name for name, info in DTYPES.items() if info.torch_name}


def measure_header(shapes: Iterable[tuple[int, ...]], *, num_heads: int) -> int:
    """Return where data begins behind the longest header of a payload for tensors of these shapes, in bytes."""
    entries = sum(2 * _ENTRY_NBYTES + len(str(list(shape))) for shape in shapes)
    return -(-(PREFIX_NBYTES + 2 + entries + num_heads * _ENTRY_NBYTES) // _ALIGNMENT) * _ALIGNMENT


class PayloadWriter:
    """A payload that is being written; a context manager that closes its files."""

    def __init__(self, path: str, *, data_start: int, mode: int) -> None:
        """Make the file `path`, with room for a header of up to `data_start` bytes, and one to keep small parts in.

        Raises:
            OSError: the system refused.
        """
        self._path = path
        self._data_start = data_start
        self._spill_path = f"{path}.hotglm-spill"
        self._placed: list[tuple[TensorEntry, str]] = []
        self._spilled: list[tuple[TensorEntry, str]] = []
        self._nbytes = self._spilled_nbytes = 0
        self._fd = seam.active.create(path, mode)
        try:
            self._spill_fd = seam.active.create(self._spill_path, 0o600)
        except BaseException:
            close_quietly(self._fd)
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close its files."""
        close_quietly(self._fd)
        close_quietly(self._spill_fd)

    @property
    def nbytes(self) -> int:
        """Size of the parts so far, in bytes."""
        return self._nbytes + self._spilled_nbytes

    def place(self, name: str, dtype: str, shape: tuple[int, ...], flat: torch.Tensor, *, digest: str) -> None:
        """Write a whole tensor, given as flat bytes, behind those that were placed before.

        Raises:
            OSError: the system refused.
        """
        self._placed.append((_entry(name, dtype, shape, self._nbytes, flat.numel()), digest))
        _write(self._fd, flat, offset=self._data_start + self._nbytes)
        self._nbytes += flat.numel()

    def spill(self, name: str, dtype: str, shape: tuple[int, ...], flat: torch.Tensor, *, digest: str) -> None:
        """Keep a small part, given as flat bytes, for behind the last whole tensor.

        Raises:
            OSError: the system refused.
        """
        self._spilled.append((_entry(name, dtype, shape, self._spilled_nbytes, flat.numel()), digest))
        _write(self._spill_fd, flat, offset=self._spilled_nbytes)
        self._spilled_nbytes += flat.numel()

    def finish(self) -> FileEntry:
        """Append what was kept, write the header, flush, and return what the file is.

        Raises:
            HeaderError: there are more tensors than a header holds.
            OSError, SourceReadError: the system refused.
        """
        self._append_spilled()
        seam.active.unlink(self._spill_path)
        head, size = self._make_head(), self._data_start + self._nbytes + self._spilled_nbytes
        parse_header(head[PREFIX_NBYTES:], file_size=size, file=self._path)
        write_all(self._fd, memoryview(head))
        seam.active.fsync(self._fd)
        digests = [digest.removeprefix("sha256:") for _, digest in (*self._placed, *self._spilled)]
        return FileEntry(size=size, digest=combine_pieces([hashlib.sha256(head).hexdigest(), *digests]))

    def _append_spilled(self) -> None:
        fd, _ = open_regular(self._spill_path)
        try:
            for start in range(0, self._spilled_nbytes, _CHUNK_NBYTES):
                nbytes = min(_CHUNK_NBYTES, self._spilled_nbytes - start)
                chunk = read_exactly(fd, nbytes=nbytes, offset=start, path=self._spill_path)
                write_all(self._fd, memoryview(chunk), offset=self._data_start + self._nbytes + start)
        finally:
            close_quietly(fd)

    def _make_head(self) -> bytes:
        placed, begin = [one for one, _ in self._placed], self._nbytes
        behind = [replace(one, start=begin + one.start, stop=begin + one.stop) for one, _ in self._spilled]
        text = format_header([*placed, *behind], {}).rstrip(b" ")
        room = self._data_start - PREFIX_NBYTES
        return room.to_bytes(PREFIX_NBYTES, "little") + text.ljust(room)


def _entry(name: str, dtype: str, shape: tuple[int, ...], start: int, nbytes: int) -> TensorEntry:
    return TensorEntry(name=name, dtype=_FORMAT_NAMES[dtype], shape=shape, start=start, stop=start + nbytes)


def _write(fd: int, flat: torch.Tensor, *, offset: int) -> None:
    if flat.numel():
        write_all(fd, view_buffer(flat), offset=offset)
