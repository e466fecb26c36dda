"""Traced and scripted modules: swapped in place they give the new outputs; what their code has swallowed is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import CallableCheckError, IncompatibleError, UnswappableError
from support.swaps import Model, build, make_class, same_bits

X = torch.arange(4.0).reshape(2, 2)


class Net(nn.Module):
    """Two layers, a tie, a buffer and an index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.second.weight = self.first.weight
        self.register_buffer("order", torch.tensor([1, 0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = torch.index_select(self.first(x), 1, self.order)  # type: ignore[arg-type]
        return torch.nn.functional.relu(self.norm(self.second(picked))) * 2.5 + torch.arange(2)


NET = build(lambda: Net().eval())


def _trace(module: nn.Module) -> nn.Module:
    traced: nn.Module = torch.jit.trace(module, X)  # type: ignore[no-untyped-call]
    return traced


def _script(module: nn.Module) -> nn.Module:
    scripted: nn.Module = torch.jit.script(module)
    return scripted


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {"traced": _trace, "scripted": _script}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


STATE = {**NET(2).state_dict(), "order": torch.tensor([1, 0])}


def make_slot(module: nn.Module, **options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(module, **{"name": "net", "version": "1.0.0", "swap": hotglm.InPlace(), **options})


@pytest.mark.parametrize("kind", MAKERS)
def test_swaps_give_the_new_outputs(kind: str) -> None:
    """G14: updates, checks and rollbacks of TorchScript, bit for bit; object and addresses stay."""
    module = MAKERS[kind](NET(1))
    slot, before = make_slot(module), [tensor.data_ptr() for tensor in module.parameters()]
    seen = []

    def look(staged: nn.Module) -> bool:
        seen.append(staged(X))
        return True

    policy = hotglm.StagePolicy(checks=(look,), warm_up=(X,))
    for seed in (2, 3, 4):
        state = MAKERS[kind](NET(seed)).state_dict()  # in TorchScript every buffer is persistent
        receipt = slot.update(state, version=f"1.0.{seed}", policy=policy)
        assert same_bits(slot(X), NET(seed)(X))
        assert same_bits(seen[-1], NET(seed)(X))  # it was proved beside the live one
        assert receipt.in_place is not None
        assert receipt.in_place.addresses_stable
    slot.rollback()
    assert same_bits(slot(X), NET(3)(X))
    assert slot.verify_live().num_compared == len(module.state_dict())
    assert slot.live.module is module
    assert [tensor.data_ptr() for tensor in module.parameters()] == before


def test_a_check_that_says_no_leaves_the_live_version() -> None:
    """P2: the staged version is a module of its own; what is live serves on."""
    slot = make_slot(_trace(NET(1)))
    with pytest.raises(CallableCheckError):
        slot.update(STATE, version="1.0.1", policy=hotglm.StagePolicy(checks=(lambda staged: False,)))
    assert same_bits(slot(X), NET(1)(X))


def test_a_flip_refuses_it_and_says_what_does_not() -> None:
    """Two of it would be two codes; the remedy names the policy."""
    with pytest.raises(UnswappableError, match=r"swap=hotglm\.InPlace\(\)"):
        hotglm.ModuleSlot(_trace(NET(1)), name="net", version="1.0.0")


def _cache(self: Any) -> None:
    self.cache = self.linear.weight.detach().t() * 2


CACHED = make_class(_cache, lambda self, x: self.linear(x) @ self.cache)


def test_a_constant_of_the_code_is_refused() -> None:
    """G04, G14: a tensor that tracing has turned into a constant is named by its shape and line."""
    traced = _trace(build(CACHED)(1))
    with pytest.raises(
        UnswappableError, match=r"constant float32 tensor of shape \[2, 2\], from .*test_in_place_traced"
    ):
        make_slot(traced)
    slot = make_slot(traced, constants="*")  # whoever says so answers for it
    slot.update(build(CACHED)(2).state_dict(), version="1.0.1")


def test_a_frozen_module_is_refused() -> None:
    """G14: after `torch.jit.freeze` there is nothing left to write."""
    with pytest.raises(UnswappableError, match="frozen"):
        make_slot(torch.jit.freeze(_script(NET(1))))


def _table(self: Any) -> None:
    self.register_buffer("table", self.linear.weight.detach().t() * 2, persistent=False)


TABLED = make_class(_table, lambda self, x: self.linear(x) @ self.table)


def test_every_buffer_of_a_traced_module_comes_with_its_weights() -> None:
    """G03: a buffer that the eager model recomputes is weights here; without it a source is refused, with its name."""
    slot = make_slot(_trace(build(TABLED)(1)))
    with pytest.raises(IncompatibleError, match="table"):
        slot.update(build(TABLED)(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), build(TABLED)(1)(X))
    slot.update(_trace(build(TABLED)(2)).state_dict(), version="1.0.1")
    assert same_bits(slot(X), build(TABLED)(2)(X))


def test_a_copy_of_the_slot_is_independent() -> None:
    """Deepcopy copies the TorchScript module as well."""
    slot = make_slot(_trace(NET(1)))
    other = copy.deepcopy(slot)
    other.update(STATE, version="1.0.1")
    assert same_bits(other(X), NET(2)(X))
    assert same_bits(slot(X), NET(1)(X))


def test_a_traced_part_of_an_eager_module_is_refused_still() -> None:
    """Only a module that is TorchScript as a whole is taken."""
    module = Model()
    module.linear = _trace(module.linear)  # type: ignore[assignment]
    with pytest.raises(UnswappableError, match="linear"):
        make_slot(module)
