"""A release that is made beside its place and appears there by one rename, or not at all.

Rules this module keeps:

- What is made stands in a workspace in the same directory, so that the rename is within one file system (R2, R8).
- The manifest is written last, behind everything that it lists, and all of it is flushed before the rename (R2).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

from hotglm import seam
from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import ArgumentError, Problem, StoreConflictError, shorten_repr
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.filling import flush_tree
from hotglm.release.workspace import make_workspace, sweep_workspaces
from hotglm.release.writing import flush_directory, write_file, writing

__all__ = ["exists_error", "find_destination", "place_release", "write_manifest"]


def find_destination(destination: str | os.PathLike[str]) -> str:
    """Return the absolute path of a destination that is free.

    Raises:
        ArgumentError: it is no path.
        StoreConflictError: something is there (EXISTS).
    """
    try:
        path = os.path.abspath(os.fsdecode(destination))
    except TypeError as error:
        found = shorten_repr(type(destination).__name__)
        raise ArgumentError(f"Expected a path, got {found}.", remedy="give a str or os.PathLike.") from error
    if os.path.lexists(path):
        raise exists_error(path, "Expected a path that is free, got one where something is.")
    return path


@contextlib.contextmanager
def place_release(path: str) -> Iterator[str]:
    """Make a directory for the body of a `with`, which appears at `path` when that ends without an error.

    The body ends with `write_manifest`. What killed makers left beside `path` is removed first.

    Raises:
        StoreConflictError: something was put at `path` meanwhile.
        StoreWriteError: it cannot be written.
    """
    parent = os.path.dirname(path)
    with writing(parent):
        sweep_workspaces(parent)
        with make_workspace(parent) as workspace:
            yield workspace
            seam.active.rename(workspace, path)  # refused by the system where something was put there meanwhile
            flush_directory(parent)


def write_manifest(
    workspace: str, text: bytes, names: Iterable[str], *, mode: int, sign: Callable[[bytes], bytes] | None = None
) -> None:
    """Write the manifest of a release that is being made, and flush the directories that hold its files.

    Args:
        workspace: its directory.
        text: the bytes of the manifest.
        names: the files of the release.
        mode: permissions of the manifest.
        sign: returns the envelope for the bytes of a manifest, which is written before it, so that nobody ever sees
            the release unsigned (T1).

    Raises:
        OSError: the system refused.
    """
    if sign is not None:
        write_file(os.path.join(workspace, ENVELOPE_NAME), sign(text), mode=mode)
    write_file(os.path.join(workspace, MANIFEST_NAME), text, mode=mode)
    flush_tree(workspace, names)


def exists_error(path: str, message: str) -> StoreConflictError:
    """Return the refusal to put something where something is."""
    return StoreConflictError(
        f"Cannot write a release to {shorten_repr(path)}.",
        problems=[Problem(code="EXISTS", message=message, file=path)],
        remedy="choose another, or remove it.",
    )
