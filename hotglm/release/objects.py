"""Files of equal content in a store are one file: each digest has a name in `objects`, and releases link to it.

Rules this module keeps:

- An object is only ever made of a file that this store copied, which nobody else has a name for (S6). A file that was
  linked in from outside may still be written to by its owner, and would take every release that shares it along.
- No object is read or written here. What it holds is verified where a release that has it is; one that is known to be
  other than it was made is not shared any more, and a new one takes its place.
- An object that no release has any more has one name left, and is garbage.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping

from hotglm import seam
from hotglm.file_entry import FileEntry
from hotglm.release.writing import name_partial

__all__ = ["name_object", "share_files"]

_CANNOT_LINK = (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP)


def name_object(digest: str) -> str:
    """Return the name that a digest has in `objects`.

    >>> name_object("sha256:00ff")
    'sha256-00ff'
    """
    return digest.replace(":", "-")


def share_files(
    directory: str, files: Mapping[str, FileEntry], *, objects: str, is_sound: Callable[[str, FileEntry], bool]
) -> list[str]:
    """Let the files of a release that is being made share their content with those that are there.

    Nobody else may look at `directory` yet. A file that cannot be shared stays as it is.

    Args:
        directory: the release.
        files: its files.
        objects: the directory of what is shared.
        is_sound: tells whether the object at a path, which has the right size, is one to share.

    Returns:
        The files that have become objects now.

    Raises:
        OSError: the system refused.
    """
    made = []
    for name, entry in files.items():
        path = os.path.join(directory, *name.split("/"))
        shared = os.path.join(objects, name_object(entry.digest))
        status, there = seam.active.lstat(path), _find_status(shared)
        if there is not None and there.st_size == entry.size and is_sound(shared, entry):
            # One file under both names is left alone: `rename` does nothing then, and would leave the spare name.
            if (there.st_dev, there.st_ino) != (status.st_dev, status.st_ino):
                _replace(path, shared)
        elif status.st_nlink == 1:
            with contextlib.suppress(FileNotFoundError):
                seam.active.unlink(shared)  # one that was cut; releases that have it keep it, and are refused
            if _link(path, shared):
                made.append(name)
    return made


def _find_status(path: str) -> os.stat_result | None:
    try:
        return seam.active.lstat(path)
    except FileNotFoundError:
        return None


def _replace(path: str, shared: str) -> None:
    spare = name_partial(os.path.dirname(path))
    if _link(shared, spare):
        seam.active.rename(spare, path)


def _link(path: str, target: str) -> bool:
    try:
        seam.active.link(path, target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:  # too many names for one file: this release has a copy of its own
            return False
        raise
    return True
