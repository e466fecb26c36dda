"""Garbage collection of a store: what nothing names, nobody has open, and no release has any more.

Rules this module keeps (S7 to S9, S15):

- What stays is decided first, from labels, their history, services and numbers; a record that is damaged ends it.
- What a delta that stays builds on stays too, down to the full release at the end of its chain.
- A release that somebody has open is in use, whatever names it: its lock is shared. It goes when it is free.
- A release is moved to `tmp` by one rename and removed there, so that nobody ever sees half of one.
- Bytes that are mapped or open stay with whoever has them: names are removed, nothing is written into.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hotglm import seam
from hotglm.errors import ArgumentError, ReleaseError, SourceError, shorten_repr
from hotglm.manifest import MAX_MANIFEST_NBYTES, parse_manifest
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.locks import try_exclusively
from hotglm.release.reading import close_quietly, list_directory, read_document
from hotglm.release.services import sweep_holders
from hotglm.release.store_reading import StoredRelease, StoreReader
from hotglm.release.workspace import sweep_workspaces
from hotglm.release.writing import PARTIAL_SUFFIX, flush_directory, name_partial, remove_tree, writing

__all__ = ["Collected", "collect_garbage", "find_needed"]


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
    bases = _Bases()
    _find_kept(store, keep_newest, bases)  # read now, and not again under the lock (S5)
    with store.locked(), writing(store.path):
        needed, releases = _find_kept(store, keep_newest, bases)
        doomed = [one for one in releases if one.sequence not in needed]
        if is_dry:
            return _foresee(store, doomed)
        for one in reversed(doomed):  # the newest first: one that somebody has open keeps what it builds on
            if one.sequence in needed:
                continue
            if _remove(store, one):
                removed.insert(0, one)
            else:
                in_use.insert(0, one)
                needed |= find_needed([one], releases, bases)
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


def _find_kept(store: StoreReader, keep_newest: int, bases: _Bases) -> tuple[set[int], list[StoredRelease]]:
    """Return the numbers of the releases that stay, and all releases."""
    named, releases = _find_named(store), store.find_releases()
    oldest_new = releases[-keep_newest:][0].sequence if releases else 0
    kept = [one for one in releases if one.sequence >= oldest_new or one.sequence in named]
    return {one.sequence for one in kept} | find_needed(kept, releases, bases), releases


class _Bases:
    """What releases build on, each read once: one that is there never changes (S1)."""

    def __init__(self) -> None:
        self._known: dict[str, int | None] = {}

    def find(self, stored: StoredRelease) -> int | None:
        """Return the number of a delta's base; None for a full release.

        Raises:
            SourceError: it cannot be read; it is asked again then.
        """
        if stored.path not in self._known:
            # The manifest alone: a release that lost another file, or got one too many, says what it builds on still.
            at = os.path.join(stored.path, MANIFEST_NAME)
            text = read_document(at, limit=MAX_MANIFEST_NBYTES, error=ReleaseError, code="MANIFEST_TOO_LARGE")
            delta = parse_manifest(text, file=at).delta
            self._known[stored.path] = None if delta is None else delta.base.sequence
        return self._known[stored.path]


def find_needed(kept: Iterable[StoredRelease], releases: Sequence[StoredRelease], bases: _Bases) -> set[int]:
    """Return the numbers of the releases that the deltas among `kept` build on, whole chains (S7, S15).

    A release whose manifest cannot be read might need any older one, so all of those are needed then.

    Args:
        kept: releases that stay.
        releases: all releases of the store.
        bases: reads what each builds on.
    """
    by_number, needed = {one.sequence: one for one in releases}, set[int]()
    todo = list(kept)
    while todo:
        one = todo.pop()
        try:
            base = bases.find(one)
        except SourceError:
            needed |= {number for number in by_number if number < one.sequence}
            continue
        if base is not None and base in by_number and base not in needed:
            needed.add(base)
            todo.append(by_number[base])
    return needed


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
