"""The one place through which hotglm asks the operating system for something that can fail.

Rules this module keeps:

- Reading, staging and publishing open, read, write, map memory and start threads only through `active`, so that a test
  can make the Nth call of any kind fail, or kill the process there (FAULTS K06, D07, D09, D14, D20), without patching
  the standard library under everybody else.
- The real seam adds nothing: each method is the call itself. A replacement must keep the same signatures.
- `reach` asks for nothing: it names the places of a stage where something other than the operating system may fail (a
  migration step, a warm-up pass), so that a test can make that place fail as well.
- Nothing in production ever assigns `active`; `hotglm.testing` and the tests do, around one test.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import cast

__all__ = ["Seam", "active"]

MADV_POPULATE_WRITE = 23
"""`madvise` advice of Linux 5.14 that faults a range in for writing; not in Python's `mmap` module as of 3.14."""


class Seam:
    """The operating system, as far as hotglm needs it. Each method is one call, with its errors."""

    def open(self, path: str, flags: int) -> int:
        """Open `path` and return the descriptor (`os.open`)."""
        return os.open(path, flags, 0o666)

    def fstat(self, fd: int) -> os.stat_result:
        """Return the status of an open file (`os.fstat`)."""
        return os.fstat(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor (`os.close`)."""
        os.close(fd)

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory (`os.listdir`)."""
        return os.listdir(path)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read up to `nbytes` at `offset` (`os.pread`); fewer at the end of the file."""
        return os.pread(fd, nbytes, offset)

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Read into `views` in order from `offset` (`os.preadv`); return the number of bytes, which may be short."""
        return os.preadv(fd, views, offset)

    def lstat(self, path: str) -> os.stat_result:
        """Return the status of what stands at `path`, a link itself included (`os.lstat`)."""
        return os.lstat(path)

    def flock(self, fd: int, operation: int) -> None:
        """Lock or unlock an open file or directory (`fcntl.flock`); the lock ends with the process at the latest."""
        fcntl.flock(fd, operation)

    def create(self, path: str, mode: int) -> int:
        """Make the file `path`, which must not exist, and return a descriptor to write it (`os.open`)."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def pwrite(self, fd: int, chunk: memoryview, offset: int) -> int:
        """Write some of `chunk` at `offset` and return how many bytes (`os.pwrite`)."""
        return os.pwrite(fd, chunk, offset)

    def fsync(self, fd: int) -> None:
        """Flush a file or directory to the disk (`os.fsync`)."""
        os.fsync(fd)

    def rename(self, path: str, target: str) -> None:
        """Move a file over `target`, or a directory to it, in one step (`os.rename`)."""
        os.rename(path, target)

    def link(self, path: str, target: str) -> None:
        """Give the file `path`, not what it points to, the further name `target` (`os.link`)."""
        os.link(path, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove the name of a file (`os.unlink`)."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make a directory (`os.mkdir`)."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory (`os.rmdir`)."""
        os.rmdir(path)

    def map_anonymous(self, nbytes: int) -> mmap.mmap:
        """Return `nbytes` of fresh private memory, zeroed, with huge pages asked for where the system has them."""
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages: slower, not wrong
                pass
        return memory

    def populate(self, memory: mmap.mmap, start: int, nbytes: int) -> None:
        """Fault `nbytes` from `start` in for writing, so that later writes do not (`MADV_POPULATE_WRITE`).

        Where the kernel has no such advice this does nothing, and the first write faults each page.
        """
        # Not `mmap.madvise`: that holds the GIL for as long as the kernel clears pages (2.6 s for 1 GiB of cold memory
        # on the machine this was written on), and every pass of the service would wait for it. ctypes releases it.
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory, start))
        if _madvise is not None:
            _madvise(address, nbytes, MADV_POPULATE_WRITE)

    def keep_from_children(self, memory: mmap.mmap) -> None:
        """Leave `memory` out of processes that are forked from now on (`madvise(MADV_DONTFORK)`); Linux only."""
        if hasattr(mmap, "MADV_DONTFORK"):
            memory.madvise(mmap.MADV_DONTFORK)

    def start_thread(self, thread: threading.Thread) -> None:
        """Start a thread (`Thread.start`)."""
        thread.start()

    def reach(self, place: str) -> None:
        """Do nothing; a stage has come to `place`.

        That is `"stage.load"` and the like for its parts, `"migration_step"` for each step of a path that was planned,
        `"migration_unit"` for each group of tensors that is computed, or `"warm_up"` for each warm-up pass.
        """


def _find_madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int], int]", function)


_madvise = _find_madvise()

active: Seam = Seam()
