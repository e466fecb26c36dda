"""Autograd across swaps: a backward pass belongs to the version of its forward pass, and is never silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import hotglm
from support.swaps import build, same_bits

X = torch.arange(4.0).reshape(2, 2)
MAKER = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))


def _slot() -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(MAKER(1), name="model", version="1.0.0")


def _update(slot: hotglm.ModuleSlot, seed: int) -> None:
    slot.update(MAKER(seed).state_dict())


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


@pytest.mark.parametrize("start", [1, 2], ids=["given module", "arena"])
def test_a_backward_pass_over_a_swap_is_that_of_the_old_version(start: int) -> None:
    """forward, any number of swaps, backward: the gradients are the old weights' and land on them alone (G06)."""
    slot = _slot()
    if start == 2:
        _update(slot, 2)
    parameters = list(slot.parameters())
    loss = slot(X).square().sum()
    for seed in range(3, 9):  # more often than there are arenas
        _update(slot, seed)
    loss.backward()
    for parameter, gradient in zip(parameters, _gradients(MAKER(start)), strict=True):
        assert parameter.grad is not None
        assert same_bits(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in slot.parameters())
    assert same_bits(_gradients(slot), _gradients(MAKER(8)))


def test_a_graph_alone_keeps_the_weights_it_needs() -> None:
    """Nothing but the loss is kept: the weights of its backward pass are not overwritten under it (G06)."""
    slot = _slot()
    _update(slot, 2)
    x = X.clone().requires_grad_()
    wanted = torch.autograd.grad(MAKER(2)(x).square().sum(), x)[0]
    loss = slot(x).square().sum()
    for seed in range(3, 9):
        _update(slot, seed)
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)


def test_double_backward_over_a_swap() -> None:
    """Gradients of gradients are those of the version of the forward pass."""
    slot = _slot()
    x = X.clone().requires_grad_()
    wanted = _second(MAKER(1)(x), x, lambda: None)
    assert same_bits(_second(slot(x), x, lambda: _update(slot, 2)), wanted)


def _second(output: torch.Tensor, x: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    between()
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def test_an_optimizer_goes_on_with_the_parameters_it_was_given() -> None:
    """After a swap, a step of an older optimizer trains the older version; the live one does not move."""
    slot = _slot()
    _update(slot, 2)
    optimizer = torch.optim.SGD(slot.parameters(), lr=1.0)
    slot(X).square().sum().backward()
    _update(slot, 3)
    before = slot(X)
    optimizer.step()
    assert same_bits(slot(X), before)
    slot.rollback()
    trained = MAKER(2)
    gradients = _gradients(trained)
    with torch.no_grad():
        for parameter, gradient in zip(trained.parameters(), gradients, strict=True):
            parameter.sub_(gradient)
    assert same_bits(slot(X), trained(X))  # what an optimizer did to a held version is in it after a rollback


def test_training_the_live_version_and_pushing_it_back() -> None:
    """The loop of an RL trainer: train a model of one's own, push its weights, act; nothing of the two is shared."""
    trained, slot = MAKER(1), _slot()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        trained(X).square().sum().backward()
        optimizer.step()
        slot.update(dict(trained.named_parameters()))
        assert same_bits(slot(X), trained(X))
    assert all(p.grad is None and p.requires_grad for p in slot.parameters())
