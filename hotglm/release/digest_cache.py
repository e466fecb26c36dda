"""Digests of files that were hashed before, so that what has not changed since is neither read nor hashed again (S13).

Rules this module keeps:

- It saves reading when something is published; it vouches for nothing. What is loaded is hashed where it is loaded, and
  a label moves only to what was read whole (D3, S4, P5): a wrong entry makes a release that is refused, never one that
  serves wrong bytes.
- A source is taken for unchanged if device, inode, size, time of the last write and of the last change of its status
  are those it had in front of its first and behind its last byte that was hashed; and if those times lay far enough
  back by then that a later write cannot have the same ones (a "racy" file, as version control calls it).
- A content of the store is taken for unchanged if it is read-only and of the size and time of the last write it was
  made with. Its change time moves with every release that links to it, and says nothing.
- An entry that is missing, damaged or of another file is as good as none. None is flushed: it carries a digest of its
  own, and what a power cut tears is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from hotglm import seam
from hotglm.errors import SourceError
from hotglm.release.objects import name_object
from hotglm.release.reading import close_quietly, read_document
from hotglm.release.writing import name_partial, write_all

__all__ = ["DigestCache", "FileStamp", "KnownFile", "find_stamp"]

_LEAST_NBYTES = 2**20
"""Smaller files are hashed again: that costs less than to look them up."""

_GRANULE_NS = 2 * 10**9
"""The coarsest clock of a file system that is in use (FAT)."""

_MAX_NBYTES = 64 * 2**20
_MODE = 0o644
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What tells that a file is still the one that was hashed: which one, its size, and when it was changed last."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp of what `fstat` or `lstat` reported."""
        return cls(
            dev=status.st_dev,
            ino=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )

    def is_written_as(self, other: FileStamp) -> bool:
        """Tell whether it is the same file, not written to since; its names may have changed."""
        mine, theirs = ((one.dev, one.ino, one.size, one.mtime_ns) for one in (self, other))
        return mine == theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A file whose digest is known.

    Attributes:
        stamp: the file when it was hashed.
        is_object: whether it is a content of the store, which nobody writes to.
        digest: as a manifest has it (D2).
        tensors: digests of its tensors by name; empty for what is no safetensors file.
    """

    stamp: FileStamp
    is_object: bool
    digest: str
    tensors: Mapping[str, str]


def find_stamp(
    before: os.stat_result, after: os.stat_result, *, began_ns: int, is_linked: bool = False
) -> FileStamp | None:
    """Return the stamp that a file which was hashed between two moments can be known by; None where it cannot.

    Args:
        before: its status in front of the first byte.
        after: its status behind the last one.
        began_ns: the time in front of the first byte.
        is_linked: whether the store itself gave it a further name just now, which alone moved its change time.
    """
    first, last = FileStamp.of(before), FileStamp.of(after)
    newest = first.mtime_ns if is_linked else max(first.mtime_ns, first.ctime_ns)
    return last if first == last and newest + _GRANULE_NS <= began_ns else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestCache:
    """What a store knows of files that were hashed. Whoever writes to it holds the store's lock.

    Attributes:
        path: directory of the entries, one a file; it may be missing.
        objects: directory of the contents that releases share.
        now_ns: the clock that file times are compared with.
    """

    path: str
    objects: str
    now_ns: Callable[[], int] = field(default=time.time_ns, repr=False)

    @property
    def least_nbytes(self) -> int:
        """Smaller files are not looked up."""
        return _LEAST_NBYTES

    def find(self, status: os.stat_result) -> KnownFile | None:
        """Return what is known of the file with this status; None where it is not known, or has changed."""
        if status.st_size < _LEAST_NBYTES:
            return None
        stamp = FileStamp.of(status)
        known = _read(self._find_entry(stamp))
        if known is None:
            return None
        if known.is_object:
            is_same = known.stamp.is_written_as(stamp) and not status.st_mode & 0o222
        else:
            is_same = known.stamp == stamp
        return known if is_same else None

    def find_object(self, digest: str) -> str | None:
        """Return the path of the content with this digest, if it is as the store made it."""
        path = os.path.join(self.objects, name_object(digest))
        return path if self.is_object(path, digest) else None

    def is_object(self, path: str, digest: str) -> bool:
        """Tell whether the file `path` is a content of the store with this digest, as the store made it."""
        try:
            known = self.find(seam.active.lstat(path))
        except OSError:
            return False
        return known is not None and known.is_object and known.digest == digest

    def remember(self, known: KnownFile) -> None:
        """Write an entry, in place of an earlier one of the same file.

        Raises:
            OSError: the system refused.
        """
        if known.stamp.size < _LEAST_NBYTES:
            return
        body = json.dumps(
            {
                "digest": known.digest,
                "is_object": known.is_object,
                "stamp": asdict(known.stamp),
                "tensors": dict(known.tensors),
            },
            separators=(",", ":"),
        ).encode()
        with contextlib.suppress(FileExistsError):
            seam.active.mkdir(self.path)
        partial = name_partial(self.path)
        fd = seam.active.create(partial, _MODE)
        try:
            write_all(fd, memoryview(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"))
        finally:
            close_quietly(fd)
        seam.active.rename(partial, self._find_entry(known.stamp))

    def forget(self, path: str) -> None:
        """Remove what is known of the file `path`, if anything is.

        Raises:
            OSError: the system refused.
        """
        with contextlib.suppress(FileNotFoundError):
            seam.active.unlink(self._find_entry(FileStamp.of(seam.active.lstat(path))))

    def forget_lost(self, find_linked: Callable[[], Iterable[os.stat_result]]) -> None:
        """Remove the entries that nothing can be linked by any more, and what is no entry.

        Args:
            find_linked: yields the status of every file of every release; asked only where there are entries of files
                that releases link to though they are no contents of the store.

        Raises:
            OSError: the system refused.
        """
        try:
            names = seam.active.listdir(self.path)
        except FileNotFoundError:
            return
        lost: dict[str, KnownFile | None] = {}
        for name in names:
            known = _read(os.path.join(self.path, name)) if name.endswith(_SUFFIX) else None
            if known is None or not os.path.lexists(os.path.join(self.objects, name_object(known.digest))):
                lost[name] = known
        has_sources = any(known is not None and not known.is_object for known in lost.values())
        linked = {(one.st_dev, one.st_ino) for one in find_linked()} if has_sources else set()
        for name, known in lost.items():
            if known is None or (known.stamp.dev, known.stamp.ino) not in linked:
                seam.active.unlink(os.path.join(self.path, name))

    def _find_entry(self, stamp: FileStamp) -> str:
        return os.path.join(self.path, f"{stamp.dev:x}-{stamp.ino:x}{_SUFFIX}")


def _read(path: str) -> KnownFile | None:
    try:
        text = read_document(path, limit=_MAX_NBYTES, error=SourceError, code="TOO_LARGE")
    except SourceError:
        return None
    body, _, rest = text.partition(b"\n")
    if rest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    try:
        values = json.loads(body)
        return KnownFile(
            stamp=FileStamp(**values["stamp"]),
            is_object=values["is_object"],
            digest=values["digest"],
            tensors=values["tensors"],
        )
    except (ValueError, KeyError, TypeError):  # of another version of hotglm
        return None
