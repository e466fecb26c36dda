"""Opening and reading files that somebody else owns: never blocks, never leaks a descriptor, always a typed error.

Rules this module keeps:

- Every OS call goes through `seam.active`. Anything may be at the path: a FIFO, a device, a directory (B18, B21).
- An error of the OS becomes one `SourceReadError` with a code that says what to do, the path and the byte offset (D07).
- A file that ends before the size it had when opened has changed: `SourceChangedError`, never a short result (D02).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from hotglm import seam
from hotglm.errors import Problem, SourceChangedError, SourceError, SourceReadError, shorten_repr

__all__ = [
    "FileIdentity",
    "close_quietly",
    "is_directory",
    "list_directory",
    "open_regular",
    "read_document",
    "read_error",
    "read_exactly",
    "read_scattered",
    "read_status",
    "verify_identity",
]

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # O_NONBLOCK: opening a FIFO returns at once
_MAX_TRIES = 100
"""How often in a row an interrupted call is made again, before it is taken for an error."""

_CODES = {
    errno.ENOENT: ("NOT_FOUND", "check the path"),
    errno.ENOTDIR: ("NOT_FOUND", "check the path"),
    errno.EACCES: ("PERMISSION", "let this user read it"),
    errno.EPERM: ("PERMISSION", "let this user read it"),
    errno.EMFILE: ("NO_DESCRIPTORS", "raise the limit on open files (ulimit -n) and try again"),
    errno.ENFILE: ("NO_DESCRIPTORS", "close files on this machine and try again"),
    errno.ENXIO: ("NOT_REGULAR", "give a regular file"),
    errno.EISDIR: ("NOT_REGULAR", "give a regular file"),
    errno.ENAMETOOLONG: ("BAD_PATH", "give a shorter path"),
    errno.ELOOP: ("BAD_PATH", "break the circle of symbolic links"),
    errno.ENOMEM: ("NO_MEMORY", "free memory and try again"),
    errno.ESTALE: ("STALE_HANDLE", "try again; the file was replaced on its server"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What tells that an open file is still what it was; not the change time, which a rename or unlink moves too.

    Attributes:
        dev: number of the device.
        ino: number of the inode.
        size: in bytes.
        mtime_ns: time of the last write, in nanoseconds.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity that `fstat` reported."""
        return cls(dev=status.st_dev, ino=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)


def read_error(error: OSError | ValueError, *, path: str, offset: int | None = None) -> SourceReadError:
    """Return what the OS said about `path`, at byte `offset` where it was reading, as our own error; never raises."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, ValueError):  # NUL or undecodable characters in the path
        code, remedy = "BAD_PATH", "give a path that this file system can hold"
    else:
        code, remedy = _CODES.get(number or 0, ("IO_ERROR", "check the disk or the mount, and try again"))
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    name = errno.errorcode.get(number or 0, "")
    problem = Problem(
        code=code,
        message=f"Expected to read the file, got: {said}{f' ({name})' if name else ''}.",
        file=path,
        offset=offset,
        found=number,
    )
    ours = SourceReadError(f"Cannot read {shorten_repr(path)}.", problems=[problem], remedy=f"{remedy}.")
    ours.errno = number
    ours.filename = path
    return ours


def close_quietly(fd: int) -> None:
    """Close a descriptor that was only read from: Linux frees it even where `close` reports an error."""
    with contextlib.suppress(OSError):
        seam.active.close(fd)


def is_directory(path: str) -> bool:
    """Tell whether `path` is a directory, after links.

    Raises:
        SourceReadError: it cannot be opened.
    """
    fd, status = _open(path)
    close_quietly(fd)
    return stat.S_ISDIR(status.st_mode)


def read_status(path: str) -> os.stat_result:
    """Return the status of what stands at `path`, a link itself included.

    Raises:
        SourceReadError: nothing is there, or the OS did not say.
    """
    try:
        return seam.active.lstat(path)
    except (OSError, ValueError) as error:
        raise read_error(error, path=path) from error


def list_directory(path: str) -> list[str]:
    """Return the names in a directory, sorted.

    Raises:
        SourceReadError: it cannot be listed.
    """
    try:
        return sorted(seam.active.listdir(path))
    except (OSError, ValueError) as error:
        raise read_error(error, path=path) from error


def open_regular(path: str) -> tuple[int, FileIdentity]:
    """Open a regular file, following links, and return its descriptor and identity; the caller closes it.

    Raises:
        SourceReadError: it cannot be opened, or is no regular file (NOT_REGULAR).
    """
    fd, status = _open(path)
    if stat.S_ISREG(status.st_mode):
        return fd, FileIdentity.of(status)
    close_quietly(fd)
    raise _not_regular(path, status)


def read_exactly(fd: int, *, nbytes: int, offset: int, path: str) -> bytes:
    """Return `nbytes` from `offset`; short and interrupted reads go on.

    Raises:
        SourceChangedError: the file ends before them.
        SourceReadError: the OS refused, with the offset it had come to.
    """
    chunks: list[bytes] = []
    end = offset + nbytes
    while offset < end:
        chunk = _pread(fd, nbytes=end - offset, offset=offset, path=path)
        if not chunk:
            raise _changed(path, message=f"Expected at least {end} bytes, got the end of the file.", offset=offset)
        chunks.append(chunk)
        offset += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def verify_identity(fd: int, *, identity: FileIdentity, path: str) -> None:
    """Refuse a file that was written to, or cut, since `identity` was taken.

    Raises:
        SourceChangedError: size or time of the last write differ.
        SourceReadError: the OS did not say.
    """
    found = FileIdentity.of(_fstat(fd, path=path))
    if found != identity:
        message = (
            f"Expected {identity.size} bytes last written at {identity.mtime_ns} ns, "
            f"got {found.size} bytes at {found.mtime_ns} ns."
        )
        offset = min(found.size, identity.size) if found.size != identity.size else None
        raise _changed(path, message=message, offset=offset)


def read_document(path: str, *, limit: int, error: type[SourceError], code: str) -> bytes:
    """Return the whole of a small file.

    Args:
        path: where it is.
        limit: most bytes that are read; a larger file is refused before any is.
        error: class of that refusal.
        code: its code.

    Raises:
        SourceError: of class `error`: it is too large.
        SourceReadError: it cannot be opened or read, or is no regular file.
        SourceChangedError: it changed while it was read.
    """
    fd, identity = open_regular(path)
    try:
        if identity.size > limit:
            message = f"Expected at most {limit} bytes, got {identity.size}."
            problem = Problem(code=code, message=message, file=path, expected=limit, found=identity.size)
            raise error(
                f"{shorten_repr(path)} is too large.", problems=[problem], remedy="check that it is the right file."
            )
        text = read_exactly(fd, nbytes=identity.size, offset=0, path=path)
        verify_identity(fd, identity=identity, path=path)
        return text
    finally:
        close_quietly(fd)


def _open(path: str) -> tuple[int, os.stat_result]:
    fd = _open_only(path)
    try:
        return fd, _fstat(fd, path=path)
    except BaseException:
        close_quietly(fd)
        raise


def _open_only(path: str) -> int:
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return seam.active.open(path, _FLAGS)
        except (OSError, ValueError) as error:
            # A stale handle (NFS) is gone on the next look-up by name (D19).
            can_pass = getattr(error, "errno", None) in (errno.EINTR, errno.ESTALE)
            if not can_pass or num_tries >= _MAX_TRIES:
                raise read_error(error, path=path) from error


def _fstat(fd: int, *, path: str) -> os.stat_result:
    try:
        return seam.active.fstat(fd)
    except OSError as error:
        raise read_error(error, path=path) from error


def _pread(fd: int, *, nbytes: int, offset: int, path: str) -> bytes:
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return seam.active.pread(fd, nbytes, offset)
        except OSError as error:
            if error.errno != errno.EINTR or num_tries >= _MAX_TRIES:
                raise read_error(error, path=path, offset=offset) from error


def _not_regular(path: str, status: os.stat_result) -> SourceReadError:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    found = kinds.get(stat.S_IFMT(status.st_mode), "something else")
    problem = Problem(code="NOT_REGULAR", message=f"Expected a regular file, got {found}.", file=path, found=found)
    return SourceReadError(f"Cannot read {shorten_repr(path)}.", problems=[problem], remedy="give a regular file.")


def _changed(path: str, *, message: str, offset: int | None) -> SourceChangedError:
    return SourceChangedError(
        f"{shorten_repr(path)} changed while it was being read.",
        problems=[Problem(code="SOURCE_CHANGED", message=message, file=path, offset=offset)],
        remedy="publish by writing beside it and renaming, then try again.",
    )


def read_scattered(fd: int, views: Sequence[memoryview], offset: int, *, path: str, size: int) -> None:
    """Fill `views` in order from byte `offset` of an open file of `size` bytes; retry short reads and interrupts.

    Raises:
        SourceReadError: the system refused. SourceChangedError: the file ends before the views are full.
    """
    todo = [view for view in views if view.nbytes]
    num_interrupts = 0
    while todo:
        try:
            nbytes = seam.active.preadv(fd, todo, offset)
        except OSError as error:
            num_interrupts += 1
            if isinstance(error, InterruptedError) and num_interrupts < _MAX_TRIES:
                continue
            raise read_error(error, path=path, offset=offset) from error
        if nbytes == 0:
            raise SourceChangedError(
                "Expected the source to keep its length while it is read, got its end.",
                problems=[
                    Problem(
                        code="SOURCE_CHANGED",
                        message=f"Expected {size} bytes, got the end of the file at {offset}",
                        file=path,
                        offset=offset,
                        expected=size,
                        found=offset,
                    )
                ],
                remedy="publish by writing a new file and renaming it, never by writing over one, and stage again.",
            )
        num_interrupts = 0  # in a row; a read that brings anything is progress
        offset += nbytes
        while todo and nbytes >= todo[0].nbytes:
            nbytes -= todo.pop(0).nbytes
        if nbytes:
            todo[0] = todo[0][nbytes:]
