"""Opening a store, and making one.

Rules this module keeps: the marker that says what a directory is comes last, so that a creation that was killed is no
store yet, and the next one goes on with what it left.
"""

from __future__ import annotations

import contextlib
import json
import os

from hotglm import seam
from hotglm.errors import ArgumentError, Problem, SourceError, SourceReadError, StoreError, shorten_repr
from hotglm.release.directory import STORE_MARKER
from hotglm.release.reading import read_document
from hotglm.release.store import Store
from hotglm.release.writing import flush_directory, make_directories, replace_whole, writing

__all__ = ["open_store"]

_FORMAT = "hotglm.store/1"
_DIRECTORIES = ("labels", "objects", "releases", "services", "tmp")


def open_store(path: str | os.PathLike[str], *, creates: bool = False, lock_timeout_s: float = 30.0) -> Store:
    """Open the store in the directory `path`.

    Args:
        path: its directory.
        creates: whether it is made where nothing is, or an empty directory.
        lock_timeout_s: how long a change waits for another process's change, in seconds.

    Raises:
        ArgumentError: `path` is no path.
        StoreError: it is no store (NOT_A_STORE), or one of a later format.
        StoreWriteError: it cannot be made.
        SourceReadError: it cannot be read.
    """
    try:
        directory = os.path.abspath(os.fsdecode(path))
    except TypeError as error:
        found = shorten_repr(type(path).__name__)
        raise ArgumentError(f"Expected a path, got {found}.", remedy="give a str or os.PathLike.") from error
    store = Store(path=directory, lock_timeout_s=lock_timeout_s)
    marker = store.join(STORE_MARKER)
    text = _read_marker(marker)
    if text is None and creates:
        _create(store)
        text = _read_marker(marker)
    expected = json.dumps({"format": _FORMAT}).encode()
    if text is None or text.strip() != expected:
        found = "none" if text is None else shorten_repr(text[:80].decode(errors="replace"))
        message = f"Expected {STORE_MARKER!r} with {expected.decode()}, got {found}."
        raise StoreError(
            f"{shorten_repr(directory)} is not a store that this hotglm can use.",
            problems=[Problem(code="NOT_A_STORE", message=message, file=marker)],
            remedy="check the path, or make one with `open_store(path, creates=True)`.",
        )
    return store


def _read_marker(marker: str) -> bytes | None:
    try:
        return read_document(marker, limit=4096, error=SourceError, code="NOT_A_STORE")
    except SourceReadError as error:
        if error.code != "NOT_FOUND":
            raise
        return None


def _create(store: Store) -> None:
    """Make what a store consists of; its marker comes last. What a killed creation left is used."""
    with writing(store.path):
        with contextlib.suppress(FileExistsError):
            seam.active.mkdir(store.path)
        ours = {*_DIRECTORIES, STORE_MARKER, "digests", "lock"}
        foreign = [n for n in seam.active.listdir(store.path) if n not in ours and not n.startswith(".hotglm-")]
        if foreign:
            raise StoreError(
                f"{shorten_repr(store.path)} is not empty and no store.",
                problems=[Problem(code="NOT_A_STORE", message=f"Expected nothing there, got {foreign[0]!a}.")],
                remedy="choose another directory.",
            )
        for name in _DIRECTORIES:
            make_directories(store.join(name), within=store.path)
        flush_directory(store.path)
        flush_directory(os.path.dirname(store.path))  # before the marker: who finds that takes the store for lasting
        replace_whole(store.join(STORE_MARKER), json.dumps({"format": _FORMAT}).encode() + b"\n")
