"""A store: a directory of releases of one model, with labels that lead to some of them.

Rules this module keeps (the clauses are those of docs/release-format.md):

- A release appears by one rename, whole and flushed; two with one version never stand in a store (S1, S2, D18).
- What changes a store holds its lock, for a few small calls: never while weights are read, hashed or copied (S5).
- A label moves only to a release whose every byte was verified, and only from where the caller says it stood (S4).
- Files of equal content are one file with several names (S6). Nothing here ever writes into a file that is there.
- A process that is killed leaves debris in `tmp`, which nobody reads and the next publisher cleans away (S9).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import EllipsisType

from hotglm import seam
from hotglm.errors import (
    Problem,
    ReleaseError,
    SourceReadError,
    StoreConflictError,
    shorten_repr,
)
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import MANIFEST_NAME, Manifest
from hotglm.progress import Progress
from hotglm.release.collecting import Collected, collect_garbage
from hotglm.release.directory import open_release
from hotglm.release.drafts import open_draft
from hotglm.release.filling import Filled, fill_directory, flush_tree
from hotglm.release.ledger import (
    Label,
    LabelMove,
    ReleaseId,
    now_text,
    verify_word,
    write_ledger,
)
from hotglm.release.objects import share_files
from hotglm.release.packing import ReleaseDetails, Stated, read_stated, verify_stated
from hotglm.release.services import Service
from hotglm.release.store_reading import StoredRelease, StoreReader, release_name
from hotglm.release.workspace import make_workspace, sweep_workspaces
from hotglm.release.writing import flush_directory, write_file, writing
from hotglm.version import Version

__all__ = ["Store"]

_MODE = 0o444
_MAX_MOVES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Store(StoreReader):
    """A store on disk, and what changes it. Any thread or process may call any method."""

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(
        self,
        source: str | os.PathLike[str],
        *,
        name: str | None = None,
        version: str | Version | None = None,
        details: ReleaseDetails | None = None,
        is_linked: bool = False,
        progress: Callable[[Progress], object] | None = None,
    ) -> StoredRelease:
        """Make a release of existing weights in this store, whole or not at all. See `hotglm.pack` for the arguments.

        Publishing the same again changes nothing and returns the release that is there.

        Args:
            source: a safetensors file, a shard index, a directory of either, or a release.
            name: name of the model; every release of a store has the same.
            version: version of the weights.
            details: whatever else the release is to say.
            is_linked: whether files may be linked instead of copied, where the file system can. They must never be
                written to again: a release whose file was is refused from then on.
            progress: told how far it is.

        Raises:
            StoreConflictError: the version is taken by something else (VERSION_REUSED), or the store holds another
                model (NAME_MISMATCH).
            StoreBusyError: another process holds the store's lock.
            StoreWriteError: it cannot be written.
            ArgumentError, ReleaseError, SourceError: as for `hotglm.pack`.
        """
        with ExitStack() as stack:
            draft = open_draft(source, stack=stack)
            stated = read_stated(draft, name=name, version=version, details=details or ReleaseDetails())
            verify_stated(stated, sequence=1)
            tmp = self.join("tmp")
            with writing(tmp):
                sweep_workspaces(tmp)
            with make_workspace(tmp) as workspace:
                filled = fill_directory(draft, workspace, mode=_MODE, is_linked=is_linked, progress=progress)
                with self.locked(), writing(self.path):
                    return self._publish_filled(workspace, filled, stated)

    def _publish_filled(self, workspace: str, filled: Filled, stated: Stated) -> StoredRelease:
        releases = self.find_releases()
        self._verify_name(stated.name, releases)
        manifest = stated.make_manifest(filled, sequence=self._next_sequence(releases))
        for one in releases:
            if one.version == stated.version:
                self._verify_same(one, manifest)
                # Whoever published it may have been killed, or failed, before it was sure to last (S1).
                flush_directory(self.join("releases"))
                return one
        share_files(workspace, filled.files, objects=self.join("objects"))
        write_file(os.path.join(workspace, MANIFEST_NAME), format_manifest(manifest), mode=_MODE)
        flush_tree(workspace, filled.files)
        name = release_name(manifest.sequence, stated.version)
        path = self.join("releases", name)
        seam.active.rename(workspace, path)
        flush_directory(self.join("releases"))
        return StoredRelease(sequence=manifest.sequence, version=stated.version, path=path)

    def _next_sequence(self, releases: list[StoredRelease]) -> int:
        """Return a number that no release of this store had, as far as anything remembers one (S2)."""
        known = [one.sequence for one in releases]
        known += [move.release.sequence for label in self.read_labels().values() for move in label.moves]
        known += [one.sequence for state in self.read_services().values() for one in state.find_ids()]
        return max(known, default=0) + 1

    def _verify_name(self, name: str, releases: list[StoredRelease]) -> None:
        for one in reversed(releases):
            found = _read_name(one)
            if found == name:
                return
            if found is not None:
                message = f"Expected model {shorten_repr(found)}, got {shorten_repr(name)}."
                raise StoreConflictError(
                    f"The store {shorten_repr(self.path)} holds another model.",
                    problems=[Problem(code="NAME_MISMATCH", message=message, file=self.path)],
                    remedy="publish it to a store of its own.",
                )

    def _verify_same(self, stored: StoredRelease, manifest: Manifest) -> None:
        with open_release(stored.path) as release:
            there = release.manifest
        same = replace(manifest, sequence=there.sequence, created_at=there.created_at, created_in=there.created_in)
        if same != there:
            changed = [name for name, entry in manifest.files.items() if there.files.get(name) != entry]
            what = f"other files ({', '.join(map(shorten_repr, changed[:3]))})" if changed else "another description"
            message = f"Expected a version that is free, got {stored.version}, which is taken; the new one has {what}."
            raise StoreConflictError(
                f"Version {stored.version} was published before, with other content.",
                problems=[Problem(code="VERSION_REUSED", message=message, file=stored.path)],
                remedy="publish under a new version; a version means the same bytes for ever.",
            )

    # -- labels --------------------------------------------------------------------------------------------------------

    def move_label(
        self,
        label: str,
        target: str | int | Version,
        *,
        expected: str | Version | EllipsisType | None = ...,
        progress: Callable[[Progress], object] | None = None,
    ) -> Label:
        """Let a label lead to a release, once every byte of that was verified.

        Args:
            label: its name: lower-case letters, digits, `-` and `_`.
            target: a label, version or sequence number of this store.
            expected: the version it must lead to now; None where there must be no such label. By default any.
            progress: told how far verifying is.

        Returns:
            The label as it is now.

        Raises:
            ArgumentError: `label` cannot be one.
            StoreConflictError: it leads somewhere else than expected (LABEL_MOVED).
            StoreError: there is no such release. StoreBusyError: another process holds the store's lock.
            StoreWriteError: it cannot be written; the label is as it was.
            SourceError: the release is not what its manifest says.
        """
        verify_word(label, what="label")
        self._verify_expected(label, self.read_label(label), expected)  # before all is read; and again under the lock
        with self.open_release(target) as release:  # open, so that it cannot be collected meanwhile
            release.verify(progress=progress)
            manifest = release.manifest
            wanted = ReleaseId(sequence=manifest.sequence, version=str(manifest.version), digest=release.digest)
            with self.locked():
                old = self.read_label(label)
                self._verify_expected(label, old, expected)
                if old is not None and old.release == wanted:
                    with writing(self.join("labels")):  # who moved it may have been killed before that (S3)
                        flush_directory(self.join("labels"))
                    return old
                moves = (LabelMove(release=wanted, moved_at=now_text()), *(() if old is None else old.moves))
                revision = 1 if old is None else old.revision + 1
                new = Label(name=label, revision=revision, moves=moves[:_MAX_MOVES])
                write_ledger(self.find_ledger("labels", label), new)
                return new

    def remove_label(self, label: str, *, expected: str | Version | EllipsisType = ...) -> None:
        """Remove a label, and what it remembers. One that is not there is fine, unless a version is expected.

        Raises:
            ArgumentError: `label` cannot be one.
            StoreConflictError: it leads somewhere else than expected (LABEL_MOVED).
            StoreError: it is damaged. SourceReadError: it cannot be read now.
            StoreBusyError: another process holds the store's lock. StoreWriteError: it cannot be removed.
        """
        path = self.find_ledger("labels", verify_word(label, what="label"))
        with self.locked():
            self._verify_expected(label, self.read_label(label), expected)
            with writing(path):
                with contextlib.suppress(FileNotFoundError):
                    seam.active.unlink(path)
                flush_directory(self.join("labels"))

    def _verify_expected(self, name: str, label: Label | None, expected: str | Version | EllipsisType | None) -> None:
        found = None if label is None else label.release.version
        if isinstance(expected, EllipsisType):
            return
        if (None if expected is None else str(Version(expected))) != found:
            message = f"Expected label {name!r} at {expected or 'no release'}, got {found or 'no such label'}."
            raise StoreConflictError(
                "Somebody else moved the label.",
                problems=[Problem(code="LABEL_MOVED", message=message, file=self.path)],
                remedy="look where it leads now, and decide again.",
            )

    # -- the rest ------------------------------------------------------------------------------------------------------

    def collect_garbage(self, *, keep_newest: int = 3, is_dry: bool = False) -> Collected:
        """Remove releases that nothing names and nobody has open, content that no release has, and debris.

        What stays: the newest releases, whatever a label leads to or led to, and what a service confirmed or tries.

        Args:
            keep_newest: how many of the newest releases stay; at least 1.
            is_dry: whether nothing is removed, and what would be if nobody had anything open is returned; debris is not
                looked for.

        Raises:
            ArgumentError: `keep_newest` is below 1.
            StoreError: a record is damaged; then nothing is removed. SourceReadError: nor where one cannot be read now.
            StoreBusyError: another process holds the store's lock. StoreWriteError: something cannot be removed.
        """
        return collect_garbage(self, keep_newest=keep_newest, is_dry=is_dry)

    def service(self, name: str) -> Service:
        """Return what the service `name` has on disk: its confirmed release, its trials, and what it must not try.

        Raises:
            ArgumentError: `name` cannot be one.
        """
        return Service(store=self, name=verify_word(name, what="service"))


def _read_name(stored: StoredRelease) -> str | None:
    """Return the model's name; None where the release is broken, but not where it only cannot be read now."""
    try:
        with open_release(stored.path) as release:
            return release.manifest.name
    except ReleaseError:
        return None
    except SourceReadError as error:
        if error.code == "NOT_FOUND":
            return None
        raise
