"""What the live generation has that the next one may be made of: its tensors, by the digests they were loaded with.

Rules this module keeps:

- A digest that a generation records is that of what is in its memory once it is staged: of tensors that a refresh has
  written it was taken again. So a tensor with the digest that is wanted has the bytes that are wanted, unless
  something has written it since; that is found out when it is copied (weights/seals.py).
- Names of one tensor share what is known of it.
- The live module is only read; whoever loads from it holds its generation meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

from hotglm.contract import Contract
from hotglm.delta_plan import TensorIdentity
from hotglm.model.inspection import find_state
from hotglm.slot.generation import Generation
from hotglm.weights import places
from hotglm.weights.device_seals import seal_on_device
from hotglm.weights.dtypes import dtype_name
from hotglm.weights.seals import Seal, seal_tensor
from hotglm.weights.supply import Kept
from hotglm.weights.workers import Cancellation

__all__ = ["find_kept", "identify", "plan_sealing"]


def find_kept(live: Generation, code: Contract) -> dict[str, Kept]:
    """Return the live tensors whose digests are known and that have the dtype and shape which `code` wants, by name."""
    seals = _find_seals(live)
    return {
        entry.name: Kept(tensor=entry.tensor.detach(), seal=seals[_first(live, entry.name)])
        for entry in find_state(live.module)
        if entry.persistent and _first(live, entry.name) in seals
        if (spec := code.state.get(entry.name)) is not None
        if (spec.dtype, spec.shape) == (dtype_name(entry.tensor.dtype), tuple(entry.tensor.shape))
    }


def identify(kept: Mapping[str, Kept]) -> dict[str, TensorIdentity]:
    """Return what tells the bytes of each tensor."""
    return {
        name: TensorIdentity(dtype_name(one.tensor.dtype), tuple(one.tensor.shape), one.seal.digest)
        for name, one in kept.items()
    }


def plan_sealing(
    live: Generation, names: Iterable[str], *, count_writes: Callable[[], int], cancellation: Cancellation
) -> list[Callable[[], None]]:
    """Return tasks that hash those live tensors among `names` whose digests nobody has taken yet, each once.

    That is what it costs to start with a delta on a module that came into the slot by itself: as much as a verified
    load without its reads, once.

    Args:
        live: the generation that serves.
        names: of tensors.
        count_writes: grows when live weights are begun to be written in place, to an odd number, and when that ends.
            Digest and fingerprint of a tensor that was written in between would not be of the same bytes.
        cancellation: of the stage.
    """
    wanted, seals = set(names), _find_seals(live)
    tensors = {
        _first(live, entry.name): entry.tensor.detach()
        for entry in find_state(live.module)
        if entry.persistent and entry.name in wanted and _first(live, entry.name) not in seals
    }
    devices = {first: places.active.find(tensor) for first, tensor in tensors.items()}
    for device in {device.name: device for device in devices.values() if device is not None}.values():
        with device.staging():  # what came with the module was published by nobody, and may still be computed
            device.wait_for(device.record_passes())

    def seal(first: str) -> None:
        before, tensor, device = count_writes(), tensors[first], devices[first]
        if device is None:
            found = seal_tensor(tensor, digest=None, is_finite=False)
        else:
            found = seal_on_device(tensor, device, cancellation=cancellation)
        if before % 2 == 0 and count_writes() == before:
            live.seals[first] = found

    return [functools.partial(seal, first) for first in tensors]


def _find_seals(live: Generation) -> dict[str, Seal]:
    """Return what is known of each tensor, by the first of its names."""
    known = live.seals.copy()  # at once: others add to it meanwhile, a proof of what is live beside a stage
    found = {_first(live, name): seal for name, seal in known.items()}
    for name, digest in live.digests.items():
        first = _first(live, name)
        if first not in found or found[first].digest != digest:
            found[first] = Seal(digest=digest)
    return found


def _first(live: Generation, name: str) -> str:
    spec = live.contract.state.get(name)
    return name if spec is None or spec.tied is None else spec.tied
