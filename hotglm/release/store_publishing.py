"""A directory that was filled becomes a release of a store: numbered, compared with what is there, and renamed.

Rules this module keeps (the clauses are those of docs/release-format.md):

- A release appears by one rename, whole and flushed; two with one version never stand in a store, in whatever form:
  one version means the same bytes for ever (S1, S2, S14, D18).
- The store's lock is held for a few small calls: never while weights are read, hashed or copied (S5).
- Files of equal content are one file with several names (S6). Nothing here ever writes into a file that is there.
- A process that is killed leaves debris in `tmp`, which nobody reads and the next publisher cleans away (S9).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from hotglm import seam
from hotglm.errors import Problem, ReleaseError, SourceReadError, StoreConflictError, shorten_repr
from hotglm.file_entry import FileEntry
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import Manifest
from hotglm.release.digest_cache import FileStamp, KnownFile
from hotglm.release.directory import open_release
from hotglm.release.objects import share_files
from hotglm.release.placing import write_manifest
from hotglm.release.store_reading import StoredRelease, StoreReader, release_name
from hotglm.release.workspace import make_workspace, sweep_workspaces
from hotglm.release.writing import flush_directory, writing

__all__ = ["STORED_MODE", "make_store_workspace", "publish_workspace"]

STORED_MODE = 0o444
"""Permissions of the files of a store: nobody writes to them again."""


@contextlib.contextmanager
def make_store_workspace(store: StoreReader) -> Iterator[str]:
    """Make an empty directory to fill for `publish_workspace`; what killed publishers left is removed first.

    Raises:
        StoreWriteError: it cannot be made.
    """
    tmp = store.join("tmp")
    with writing(tmp):
        sweep_workspaces(tmp)
    with make_workspace(tmp) as workspace:
        yield workspace


def publish_workspace(
    store: StoreReader,
    workspace: str,
    files: Mapping[str, FileEntry],
    make: Callable[[int], Manifest],
    *,
    learnt: Iterable[KnownFile] = (),
    sign: Callable[[bytes], bytes] | None = None,
) -> StoredRelease:
    """Let a filled workspace become the next release of a store, unless what it leads to is there already.

    Args:
        store: the store.
        workspace: one of `make_store_workspace`, with all files in it, flushed, and no manifest.
        files: what is in it.
        make: returns the manifest for a sequence number.
        learnt: what is known now of the sources that were hashed; it is remembered.
        sign: returns the envelope for the bytes of a manifest; None where it is not to be signed.

    Returns:
        The release that is there now: this one, or one of the same version and the same result.

    Raises:
        StoreConflictError: the version is taken by something else (VERSION_REUSED), or the store holds another model
            (NAME_MISMATCH).
        StoreBusyError: another process holds the store's lock. StoreWriteError: it cannot be written.
        ReleaseError: what it says breaks the format.
    """
    with store.locked(), writing(store.path):
        _remember(store, learnt)
        releases = store.find_releases()
        manifest = make(_next_sequence(store, releases))
        _verify_name(store, manifest.name, releases)
        for one in releases:
            if one.version == manifest.version:
                _verify_same(one, manifest)
                # Whoever published it may have been killed, or failed, before it was sure to last (S1).
                flush_directory(store.join("releases"))
                return one
        shared = share_files(workspace, files, objects=store.join("objects"), is_sound=_find_judge(store))
        _remember(store, _find_contents(workspace, shared, manifest))
        write_manifest(workspace, format_manifest(manifest), files, mode=STORED_MODE, sign=sign)
        path = store.join("releases", release_name(manifest.sequence, manifest.version))
        seam.active.rename(workspace, path)
        flush_directory(store.join("releases"))
        return StoredRelease(sequence=manifest.sequence, version=manifest.version, path=path)


def _remember(store: StoreReader, files: Iterable[KnownFile]) -> None:
    """Note what is known of files. That it cannot be noted costs time, later, and is no failure now."""
    with contextlib.suppress(OSError):
        for one in files:
            store.digests.remember(one)


def _find_contents(workspace: str, names: Iterable[str], manifest: Manifest) -> Iterator[KnownFile]:
    """Yield what is known of files that have just become contents of the store: the store made them itself."""
    payload = None if manifest.delta is None else manifest.delta.payload
    for name in names:
        if name == payload:
            continue  # its tensors have no digests of their own, so nothing but a delta can be made of it
        status = seam.active.lstat(os.path.join(workspace, *name.split("/")))
        digests = {tensor: one.digest for tensor, one in manifest.tensors.items() if one.file == name}
        entry = manifest.files[name]
        yield KnownFile(stamp=FileStamp.of(status), is_object=True, digest=entry.digest, tensors=digests)


def _find_judge(store: StoreReader) -> Callable[[str, FileEntry], bool]:
    """Return what tells whether a content is one to share: one large enough to be known is as the store made it."""
    digests = store.digests
    return lambda path, entry: entry.size < digests.least_nbytes or digests.is_object(path, entry.digest)


def _next_sequence(store: StoreReader, releases: list[StoredRelease]) -> int:
    """Return a number that no release of this store had, as far as anything remembers one (S2)."""
    known = [one.sequence for one in releases]
    known += [move.release.sequence for label in store.read_labels().values() for move in label.moves]
    known += [one.sequence for state in store.read_services().values() for one in state.find_ids()]
    return max(known, default=0) + 1


def _verify_name(store: StoreReader, name: str, releases: list[StoredRelease]) -> None:
    for one in reversed(releases):
        found = _read_name(one)
        if found == name:
            return
        if found is not None:
            message = f"Expected model {shorten_repr(found)}, got {shorten_repr(name)}."
            raise StoreConflictError(
                f"The store {shorten_repr(store.path)} holds another model.",
                problems=[Problem(code="NAME_MISMATCH", message=message, file=store.path)],
                remedy="publish it to a store of its own.",
            )


def _verify_same(stored: StoredRelease, manifest: Manifest) -> None:
    """Refuse another result under a version that is there; a delta and a full release of one result are the same."""
    with open_release(stored.path) as release:
        there = release.manifest.result
    new = manifest.result
    same = replace(new, sequence=there.sequence, created_at=there.created_at, created_in=there.created_in)
    if same != there:
        changed = [name for name, entry in new.files.items() if there.files.get(name) != entry]
        what = f"other files ({', '.join(map(shorten_repr, changed[:3]))})" if changed else "another description"
        message = f"Expected a version that is free, got {stored.version}, which is taken; the new one has {what}."
        raise StoreConflictError(
            f"Version {stored.version} was published before, with other content.",
            problems=[Problem(code="VERSION_REUSED", message=message, file=stored.path)],
            remedy="publish under a new version; a version means the same bytes for ever.",
        )


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
