"""The files of a release, hashed and put where they belong: copied, linked, or left where they are.

Rules this module keeps:

- A copy holds the bytes that were hashed; a link and a file that stays are hashed by the name they will have.
- Everything is flushed before this returns, so that a manifest that is written after it promises only what is on disk.
- At most `_BATCH` copies are open at once.
- A file whose digest is known and that is as it was then is neither read nor hashed: it is linked (S13).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hotglm import seam
from hotglm.document import Report
from hotglm.errors import DigestMismatchError, Problem, ReleaseError, shorten_repr
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import ReleasedTensor
from hotglm.progress import Progress
from hotglm.release.digest_cache import DigestCache, FileStamp, KnownFile, find_stamp
from hotglm.release.directory import cut_side_file, cut_weight_file
from hotglm.release.drafts import Draft
from hotglm.release.files import WeightFile
from hotglm.release.hashing import FilePieces, HashMeter, hash_pieces
from hotglm.release.known_files import link_known, link_source
from hotglm.release.reading import close_quietly, open_regular, read_status, verify_identity
from hotglm.release.writing import flush_directory, flush_file, make_directories, writing

__all__ = ["Filled", "fill_directory", "flush_tree", "hash_in_place", "verify_promised"]

_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What stands in the directory of a release, as its manifest will say.

    Attributes:
        files: every file by path.
        tensors: every tensor by name.
        stamps: by path, what sources that were hashed now can be known by, where they can.
    """

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, ReleasedTensor]
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)

    def find_known(self) -> Iterator[KnownFile]:
        """Yield what was learnt about the sources."""
        for name, stamp in self.stamps.items():
            digests = {tensor: one.digest for tensor, one in self.tensors.items() if one.file == name}
            yield KnownFile(stamp=stamp, is_object=False, digest=self.files[name].digest, tensors=digests)


def fill_directory(
    draft: Draft,
    directory: str,
    *,
    mode: int,
    is_linked: bool = False,
    cache: DigestCache | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Filled:
    """Copy the files of a draft into an empty directory, or link them, hash and flush them.

    Args:
        draft: what is going to be the release.
        directory: where to; it must exist.
        mode: permissions of the copies.
        is_linked: whether a further name of the same file will do, where the file system can give one.
        cache: what is known of files; what it knows is linked, and neither read nor hashed.
        progress: told how far it is.

    Raises:
        DigestMismatchError: the source says other digests than its bytes have.
        SourceChangedError: the source was written to meanwhile.
        SourceReadError: it cannot be read. StoreWriteError: a copy cannot be written.
    """

    def place(name: str, file: WeightFile | None, stack: ExitStack) -> FilePieces | KnownFile:
        source, target = draft.sources[name], os.path.join(directory, *name.split("/"))
        with writing(target):
            make_directories(os.path.dirname(target), within=directory)
            if cache is not None:
                known = link_known(source, target, file=file, cache=cache, is_linked=is_linked)
                if known is not None:
                    return known
            if is_linked and link_source(source, target):
                return _cut(name, target, file=_reopen(file, target, stack=stack), stack=stack)
            fd = seam.active.create(target, mode)
        stack.callback(close_quietly, fd)
        return replace(_cut(name, source, file=file, stack=stack), copy_path=target, copy_fd=fd)

    filled = _hash_all(draft, place, part="copy", cache=cache, progress=progress)
    with writing(directory):
        flush_tree(directory, filled.files)
    return filled


def hash_in_place(draft: Draft, *, progress: Callable[[Progress], object] | None = None) -> Filled:
    """Hash the files of a draft where they are, and flush them.

    Raises:
        ReleaseError: some are no regular files; all are named.
        DigestMismatchError: the source says other digests than its bytes have.
        SourceChangedError: it was written to meanwhile. SourceReadError: it cannot be read.
        StoreWriteError: it cannot be flushed.
    """
    report = Report(
        ReleaseError,
        headline=f"{shorten_repr(draft.path)} cannot become a release in place",
        remedy="pack it to another directory: what links lead to is copied there.",
        prefix="RELEASE",
        file=draft.path,
    )
    for name, path in draft.sources.items():
        if not stat.S_ISREG(read_status(path).st_mode):
            report.add("NOT_REGULAR", f"Expected {shorten_repr(name)} to be a regular file, got a link.", found=name)
    report.raise_if_any()

    def place(name: str, file: WeightFile | None, stack: ExitStack) -> FilePieces | KnownFile:
        return _cut(name, draft.sources[name], file=file, stack=stack)

    filled = _hash_all(draft, place, part="hash", cache=None, progress=progress)
    for path in draft.sources.values():
        with writing(path):
            flush_file(path)
    return filled


def flush_tree(directory: str, names: Iterable[str]) -> None:
    """Flush the directories that hold the files `names`, innermost first, and `directory` itself.

    Raises:
        OSError: the system refused.
    """
    parents = {name[:at] for name in names for at, character in enumerate(name) if character == "/"}
    for parent in sorted(parents, key=lambda parent: -parent.count("/")):
        flush_directory(os.path.join(directory, *parent.split("/")))
    flush_directory(directory)


def _hash_all(
    draft: Draft,
    place: Callable[[str, WeightFile | None, ExitStack], FilePieces | KnownFile],
    *,
    part: str,
    cache: DigestCache | None,
    progress: Callable[[Progress], object] | None,
) -> Filled:
    weights = {} if draft.files is None else {os.path.relpath(one.path, draft.root): one for one in draft.files.files}
    total = sum(os.stat(path).st_size for path in draft.sources.values()) if progress is not None else 0
    meter = HashMeter(part, total, progress)
    digests: dict[str, str] = {}
    tensors: dict[str, str] = {}
    sizes: dict[str, int] = {}
    stamps: dict[str, FileStamp] = {}
    for names in _batched(list(draft.sources)):
        with ExitStack() as stack:
            placed = {name: place(name, weights.get(name), stack) for name in names}
            cut = [one for one in placed.values() if isinstance(one, FilePieces)]
            known = {name: one for name, one in placed.items() if isinstance(one, KnownFile)}
            watched = None if cache is None else _Watched(cut, cache=cache)
            of_files, of_tensors = hash_pieces(cut, meter=meter)
            for one in cut:
                verify_identity(one.fd, identity=one.identity, path=draft.sources[one.path])
                if one.copy_fd is not None:
                    with writing(one.copy_path or ""):
                        seam.active.fsync(one.copy_fd)
                sizes[one.path] = one.identity.size
            if watched is not None:
                stamps |= watched.find_stamps()
        for name, found in known.items():
            meter.add(found.stamp.size)
            sizes[name] = found.stamp.size
            of_files[name] = found.digest
            of_tensors |= found.tensors
            if not found.is_object:
                stamps[name] = found.stamp
        digests |= of_files
        tensors |= of_tensors
    filled = Filled(
        files={name: FileEntry(size=sizes[name], digest=digest) for name, digest in digests.items()},
        tensors={
            tensor: ReleasedTensor(file=name, dtype=entry.torch_dtype, shape=tuple(entry.shape), digest=tensors[tensor])
            for name, file in weights.items()
            for tensor, entry in file.header.tensors.items()
        },
        stamps=stamps,
    )
    verify_promised(draft, filled)
    return filled


class _Watched:
    """The status of open files in front of the first byte that is hashed, to be compared behind the last one."""

    def __init__(self, cut: Sequence[FilePieces], *, cache: DigestCache) -> None:
        large = [one for one in cut if one.identity.size >= cache.least_nbytes]
        self._before = [(one, status) for one in large if (status := _find_status(one.fd)) is not None]
        self._began_ns = cache.now_ns()

    def find_stamps(self) -> Iterator[tuple[str, FileStamp]]:
        for one, before in self._before:
            after = _find_status(one.fd)
            is_linked = one.copy_fd is None  # what is hashed and not copied was linked just now
            if after is not None:
                stamp = find_stamp(before, after, began_ns=self._began_ns, is_linked=is_linked)
                if stamp is not None:
                    yield one.path, stamp


def _find_status(fd: int) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # then nothing is remembered of it
        return seam.active.fstat(fd)
    return None


def _batched(names: Sequence[str]) -> Iterator[Sequence[str]]:
    rest = iter(names)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch


def _cut(name: str, path: str, *, file: WeightFile | None, stack: ExitStack) -> FilePieces:
    return cut_side_file(path, name=name, stack=stack) if file is None else cut_weight_file(file, name=name)


def _reopen(file: WeightFile | None, target: str, *, stack: ExitStack) -> WeightFile | None:
    """Return the weights under their new name, which must be the file whose header was read."""
    if file is None:
        return None
    fd, _ = open_regular(target)
    stack.callback(close_quietly, fd)
    verify_identity(fd, identity=file.identity, path=file.path)
    return replace(file, fd=fd)


def verify_promised(draft: Draft, filled: Filled) -> None:
    """Refuse a source whose own digests, in its manifest or its metadata, are not those of its bytes.

    Raises:
        DigestMismatchError: with everything that differs.
    """
    problems: list[Problem] = []
    if draft.manifest is not None:
        for name, entry in draft.manifest.files.items():
            found = filled.files[name].digest
            if found != entry.digest:
                problems.append(_mismatch(entry.digest, found, file=draft.sources[name]))
    for tensor, expected in draft.read_metadata("hotglm.digests", {}).items():
        found = filled.tensors[tensor].digest if tensor in filled.tensors else "no such tensor"
        if found != expected:
            problems.append(_mismatch(expected, found, tensor=tensor))
    if problems:
        raise DigestMismatchError(
            f"The source {shorten_repr(draft.path)} is not what it says itself.",
            problems=problems,
            remedy="fetch or write it again; it was damaged.",
        )


def _mismatch(expected: str, found: str, *, file: str | None = None, tensor: str | None = None) -> Problem:
    message = f"Expected digest {expected}, got {found}."
    return Problem(code="DIGEST_MISMATCH", message=message, file=file, tensor=tensor, expected=expected, found=found)
