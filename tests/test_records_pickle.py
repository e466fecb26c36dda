"""Receipts and refusals are data: they survive pickling, as on the way out of a worker process."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import hotglm


def make_slot() -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(nn.Linear(2, 2), name="m", version="1.0.0")


def test_a_receipt_survives_pickling() -> None:
    """A receipt of a commit and one of a rollback are equal after a round trip."""
    slot = make_slot()
    for receipt in (slot.update(nn.Linear(2, 2), version="1.0.1"), slot.rollback()):
        assert pickle.loads(pickle.dumps(receipt)).to_dict() == receipt.to_dict()


@pytest.mark.parametrize(
    "source",
    [
        {"weight": torch.zeros(3, 2)},
        {"weight": torch.full((2, 2), float("nan")), "bias": torch.zeros(2)},
        "no.safetensors",
    ],
    ids=["incompatible", "nonfinite", "missing"],
)
def test_a_refusal_survives_pickling(source: dict[str, torch.Tensor] | str) -> None:
    """An error of an update keeps class, text, code and receipt, and the live generation still serves, bit for bit."""
    slot = make_slot()
    before = slot(torch.ones(1, 2))
    with pytest.raises(hotglm.HotglmError) as caught:
        slot.update(source, version="1.0.1")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is caught.type
    assert (str(again), again.code) == (str(caught.value), caught.value.code)
    assert again.receipt is not None
    assert torch.equal(slot(torch.ones(1, 2)), before)
