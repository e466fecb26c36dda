"""A store: a directory of releases of one model, with labels that lead to some of them.

Rules this module keeps (the clauses are those of docs/release-format.md):

- What changes a store holds its lock, for a few small calls: never while weights are read, hashed or copied (S5).
- A label moves only to a release whose every byte was verified, and only from where the caller says it stood (S4).
- Publishing is that of `store_publishing`, collection that of `collecting`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING

from hotglm import seam
from hotglm.errors import DigestMismatchError, HotglmError, Problem, StoreConflictError
from hotglm.progress import Progress
from hotglm.release.chains import verify_chain
from hotglm.release.collecting import Collected, collect_garbage
from hotglm.release.drafts import open_draft
from hotglm.release.filling import fill_directory
from hotglm.release.ledger import (
    Label,
    LabelMove,
    ReleaseId,
    now_text,
    verify_word,
    write_ledger,
)
from hotglm.release.packing import ReleaseDetails, read_stated, verify_stated
from hotglm.release.services import Service
from hotglm.release.store_publishing import STORED_MODE, make_store_workspace, publish_workspace
from hotglm.release.store_reading import StoredRelease, StoreReader
from hotglm.release.writing import flush_directory, writing
from hotglm.version import Version

if TYPE_CHECKING:
    from hotglm.trust.policy import Trust

__all__ = ["Store"]

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
            source: a safetensors file, a shard index, a directory of either, or a release, whose signatures do not come
                along: this store gives it a number of its own.
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
            details = details or ReleaseDetails()
            stated = read_stated(draft, name=name, version=version, details=details)
            verify_stated(stated, sequence=1)
            with make_store_workspace(self) as workspace:
                filled = fill_directory(
                    draft, workspace, mode=STORED_MODE, is_linked=is_linked, cache=self.digests, progress=progress
                )
                return publish_workspace(
                    self,
                    workspace,
                    filled.files,
                    lambda sequence: stated.make_manifest(filled, sequence=sequence),
                    learnt=filled.find_known(),
                    sign=details.sign,
                )

    # -- labels --------------------------------------------------------------------------------------------------------

    def move_label(
        self,
        label: str,
        target: str | int | Version,
        *,
        expected: str | Version | EllipsisType | None = ...,
        trust: Trust | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Label:
        """Let a label lead to a release, once every byte of that, and of what it builds on, was verified.

        Args:
            label: its name: lower-case letters, digits, `-` and `_`.
            target: a label, version or sequence number of this store.
            expected: the version it must lead to now; None where there must be no such label. By default any.
            trust: what must accept the release first; nothing is remembered for that, as nothing goes live by it.
            progress: told how far verifying is.

        Returns:
            The label as it is now.

        Raises:
            ArgumentError: `label` cannot be one.
            StoreConflictError: it leads somewhere else than expected (LABEL_MOVED).
            StoreError: there is no such release. StoreBusyError: another process holds the store's lock.
            StoreWriteError: it cannot be written; the label is as it was.
            SourceError: the release is not what its manifest says.
            TrustError: `trust` refuses it; `SignatureError`, `ReplayedError`, `ExpiredError` say why.
            MissingExtraError: `cryptography` is not installed.
        """
        verify_word(label, what="label")
        self._verify_expected(label, self.read_label(label), expected)  # before all is read; and again under the lock
        with self.open_release(target) as release:  # open, so that it cannot be collected meanwhile
            if trust is not None:
                trust.verify(release)
            try:
                verify_chain(release, progress=progress)
            except DigestMismatchError as error:
                self._forget_digests(error)
                raise
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

    def _forget_digests(self, error: DigestMismatchError) -> None:
        """Know no digest any more of files that have another one: what is sound takes their place when it is published.

        Otherwise every release of the same content would be given the content that has rotted (S13).
        """
        with contextlib.suppress(HotglmError, OSError), self.locked():
            for problem in error.problems:
                if problem.file is not None:
                    self.digests.forget(problem.file)

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
