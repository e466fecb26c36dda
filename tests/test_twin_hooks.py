"""Hooks and functions on a module: carried into the next generation or refused by name, never left with the old."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import UncopyableError
from support.swaps import build, make_class, same_bits, swap

X = torch.arange(4.0).reshape(2, 2)

# -- hooks -------------------------------------------------------------------------------------------------------------


class Counter:
    """A hook with state of its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num = 0

    def __call__(self, *_: object) -> None:
        self.num += 1

    def count(self, *_: object) -> None:
        self.num += 1


@pytest.mark.parametrize("as_method", [False, True])
def test_a_hook_of_somebody_else_goes_on_with_its_state(*, as_method: bool) -> None:
    """Hook objects, and methods of objects outside the module, are shared by the generations (G05)."""
    counter = Counter()
    hook = counter.count if as_method else counter

    def prepare(model: Any) -> None:
        model.linear.register_forward_hook(hook)
        model.register_forward_pre_hook(hook)

    slot, _ = swap(make_class(prepare))
    slot(X)
    assert counter.num == 2
    slot.rollback()
    slot(X)
    assert counter.num == 4


def test_every_kind_of_module_hook_is_carried_over() -> None:
    """Forward, pre-forward, keyword, backward and state-dict hooks run in the new generation too."""
    seen: list[str] = []

    def prepare(model: Any) -> None:
        model.register_forward_pre_hook(lambda m, a, k: seen.append("pre"), with_kwargs=True)
        model.register_forward_hook(lambda m, a, k, o: seen.append("post"), with_kwargs=True, always_call=True)
        model.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
        model.register_state_dict_post_hook(lambda m, s, p, meta: seen.append("state"))

    slot, _ = swap(make_class(prepare))
    seen.clear()
    slot(X.clone().requires_grad_()).sum().backward()
    slot.state_dict()
    assert seen == ["pre", "post", "backward", "state"]


def _close_over(captured: Any) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return captured, x

    return function


def _default(captured: Any) -> Callable[..., Any]:
    def function(x: Any, layer: Any = captured) -> Any:
        return layer(x)

    return function


def _keyword_default(captured: Any) -> Callable[..., Any]:
    def function(x: Any, *, layer: Any = captured) -> Any:
        return layer(x)

    return function


CAPTURES: dict[str, Callable[[Any], object]] = {
    "module": _close_over,
    "part": lambda m: _close_over(m.linear),
    "parameter": lambda m: _close_over(m.linear.weight),
    "view of a parameter": lambda m: _close_over(m.linear.weight.detach().t()),
    "bound method": lambda m: _close_over(m.linear.forward),
    "partial": lambda m: _close_over(functools.partial(m.linear)),
    "list": lambda m: _close_over([m.linear]),
    "default argument": lambda m: _default(m.linear),
    "keyword default": lambda m: _keyword_default(m.linear),
    "function in a function": lambda m: _close_over(_close_over(m.linear)),
    "function in nested dicts": lambda m: {"a": {"b": _close_over(m.linear)}},
    "cache of a method": lambda m: functools.lru_cache(m.linear.forward),
    "weak dictionary": lambda m: weakref.WeakValueDictionary(a=m.linear),
    "weak keys": lambda m: weakref.WeakKeyDictionary({m.linear.weight: 1}),
    "weak set": lambda m: weakref.WeakSet([m.linear]),
    "numpy array over a weight": lambda m: m.linear.weight.detach().numpy(),
}


@pytest.mark.parametrize("kind", CAPTURES)
def test_a_function_that_has_captured_the_old_module_is_refused_by_name(kind: str) -> None:
    """What would go on running the old weights, and cannot be copied, is refused and named."""
    maker = build(make_class(lambda model: setattr(model, "f", CAPTURES[kind](model))))
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    before = slot(X)
    with pytest.raises(UncopyableError) as caught:
        slot.update(maker(2).state_dict(), version="1.0.1")
    assert [problem.code for problem in caught.value.problems] == ["UNCOPYABLE"]
    assert "'f'" in str(caught.value)
    assert same_bits(slot(X), before)


def test_hooks_that_capture_the_module_are_all_refused_at_once() -> None:
    """Every uncopyable hook and attribute of a module is in one error."""

    def prepare(model: Any) -> None:
        model.register_forward_hook(_close_over(model.linear))
        model.linear.weight.register_hook(lambda grad: grad)
        model.f = _close_over(model)

    with pytest.raises(UncopyableError) as caught:
        swap(make_class(prepare))
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "'_forward_hooks'" in text
    assert "'f'" in text
    assert "'linear.weight'" in text
