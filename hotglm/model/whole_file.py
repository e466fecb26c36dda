"""Writing a file so that it appears whole or not at all.

Rules this module keeps:

- What is written stands under a name of its own beside the target, readable by nobody who could not read the target,
  until it is flushed to the disk; then it is renamed, and the directory is flushed (P11).
- Only a regular file is ever replaced: not a directory, a device or a FIFO.
- On a failure nothing is left behind. Only a process that is killed leaves its `.hotglm-*.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator

from hotglm.errors import ArgumentError, shorten_repr

__all__ = ["open_whole", "verify_path", "write_at", "write_whole"]

_NEW_MODE = 0o666  # the umask applies


def verify_path(path: str | bytes | os.PathLike[str]) -> str:
    """Return `path` as text, with links followed.

    Raises:
        ArgumentError: it is no path.
        OSError: the links go in a circle, or a directory in it cannot be searched.
    """
    remedy = "give a str, bytes or os.PathLike that this file system can hold."
    try:
        text = os.fsdecode(path)
        if not text or "\0" in text:
            raise ArgumentError(f"Expected a path, got {shorten_repr(text)}.", remedy=remedy)
        os.fsencode(text)
    except (TypeError, UnicodeError) as error:
        raise ArgumentError(f"Expected a path, got {shorten_repr(path)}.", remedy=remedy) from error
    return os.path.realpath(text)


def write_whole(path: str, chunks: Iterable[memoryview]) -> None:
    """Write `chunks` to the file `path`, or leave it as it is.

    Raises:
        OSError: it cannot be written. Where only the directory could not be flushed, the file is the new one.
    """
    with open_whole(path) as fd:
        for chunk in chunks:
            _write(fd, chunk)


@contextlib.contextmanager
def open_whole(path: str) -> Iterator[int]:
    """Open a new file that takes the place of `path` when the `with` ends well; else `path` stays as it is.

    Raises:
        OSError: it cannot be written. Where only the directory could not be flushed, the file is the new one.
    """
    mode = _find_mode(path)
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".hotglm-{secrets.token_hex(8)}.partial")
    fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, _NEW_MODE if mode is None else mode)
    try:
        try:
            if mode is not None:
                os.fchmod(fd, mode)  # without the umask, which took its part when the file was made
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush_directory(directory)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from byte `offset` of an open file; any thread may.

    Raises:
        OSError: it cannot be written.
    """
    while data.nbytes:  # the system may take less than all of it; Linux never more than 2 GiB at once
        num_written = os.pwrite(fd, data, offset)
        if num_written <= 0:
            raise OSError(errno.EIO, "Nothing was written")
        data, offset = data[num_written:], offset + num_written


def _find_mode(path: str) -> int | None:
    """Return the permissions of the file that is there; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return stat.S_IMODE(status.st_mode) & 0o777


def _write(fd: int, chunk: memoryview) -> None:
    start = 0
    while start < len(chunk):  # the system may take less than all of it; Linux never more than 2 GiB at once
        num_written = os.write(fd, chunk[start:])
        if num_written <= 0:
            raise OSError(errno.EIO, "Nothing was written")
        start += num_written


def _flush_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
