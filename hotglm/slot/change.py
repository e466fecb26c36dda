"""One commit or rollback in place: what it is to do, and what is made ready for it before the gate closes.

Rules this module keeps: data; only what a change comes to is written, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hotglm.model.compiled import CompiledCall
from hotglm.slot.claim import Claim
from hotglm.slot.generation import Generation
from hotglm.slot.publication import Publication
from hotglm.weights import places
from hotglm.weights.digest import digest_tensor
from hotglm.weights.exchanges import Exchanges

__all__ = ["Change", "Publications", "Ready", "digest_where_it_is"]

Publications = tuple[Publication, Publication]
"""What was published before a change, and after it."""


@dataclass(slots=True, kw_only=True)
class Change:
    """What one commit or rollback is to do, and what it comes to.

    Attributes:
        choose: called under the writers' lock with what is published; returns the generation to be made live, or
            raises.
        claim: taken when nobody is inside, right before the first byte; given back where the change is undone.
        follow: makes the next publication of the latest one, the new live generation and the displaced one.
        outcome: set right before the store.
    """

    choose: Callable[[Publication], Generation]
    claim: Claim
    follow: Callable[[Publication, Generation, Generation], Publication]
    outcome: Publications | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What is made before the gate closes.

    Attributes:
        generation: staged or held; its tensors have the bytes that are to be live.
        exchange: of them with the live ones.
        digests: of derived tensors among them.
        loose: tensors of the live module that are neither parameters nor buffers that files carry.
        calls: its compiled parts, which begin to count anew.
    """

    generation: Generation
    exchange: Exchanges
    digests: dict[str, str]
    loose: tuple[Any, ...]
    calls: tuple[CompiledCall, ...]


def digest_where_it_is(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor that is at rest, read by the side stream where it is on a device."""
    device = places.active.find(tensor)
    with contextlib.nullcontext() if device is None else device.submitting():
        return digest_tensor(tensor)
