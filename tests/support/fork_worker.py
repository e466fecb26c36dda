"""What a worker of multiprocessing runs; in a module of its own, so that spawned interpreters can import it."""

from __future__ import annotations

from typing import Any

import torch

import hotglm
from support.universal import Chain, make_state

__all__ = ["serve"]


def serve(slot: hotglm.ModuleSlot, answers: Any) -> None:
    """Run passes and one update in the slot that came with the process; answer its version."""
    x = torch.arange(8.0)
    slot(x)
    slot.update(make_state(2), version="1.0.2")
    plain = Chain()
    plain.load_state_dict(make_state(2))
    assert slot(x).equal(plain(x))
    answers.put(str(slot.version))
