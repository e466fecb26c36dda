"""What a slot was made with, and what one stage was asked for.

Rules this module keeps: data, and whether it can be meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hotglm.errors import ArgumentError
from hotglm.migration.registry import Migrations
from hotglm.progress import Progress
from hotglm.slot.checks import StagePolicy
from hotglm.slot.memory import MemoryPolicy
from hotglm.slot.policies import Flip, InPlace, SwapChoice
from hotglm.slot.requantize import Requantize
from hotglm.trust.policy import Trust
from hotglm.version import Bump

__all__ = ["SlotSettings", "StageOptions", "verify_settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """What a slot was made with; see `ModuleSlot`."""

    name: str
    accept: Bump
    policy: StagePolicy
    memory: MemoryPolicy
    constants: tuple[str, ...]
    refresh: Callable[[nn.Module], object] | None
    swap: SwapChoice
    requantize: Requantize | None = None
    migrations: Migrations | None = None
    trust: Trust | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """What one stage was asked for; see `ModuleSlot.stage`."""

    policy: StagePolicy | None = None
    digests: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None
    progress: Callable[[Progress], object] | None = None


def verify_settings(
    *,
    name: object,
    policy: object,
    memory: object,
    refresh: object,
    migrations: object,
    trust: object,
    swap: object,
) -> None:
    """Return when a slot can be made with these; see `ModuleSlot`.

    Raises:
        ArgumentError: naming those that are of no kind that can be meant.
    """
    wrong = [
        *(["name"] if name is not None and not (isinstance(name, str) and name) else []),
        *(["policy"] if policy is not None and not isinstance(policy, StagePolicy) else []),
        *(["memory"] if memory is not None and not isinstance(memory, MemoryPolicy) else []),
        *(["refresh"] if refresh is not None and not callable(refresh) else []),
        *(["migrations"] if migrations is not None and not isinstance(migrations, Migrations) else []),
        *(["trust"] if trust is not None and not isinstance(trust, Trust) else []),
        *(["swap"] if swap is not None and not isinstance(swap, (Flip, InPlace)) and swap != "auto" else []),
    ]
    if wrong:
        raise ArgumentError(
            f"Expected settings of a slot that can be meant, got bad {', '.join(wrong)}.",
            remedy="name is text, policy a StagePolicy, memory a MemoryPolicy, refresh a function of a module, "
            'migrations a Migrations, trust what open_trust returns, swap a Flip, an InPlace or "auto".',
        )
