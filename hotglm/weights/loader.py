"""Filling a spare: bytes of files, or tensors of a mapping, into views of an arena, hashed and proved as they arrive.

Rules this module keeps:

- The bytes that are hashed and searched for NaN are the ones in the arena, which are the ones that will run (P5).
- Nothing here maps a file: a read past a truncated end comes back short and becomes a typed error, never a signal.
- Every tensor is filled once. A second name of a tied tensor is compared, byte for byte, with the first.
- All tensors that fail are named in one error.
- dtypes are converted only where the caller said so, by `Tensor.copy_`, in the worker.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from hotglm.errors import TensorValueError
from hotglm.release.files import TensorLocation, WeightFiles
from hotglm.release.reading import read_scattered
from hotglm.weights.arena import Lease
from hotglm.weights.digest import format_digest
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.plan import CHUNK_NBYTES, Read, Transfer, plan_reads
from hotglm.weights.proof import (
    Loaded,
    LoadOptions,
    Target,
    describe_conflict,
    equals_view,
    find_first_names,
    prove_tensor,
    run_load,
)

__all__ = ["ReadingTurn", "count_nbytes", "load_files", "load_tensors", "make_turn", "read_bundle"]


ReadingTurn = contextlib.AbstractContextManager[object]
"""What a thread holds while it reads."""


def load_files(files: WeightFiles, targets: Mapping[str, Target], *, lease: Lease, options: LoadOptions) -> Loaded:
    """Read every tensor of `files` into its target.

    Args:
        files: open and parsed; stays open.
        targets: for every name in `files`, and shapes equal to theirs.
        lease: the memory that the targets are views of.
        options: how.

    Raises:
        SourceReadError: the system refused a read.
        SourceChangedError: the source became shorter, or its size or time of change moved.
        DigestMismatchError, TensorValueError, NonFiniteError: bytes that were read are not acceptable; all are named.
    """
    job = _FileJob(files, targets, lease=lease, options=options)
    run_load(job.plan_firsts(), options, nbytes=files.total_nbytes)
    run_load(job.plan_seconds(), options, nbytes=files.total_nbytes)
    files.verify_unchanged()
    job.loaded.raise_if_any(f"{files.path!r}")
    return job.loaded


def load_tensors(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, Target], *, options: LoadOptions) -> Loaded:
    """Copy every tensor of a mapping into its target.

    The caller must not write the tensors meanwhile; what was copied is what is hashed, and nothing aliases them after.

    Raises:
        DigestMismatchError, TensorValueError, NonFiniteError: as `load_files`.
    """
    loaded = Loaded()
    first_names = find_first_names(tensors, targets)

    def copy(name: str) -> None:
        target, tensor = targets[name], tensors[name].detach()
        if first_names[target.key] == name:
            target.view.copy_(tensor)
        _settle(name, target, tensor=tensor, is_first=first_names[target.key] == name, loaded=loaded, options=options)

    order = sorted(tensors, key=lambda name: first_names[targets[name].key] != name)
    firsts = [name for name in order if first_names[targets[name].key] == name]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    bundles = _bundle_names(firsts, tensors)
    run_load([functools.partial(_copy_all, bundle, copy, options) for bundle in bundles], options, nbytes=nbytes)
    run_load([functools.partial(copy, name) for name in order[len(firsts) :]], options, nbytes=nbytes)
    loaded.raise_if_any("the mapping")
    return loaded


def _copy_all(names: list[str], copy: Callable[[str], None], options: LoadOptions) -> None:
    for name in names:
        options.cancellation.raise_if_cancelled()
        copy(name)


def _bundle_names(names: list[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    bundle: list[str] = []
    nbytes = 0
    for name in names:
        bundle.append(name)
        nbytes += tensors[name].numel() * tensors[name].element_size()
        if nbytes >= CHUNK_NBYTES:
            yield bundle
            bundle, nbytes = [], 0
    if bundle:
        yield bundle


def _settle(
    name: str, target: Target, *, tensor: torch.Tensor, is_first: bool, loaded: Loaded, options: LoadOptions
) -> None:
    """Count, hash and prove one tensor that came as a tensor; where it is a second name, compare it with the first."""
    if tensor.dtype is not target.view.dtype:
        loaded.converted.append(name)
    if not is_first and not equals_view(target.view, tensor):
        loaded.problems.append((TensorValueError, describe_conflict(name, target)))
    prove_tensor(name, target, digest=None, loaded=loaded, options=options, source=tensor)
    loaded.add_nbytes(target.view.numel() * target.view.element_size() if is_first else 0)
    options.report(tensor.numel() * tensor.element_size())


class _FileJob:
    """One load from files: which tensors are read straight into the arena, and which by way of a buffer."""

    def __init__(
        self, files: WeightFiles, targets: Mapping[str, Target], *, lease: Lease, options: LoadOptions
    ) -> None:
        self.loaded = Loaded()
        self._files = files
        self._numbers = {id(file): number for number, file in enumerate(files.files)}
        self._targets = targets
        self._lease = lease
        self._options = options
        first_names = find_first_names(files.tensors, targets)
        self._firsts = {name for name in files.tensors if first_names[targets[name].key] == name}
        self._reading = make_turn(options)

    def plan_firsts(self) -> list[Callable[[], None]]:
        """Return the tasks that fill every target once; the largest first, so that the threads end together."""
        firsts = [name for name in self._files.tensors if name in self._firsts]
        direct = [name for name in firsts if self._is_direct(name)]
        bundles = sorted(plan_reads(map(self._transfer, direct)), key=count_nbytes, reverse=True)
        empty = [name for name in direct if not self._files.tensors[name].nbytes]
        return [
            *(functools.partial(self._read_bundle, bundle) for bundle in bundles),
            *(functools.partial(self._finish, name, None) for name in empty),
            *(functools.partial(self._read_buffered, name) for name in firsts if not self._is_direct(name)),
        ]

    def plan_seconds(self) -> list[Callable[[], None]]:
        """Return the tasks that compare further names of tied tensors with what the first names brought."""
        return [
            functools.partial(self._read_buffered, name) for name in self._files.tensors if name not in self._firsts
        ]

    def _is_direct(self, name: str) -> bool:
        view = self._targets[name].view
        return TORCH_DTYPES[self._files.tensors[name].entry.torch_dtype] is view.dtype and view.is_contiguous()

    def _transfer(self, name: str) -> Transfer:
        location = self._files.tensors[name]
        return Transfer(
            name=name,
            file=self._numbers[id(location.file)],
            file_offset=location.offset,
            arena_offset=self._targets[name].offset,
            nbytes=location.nbytes,
        )

    def _read_bundle(self, reads: tuple[Read, ...]) -> None:
        found = read_bundle(reads, self._files, lease=self._lease, turn=self._reading, options=self._options)
        for name, digest in found:
            self._finish(name, digest)

    def _finish(self, name: str, digest: str | None) -> None:
        nbytes = self._files.tensors[name].nbytes
        prove_tensor(name, self._targets[name], digest=digest, loaded=self.loaded, options=self._options)
        self.loaded.add_nbytes(nbytes)
        self._options.report(nbytes)

    def _read_buffered(self, name: str) -> None:
        location, target, is_first = self._files.tensors[name], self._targets[name], name in self._firsts
        tensor = self._read_tensor(location)
        if is_first:
            target.view.copy_(tensor)
        _settle(name, target, tensor=tensor, is_first=is_first, loaded=self.loaded, options=self._options)

    def _read_tensor(self, location: TensorLocation) -> torch.Tensor:
        dtype = TORCH_DTYPES[location.entry.torch_dtype]
        tensor = torch.empty(location.entry.shape, dtype=dtype)
        if location.nbytes:
            data = bytearray(location.nbytes)
            file = location.file
            read_scattered(file.fd, [memoryview(data)], location.offset, path=file.path, size=file.size)
            tensor = torch.frombuffer(data, dtype=dtype).view(location.entry.shape)
        return tensor


def count_nbytes(bundle: tuple[Read, ...]) -> int:
    """Return the bytes that a task of reads brings."""
    return sum(read.nbytes for read in bundle)


def read_bundle(
    reads: tuple[Read, ...], files: WeightFiles, *, lease: Lease, turn: ReadingTurn, options: LoadOptions
) -> Iterator[tuple[str, str | None]]:
    """Read one task into the arena; yield each name that is complete, with its digest where that is known already."""
    wants_digest = options.digest or bool(options.expected)
    running = hashlib.sha256() if len(reads) > 1 and wants_digest else None
    for read in reads:
        options.cancellation.raise_if_cancelled()
        views = [lease.bytes(piece.arena_offset, piece.nbytes) for piece in read.pieces]
        file = files.files[read.file]
        with turn:
            read_scattered(file.fd, views, read.file_offset, path=file.path, size=file.size)
        if running is not None:
            running.update(views[0])
        for name in read.completes:
            yield name, format_digest(running.hexdigest()) if running is not None else None
        if not read.completes:
            options.report(0)


def make_turn(options: LoadOptions) -> ReadingTurn:
    """Return what a thread holds while it reads.

    Where bytes are hashed as well, threads take turns at reading: one of them fills the memory bus, or the disk, and
    the others have hashing to do, which needs neither. Without turns they read at the same time and hash at the same
    time (measured on two cores: 27 % over hashing alone instead of 13 %; a cold GiB 1.3 s, not 0.9 s).
    """
    return threading.Lock() if options.digest or options.expected else contextlib.nullcontext()
