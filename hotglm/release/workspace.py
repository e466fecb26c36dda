"""Directories that something is being made in: nobody reads them, and those of killed processes are cleaned away.

Rules this module keeps:

- A workspace has a name that starts with a dot and ends in `.partial`, so that readers pass over it (R8).
- Its maker shares its lock for as long as it lives. One whose lock is free belongs to nobody, and is debris (D16, S9).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from hotglm import seam
from hotglm.errors import StoreWriteError
from hotglm.release.locks import lock_directory, try_exclusively
from hotglm.release.reading import close_quietly
from hotglm.release.writing import PARTIAL_SUFFIX, name_partial, remove_tree, writing

__all__ = ["make_workspace", "sweep_workspaces"]

_MAX_TRIES = 100


@contextlib.contextmanager
def make_workspace(parent: str) -> Iterator[str]:
    """Make an empty directory in `parent` for the body of a `with`; whatever is left there afterwards is removed.

    Raises:
        StoreWriteError: it cannot be made.
    """
    path, fd = _make(parent)
    try:
        yield path
    finally:
        # Debris if it cannot be removed now: whoever comes next removes it, and a first error stays the one raised.
        with contextlib.suppress(OSError):
            remove_tree(path)
        close_quietly(fd)


def _make(parent: str) -> tuple[str, int]:
    for _ in range(_MAX_TRIES):
        path = name_partial(parent)
        with writing(path):
            seam.active.mkdir(path)
            # Between the two calls it belongs to nobody, so somebody who cleans may take it; then another one is made.
            with contextlib.suppress(FileNotFoundError):
                fd = lock_directory(path)
                if fd is not None and os.path.lexists(path):
                    return path, fd
                if fd is not None:
                    close_quietly(fd)
    raise StoreWriteError(f"Cannot make a directory in {parent!a}; it is always cleaned away.", remedy="try again.")


def sweep_workspaces(parent: str) -> list[str]:
    """Remove what killed processes left in `parent`, and return the names.

    What cannot be removed is left for the next one.

    Raises:
        OSError: `parent` cannot be listed.
    """
    swept = []
    for name in seam.active.listdir(parent):
        if name.startswith(".hotglm-") and name.endswith(PARTIAL_SUFFIX):
            with contextlib.suppress(OSError):
                if _sweep(os.path.join(parent, name)):
                    swept.append(name)
    return sorted(swept)


def _sweep(path: str) -> bool:
    if not stat.S_ISDIR(seam.active.lstat(path).st_mode):
        return False  # a file that is being written whole; its writer may be alive and has no lock
    fd = try_exclusively(path)
    if fd is None:
        return False
    try:
        remove_tree(path)
    finally:
        close_quietly(fd)
    return True
