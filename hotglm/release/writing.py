"""Writing to disk so that a kill or a power cut leaves the old state or the new one, and errors are our own.

Rules this module keeps:

- Every OS call goes through `seam.active`: `tests/test_store_killed.py` ends the process at each of them (D09, P11).
- What appears under a name that somebody reads was flushed before, and appears by one rename; then its directory is
  flushed. What is not finished stands under a name that starts with a dot, or in a store's `tmp`.
- An `fsync` that fails is a failure; it is not tried again and believed (D12).
- Links are never followed when something is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from hotglm import seam
from hotglm.errors import HotglmError, Problem, StoreWriteError, shorten_repr
from hotglm.release.reading import close_quietly

__all__ = [
    "PARTIAL_SUFFIX",
    "flush_directory",
    "flush_file",
    "make_directories",
    "name_partial",
    "remove_tree",
    "replace_whole",
    "write_all",
    "write_file",
    "writing",
]

PARTIAL_SUFFIX = ".partial"
_FILE_MODE = 0o644
_CODES = {
    errno.ENOSPC: ("DISK_FULL", "free space on that disk and try again"),
    errno.EDQUOT: ("DISK_FULL", "free space within the quota and try again"),
    errno.EFBIG: ("DISK_FULL", "raise the limit on the size of files and try again"),
    errno.EACCES: ("PERMISSION", "let this user write there"),
    errno.EPERM: ("PERMISSION", "let this user write there"),
    errno.EROFS: ("PERMISSION", "mount it for writing"),
    errno.EMFILE: ("NO_DESCRIPTORS", "raise the limit on open files (ulimit -n) and try again"),
    errno.ENFILE: ("NO_DESCRIPTORS", "close files on this machine and try again"),
    errno.ENOENT: ("NOT_FOUND", "check the path"),
    errno.ENOTDIR: ("NOT_FOUND", "check the path"),
    errno.EEXIST: ("EXISTS", "choose a path that is free, or remove what is there"),
    errno.ENOTEMPTY: ("EXISTS", "choose a path that is free, or remove what is there"),
}


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what the OS says in the body into a `StoreWriteError` about `path`.

    Raises:
        StoreWriteError: with a code that says what to do.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, HotglmError):  # several of ours are errors of the system too
            raise
        code, remedy = _CODES.get(error.errno or 0, ("IO_ERROR", "check the disk or the mount, and try again"))
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        message = f"Expected to write there, got: {error.strerror or shorten_repr(str(error))} ({name})."
        problem = Problem(code=code, message=message, file=path, found=error.errno)
        ours = StoreWriteError(f"Cannot write {shorten_repr(path)}.", problems=[problem], remedy=f"{remedy}.")
        ours.errno = error.errno
        ours.filename = path
        raise ours from error


def name_partial(directory: str) -> str:
    """Return a path in `directory` that nobody else uses and that readers pass over."""
    return os.path.join(directory, f".hotglm-{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def write_all(fd: int, chunk: memoryview, *, offset: int = 0) -> None:
    """Write the whole of `chunk` at `offset`; the system may take less at once."""
    start = 0
    while start < len(chunk):
        num_written = seam.active.pwrite(fd, chunk[start:], offset + start)
        if num_written <= 0:
            raise OSError(errno.EIO, "Nothing was written")
        start += num_written


def write_file(path: str, content: bytes, *, mode: int = _FILE_MODE) -> None:
    """Make the file `path`, which must not exist, with this content, flushed."""
    fd = seam.active.create(path, mode)
    try:
        write_all(fd, memoryview(content))
        seam.active.fsync(fd)
    finally:
        close_quietly(fd)


def replace_whole(path: str, content: bytes) -> None:
    """Put a small file in the place of `path`, whole or not at all, and flush its directory.

    Raises:
        StoreWriteError: it cannot be written. Where only the directory could not be flushed, the file is the new one.
    """
    directory = os.path.dirname(path)
    partial = name_partial(directory)
    with writing(path):
        try:
            write_file(partial, content)
            seam.active.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                seam.active.unlink(partial)
            raise
        flush_directory(directory)


def flush_file(path: str) -> None:
    """Flush a file that somebody else wrote."""
    _flush(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)


def flush_directory(path: str) -> None:
    """Flush a directory, so that the names in it survive a power cut."""
    _flush(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _flush(path: str, flags: int) -> None:
    fd = seam.active.open(path, flags)
    try:
        seam.active.fsync(fd)
    finally:
        close_quietly(fd)


def make_directories(path: str, *, within: str) -> None:
    """Make the directory `path` and those above it, below `within`, where they are missing."""
    missing = []
    while path != within and not _is_there(path):
        missing.append(path)
        path = os.path.dirname(path)
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # somebody else made it just now
            seam.active.mkdir(one)


def _is_there(path: str) -> bool:
    try:
        return stat.S_ISDIR(seam.active.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def remove_tree(path: str) -> None:
    """Remove a directory and what is in it, or a file; what is gone already is fine. No link is followed."""
    try:
        if not stat.S_ISDIR(seam.active.lstat(path).st_mode):
            seam.active.unlink(path)
            return
        for name in seam.active.listdir(path):
            remove_tree(os.path.join(path, name))
        seam.active.rmdir(path)
    except FileNotFoundError:
        return
