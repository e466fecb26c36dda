"""A delta becomes the full release that it leads to: the author's own files, byte for byte.

Rules this module keeps:

- Every tensor is verified by digest before it is written, every header by the digest of its file (X4, X7, C03).
- The manifest is the one that the result digest names, so full form and delta are one release (D5, R9).
- Each tensor is made once, on all cores, a few in memory for each; the release appears whole or not at all (R2, C15).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from hotglm import seam
from hotglm.delta_plan import MAX_CHAIN
from hotglm.deltas.ordered import run_ordered
from hotglm.deltas.reading import ResultReader, open_result
from hotglm.errors import DigestMismatchError, Problem, shorten_repr
from hotglm.header import PREFIX_NBYTES, parse_header
from hotglm.manifest import format_manifest
from hotglm.progress import Progress
from hotglm.release.directory import Release, open_release
from hotglm.release.hashing import HashMeter
from hotglm.release.placing import find_destination, place_release, write_manifest
from hotglm.release.reading import close_quietly
from hotglm.release.side_files import copy_side_files
from hotglm.release.writing import make_directories, write_all, writing
from hotglm.weights.digest import view_buffer

__all__ = ["materialize"]

_MODE = 0o644


def materialize(
    release: str | os.PathLike[str] | Release,
    destination: str | os.PathLike[str],
    *,
    max_chain: int = MAX_CHAIN,
    progress: Callable[[Progress], object] | None = None,
) -> Release:
    """Make the full release that a delta leads to, and open it. A full release is copied.

    Its files and its manifest are those of the release that the delta was made of, byte for byte. On an error nothing
    is left at the destination.

    Args:
        release: a delta, with the releases that it builds on beside it.
        destination: a directory that does not exist yet.
        max_chain: how many deltas may lead to it.
        progress: told about every tensor, one at a time; what it raises ends the making.

    Returns:
        The open full release; the caller closes it.

    Raises:
        ArgumentError: an argument that cannot be meant, or a dtype that this torch lacks.
        StoreConflictError: something is at the destination already.
        StoreWriteError: it cannot be written.
        DeltaChainError: a base is not there (CHAIN_BASE_MISSING), or the chain is broken or too long.
        WrongBaseError: what stands there as a base is something else.
        DeltaError: a payload cannot be applied.
        DigestMismatchError: with every tensor and file that is not what is promised.
        MissingExtraError: it needs the extra `delta`.
        SourceError: something is not what it says, or cannot be read.
        ThreadStartError: no thread could be started.
    """
    path = find_destination(destination)
    with ExitStack() as stack:
        reader = open_result(release, stack=stack, max_length=max_chain)
        manifest = reader.manifest
        sides = {one: reader.release.find_path(one) for one in manifest.files if one not in reader.paths}
        meter = HashMeter("materialize", sum(one.nbytes for one in manifest.tensors.values()), progress)
        with place_release(path) as workspace:
            copy_side_files(sides, workspace, mode=_MODE, promised=manifest.files)
            problems = [problem for one in reader.paths for problem in _write_file(reader, one, workspace, meter=meter)]
            _raise_problems(reader.release, problems)
            reader.verify_unchanged()
            write_manifest(workspace, format_manifest(manifest), manifest.files, mode=_MODE)
    return open_release(path)


def _write_file(reader: ResultReader, path: str, workspace: str, *, meter: HashMeter) -> list[Problem]:
    """Write one safetensors file of the result, flushed; return in which tensors it is not what is promised."""
    head, size = reader.read_head(path), reader.manifest.files[path].size
    entries = parse_header(head[PREFIX_NBYTES:], file_size=size, file=path).tensors
    target = os.path.join(workspace, *path.split("/"))
    with writing(target):
        make_directories(os.path.dirname(target), within=workspace)
        fd = seam.active.create(target, _MODE)

    def work(name: str) -> list[Problem]:
        try:
            flat = reader.read_tensor(name)
        except DigestMismatchError as error:
            return list(error.problems)
        if flat.numel():
            with writing(target):
                write_all(fd, view_buffer(flat), offset=len(head) + entries[name].start)
        meter.add(flat.numel())
        return []

    try:
        with writing(target):
            write_all(fd, memoryview(head))
        problems = [one for found in run_ordered(work, list(entries), nbytes=size) for one in found]
        with writing(target):
            seam.active.fsync(fd)
        return problems
    finally:
        close_quietly(fd)


def _raise_problems(release: Release, problems: list[Problem]) -> None:
    if problems:
        raise DigestMismatchError(
            f"The release {shorten_repr(release.path)} gives other bytes than promised.",
            problems=problems,
            remedy="fetch it and what it builds on again; it was damaged.",
        )
