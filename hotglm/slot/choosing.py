"""Which swap policy a slot gets: the one that was named, or, where the planner was asked, one with its reason.

Rules this module keeps:

- Without being asked the planner does nothing: a slot that names no policy flips.
- In place is chosen only for what a flip would leave behind: code that is compiled for the one object, graphs that were
  captured over its addresses, or somebody who trains or shares the very tensors. What can be seen is said; what cannot
  (graphs that somebody else keeps, addresses handed to other libraries) the user names.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from hotglm.errors import shorten_repr
from hotglm.model.captured import find_captures
from hotglm.model.inspection import find_state
from hotglm.model.references import is_a
from hotglm.model.scripted import is_script
from hotglm.slot.placing import find_devices
from hotglm.slot.policies import Flip, InPlace, SwapChoice

__all__ = ["choose_swap"]


def choose_swap(swap: Flip | InPlace | Literal["auto"] | None, module: nn.Module) -> SwapChoice:
    """Return the policy of a slot around `module`.

    Args:
        swap: a policy; None for `Flip()`; `"auto"` to look for a reason to swap in place. That walks all objects of the
            process once, as a garbage collection does.
        module: as the slot is given it.
    """
    if isinstance(swap, (Flip, InPlace)):
        return SwapChoice(policy=swap, reason="it was asked for")
    if swap is None:
        return SwapChoice(policy=Flip(), reason="nothing else was asked for")
    reason = next(_find_reasons(module), None)
    if reason is None:
        reason = next(_find_scarce(module), None)
    if reason is None:
        return SwapChoice(policy=Flip(), reason="nobody was found who needs the tensors to stay where they are")
    return SwapChoice(policy=InPlace(), reason=reason)


def _find_scarce(module: nn.Module) -> Iterator[str]:
    """Yield the devices that have no room for a second copy; one on the host does for a swap in place."""
    for device, nbytes in find_devices(list(find_state(module))):
        available = device.read_free_nbytes()
        if nbytes > available:
            yield f"two copies do not fit on {device.name}, which has {available} bytes for another {nbytes}"


def _find_reasons(module: nn.Module) -> Iterator[str]:
    if is_script(module):
        yield "it is TorchScript, which is compiled for the one object"
        return
    yield from find_captures(module)
    names = {id(entry.registered): entry.registered_name for entry in find_state(module)}
    parts = {id(part) for part in module.modules()}
    for item in gc.get_objects():
        # By its class, because `isinstance` may ask the object, and a lazy one would wake up.
        if is_a(item, torch.optim.Optimizer):
            tensors = [tensor for group in item.param_groups for tensor in group["params"]]
        elif is_a(item, nn.Module) and id(item) not in parts and "_parameters" in vars(item):
            tensors = [*item._parameters.values(), *item._buffers.values()]
        else:
            continue
        name = next((names[id(tensor)] for tensor in tensors if id(tensor) in names), None)
        if name is not None:
            yield f"{type(item).__name__} holds {shorten_repr(name)}"
