"""Filling a spare whose memory is on devices: what can be goes through the pinned ring, the rest by way of the host.

Rules this module keeps:

- **Within the device**: a tensor that is live there with the bytes that are promised (weights/handover.py).
- **Through the ring**: a tensor of a file whose bytes are those of its view, and that no other name shares. A reader
  thread reads it into a window, submits the copy, and hashes the window while the copy engine drains it. There is no
  second pass over the bytes on the host, and no copy of the weights in it.
- **From a mapping**: a tensor that no other name shares is copied to its view by torch, on the side stream, wherever it
  is, and hashed from there.
- **By way of the host**: whatever else there is (migrations, deltas, conversions, other strides, ties) is loaded by the
  loaders for the processor into an image with the layout of the spare, proved there, and copied from it through the
  ring. The image takes as much memory as these tensors, until the load has ended.
- What is searched for NaN are the bytes on the device, once the host has seen their copies done; what is hashed are the
  bytes that the device copied from memory that is ours (P5).
- Every byte is submitted to the side stream of its device, after `begin` and before `settle` ([Note: streams] in
  weights/device.py).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch

from hotglm.release.reading import read_scattered
from hotglm.weights import places
from hotglm.weights.arena import Arena, Lease
from hotglm.weights.bundles import count_nbytes, cut_pairs
from hotglm.weights.device_arena import DeviceLease
from hotglm.weights.digest import format_digest
from hotglm.weights.handover import find_handed, hand_over, refill_drifted, seal_loaded, without_unproved
from hotglm.weights.pace import is_yielding, rest
from hotglm.weights.plan import Read, Transfer, plan_reads
from hotglm.weights.proof import Loaded, LoadOptions, Target, prove_tensor, run_load
from hotglm.weights.ring import Ring
from hotglm.weights.split_arena import SplitLease
from hotglm.weights.supply import SourceTensor, Supply
from hotglm.weights.windows import place_pieces
from hotglm.weights.yielding import Work

__all__ = ["Given", "load_split"]

Given = Supply | Mapping[str, torch.Tensor]
"""What a load takes its bytes from."""

Load = Callable[[Given, Mapping[str, Target], Lease], Loaded]
"""Loads a part of what is given into targets in the processor's memory."""


def load_split(
    source: Given,
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
    names: Iterable[str],
    load: Load,
    is_plain: bool,
) -> Loaded:
    """Fill the targets that `names` name, and return when the host has seen every copy done.

    Args:
        source: open files, or tensors by name.
        targets: where each name goes; views of `lease`.
        lease: of blocks of which at least one is a device's.
        options: how.
        names: of the tensors that are filled, in the layout of the targets.
        load: loads a part of the source into targets in the processor's memory.
        is_plain: whether the tensors of the source are those of the targets, by name; else all go by way of the host.

    Raises:
        HotglmError: what the loaders of files, mappings and migrations raise.
    """
    with options.pace.working(options.cancellation):
        loaded = _load_all(
            source, targets, lease=lease, options=options, wanted=list(names), load=load, is_plain=is_plain
        )
        lease.settle()
    if isinstance(source, Supply):
        source.verify_unchanged()
    return loaded


def _load_all(
    source: Given,
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
    wanted: list[str],
    load: Load,
    is_plain: bool,
) -> Loaded:
    loaded = Loaded()
    if is_plain and isinstance(source, Supply):
        loaded = hand_over(source, find_handed(source, targets, lease, wanted), targets, lease=lease, options=options)
        source = without_unproved(refill_drifted(source, loaded.drifted), loaded.seals.keys())
    handed = set(loaded.seals)
    wanted = [name for name in wanted if name not in handed]
    direct = _find_direct(source, targets, lease, wanted) if is_plain else []
    loaded = _join(loaded, _load_direct(source, direct, targets, lease=lease, options=options))
    known = handed.union(direct)
    rest = [name for name in wanted if name not in known]
    if rest:
        left = _without(source, known)
        loaded = _join(loaded, _load_image(left, rest, targets, lease=lease, options=options, load=load))
    seal_loaded(loaded, targets, lease=lease, options=options, handed=handed)
    return loaded


def _find_direct(source: Given, targets: Mapping[str, Target], lease: SplitLease, names: list[str]) -> list[str]:
    """Return the names that need no image."""
    num_names = Counter(targets[name].key for name in names)
    return [
        name
        for name in names
        if num_names[targets[name].key] == 1 and targets[name].covers
        if isinstance(lease.locate(targets[name].offset)[0], DeviceLease)
        if not isinstance(source, Supply) or _is_read_as_it_is(source.tensors[name], targets[name].view)
    ]


def _is_read_as_it_is(tensor: SourceTensor, view: torch.Tensor) -> bool:
    is_in_file = tensor.location is not None and tensor.kept is None and not tensor.steps
    return is_in_file and tensor.dtype is view.dtype and view.is_contiguous()


def _without(source: Given, left_out: AbstractSet[str]) -> Given:
    if isinstance(source, Supply):
        return replace(source, tensors={name: at for name, at in source.tensors.items() if name not in left_out})
    return {name: tensor for name, tensor in source.items() if name not in left_out}


def _join(one: Loaded, other: Loaded) -> Loaded:
    one.digests |= other.digests
    one.seals |= other.seals
    one.add(
        nbytes=other.nbytes,
        read_nbytes=other.read_nbytes,
        copied_nbytes=other.copied_nbytes,
        found_nbytes=other.found_nbytes,
        decoded_nbytes=other.decoded_nbytes,
    )
    one.converted += other.converted
    one.drifted += other.drifted
    return one


# -- through the ring, and from mappings -------------------------------------------------------------------------------


def _load_direct(
    source: Given, names: list[str], targets: Mapping[str, Target], *, lease: SplitLease, options: LoadOptions
) -> Loaded:
    loaded = Loaded()
    if not names:
        return loaded
    if isinstance(source, Supply):
        label, digests = source.label, _read_all(source, names, targets, lease=lease, options=options)
    else:
        label, digests = "the mapping", {}
        _copy_all(source, names, targets, lease=lease, options=options, loaded=loaded)
    lease.settle()

    def prove(name: str) -> None:
        given = None if isinstance(source, Supply) else source[name]
        with lease.submitting():
            prove_tensor(name, targets[name], digest=digests.get(name), loaded=loaded, options=options, source=given)
        view = targets[name].view
        loaded.add(nbytes=view.nbytes, read_nbytes=view.nbytes if given is None else 0)

    # Bytes that are not hashed yet are fetched to be, by several threads; what is left to do else is the device's.
    nbytes = sum(targets[name].view.nbytes for name in names if name not in digests) if options.digest else 0
    run_load([functools.partial(prove, name) for name in names], options, nbytes=nbytes)
    if isinstance(source, Supply):
        source.verify_unchanged()
    loaded.raise_if_any(label)
    return loaded


def _copy_all(
    tensors: Mapping[str, torch.Tensor],
    names: list[str],
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
    loaded: Loaded,
) -> None:
    for name in names:
        options.cancellation.raise_if_cancelled()
        tensor, view = tensors[name].detach(), targets[name].view
        for into, piece in cut_pairs(view, tensor, options.pace.chunk_nbytes):
            options.budget.take(piece.nbytes, cancellation=options.cancellation)
            rest(Work.UPLOAD, piece.nbytes)
            with lease.submitting():
                into.copy_(piece)
            if is_yielding():
                lease.settle()
        if tensor.dtype is not view.dtype:
            loaded.converted.append(name)
        options.report(tensor.nbytes)


def _read_all(
    files: Supply,
    names: list[str],
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
) -> dict[str, str]:
    """Read tensors of files onto their devices; return their digests, where they are wanted."""
    digests: dict[str, str] = {}
    numbers = {id(file): number for number, file in enumerate(files.files)}
    tasks: list[tuple[int, Callable[[], None]]] = []
    for part in lease.devices:
        mine = [name for name in names if lease.locate(targets[name].offset)[0] is part]
        transfers = [
            Transfer(
                name=name,
                file=numbers[id(files.tensors[name].located.file)],
                file_offset=files.tensors[name].located.offset,
                arena_offset=lease.locate(targets[name].offset)[1],
                nbytes=files.tensors[name].nbytes,
            )
            for name in mine
        ]
        ring = places.active.ring(part.device)
        reader = _Reader(files=files, lease=part, ring=ring, options=options, digests=digests)
        tasks += [
            (count_nbytes(reads), functools.partial(reader.read_bundle, reads))
            for reads in plan_reads(transfers, chunk_nbytes=min(ring.chunk_nbytes, options.pace.chunk_nbytes))
        ]
    tasks.sort(key=lambda task: task[0], reverse=True)  # the largest first, so that the threads end together
    run_load([task for _, task in tasks], options, nbytes=sum(nbytes for nbytes, _ in tasks))
    return digests


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """What a reader thread needs: from which files, onto which block, through which ring."""

    files: Supply
    lease: DeviceLease
    ring: Ring
    options: LoadOptions
    digests: dict[str, str]

    def read_bundle(self, reads: tuple[Read, ...]) -> None:
        """Read one task, a window at a time; a tensor larger than a window is hashed across its windows."""
        running = hashlib.sha256() if len(reads) > 1 else None
        with self.ring.device.staging():
            for read in reads:
                self._read(read, running)

    def _read(self, read: Read, running: hashlib._Hash | None) -> None:
        options = self.options
        options.budget.take(read.nbytes, cancellation=options.cancellation)
        with self.ring.lend(cancellation=options.cancellation) as window:
            placed = tuple(place_pieces(read.pieces))
            views = [window.bytes(start, piece.nbytes) for run in placed for start, piece in run.pieces]
            file = self.files.files[read.file]
            rest(Work.READ, read.nbytes)
            read_scattered(file.fd, list(views), read.file_offset, path=file.path, size=file.size)
            rest(Work.UPLOAD, read.nbytes)
            for run in placed:
                window.copy(run.start, self.lease.range(run.arena_offset, run.nbytes))
            _wait_if_yielding(self.ring)
            if options.digest or options.expected:  # while the copy engine reads the window
                rest(Work.HASH, read.nbytes)
                self._hash(read, views, running)
        options.report(read.nbytes)

    def _hash(self, read: Read, views: list[memoryview], running: hashlib._Hash | None) -> None:
        if running is None:
            for name, view in zip(read.completes, views, strict=True):
                self.digests[name] = format_digest(hashlib.sha256(view).hexdigest())
            return
        running.update(views[0])
        for name in read.completes:
            self.digests[name] = format_digest(running.hexdigest())


def _wait_if_yielding(ring: Ring) -> None:
    """Leave the copy engine alone until the next piece, and have the time that it took for this one told from it."""
    if is_yielding():
        ring.device.record().wait()


# -- by way of the host ------------------------------------------------------------------------------------------------


def _load_image(
    source: Given,
    names: list[str],
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
    load: Load,
) -> Loaded:
    """Load into an image of the layout, and copy what was loaded to where it belongs.

    The image is as large as the layout and resident only where something is loaded.
    """
    image = Arena(lease.nbytes).lease()
    on_host = {name: replace(target, view=_view_image(image, target)) for name, target in targets.items()}
    loaded = load(source, on_host, image)
    extents = sorted({(targets[name].offset, _extent(targets[name].view)) for name in names if targets[name].covers})
    for offset, nbytes in extents:
        _move(image, offset, nbytes, lease=lease, options=options)
    lease.settle()  # before the image goes
    return loaded


def _view_image(image: Lease, target: Target) -> torch.Tensor:
    view = target.view
    return image.view(target.offset, dtype=view.dtype, shape=view.shape, stride=view.stride())


def _extent(view: torch.Tensor) -> int:
    if not view.numel():
        return 0
    return view.element_size() * (
        1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    )


def _move(image: Lease, offset: int, nbytes: int, *, lease: SplitLease, options: LoadOptions) -> None:
    if not nbytes:
        return
    part, start = lease.locate(offset)
    data = image.view(offset, dtype=torch.uint8, shape=(nbytes,))
    if not isinstance(part, DeviceLease):
        part.view(start, dtype=torch.uint8, shape=(nbytes,)).copy_(data)
        return
    ring = places.active.ring(part.device)
    step = min(ring.chunk_nbytes, options.pace.chunk_nbytes)
    for at in range(0, nbytes, step):
        piece = data[at : at + step]
        options.budget.take(piece.numel(), cancellation=options.cancellation)
        rest(Work.UPLOAD, piece.numel())
        with ring.lend(cancellation=options.cancellation) as window:
            window.tensor(0, piece.numel()).copy_(piece)  # torch's copy: it gives the GIL away
            window.copy(0, part.range(start + at, piece.numel()))
            _wait_if_yielding(ring)
