"""Where the image of a version is staged: laid out, and planned, before anything is taken.

Rules this module keeps:

- What is exchanged in place on a device has the room behind it that the exchange needs (`[Note: exchange]`,
  weights/device_exchange.py).
- Where the device has no room, the image goes to pinned memory of the host, if the policy does not say otherwise, and
  the plan says why. It cannot be run there: whatever would run it is refused by name, before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from hotglm.errors import MemoryPlanError, Problem, UnswappableError
from hotglm.model.derived import find_refreshers
from hotglm.model.extents import lay_out
from hotglm.model.inspection import StateEntry, find_state
from hotglm.model.scripted import is_script
from hotglm.slot.memory import DevicePlan, MemoryPlan
from hotglm.slot.spare import Spares
from hotglm.slot.stage_request import StageRequest
from hotglm.weights import host_exchange, places
from hotglm.weights.device import Device
from hotglm.weights.device_exchange import find_extent, find_room
from hotglm.weights.exchange import is_dense
from hotglm.weights.layout import Layout, Region, find_no_room

__all__ = ["find_devices", "plan_image"]


def plan_image(
    request: StageRequest, spares: Spares, entries: Sequence[StateEntry], *, module: nn.Module
) -> tuple[Layout, MemoryPlan]:
    """Return where each tensor of a version goes, and where the memory for that comes from.

    Args:
        request: of the stage.
        spares: of the slot.
        entries: the state of the version.
        module: the module that they are of.

    Raises:
        MemoryPlanError: there is none within the policy and the limits.
        UnswappableError: the image has to be on the host, and something is to be done with it that needs the device.
    """
    owner = request.owner
    room = find_room if owner.is_in_place else find_no_room
    layout = lay_out(entries, like=find_state(request.live.module), find_room=room)
    if owner.image == "device" or not layout.regions:
        return layout, spares.plan(layout.nbytes, layout.regions)
    why = "it was asked for"
    if owner.image == "auto":
        try:
            return layout, spares.plan(layout.nbytes, layout.regions)
        except MemoryPlanError as failure:
            why = f"there is none for it where the live weights are: {failure.message.rstrip('.')}"
    _verify_provable(request, entries, module=module, why=why)
    return _plan_host(spares, entries, why=why)


def find_devices(entries: Sequence[StateEntry]) -> tuple[tuple[Device, int], ...]:
    """Return the devices that tensors are on, and how many bytes they have there, ties counted once."""
    found: dict[str, tuple[Device, int]] = {}
    for tensor in {entry.tensor.data_ptr(): entry.tensor for entry in entries}.values():
        device = places.active.find(tensor)
        if device is not None:
            found[device.name] = (device, found.get(device.name, (device, 0))[1] + tensor.nbytes)
    return tuple(found.values())


def _plan_host(spares: Spares, entries: Sequence[StateEntry], *, why: str) -> tuple[Layout, MemoryPlan]:
    devices = find_devices(entries)
    plain = lay_out(entries, is_on_host=True)
    region = Region(device=None, start=0, nbytes=plain.nbytes, pinned_for=devices[0][0])
    layout = replace(plain, regions=(region,))
    windows = [_plan_windows(device, plain.nbytes) for device, _ in devices]
    plan = spares.plan(layout.nbytes, layout.regions)
    where = ", ".join(f"{part.nbytes} bytes of {part.name}" for part in windows)
    return layout, replace(plan, image=f"pinned memory of the host, with {where} to exchange it by, because {why}")


def _plan_windows(device: Device, nbytes: int) -> DevicePlan:
    needed = host_exchange.find_windows(nbytes)
    available = device.read_free_nbytes()
    if needed > available:
        raise MemoryPlanError(
            f"Expected {needed} bytes of {device.name} to exchange an image on the host by, got {available} available.",
            remedy="free device memory.",
        )
    return DevicePlan(name=device.name, nbytes=needed, available_nbytes=available)


def _verify_provable(request: StageRequest, entries: Sequence[StateEntry], *, module: nn.Module, why: str) -> None:
    """Refuse what an image on the host cannot be put through.

    Raises:
        UnswappableError: naming all of it.
    """
    problems = [*_find_passes(request), *_find_derived(request, module), *_find_gaps(entries)]
    if is_script(module):
        problems.append(Problem(code="CANNOT_SWAP", message="TorchScript is copied with its weights where these are"))
    if problems:
        raise UnswappableError(
            f"Expected a version that can be proved without running it, because it is staged on the host: {why}.",
            problems=problems,
            remedy="free device memory for a second copy, or leave these out (policy=StagePolicy() for this stage).",
        )


def _find_passes(request: StageRequest) -> Iterator[Problem]:
    policy = request.policy
    for name, wanted in (("warm_up", policy.warm_up), ("goldens", policy.goldens), ("checks", policy.checks)):
        if wanted:
            yield Problem(code="CANNOT_SWAP", message=f"StagePolicy.{name} runs the staged module on its device")


def _find_derived(request: StageRequest, module: nn.Module) -> Iterator[Problem]:
    message = "Derived state is computed on the device"
    if request.refresh is not None:
        yield Problem(code="CANNOT_SWAP", message=f"{message}: ModuleSlot(refresh=...)")
    for path, part in module.named_modules():
        if next(iter(find_refreshers(part)), None) is not None:
            yield Problem(code="CANNOT_SWAP", message=f"{message}: a method marked @hotglm.refresh", tensor=path)


def _find_gaps(entries: Sequence[StateEntry]) -> Iterator[Problem]:
    for entry in entries:
        tensor = entry.tensor
        if places.active.find(tensor) is None or is_dense(tensor) or find_extent(tensor) <= host_exchange.WINDOW_NBYTES:
            continue
        yield Problem(code="CANNOT_SWAP", message="Expected one without gaps between its elements", tensor=entry.name)
