"""Golden outputs are a promise: a version that would give back something else is refused before it is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hotglm
from hotglm.slot.checks import Golden, StagePolicy

IDS = torch.zeros(2, 3, dtype=torch.int64)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, width)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.embed(ids)}


def make(width: int) -> Head:
    module = Head(width)
    nn.init.ones_(module.embed.weight)
    return module


def policy(width: int) -> StagePolicy:
    return StagePolicy(goldens=(Golden(inputs=IDS, outputs={"logits": torch.ones(2, 3, width)}),))


def make_slot() -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(make(32000), name="lm", version="2.3.0", policy=policy(32000))


def test_a_wider_output_needs_a_major_step() -> None:
    """The example of DESIGN section 7: a version that gives wider logits and claims 2.4.0 is refused."""
    slot = make_slot()
    with pytest.raises(hotglm.IncompatibleError) as caught:
        slot.stage(make(32064), version="2.4.0", policy=policy(32064))
    assert caught.value.verdict is not None
    assert [reason.code for reason in caught.value.verdict.reasons] == ["UNDERCLAIMED", "MAJOR_REFUSED"]
    message = caught.value.verdict.reasons[0].message
    assert message == "claims 2.4.0 after 2.3.0, but output 'logits' went from 32000 to 32064 wide: needs 3.0.0."
    assert slot.version == "2.3.0"
    assert torch.equal(slot(IDS)["logits"], torch.ones(2, 3, 32000))


def test_an_honest_wider_output_is_taken_where_major_steps_are() -> None:
    """The same step under an honest number goes live, and its promise with it."""
    slot = hotglm.ModuleSlot(make(8), name="lm", version="2.3.0", policy=policy(8), accept="major")
    slot.update(make(9), version="3.0.0", policy=policy(9))
    assert slot.live.contract.outputs == hotglm.contract_of(make(9), inputs=[IDS]).outputs


def test_new_values_keep_the_promise() -> None:
    """An update of values alone promises what was promised, also under a policy without golden outputs."""
    slot = make_slot()
    promised = slot.live.contract.outputs
    assert promised is not None
    slot.update({"embed.weight": torch.ones(4, 32000)}, version="2.3.1", policy=StagePolicy())
    assert slot.live.contract.outputs == promised
    with pytest.raises(hotglm.IncompatibleError, match="32064 wide"):
        slot.stage(make(32064), version="2.4.0", policy=policy(32064))


class Picker(nn.Module):
    """Gives back as many rows as its weights say."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.keep > 0]


def test_a_shape_that_follows_the_values_is_no_change_of_the_promise() -> None:
    """The same code with other golden shapes shows that they follow the values, and is no step that callers notice."""
    x = torch.arange(3.0)
    first = StagePolicy(goldens=(Golden(inputs=x, outputs=x),))
    slot = hotglm.ModuleSlot(Picker(), version="1.0.0", policy=first)
    keep = {"keep": torch.tensor([1.0, 0.0, 1.0])}
    slot.update(keep, version="1.0.1", policy=StagePolicy(goldens=(Golden(inputs=x, outputs=x[[0, 2]]),)))
    assert slot.version == "1.0.1"
    outputs = slot.live.contract.outputs
    assert outputs is not None
    assert len(outputs.recordings) == 2


def test_code_without_golden_outputs_promises_nothing_about_them() -> None:
    """New code under a policy without golden outputs has an unknown output, which is not compared."""
    slot = make_slot()
    slot.update(make(32064), version="2.4.0", policy=StagePolicy())
    assert slot.live.contract.outputs is None
