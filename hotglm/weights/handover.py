"""What is live on a device is copied to the spare there: within the device, and proved by fingerprints of the copies.

Rules this module keeps:

- Live tensors are only read. Copies are on the side stream: behind whatever computed weights that came with a module,
  because the lease of the spare was begun after it (`begin` in weights/device_arena.py), and before every later write
  to either arena ([Note: streams] in weights/device.py).
- What is proved is the copy, after it was made: whoever writes the original meanwhile, such as a pass in training mode
  that writes a buffer, is found out (C02), and that tensor is read from files.
- A fingerprint is taken of everything that a load with digests brings to a device. That costs one pass over memory
  that is a hundred times faster than the way there, and so the next load can copy it, and a proof be quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch

from hotglm.weights import places
from hotglm.weights.device_arena import DeviceLease
from hotglm.weights.device_seals import find_unchanged, take_fingerprints
from hotglm.weights.pace import is_yielding, rest
from hotglm.weights.proof import Loaded, LoadOptions, Target, prove_tensor
from hotglm.weights.seals import Seal, find_flat
from hotglm.weights.split_arena import SplitLease
from hotglm.weights.supply import Kept, SourceTensor, Supply

__all__ = ["find_handed", "hand_over", "refill_drifted", "seal_loaded", "without_unproved"]

_PIECE_NBYTES = 256 << 20
"""How much is copied before it is looked whether the stage was cancelled."""

_SHORT_NBYTES = 16 << 20
"""The same, for a load that yields: some 10 us of the device's memory."""


def find_handed(
    supply: Supply, targets: Mapping[str, Target], lease: SplitLease, names: Iterable[str]
) -> dict[str, list[str]]:
    """Return the names of tensors that are on the device of their targets already, with a fingerprint and as wanted.

    Returns:
        For each tensor the name under which it is copied, and the others that it has, which are told by its digest.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(targets[name].key, []).append(name)
    return {
        group[0]: group[1:]
        for group in groups.values()
        if targets[group[0]].covers and all(_is_wanted(name, supply, targets, lease) for name in group)
        if len({_describe(name, supply, targets) for name in group}) == 1
    }


def _is_wanted(name: str, supply: Supply, targets: Mapping[str, Target], lease: SplitLease) -> bool:
    tensor, target = supply.tensors[name], targets[name]
    if tensor.kept is None or tensor.steps:
        return False
    return _is_alike(tensor.kept, target.view) and _is_near(tensor.kept, target, lease)


def _describe(name: str, supply: Supply, targets: Mapping[str, Target]) -> tuple[object, ...]:
    """Return what is the same for all names of one tensor that is promised once."""
    kept, view = supply.tensors[name].kept, targets[name].view
    return (kept and kept.seal.digest, targets[name].offset, view.dtype, tuple(view.shape), view.stride())


def _is_alike(kept: Kept, view: torch.Tensor) -> bool:
    is_known = kept.seal.fingerprint is not None and kept.seal.stride == view.stride()
    is_same = (kept.tensor.dtype, kept.tensor.stride()) == (view.dtype, view.stride())
    return is_known and is_same and find_flat(kept.tensor) is not None and find_flat(view) is not None


def _is_near(kept: Kept, target: Target, lease: SplitLease) -> bool:
    part, _ = lease.locate(target.offset)
    return isinstance(part, DeviceLease) and places.active.find(kept.tensor) is part.device


def without_unproved(supply: Supply, handed: AbstractSet[str]) -> Supply:
    """Return a supply that reads from files what is on a device and was not handed over, where files have it.

    Whatever else is wanted from a device is fetched from there, and hashed.
    """

    def drop(name: str, tensor: SourceTensor) -> SourceTensor:
        is_elsewhere = tensor.location is not None and not tensor.steps and name not in handed
        if tensor.kept is None or not is_elsewhere or places.active.find(tensor.kept.tensor) is None:
            return tensor
        return replace(tensor, kept=None)

    return replace(supply, tensors={name: drop(name, tensor) for name, tensor in supply.tensors.items()})


def hand_over(
    supply: Supply,
    names: Mapping[str, list[str]],
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
) -> Loaded:
    """Copy live tensors within their devices; return those that were what they should be, the others as `drifted`.

    Args:
        supply: with a tensor in memory for each name; see `find_handed`.
        names: which, and what else they are called.
        targets: where to.
        lease: of the spare.
        options: how.

    Raises:
        NonFiniteError, TensorValueError: a tensor has values that nobody has looked for yet; all are named.
    """
    loaded, pause = Loaded(), options.cancellation.raise_if_cancelled
    kept = {name: one for name in names if (one := supply.tensors[name].kept) is not None}
    for part in lease.devices:
        mine = [name for name in kept if lease.locate(targets[name].offset)[0] is part]
        for name in mine:
            _copy(kept[name].tensor, targets[name].view, part, options=options)
        views, seals = {name: targets[name].view for name in mine}, {name: kept[name].seal for name in mine}
        unchanged = find_unchanged(views, seals, part.device, pause=pause)
        with part.device.staging(), part.device.submitting():
            for name in mine:
                if name in unchanged:
                    _accept(name, targets[name], seals[name], loaded=loaded, options=options)
                    for other in names[name]:
                        loaded.digests[other], loaded.seals[other] = seals[name].digest, loaded.seals[name]
                        options.report(targets[other].view.nbytes)
        loaded.drifted += [name for name in mine if name not in unchanged]
    loaded.raise_if_any(supply.label)
    return loaded


def _copy(tensor: torch.Tensor, view: torch.Tensor, part: DeviceLease, *, options: LoadOptions) -> None:
    source, target = find_flat(tensor), find_flat(view)
    if source is None or target is None:
        raise ValueError("a tensor that does not fill its memory")
    with part.device.staging():
        step = _SHORT_NBYTES if is_yielding() else _PIECE_NBYTES
        for start in range(0, source.numel(), step):
            piece = source[start : start + step]
            options.budget.take(piece.numel(), cancellation=options.cancellation)
            options.cancellation.raise_if_cancelled()
            rest()
            part.device.copy(piece, target[start : start + step])
            if is_yielding():
                part.settle()


def _accept(name: str, target: Target, seal: Seal, *, loaded: Loaded, options: LoadOptions) -> None:
    """Take a copy for what its seal says; search it for NaN where nobody has."""
    left = replace(options, finite=options.finite and not seal.is_finite)
    prove_tensor(name, target, digest=seal.digest, loaded=loaded, options=left)
    loaded.seals[name] = replace(seal, is_finite=seal.is_finite or options.finite)
    loaded.add(nbytes=target.view.nbytes, copied_nbytes=target.view.nbytes)
    options.report(target.view.nbytes)


def refill_drifted(supply: Supply, names: list[str]) -> Supply:
    """Return the supply with tensors that memory did not have any more taken from elsewhere.

    Raises:
        HotglmError: whatever says that they are nowhere else.
    """
    if not names:
        return supply
    found = supply.refill(names)
    files = {id(file): file for file in (*supply.files, *found.files)}
    return replace(found, files=tuple(files.values()), tensors={**supply.tensors, **found.tensors})


def seal_loaded(
    loaded: Loaded,
    targets: Mapping[str, Target],
    *,
    lease: SplitLease,
    options: LoadOptions,
    handed: AbstractSet[str],
) -> None:
    """Take the fingerprint of everything on a device that has a digest; what was handed over has one already.

    Where a device has no room for scratch there is none; the next load then reads it again.
    """
    pause = options.cancellation.raise_if_cancelled
    for part in lease.devices:
        mine = [name for name in loaded.digests if lease.locate(targets[name].offset)[0] is part]
        wanted = [name for name in mine if name not in handed]
        found = take_fingerprints([targets[name].view for name in wanted], part.device, pause=pause)
        for name, fingerprint in zip(wanted, found, strict=True):
            view = targets[name].view
            loaded.seals[name] = Seal(
                digest=loaded.digests[name],
                fingerprint=fingerprint,
                stride=view.stride() if fingerprint is not None else (),
                is_finite=options.finite,
            )
