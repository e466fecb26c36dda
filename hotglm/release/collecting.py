"""Garbage collection of a store: what nothing names, nobody has open, and no release has any more.

Rules this module keeps (S7 to S9):

- What stays is decided first, from labels, their history, services and numbers; a record that is damaged ends it.
- A release that somebody has open is in use, whatever names it: its lock is shared. It goes when it is free.
- A release is moved to `tmp` by one rename and removed there, so that nobody ever sees half of one.
- Bytes that are mapped or open stay with whoever has them: names are removed, nothing is written into.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hotglm import seam
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.release.locks import try_exclusively
from hotglm.release.reading import close_quietly, list_directory
from hotglm.release.services import sweep_holders
from hotglm.release.store_reading import StoredRelease, StoreReader
from hotglm.release.workspace import sweep_workspaces
from hotglm.release.writing import PARTIAL_SUFFIX, flush_directory, name_partial, remove_tree, writing

__all__ = ["Collected", "collect_garbage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a garbage collection did.

    Attributes:
        removed: the releases that are gone.
        in_use: the releases that would have gone, but somebody has them open.
        num_objects: how many contents no release had any more.
        nbytes: their size, in bytes.
        debris: names that killed processes had left.
    """

    removed: tuple[StoredRelease, ...]
    in_use: tuple[StoredRelease, ...]
    num_objects: int
    nbytes: int
    debris: tuple[str, ...]


def collect_garbage(store: StoreReader, *, keep_newest: int, is_dry: bool = False) -> Collected:
    """Remove what nothing needs; see `Store.collect_garbage`."""
    if type(keep_newest) is not int or keep_newest < 1:
        raise ArgumentError(
            f"Expected to keep at least 1 release, got {shorten_repr(keep_newest)}.", remedy="keep the newest ones."
        )
    removed: list[StoredRelease] = []
    in_use: list[StoredRelease] = []
    with store.locked(), writing(store.path):
        named = _find_named(store)
        doomed = [one for one in store.find_releases()[:-keep_newest] if one.sequence not in named]
        if is_dry:
            return _foresee(store, doomed)
        for one in doomed:
            (removed if _remove(store, one) else in_use).append(one)
        debris = [*sweep_workspaces(store.join("tmp")), *_sweep_partials(store), *sweep_holders(store)]
        num_objects, nbytes = _remove_objects(store)
        store.digests.forget_lost(lambda: _find_files(store.join("releases")))
    return Collected(
        removed=tuple(removed), in_use=tuple(in_use), num_objects=num_objects, nbytes=nbytes, debris=tuple(debris)
    )


def _find_named(store: StoreReader) -> set[int]:
    labels, services = store.read_labels().values(), store.read_services().values()
    named = {move.release.sequence for label in labels for move in label.moves}
    return named | {one.sequence for state in services for one in state.find_ids()}


def _foresee(store: StoreReader, doomed: list[StoredRelease]) -> Collected:
    """Return what would be removed. No lock of a release is tried: whoever opened it just then would be turned away."""
    links = Counter((one.st_dev, one.st_ino) for stored in doomed for one in _find_files(stored.path))
    num, nbytes = 0, 0
    for name in list_directory(store.join("objects")):
        status = seam.active.lstat(store.join("objects", name))
        if status.st_nlink - links[status.st_dev, status.st_ino] == 1:
            num, nbytes = num + 1, nbytes + status.st_size
    return Collected(removed=tuple(doomed), in_use=(), num_objects=num, nbytes=nbytes, debris=())


def _find_files(directory: str) -> Iterator[os.stat_result]:
    for name in list_directory(directory):
        path = os.path.join(directory, name)
        status = seam.active.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            yield from _find_files(path)
        else:
            yield status


def _remove(store: StoreReader, stored: StoredRelease) -> bool:
    """Remove a release unless somebody has it open; tell whether it is gone."""
    fd = try_exclusively(stored.path)
    if fd is None:
        return not os.path.lexists(stored.path)
    try:
        partial = name_partial(store.join("tmp"))
        seam.active.rename(stored.path, partial)
        flush_directory(store.join("releases"))
        remove_tree(partial)
    finally:
        close_quietly(fd)
    return True


def _sweep_partials(store: StoreReader) -> list[str]:
    """Remove records that were being written: under the store's lock nobody writes one."""
    swept = []
    for directory in ("labels", "services", ""):
        for name in list_directory(store.join(directory)):
            if name.startswith(".hotglm-") and name.endswith(PARTIAL_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    seam.active.unlink(store.join(directory, name))
                    swept.append(name)
    return swept


def _remove_objects(store: StoreReader) -> tuple[int, int]:
    num, nbytes = 0, 0
    for name in list_directory(store.join("objects")):
        path = store.join("objects", name)
        status = seam.active.lstat(path)
        if status.st_nlink == 1:
            seam.active.unlink(path)
            num, nbytes = num + 1, nbytes + status.st_size
    return num, nbytes
