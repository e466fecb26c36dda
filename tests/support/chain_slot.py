"""A slot around the chain of `support.universal`, with two copies, and the events it tells; fixtures to import."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import hotglm
from hotglm.events import Event
from support.universal import Chain, make_state

__all__ = ["X", "answer", "heard", "kinds", "make", "slot", "stage"]

X = torch.arange(8.0)


def make(number: int = 0) -> Chain:
    chain = Chain()
    chain.load_state_dict(make_state(number))
    return chain


def answer(number: int) -> torch.Tensor:
    return cast("torch.Tensor", make(number)(X))


@pytest.fixture
def slot() -> hotglm.ModuleSlot:
    memory = hotglm.MemoryPolicy(small_nbytes=0, drain_timeout_s=0.01)
    return hotglm.ModuleSlot(make(), name="chain", version="1.0.0", memory=memory)


@pytest.fixture
def heard(slot: hotglm.ModuleSlot) -> list[Event]:
    events: list[Event] = []
    slot.subscribe(events.append)
    return events


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def stage(slot: hotglm.ModuleSlot, number: int, **options: Any) -> hotglm.Staged:
    return slot.stage(make_state(number), version=f"1.0.{number}", **options)
