"""Files that need not be read when a release is made, because the store knows their digest: they are linked (S13).

Rules this module keeps:

- A content of the store is linked under the name it will have and looked at under that name, so that what was looked
  at is what the release gets; where it is not what it was, the link goes and the source is read.
- The header of weights is read all the same: its digest and those that are known of the tensors must combine to the one
  that is known of the file.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from hotglm import seam
from hotglm.file_entry import combine_pieces
from hotglm.release.digest_cache import DigestCache, FileStamp, KnownFile
from hotglm.release.files import WeightFile
from hotglm.release.writing import flush_file

__all__ = ["link_known", "link_source"]

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP)


def link_known(
    source: str, target: str, *, file: WeightFile | None, cache: DigestCache, is_linked: bool
) -> KnownFile | None:
    """Give what the file `source` holds the name `target` without reading it; None where it has to be read.

    Args:
        source: path of the source.
        target: path in the release that is being made; nothing is there.
        file: the source, where it is open as weights.
        cache: what the store knows.
        is_linked: whether the source itself may be linked.

    Raises:
        OSError: the system refused.
    """
    # Not through a link: the caches that are made of them hold weights, which are open.
    known = cache.find(seam.active.lstat(source) if file is None else seam.active.fstat(file.fd))
    if known is None or not _fits(known, file):
        return None
    shared = cache.find_object(known.digest)
    if shared is not None and _link_object(shared, target, digest=known.digest, cache=cache):
        return known
    return _link_known_source(source, target, known) if is_linked and not known.is_object else None


def link_source(source: str, target: str) -> bool:
    """Give a source a further name, flushed; tell whether the file system could.

    Raises:
        OSError: the system refused.
    """
    try:
        seam.active.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    flush_file(target)
    return True


def _fits(known: KnownFile, file: WeightFile | None) -> bool:
    """Tell whether what is known of weights is what the header of the source says."""
    if file is None:
        return not known.tensors
    if file.header.tensors.keys() != known.tensors.keys():
        return False
    inside = (known.tensors[name].removeprefix("sha256:") for name in file.header.tensors)
    return combine_pieces([file.header_sha256, *inside]) == known.digest


def _link_object(shared: str, target: str, *, digest: str, cache: DigestCache) -> bool:
    try:
        seam.active.link(shared, target)
    except OSError as error:
        if error.errno in (*_CANNOT_LINK, errno.ENOENT):  # no more names for it, or collected just now
            return False
        raise
    if cache.is_object(target, digest):
        return True
    seam.active.unlink(target)
    return False


def _link_known_source(source: str, target: str, known: KnownFile) -> KnownFile | None:
    if not link_source(source, target):
        return None
    stamp = FileStamp.of(seam.active.lstat(target))
    if known.stamp.is_written_as(stamp):
        return replace(known, stamp=stamp)  # the link itself moved its change time
    seam.active.unlink(target)
    return None
