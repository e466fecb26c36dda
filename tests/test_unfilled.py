"""Offered tensors fill the persistent state of the code exactly, or everything in the way is named."""

from __future__ import annotations

import pytest
from hypothesis import given

from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from support.contracts import contract, contracts, tensor

W = tensor("w")


def unfilled(code: Contract, **offered: tuple[str, tuple[int, ...]]) -> list[str]:
    return [found.code for found in find_unfilled(code, Contract.of_tensors(offered))]


TIED = contract(tensor("emb", tied="emb"), tensor("head", tied="emb"), tensor("mask", kind="buffer", persistent=False))


def test_tensors_that_fit_exactly_fill_the_code() -> None:
    """Offering just the persistent state, with its shapes and dtypes, leaves nothing to complain about."""
    assert unfilled(contract(W), w=("float32", (2, 3))) == []


def test_every_misfit_is_named_at_once() -> None:
    """Missing, unexpected, wrong shape and wrong dtype are found together."""
    code = contract(tensor("a"), tensor("b"), tensor("c"))
    assert unfilled(code, b=("float32", (3, 2)), c=("int8", (2, 3)), d=("int8", ())) == [
        "TENSOR_MISSING",
        "SHAPE_CHANGED",
        "DTYPE_CHANGED",
        "TENSOR_UNEXPECTED",
    ]


@pytest.mark.parametrize("names", [("emb",), ("head",), ("emb", "head")])
def test_any_name_of_a_tied_group_fills_it(names: tuple[str, ...]) -> None:
    """One name of a tied group is enough, whichever it is, and so are all of them."""
    assert unfilled(TIED, **dict.fromkeys(names, ("float32", (2, 3)))) == []


def test_a_tied_group_without_any_name_is_missing_as_a_whole() -> None:
    """When no name of a tied group is offered, every name is reported."""
    assert unfilled(TIED) == ["TENSOR_MISSING", "TENSOR_MISSING"]


def test_each_offered_name_of_a_tied_group_must_fit() -> None:
    """A second name of a tied group is held to the same shape."""
    assert unfilled(TIED, emb=("float32", (2, 3)), head=("float32", (9,))) == ["SHAPE_CHANGED"]


def test_a_non_persistent_buffer_is_not_offered() -> None:
    """A non-persistent buffer is not missing when absent, and is unexpected when present."""
    assert unfilled(TIED, emb=("float32", (2, 3)), mask=("float32", (2, 3))) == ["TENSOR_UNEXPECTED"]


@given(contracts())
def test_a_contract_fills_itself(one: Contract) -> None:
    """The persistent part of a contract fills it exactly."""
    offered = {name: (spec.dtype, spec.shape) for name, spec in one.state.items() if spec.persistent}
    assert list(find_unfilled(one, Contract.of_tensors(offered))) == []
