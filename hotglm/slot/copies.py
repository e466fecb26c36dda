"""Slots that are copied and pickled: the live module and the settings go along, and history stays behind.

Rules this module keeps:

- A copy is a slot of its own: what is live in it is its first generation.
- What is known of that generation's code goes along, so that later versions are decided on as in the first slot.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hotglm.model.compiled import adopt_compiled
from hotglm.slot.core import SlotCore
from hotglm.slot.generation import Generation
from hotglm.version import Version

if TYPE_CHECKING:
    from hotglm.slot.slot import ModuleSlot

__all__ = ["copy_slot", "rebuild_slot", "reduce_slot"]


def copy_slot(core: SlotCore, generation: Generation, memo: dict[int, Any], *, kind: type[ModuleSlot]) -> ModuleSlot:
    """Return an independent slot around a deep copy of `generation`, which is live in `core`."""
    copied = kind(copy.deepcopy(generation.module, memo), **_find_options(core, generation))
    _continue(copied, _find_facts(core, generation))
    adopt_compiled(copied.live.module, generation.module)
    copied._admission.refresh_call()
    return copied


def reduce_slot(core: SlotCore, generation: Generation, protocol: Any, *, kind: type[ModuleSlot]) -> tuple[Any, ...]:
    """Return what `pickle` makes a slot again from.

    By value and with the plain pickler: that of `multiprocessing` moves the tensors that it is given into memory
    that the other process can write (P5; `tests/test_fork.py`).
    """
    module = pickle.dumps(generation.module, protocol)
    return rebuild_slot, (kind, module, _find_options(core, generation), _find_facts(core, generation))


def rebuild_slot(
    kind: Callable[..., ModuleSlot], module: bytes, options: dict[str, Any], facts: dict[str, Any]
) -> ModuleSlot:
    """Return the slot that `reduce_slot` has described."""
    slot = kind(pickle.loads(module), **options)  # noqa: S301 - part of a pickle that is being read already
    _continue(slot, facts)
    return slot


def _find_options(core: SlotCore, generation: Generation) -> dict[str, Any]:
    settings = core.settings
    return {
        "name": settings.name,
        "version": str(generation.version),
        "accept": settings.accept,
        "policy": settings.policy,
        "memory": settings.memory,
        "constants": settings.constants,
        "refresh": settings.refresh,
        "migrations": settings.migrations,
        "trust": settings.trust,
        "swap": settings.swap.policy,
    }


def _find_facts(core: SlotCore, generation: Generation) -> dict[str, Any]:
    return {
        "code_version": str(generation.code_version),
        "is_migrated": generation.is_migrated,
        "origin": generation.origin,
        "requantize": core.settings.requantize,  # not by the constructor: what is live may have come of another config
    }


def _continue(slot: ModuleSlot, facts: dict[str, Any]) -> None:
    live, core = slot.live, slot._core
    live.code_version, live.is_migrated = Version(facts["code_version"]), facts["is_migrated"]
    live.origin = facts["origin"]
    core.settings = replace(core.settings, requantize=facts["requantize"])
