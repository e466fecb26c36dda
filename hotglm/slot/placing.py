"""Where the image of a version is staged: laid out, and planned, before anything is taken.

Rules this module keeps: what is exchanged in place has the room behind it that the exchange needs
(`[Note: exchange]`, weights/device_exchange.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hotglm.model.extents import lay_out
from hotglm.model.inspection import StateEntry, find_state
from hotglm.slot.memory import MemoryPlan
from hotglm.slot.spare import Spares
from hotglm.weights.device_exchange import find_room
from hotglm.weights.layout import Layout, find_no_room

__all__ = ["plan_image"]


def plan_image(spares: Spares, entries: Sequence[StateEntry], *, live: nn.Module) -> tuple[Layout, MemoryPlan]:
    """Return where each tensor of a version goes, and where the memory for that comes from.

    Args:
        spares: of the slot.
        entries: the state of the version.
        live: the module that serves.

    Raises:
        MemoryPlanError: there is none within the policy and the limits.
    """
    room = find_room if spares.admission.is_in_place else find_no_room
    layout = lay_out(entries, like=find_state(live), find_room=room)
    return layout, spares.plan(layout.nbytes, layout.regions)
