"""Derived state of a staged module, computed anew from the weights that were loaded.

Rules this module keeps:

- What a refresh writes into the state dict is hashed again, because that is what will be live (P12).
- That it was written is seen in the bytes, too: writes through `.data` move no version counter of torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hotglm.errors import Problem, RefreshError
from hotglm.model.derived import find_refreshers, run_refreshers
from hotglm.model.twin import Twin, settle_in_place
from hotglm.problem import describe_exception
from hotglm.weights import places
from hotglm.weights.digest import digest_tensor
from hotglm.weights.proof import Loaded
from hotglm.weights.seals import seal_tensor

__all__ = ["refresh_derived"]


def refresh_derived(twin: Twin, loaded: Loaded, *, refresh: Callable[[nn.Module], object] | None) -> tuple[str, ...]:
    """Run the refresh methods of a twin, then `refresh`; return their names, and take digests again where they wrote.

    Raises:
        RefreshError: one of them raised.
    """
    module = twin.module
    if refresh is None and all(next(find_refreshers(part), None) is None for part in module.modules()):
        return ()
    before = {name: _look(twin.views[name]) for name in loaded.digests}
    ran = (*run_refreshers(module), *_run(refresh, module))
    settle_in_place(twin)
    written = [name for name, found in before.items() if _look(twin.views[name]) != found]
    loaded.digests |= {name: digest_tensor(twin.views[name]) for name in written}
    return ran


def _look(view: torch.Tensor) -> tuple[object, ...]:
    """Return what is another after a write: torch's counter and, where memory is quick to read, a fingerprint."""
    if places.active.find(view) is not None:
        return (view._version,)
    seal = seal_tensor(view, digest="", is_finite=False)
    return (view._version, seal.digest, seal.fingerprint)


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
