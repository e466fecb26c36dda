"""A store as it is read: which releases, labels and services it has, and its lock.

Rules this module keeps:

- Names are enough to know the releases: a release is whole as soon as it has its name (S1), so no manifest is read.
- Nothing of a store is kept in memory: any number of threads and processes may share it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from hotglm.errors import ArgumentError, Problem, SourceError, StoreError, VersionSyntaxError, shorten_repr
from hotglm.release.digest_cache import DigestCache
from hotglm.release.directory import Release, open_release
from hotglm.release.ledger import Label, ServiceState, read_record, verify_word
from hotglm.release.locks import hold_exclusively
from hotglm.release.reading import list_directory
from hotglm.release.writing import writing
from hotglm.version import Version

__all__ = ["StoreReader", "StoredRelease", "release_name"]

_NAME = re.compile(r"([0-9]{9,16})-(.+)")
_LEDGER_SUFFIX = ".json"
_MAX_TRIES = 10


def release_name(sequence: int, version: object) -> str:
    """Return the name of the directory of a release in a store (S1).

    >>> release_name(7, "1.4.0")
    '000000007-1.4.0'
    """
    return f"{sequence:09d}-{version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRelease:
    """A release as the store names it, before anything of it is read.

    Attributes:
        sequence: its number in the store.
        version: its version.
        path: its directory.
    """

    sequence: int
    version: Version
    path: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoreReader:
    """A store on disk, without what changes it. Any thread may call any method.

    Attributes:
        path: its directory.
        lock_timeout_s: how long a change waits for another process's change, in seconds.
    """

    path: str
    lock_timeout_s: float = 30.0

    # -- what is there -------------------------------------------------------------------------------------------------

    def find_releases(self) -> list[StoredRelease]:
        """Return every release, oldest first; no manifest is read. Names that the store did not give are passed over.

        Raises:
            SourceReadError: the store cannot be listed.
        """
        found = [
            StoredRelease(sequence=parts[0], version=parts[1], path=self.join("releases", name))
            for name in list_directory(self.join("releases"))
            if (parts := _parse_name(name)) is not None
        ]
        return sorted(found, key=lambda one: one.sequence)

    def find_release(self, target: str | int | Version) -> StoredRelease:
        """Return the release that a label, a version or a sequence number leads to.

        Raises:
            StoreError: there is none (NOT_IN_STORE), or the label is damaged.
            SourceReadError: the label cannot be read now, or the store cannot be listed.
        """
        releases: list[StoredRelease] = []
        for _ in range(_MAX_TRIES):
            # The label first: where it leads now was published before, so a listing that comes after has it.
            label = self.read_label(target) if isinstance(target, str) else None
            releases = self.find_releases()
            wanted = _as_wanted(target) if label is None else label.release.sequence
            for one in releases:
                if (one.sequence if isinstance(wanted, int) else one.version) == wanted:
                    return one
            if label is None or self.read_label(label.name) == label:
                break
            # Moved on meanwhile, and what it led to was collected: look again.
        latest = f"the latest is {releases[-1].version}" if releases else "it is empty"
        message = f"Expected a label, version or sequence number of this store, got {shorten_repr(str(target))}."
        raise StoreError(
            f"The store {shorten_repr(self.path)} has no such release; {latest}.",
            problems=[Problem(code="NOT_IN_STORE", message=message, file=self.path)],
            remedy="look at `hotglm log`.",
        )

    def open_release(self, target: str | int | Version) -> Release:
        """Open the release that a label, a version or a sequence number leads to; the caller closes it.

        As long as it is open, garbage collection leaves it alone.

        Raises:
            StoreError: there is none.
            SourceError: it is not what its manifest says.
        """
        for _ in range(_MAX_TRIES):
            stored = self.find_release(target)
            try:
                return open_release(stored.path)
            except SourceError:
                # A label may have moved on, and the release been collected, since the name was found.
                if os.path.lexists(stored.path) and self.find_release(target) == stored:
                    raise
        return open_release(self.find_release(target).path)

    def read_labels(self) -> dict[str, Label]:
        """Return every label by name.

        Raises:
            StoreError: one is damaged.
            SourceReadError: one cannot be read now, or the store cannot be listed.
        """
        names = [name.removesuffix(_LEDGER_SUFFIX) for name in self._ledgers("labels")]
        labels = {name: read_record(self.find_ledger("labels", name), Label) for name in names}
        return {name: label for name, label in labels.items() if label is not None}

    def read_services(self) -> dict[str, ServiceState]:
        """Return what every service has on disk, by name.

        Raises:
            StoreError: a record is damaged.
            SourceReadError: one cannot be read now, or the store cannot be listed.
        """
        names = [name.removesuffix(_LEDGER_SUFFIX) for name in self._ledgers("services")]
        states = {name: read_record(self.find_ledger("services", name), ServiceState) for name in names}
        return {name: state for name, state in states.items() if state is not None}

    def read_label(self, name: str) -> Label | None:
        """Return a label; None where there is none, or `name` cannot be one.

        Raises:
            StoreError: it is damaged.
            SourceReadError: it cannot be read now.
        """
        try:
            verify_word(name, what="label")
        except ArgumentError:
            return None
        return read_record(self.find_ledger("labels", name), Label)

    @property
    def digests(self) -> DigestCache:
        """What the store knows of files that were hashed (S13)."""
        return DigestCache(path=self.join("digests"), objects=self.join("objects"))

    def join(self, *parts: str) -> str:
        """Return a path inside of the store."""
        return os.path.join(self.path, *parts)

    def find_ledger(self, directory: str, name: str) -> str:
        """Return the path of a record: of `"labels"` or `"services"`."""
        return self.join(directory, f"{name}{_LEDGER_SUFFIX}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock for the body of a `with`: nobody else changes it.

        Raises:
            StoreBusyError: another process holds it for too long. StoreWriteError: it cannot be opened.
        """
        path = self.join("lock")
        with ExitStack() as stack:
            with writing(path):
                stack.enter_context(hold_exclusively(path, timeout_s=self.lock_timeout_s))
            yield

    def _ledgers(self, directory: str) -> list[str]:
        """Return the file names of records; names that the store did not give are passed over."""
        names = list_directory(self.join(directory))
        return [name for name in names if name.endswith(_LEDGER_SUFFIX) and _is_word(name.removesuffix(_LEDGER_SUFFIX))]


@functools.lru_cache(maxsize=65_536)  # a pure function: with 10 000 releases parsing would cost more than listing
def _parse_name(name: str) -> tuple[int, Version] | None:
    """Return number and version of the release in the directory `name`; None where the store did not give that."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return int(match[1]), Version(match[2])
    except ArgumentError:
        return None


def _is_word(name: str) -> bool:
    try:
        verify_word(name, what="record")
    except ArgumentError:
        return False
    return True


def _as_wanted(target: str | int | Version) -> int | Version | None:
    """Return what is looked for among the releases; None where it can be none."""
    if isinstance(target, int):
        return target
    try:
        return Version(target)
    except VersionSyntaxError:
        return None
