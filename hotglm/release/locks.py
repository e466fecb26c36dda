"""Locks between processes that a killed process cannot leave behind.

Rules this module keeps:

- A lock is `flock` on an open file or directory: the kernel gives it up with the last descriptor, however the process
  ends. Nothing on disk says "locked", so nothing stale can.
- A descriptor is close-on-exec and never handed out. A child made by `fork` shares it until it ends or execs: a lease
  then lasts until both are done with it, which keeps more, never less. A store's lock is unlocked by whoever took it.
- A store's lock is held for a few small writes, never while weights are read, hashed or copied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from hotglm import seam
from hotglm.errors import Problem, StoreBusyError, shorten_repr
from hotglm.release.reading import close_quietly

__all__ = ["hold_exclusively", "lock_directory", "lock_holder", "try_exclusively"]

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0001, 0.005
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def hold_exclusively(path: str, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path`, made where it is missing, for the body of a `with`.

    Raises:
        StoreBusyError: another process holds it for longer than `timeout_s` seconds.
        OSError: it cannot be opened, or this file system has no locks.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while (fd := _open_locked(path)) is None:
        if time.monotonic() >= deadline:
            message = f"Expected the lock within {timeout_s} s, got none; another process holds it."
            raise StoreBusyError(
                f"The store's lock {shorten_repr(path)} is held.",
                problems=[Problem(code="STORE_BUSY", message=message, file=path)],
                remedy="try again; if it stays, look with `lslocks` for a process that was stopped.",
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)  # most changes take less than a millisecond
    try:
        yield
    finally:
        # Unlocked, not only closed: a child that was forked meanwhile has a copy of the descriptor, and would keep the
        # lock until it ends (tests/test_services.py).
        with contextlib.suppress(OSError):
            seam.active.flock(fd, fcntl.LOCK_UN)
        close_quietly(fd)


def _open_locked(path: str) -> int | None:
    """Return a descriptor with the lock; None where somebody else has it, or the file is no longer what `path` names.

    Somebody may have tidied the lock file away: a lock on what has no name keeps nobody out.
    """
    fd = seam.active.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _try(fd, fcntl.LOCK_EX) and _is_named(fd, path):
            return fd
    except BaseException:
        close_quietly(fd)
        raise
    close_quietly(fd)
    return None


def _is_named(fd: int, path: str) -> bool:
    ours = seam.active.fstat(fd)
    try:
        named = seam.active.lstat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def _try(fd: int, operation: int) -> bool:
    try:
        seam.active.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except InterruptedError:
        return False
    return True


def lock_directory(path: str) -> int | None:
    """Open a directory and share its lock: a lease, for as long as the descriptor that is returned stays open.

    Returns:
        The descriptor, which the caller closes; None where somebody holds it exclusively, to remove it. On a file
        system without locks the descriptor alone.

    Raises:
        OSError: it cannot be opened, or is no directory.
    """
    fd = seam.active.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        is_locked = _try(fd, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return fd
        close_quietly(fd)
        raise
    except BaseException:
        close_quietly(fd)
        raise
    if is_locked:
        return fd
    close_quietly(fd)
    return None


def try_exclusively(path: str) -> int | None:
    """Open a file or directory and lock it, unless somebody shares or holds its lock.

    Returns:
        The descriptor, which the caller closes; None where it is in use, or gone.

    Raises:
        OSError: it cannot be opened, or this file system has no locks.
    """
    try:
        fd = seam.active.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        if _try(fd, fcntl.LOCK_EX):
            return fd
    except BaseException:
        close_quietly(fd)
        raise
    close_quietly(fd)
    return None


def lock_holder(path: str) -> int:
    """Make the file `path` and lock it, for as long as this process and the descriptor that is returned live.

    Raises:
        OSError: it is there already, cannot be made, or this file system has no locks.
    """
    fd = seam.active.create(path, 0o644)
    try:
        seam.active.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        close_quietly(fd)
        raise
    return fd
