"""Files that move with weights and are no weights: copied, hashed in the same go, and flushed.

Rules this module keeps: the bytes that are hashed are the bytes that are written; a few files are open at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from hotglm import seam
from hotglm.errors import DigestMismatchError, Problem
from hotglm.file_entry import FileEntry
from hotglm.release.directory import cut_side_file
from hotglm.release.filling import flush_tree
from hotglm.release.hashing import FilePieces, HashMeter, hash_pieces
from hotglm.release.reading import close_quietly, verify_identity
from hotglm.release.writing import make_directories, writing

__all__ = ["copy_side_files"]

_BATCH = 64


def copy_side_files(
    sources: Mapping[str, str], directory: str, *, mode: int, promised: Mapping[str, FileEntry] | None = None
) -> dict[str, FileEntry]:
    """Copy files into a directory that nobody else looks at yet, and return what they are.

    Args:
        sources: path in the directory -> path on disk.
        directory: where to; it must exist.
        mode: permissions of the copies.
        promised: what some of them must be.

    Raises:
        DigestMismatchError: with every file that has other bytes than promised.
        SourceReadError: one cannot be read. SourceChangedError: one was written to meanwhile.
        StoreWriteError: a copy cannot be written.
    """
    entries: dict[str, FileEntry] = {}
    names = sorted(sources)
    for start in range(0, len(names), _BATCH):
        with ExitStack() as stack:
            cut = [
                _open(name, sources[name], directory, mode=mode, stack=stack) for name in names[start : start + _BATCH]
            ]
            digests, _ = hash_pieces(cut, meter=HashMeter("copy", 0, None))
            for one in cut:
                verify_identity(one.fd, identity=one.identity, path=sources[one.path])
                with writing(one.copy_path or ""):
                    seam.active.fsync(one.copy_fd or 0)
                entries[one.path] = FileEntry(size=one.identity.size, digest=digests[one.path])
    with writing(directory):
        flush_tree(directory, entries)
    _verify(entries, promised or {}, sources)
    return entries


def _open(name: str, source: str, directory: str, *, mode: int, stack: ExitStack) -> FilePieces:
    target = os.path.join(directory, *name.split("/"))
    cut = cut_side_file(source, name=name, stack=stack)
    with writing(target):
        make_directories(os.path.dirname(target), within=directory)
        fd = seam.active.create(target, mode)
    stack.callback(close_quietly, fd)
    return replace(cut, copy_path=target, copy_fd=fd)


def _verify(entries: Mapping[str, FileEntry], promised: Mapping[str, FileEntry], sources: Mapping[str, str]) -> None:
    problems = [
        Problem(
            code="DIGEST_MISMATCH",
            message=f"Expected digest {promised[name].digest}, got {entry.digest}.",
            file=sources[name],
            expected=promised[name].digest,
            found=entry.digest,
        )
        for name, entry in entries.items()
        if name in promised and promised[name] != entry
    ]
    if problems:
        raise DigestMismatchError(
            "Files are not what their release says.", problems=problems, remedy="fetch the release again."
        )
