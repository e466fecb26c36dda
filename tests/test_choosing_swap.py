"""The planner of swap policies: in place only for a reason that it can name, and only when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from support.swaps import Model


def describe(module: nn.Module, **options: Any) -> str:
    return hotglm.ModuleSlot(module, name="m", version="1.0.0", **options).status().swap


def test_nothing_is_looked_for_unless_it_is_asked_for() -> None:
    """The default is a flip, whoever holds the parameters; a policy that was named is taken."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert describe(model).startswith("flip: nothing else")
    assert describe(Model(), swap=hotglm.Flip()) == "flip: it was asked for"
    assert describe(Model(), swap=hotglm.InPlace()) == "in place: it was asked for"
    del optimizer


def test_an_optimizer_that_holds_the_parameters_is_a_reason() -> None:
    """It would go on training a version that serves no more; the text names it and a tensor."""
    model, other = Model(), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert describe(other, swap="auto").startswith("flip: nobody was found")
    slot = hotglm.ModuleSlot(model, name="m", version="1.0.0", swap="auto")
    assert slot.status().swap == "in place: AdamW holds 'linear.weight'"
    slot.update(other.state_dict(), version="1.0.1")
    held = optimizer.param_groups[0]["params"][0]
    assert held is model.linear.weight
    assert torch.equal(held, other.linear.weight)


def test_a_module_that_shares_a_tensor_is_a_reason() -> None:
    """A tie with something outside would be cut by a flip; a parent that merely has the module as a part is none."""
    model, head = Model(), nn.Linear(2, 2, bias=False)
    parent = nn.Sequential(model)
    assert describe(model, swap="auto").startswith("flip")
    head.weight = model.linear.weight
    assert describe(model, swap="auto") == "in place: Linear holds 'linear.weight'"
    assert isinstance(parent[0], Model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_a_reason() -> None:
    """What can be swapped in place only is, where the planner is asked."""
    traced: Any = torch.jit.trace(Model().eval(), torch.ones(2, 2))  # type: ignore[no-untyped-call]
    assert describe(traced, swap="auto").startswith("in place: it is TorchScript")
