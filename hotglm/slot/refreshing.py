"""Derived state of a staged module, computed anew from the weights that were loaded.

Rules this module keeps:

- What a refresh writes into the state dict is hashed again, because that is what will be live (P12).
- That it was written is seen in the bytes, too: writes through `.data` move no version counter of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hotglm.errors import Problem, RefreshError
from hotglm.model.derived import find_refreshers, run_refreshers
from hotglm.model.twin import Twin, settle_in_place
from hotglm.problem import describe_exception
from hotglm.weights import places
from hotglm.weights.device_seals import take_fingerprints
from hotglm.weights.download import digest_in_place
from hotglm.weights.proof import Loaded
from hotglm.weights.seals import seal_tensor
from hotglm.weights.workers import Cancellation

__all__ = ["refresh_derived"]


def refresh_derived(twin: Twin, loaded: Loaded, *, refresh: Callable[[nn.Module], object] | None) -> tuple[str, ...]:
    """Run the refresh methods of a twin, then `refresh`; return their names, and take digests again where they wrote.

    Raises:
        RefreshError: one of them raised.
    """
    module = twin.module
    if refresh is None and all(next(find_refreshers(part), None) is None for part in module.modules()):
        return ()
    views = {name: twin.views[name] for name in loaded.digests}
    before = _look(views)
    ran = (*run_refreshers(module), *_run(refresh, module))
    settle_in_place(twin)
    after = _look(views)
    written = [name for name in views if after[name] != before[name]]
    loaded.digests |= {name: digest_in_place(views[name], cancellation=Cancellation()) for name in written}
    return ran


def _look(views: Mapping[str, torch.Tensor]) -> dict[str, tuple[object, ...]]:
    """Return, for each view, what is another after a write: torch's counter, and a fingerprint."""
    devices = {name: places.active.find(view) for name, view in views.items()}
    found: dict[str, tuple[object, ...]] = {}
    for name, view in views.items():
        if devices[name] is None:
            seal = seal_tensor(view, digest="", is_finite=False)
            found[name] = (view._version, seal.digest, seal.fingerprint)
    for device in {device.name: device for device in devices.values() if device is not None}.values():
        mine = [name for name, other in devices.items() if other is device]
        with device.staging():
            device.wait_for(device.record_here())  # behind the refresh, which ran on this thread's stream
        fingerprints = take_fingerprints([views[name] for name in mine], device)
        found |= {name: (views[name]._version, one) for name, one in zip(mine, fingerprints, strict=True)}
    return found


def _run(refresh: Callable[[nn.Module], object] | None, module: nn.Module) -> tuple[str, ...]:
    if refresh is None:
        return ()
    label = getattr(refresh, "__qualname__", repr(refresh))
    try:
        with torch.no_grad():
            refresh(module)
    except Exception as error:
        raise RefreshError(
            "Expected derived state to be recomputed, got an error.",
            problems=[Problem(code="REFRESH_FAILED", message=f"{label} raised {describe_exception(error)}")],
            remedy="make the refresh function work from the module it is given alone.",
        ) from error
    return (label,)
