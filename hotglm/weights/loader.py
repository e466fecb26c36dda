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
from dataclasses import dataclass, field

import torch

from hotglm.errors import (
    DigestMismatchError,
    NonFiniteError,
    Problem,
    SourceError,
    TensorValueError,
    shorten_repr,
)
from hotglm.release.files import TensorLocation, WeightFiles
from hotglm.release.reading import read_scattered
from hotglm.weights.arena import Lease
from hotglm.weights.digest import digest_tensor, format_digest, tensor_bytes
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.finite import find_nonfinite
from hotglm.weights.plan import CHUNK_NBYTES, Read, Transfer, plan_reads
from hotglm.weights.workers import Cancellation, run_tasks

__all__ = ["LoadOptions", "Loaded", "Target", "load_files", "load_tensors"]


_SMALL_NBYTES = 1 << 20
"""Loads below this size, in bytes, run in the staging thread itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one name's tensor goes.

    Attributes:
        view: the tensor in the arena.
        offset: byte offset of its first element in the arena.
        key: the same for all names of tensors that are tied or overlap: one of them fills, the others are compared.
        covers: whether the view has every byte of those.
    """

    view: torch.Tensor
    offset: int
    key: str
    covers: bool = True


def _ignore(nbytes: int) -> None:
    """Take a count of bytes that nobody asked for."""
    del nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load.

    Attributes:
        digest: hash every tensor.
        finite: refuse NaN and infinity.
        expected: digests that the tensors must have, by name; implies hashing of those.
        num_threads: threads that read and hash, 1 or more.
        nice: how much the extra threads lower their priority.
        cancellation: stops the load at its next chunk.
        report: called with a number of bytes whenever that many more are done; from any worker thread.
    """

    digest: bool = True
    finite: bool = True
    expected: Mapping[str, str] = field(default_factory=dict)
    num_threads: int = 1
    nice: int = 0
    cancellation: Cancellation = field(default_factory=Cancellation)
    report: Callable[[int], object] = _ignore


@dataclass(slots=True, kw_only=True)
class Loaded:
    """What was loaded: digests by name, bytes, and the names whose dtype was converted."""

    digests: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    converted: list[str] = field(default_factory=list)
    problems: list[tuple[type[Exception], Problem]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_nbytes(self, nbytes: int) -> None:
        """Count bytes; workers call it side by side."""
        with self._lock:
            self.nbytes += nbytes

    def raise_if_any(self, source: str) -> None:
        """Raise one error with every problem, of the gravest kind found."""
        for kind in (SourceError, DigestMismatchError, TensorValueError, NonFiniteError):
            if any(found is kind for found, _ in self.problems):
                raise kind(
                    f"Expected loadable tensors in {source}.",
                    problems=sorted((problem for _, problem in self.problems), key=lambda p: p.tensor or ""),
                    remedy="write it again from a good state; nothing has used these weights.",
                )


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
    _run(job.plan_firsts(), options, nbytes=files.total_nbytes)
    _run(job.plan_seconds(), options, nbytes=files.total_nbytes)
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
    first_names = _find_first_names(tensors, targets)

    def copy(name: str) -> None:
        target, tensor = targets[name], tensors[name].detach()
        if first_names[target.key] == name:
            target.view.copy_(tensor)
        _settle(name, target, tensor=tensor, is_first=first_names[target.key] == name, loaded=loaded, options=options)

    order = sorted(tensors, key=lambda name: first_names[targets[name].key] != name)
    firsts = [name for name in order if first_names[targets[name].key] == name]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    bundles = _bundle_names(firsts, tensors)
    _run([functools.partial(_copy_all, bundle, copy, options) for bundle in bundles], options, nbytes=nbytes)
    _run([functools.partial(copy, name) for name in order[len(firsts) :]], options, nbytes=nbytes)
    loaded.raise_if_any("the mapping")
    return loaded


def _run(tasks: list[Callable[[], None]], options: LoadOptions, *, nbytes: int) -> None:
    """Run tasks on as many low-priority threads as the options say; what is done sooner than a thread starts, here."""
    is_small = nbytes < _SMALL_NBYTES
    run_tasks(
        tasks,
        num_threads=1 if is_small else options.num_threads,
        nice=0 if is_small else options.nice,
        cancellation=options.cancellation,
        name="hotglm-load",
    )


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


def _find_first_names(names: Mapping[str, object], targets: Mapping[str, Target]) -> dict[str, str]:
    first: dict[str, str] = {}
    for name in sorted(names, key=lambda name: not targets[name].covers):
        first.setdefault(targets[name].key, name)
    return first


def _settle(
    name: str, target: Target, *, tensor: torch.Tensor, is_first: bool, loaded: Loaded, options: LoadOptions
) -> None:
    """Count, hash and prove one tensor that came as a tensor; where it is a second name, compare it with the first."""
    if tensor.dtype is not target.view.dtype:
        loaded.converted.append(name)
    if not is_first and not _equals(target.view, tensor):
        loaded.problems.append((TensorValueError, _describe_conflict(name, target)))
    _prove(name, target, digest=None, loaded=loaded, options=options, source=tensor)
    loaded.add_nbytes(target.view.numel() * target.view.element_size() if is_first else 0)
    options.report(tensor.numel() * tensor.element_size())


def _equals(view: torch.Tensor, tensor: torch.Tensor) -> bool:
    same = tensor if tensor.dtype is view.dtype else tensor.to(view.dtype)
    return torch.equal(tensor_bytes(view), tensor_bytes(same))


def _describe_conflict(name: str, target: Target) -> Problem:
    message = f"Expected the values of the tensor that shares its memory, {shorten_repr(target.key)}, got others"
    return Problem(code="TIE_CONFLICT", message=message, tensor=name)


def _prove(
    name: str,
    target: Target,
    *,
    digest: str | None,
    loaded: Loaded,
    options: LoadOptions,
    source: torch.Tensor | None = None,
) -> None:
    """Hash the tensor where that is wanted and not done yet, and note what is wrong with its values."""
    expected = options.expected.get(name)
    if digest is None and (options.digest or expected is not None):
        digest = digest_tensor(target.view)
    if digest is not None:
        loaded.digests[name] = digest
    if expected is not None and source is not None and source.dtype is not target.view.dtype:
        digest = digest_tensor(source)  # what was promised is what was offered, not what it was converted to
    if expected is not None and digest != expected:
        loaded.problems.append(
            (
                DigestMismatchError,
                Problem(
                    code="DIGEST_MISMATCH",
                    message=f"Expected digest {expected}, got {digest}",
                    tensor=name,
                    expected=expected,
                    found=digest,
                ),
            )
        )
    _find_bad_values(name, target.view, loaded=loaded, finite=options.finite)


def _find_bad_values(name: str, view: torch.Tensor, *, loaded: Loaded, finite: bool) -> None:
    if view.dtype is torch.bool and view.numel() and int(view.view(torch.uint8).max().item()) > 1:
        problem = Problem(code="BAD_BOOL", message="Expected bytes 0 and 1 in a BOOL tensor, got others", tensor=name)
        loaded.problems.append((TensorValueError, problem))
    if finite and (bad := find_nonfinite(view)) is not None:
        problem = Problem(
            code="NONFINITE",
            message=f"Expected finite values, got {bad.num_elements} NaN or infinite of {view.numel()}, "
            f"the first at index {bad.first_index}",
            tensor=name,
            expected=0,
            found=bad.num_elements,
        )
        loaded.problems.append((NonFiniteError, problem))


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
        first_names = _find_first_names(files.tensors, targets)
        self._firsts = {name for name in files.tensors if first_names[targets[name].key] == name}
        # Where bytes are hashed as well, threads take turns at reading: one of them fills the memory bus, or the disk,
        # and the others have hashing to do, which needs neither. Without turns they read at the same time and hash at
        # the same time (measured on two cores: 27 % over hashing alone instead of 13 %; a cold GiB 1.3 s, not 0.9 s).
        self._reading = threading.Lock() if options.digest or options.expected else contextlib.nullcontext()

    def plan_firsts(self) -> list[Callable[[], None]]:
        """Return the tasks that fill every target once; the largest first, so that the threads end together."""
        firsts = [name for name in self._files.tensors if name in self._firsts]
        direct = [name for name in firsts if self._is_direct(name)]
        bundles = sorted(plan_reads(map(self._transfer, direct)), key=_count_nbytes, reverse=True)
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
        wants_digest = self._options.digest or bool(self._options.expected)
        running = hashlib.sha256() if len(reads) > 1 and wants_digest else None
        for read in reads:
            self._options.cancellation.raise_if_cancelled()
            views = [self._lease.bytes(piece.arena_offset, piece.nbytes) for piece in read.pieces]
            file = self._files.files[read.file]
            with self._reading:
                read_scattered(file.fd, views, read.file_offset, path=file.path, size=file.size)
            if running is not None:
                running.update(views[0])
            for name in read.completes:
                self._finish(name, format_digest(running.hexdigest()) if running is not None else None)
            if not read.completes:
                self._options.report(0)

    def _finish(self, name: str, digest: str | None) -> None:
        nbytes = self._files.tensors[name].nbytes
        _prove(name, self._targets[name], digest=digest, loaded=self.loaded, options=self._options)
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


def _count_nbytes(bundle: tuple[Read, ...]) -> int:
    return sum(read.nbytes for read in bundle)
