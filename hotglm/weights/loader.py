"""Filling a spare: bytes of files, of memory or of a mapping, into views of an arena, hashed and proved as they arrive.

Rules this module keeps:

- The bytes that are hashed and searched for NaN are the ones in the arena, which are the ones that will run (P5).
- Nothing here maps a file: a read past a truncated end comes back short and becomes a typed error, never a signal.
- Every tensor is filled once. A second name of a tied tensor is compared, byte for byte, with the first.
- What is in memory already is copied from there, held against its seal, and not read; what a delta makes of a tensor is
  hashed when it is done, whatever it was made of (C02, C03).
- All tensors that fail are named in one error.
- dtypes are converted only where the caller said so, by `Tensor.copy_`, in the worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from hotglm.errors import DeltaError, DigestMismatchError, TensorValueError
from hotglm.release.files import TensorLocation, WeightFiles
from hotglm.weights import places
from hotglm.weights.arena import Lease
from hotglm.weights.bundles import bundle_names, copy_in_pieces, count_nbytes, make_turn, read_bundle, read_into
from hotglm.weights.delta_codec import decode_into
from hotglm.weights.download import fetch_sealed
from hotglm.weights.pace import rest
from hotglm.weights.plan import Read, Transfer, plan_reads
from hotglm.weights.proof import (
    Loaded,
    LoadOptions,
    Target,
    describe_conflict,
    describe_drift,
    find_first_names,
    prove_tensor,
    run_load,
    settle_tensor,
)
from hotglm.weights.seals import Seal, copy_sealed, is_intact, seal_tensor
from hotglm.weights.supply import Kept, Supply

__all__ = ["load_files", "load_supply", "load_tensors"]


def load_files(files: WeightFiles, targets: Mapping[str, Target], *, lease: Lease, options: LoadOptions) -> Loaded:
    """Read every tensor of `files` into its target; see `load_supply`."""
    return load_supply(Supply.of(files), targets, lease=lease, options=options)


def load_supply(
    supply: Supply,
    targets: Mapping[str, Target],
    *,
    lease: Lease,
    options: LoadOptions,
    left: Mapping[int, Seal] = MappingProxyType({}),
) -> Loaded:
    """Bring every tensor of `supply` into its target.

    Args:
        supply: what is open in it stays open, and what is in memory is not written meanwhile.
        targets: for every name in `supply`, and shapes equal to theirs.
        lease: the memory that the targets are views of.
        options: how.
        left: what may stand in the memory of `lease` still, by offset: of the digest that is expected there, it is
            proved by its fingerprint and left alone.

    Raises:
        SourceReadError: the system refused a read.
        SourceChangedError: the source became shorter, or its size or time of change moved.
        DeltaError: a payload cannot be applied, or makes something else than was promised; all are named.
        DigestMismatchError, TensorValueError, NonFiniteError: bytes that were read are not acceptable; all are named.
        MissingExtraError: a payload needs the extra `delta`.
    """
    job = _SupplyJob(supply, targets, lease=lease, options=options)
    run_load(job.plan_left(left), options, nbytes=supply.nbytes)
    run_load(job.plan_firsts(), options, nbytes=supply.nbytes)
    if job.loaded.drifted:
        run_load(job.plan_refill(), options, nbytes=supply.nbytes)
    run_load(job.plan_seconds(), options, nbytes=supply.nbytes)
    job.supply.verify_unchanged()
    job.loaded.raise_if_any(supply.label)
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
            copy_in_pieces(target.view, tensor, options)
        settle_tensor(
            name, target, tensor=tensor, is_first=first_names[target.key] == name, loaded=loaded, options=options
        )

    order = sorted(tensors, key=lambda name: first_names[targets[name].key] != name)
    firsts = [name for name in order if first_names[targets[name].key] == name]
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    nbytes = sum(sizes.values())
    bundles = bundle_names(firsts, sizes)
    run_load([functools.partial(_copy_all, bundle, copy, options) for bundle in bundles], options, nbytes=nbytes)
    run_load([functools.partial(copy, name) for name in order[len(firsts) :]], options, nbytes=nbytes)
    loaded.raise_if_any("the mapping")
    return loaded


def _copy_all(names: list[str], copy: Callable[[str], None], options: LoadOptions) -> None:
    for name in names:
        options.cancellation.raise_if_cancelled()
        copy(name)


class _SupplyJob:
    """One load: what is copied from memory, what is read straight into the arena, and what goes by way of a buffer."""

    def __init__(self, supply: Supply, targets: Mapping[str, Target], *, lease: Lease, options: LoadOptions) -> None:
        self.loaded = Loaded()
        self.supply = supply
        self._targets = targets
        self._lease = lease
        self._options = options
        self._first_names = find_first_names(supply.tensors, targets)
        self._reading = make_turn(options)
        self._reuses = supply.reuses
        self._found: set[str] = set()

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan_left(self, left: Mapping[int, Seal]) -> list[Callable[[], None]]:
        """Return the tasks that find out which targets have their bytes already."""
        found = {
            name: left[target.offset]
            for name in self.supply.tensors
            if (target := self._targets[name]).offset in left and self._is_first(name) and self._is_direct(name)
            if target.view.numel() and left[target.offset].digest == self._options.expected.get(name)
        }
        sizes = {name: self.supply.tensors[name].nbytes for name in found}
        return [functools.partial(self._find_all, bundle, found) for bundle in bundle_names(found, sizes)]

    def plan_firsts(self) -> list[Callable[[], None]]:
        """Return the tasks that fill every other target; the largest first, so that the threads end together."""
        names = [name for name in self.supply.tensors if self._is_first(name)]
        return self._plan(name for name in names if name not in self._found)

    def plan_refill(self) -> list[Callable[[], None]]:
        """Return the tasks that fill what memory did not have any more from wherever else it may be had.

        Raises:
            HotglmError: whatever says that it is nowhere else.
        """
        names = list(self.loaded.drifted)
        found = self.supply.refill(names)
        # Everything of the first supply that is left to do is comparing, which wants no file of another one.
        self.supply = replace(found, tensors={**self.supply.tensors, **found.tensors})
        return self._plan(names)

    def plan_seconds(self) -> list[Callable[[], None]]:
        """Return the tasks that compare further names of tied tensors with what the first names brought."""
        seconds = [name for name in self.supply.tensors if not self._is_first(name)]
        return [functools.partial(self._compare, name) for name in seconds]

    def _plan(self, names: Iterable[str]) -> list[Callable[[], None]]:
        ways: dict[str, list[str]] = {"decode": [], "copy": [], "read": [], "buffer": []}
        for name in names:
            ways[self._find_way(name)].append(name)
        largest = sorted(ways["decode"], key=lambda name: self.supply.tensors[name].nbytes, reverse=True)
        numbers = {id(file): number for number, file in enumerate(self.supply.files)}
        transfers = [self._transfer(name, numbers) for name in ways["read"]]
        reads = plan_reads(transfers, chunk_nbytes=self._options.pace.chunk_nbytes)
        bundles = sorted(reads, key=count_nbytes, reverse=True)
        empty = [transfer.name for transfer in transfers if not transfer.nbytes]
        copies = bundle_names(ways["copy"], {name: self.supply.tensors[name].nbytes for name in ways["copy"]})
        return [
            *(functools.partial(self._decode, name) for name in largest),
            *(functools.partial(self._read_bundle, bundle) for bundle in bundles),
            *(functools.partial(self._finish, name, None) for name in empty),
            *(functools.partial(self._copy_all, bundle) for bundle in copies),
            *(functools.partial(self._read_buffered, name) for name in ways["buffer"]),
        ]

    def _find_way(self, name: str) -> str:
        source = self.supply.tensors[name]
        if source.steps:
            return "decode"
        if source.kept is not None:
            return "copy"
        return "read" if self._is_direct(name) else "buffer"

    def _is_first(self, name: str) -> bool:
        return self._first_names[self._targets[name].key] == name

    def _is_direct(self, name: str) -> bool:
        view = self._targets[name].view
        return self.supply.tensors[name].dtype is view.dtype and view.is_contiguous()

    def _transfer(self, name: str, numbers: Mapping[int, int]) -> Transfer:
        location = self.supply.tensors[name].located
        return Transfer(
            name=name,
            file=numbers[id(location.file)],
            file_offset=location.offset,
            arena_offset=self._targets[name].offset,
            nbytes=location.nbytes,
        )

    # -- filling -------------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        self._options.cancellation.raise_if_cancelled()
        rest()

    def _read_bundle(self, reads: tuple[Read, ...]) -> None:
        found = read_bundle(reads, self.supply.files, lease=self._lease, turn=self._reading, options=self._options)
        for name, digest in found:
            self.loaded.add(read_nbytes=self.supply.tensors[name].nbytes)
            self._finish(name, digest)

    def _finish(self, name: str, digest: str | None) -> None:
        source, target = self.supply.tensors[name], self._targets[name]
        prove_tensor(name, target, digest=digest, loaded=self.loaded, options=self._options)
        self._seal(name)
        self.loaded.add(nbytes=source.nbytes)
        self._options.report(source.nbytes)

    def _seal(self, name: str) -> None:
        """Note the fingerprint of what was read where other tensors were not: the next load will want to copy it."""
        digest = self.loaded.digests.get(name)
        if digest is not None and self._reuses:
            view, is_finite = self._targets[name].view, self._options.finite
            self.loaded.seals[name] = seal_tensor(view, digest=digest, is_finite=is_finite)

    def _find_all(self, names: list[str], left: Mapping[str, Seal]) -> None:
        for name in names:
            if is_intact(self._targets[name].view, left[name], pause=self._pause):
                nbytes = self.supply.tensors[name].nbytes
                self._accept(name, left[name])
                self.loaded.add(found_nbytes=nbytes, nbytes=nbytes)
                self._found.add(name)
                self._options.report(nbytes)

    def _accept(self, name: str, seal: Seal) -> None:
        """Take a tensor for what its seal says; search it for NaN where nobody has."""
        options = replace(self._options, finite=self._options.finite and not seal.is_finite)
        prove_tensor(name, self._targets[name], digest=seal.digest, loaded=self.loaded, options=options)
        self.loaded.seals[name] = replace(seal, is_finite=seal.is_finite or self._options.finite)

    def _copy_all(self, names: list[str]) -> None:
        for name in names:
            self._pause()
            if (kept := self.supply.tensors[name].kept) is not None and self._copy(name, kept, into=None):
                self._options.report(self.supply.tensors[name].nbytes)

    def _copy(self, name: str, kept: Kept, *, into: torch.Tensor | None) -> bool:
        """Copy a tensor from memory, into its target or to be made another; return whether it was what it should be."""
        view = self._targets[name].view if into is None else into
        device, cancellation = places.active.find(kept.tensor), self._options.cancellation
        self._options.budget.take(view.nbytes, cancellation=cancellation)
        if device is None:
            seal = copy_sealed(view, kept.tensor, kept.seal, pause=self._pause)
        else:
            seal = fetch_sealed(view, kept.tensor, kept.seal, device, cancellation=cancellation)
        if seal is None:
            self.loaded.drifted.append(name)
            return False
        nbytes = view.numel() * view.element_size()
        self.loaded.add(copied_nbytes=nbytes)
        if into is None:
            self._accept(name, seal)
            self.loaded.add(nbytes=nbytes)
        return True

    def _decode(self, name: str) -> None:
        source, target = self.supply.tensors[name], self._targets[name]
        view = target.view if self._is_direct(name) else torch.empty(source.shape, dtype=source.dtype)
        if not self._make(name, view):
            return
        if view is not target.view:
            target.view.copy_(view)
        is_converted = source.dtype is not target.view.dtype
        prove_tensor(
            name,
            target,
            digest=None,
            loaded=self.loaded,
            options=self._options,
            source=view if is_converted else None,
            mismatch="DELTA_RESULT_MISMATCH",
        )
        if is_converted:
            self.loaded.converted.append(name)
        else:
            self._seal(name)
        self.loaded.add(nbytes=target.view.numel() * target.view.element_size())
        self._options.report(source.nbytes)

    def _make(self, name: str, view: torch.Tensor) -> bool:
        """Make a tensor of what it starts as and the deltas to it; note what keeps it from being made."""
        source = self.supply.tensors[name]
        if source.kept is not None:
            if not self._copy(name, source.kept, into=view):
                return False
        else:
            self._read_into(view, source.located)
        try:
            for step in source.steps:
                decode_into(view, codec=step.codec, parts=step.parts, name=name, pause=self._pause)
        except DeltaError as error:
            self.loaded.problems += [(DeltaError, problem) for problem in error.problems]
            return False
        parts_nbytes = sum(part.nbytes for step in source.steps for part in step.parts)
        self.loaded.add(read_nbytes=parts_nbytes, decoded_nbytes=source.nbytes if source.steps else 0)
        return True

    def _read_buffered(self, name: str) -> None:
        source, target = self.supply.tensors[name], self._targets[name]
        tensor = torch.empty(source.shape, dtype=source.dtype)
        self._read_into(tensor, source.located)
        target.view.copy_(tensor)
        settle_tensor(name, target, tensor=tensor, is_first=True, loaded=self.loaded, options=self._options)

    def _read_into(self, tensor: torch.Tensor, location: TensorLocation) -> None:
        read_into(tensor, location, turn=self._reading, options=self._options)
        self.loaded.add(read_nbytes=location.nbytes)

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _compare(self, name: str) -> None:
        source, target = self.supply.tensors[name], self._targets[name]
        first = self._first_names[target.key]
        if self._is_told_by_digests(name, first):
            if self._options.expected[name] != self.loaded.digests[first]:
                self.loaded.problems.append((TensorValueError, describe_conflict(name, target)))
            self.loaded.digests[name] = self.loaded.digests[first]
            self._options.report(source.nbytes)
            return
        tensor = torch.empty(source.shape, dtype=source.dtype)
        if self._make(name, tensor):
            settle_tensor(name, target, tensor=tensor, is_first=False, loaded=self.loaded, options=self._options)
        elif name in self.loaded.drifted:
            self.loaded.problems.append((DigestMismatchError, describe_drift(name)))

    def _is_told_by_digests(self, name: str, first: str) -> bool:
        """Tell whether digests say if a further name has the bytes of the first, so that neither has to be read."""
        source, other = self.supply.tensors[name], self.supply.tensors[first]
        if not self._reuses or (source.dtype, source.shape) != (other.dtype, other.shape):
            return False
        one, two = self._targets[name].view, self._targets[first].view
        if one.dtype is not source.dtype or one.stride() != two.stride() or one.data_ptr() != two.data_ptr():
            return False
        return name in self._options.expected and first in self.loaded.digests
