"""Twins: the next generation is the user's own class and attributes, over the next version's weights."""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import hotglm
from hotglm.errors import UncopyableError
from support.swaps import Model, build, make_class, same_bits, swap

X = torch.arange(4.0).reshape(2, 2)


class Child(nn.Module):
    """A part that knows its parent, by whatever `refer` makes of it."""

    def __init__(self, parent: Any, refer: Callable[[Any], Any], look: Callable[[Any], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2))
        object.__setattr__(self, "parent", refer(parent))
        self.look = look

    def forward(self, x: torch.Tensor) -> Any:
        return self.look(self.parent).linear(x) * self.scale


def _call(reference: Any) -> Any:
    return reference()


def _same(item: Any) -> Any:
    return item


def _first(items: Any) -> Any:
    return items[0]


def _deep(items: Any) -> Any:
    return items["a"][0]()


ROUNDABOUT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "weak reference": (weakref.ref, _call),
    "weak proxy": (weakref.proxy, _same),
    "nested weak reference": (lambda parent: {"a": [weakref.ref(parent)]}, _deep),
    "list": (lambda parent: [parent], _first),
    "hidden attribute": (_same, _same),
}


@pytest.mark.parametrize("kind", ROUNDABOUT)
def test_a_part_that_refers_to_its_parent_refers_to_the_new_one(kind: str) -> None:
    """Weak and strong references between parts of a module lead to the parts of the same generation."""
    refer, look = ROUNDABOUT[kind]

    def prepare(model: Any) -> None:
        model.child = Child(model, refer, look)

    slot, cold = swap(make_class(prepare, lambda self, x: self.child(x)))
    assert same_bits(slot(X), cold(X))
    child = slot.live.module.get_submodule("child")
    linear = slot.live.module.get_submodule("linear")
    assert look(child.parent).linear is linear


ATTRIBUTES: dict[str, tuple[Callable[[Any], object], Callable[[Any, torch.Tensor], Any]]] = {
    "bound method of a part": (lambda m: setattr(m, "f", m.linear.forward), lambda m, x: m.f(x)),
    "partial": (lambda m: setattr(m, "f", functools.partial(m.linear.forward)), lambda m, x: m.f(x)),
    "patched forward": (
        lambda m: setattr(m.linear, "forward", types.MethodType(lambda self, x: x @ self.weight, m.linear)),
        lambda m, x: m.linear(x),
    ),
    "transposed weight": (lambda m: setattr(m, "wt", m.linear.weight.t()), lambda m, x: x @ m.wt),
    "chunks of a weight": (
        lambda m: setattr(m, "qk", {"q": m.linear.weight.detach().chunk(2)}),
        lambda m, x: x * m.qk["q"][1],
    ),
    "a weight's bits": (
        lambda m: setattr(m, "bits", m.linear.weight.detach().view(torch.int32)),
        lambda m, x: m.bits,
    ),
    "list of parameters": (lambda m: setattr(m, "ps", list(m.linear.parameters())), lambda m, x: m.ps[0] + m.ps[1]),
    "weak references to parameters": (
        lambda m: setattr(m, "ps", [weakref.ref(p) for p in m.linear.parameters()]),
        lambda m, x: m.ps[0]() + m.ps[1](),
    ),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_that_are_made_of_weights_follow_them(kind: str) -> None:
    """Methods, partials, views and lists of weights kept in attributes are those of the new weights."""
    prepare, forward = ATTRIBUTES[kind]
    slot, cold = swap(make_class(prepare, forward))
    assert same_bits(slot(X), cold(X))
    first = slot.live.module
    slot.update(cold.state_dict(), version="1.0.2")
    assert slot.live.module is not first
    assert same_bits(slot(X), cold(X))


WRAPPERS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": spectral_norm,
    "own parametrization": lambda linear: parametrize.register_parametrization(linear, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_parametrized_weights_are_those_of_the_new_version(kind: str) -> None:
    """Parametrizations, old and new, are carried over, and compute from the new weights (G05)."""
    slot, cold = swap(lambda: make_class(lambda m: WRAPPERS[kind](m.linear))().eval())
    assert same_bits(slot(X), cold(X))
    assert type(slot.live.module.get_submodule("linear")).__name__ == type(cold.get_submodule("linear")).__name__


def _prune(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", amount=1)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [_prune, torch.nn.utils.weight_norm])
def test_a_weight_that_a_hook_computes_needs_to_be_vouched_for(wrap: Callable[[nn.Module], object]) -> None:
    """Pruning and old weight_norm keep a computed weight, which is refused by name until the user vouches for it."""
    make = make_class(lambda m: wrap(m.linear))
    with pytest.raises(hotglm.StaleStateError) as caught:
        swap(make)
    assert caught.value.tensor == "linear.weight"
    slot, cold = swap(make, constants=["linear.weight"])
    assert same_bits(slot(X), cold(X))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_use_the_new_weights(make: type[nn.Module]) -> None:
    """The flat lists of weights that torch's recurrent layers keep are lists of the new weights."""
    slot, cold = swap(lambda: make(2, 3, num_layers=2, bidirectional=True))
    assert same_bits(slot(X), cold(X))
    assert all(one is other for one, other in zip(slot._flat_weights, slot.parameters(), strict=True))


# -- attributes --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_copied_and_has_nothing_to_do_with_weights_is_shared() -> None:
    """Locks, generators of random numbers and clients stay the same objects in every generation."""

    class Client:
        def __init__(self) -> None:
            self.lock = threading.Lock()

    client, generator = Client(), torch.Generator()

    def prepare(model: Any) -> None:
        model.client, model.generator, model.sizes = client, generator, {"a": [1, 2]}

    slot, _ = swap(make_class(prepare))
    assert slot.client is client
    assert slot.generator is generator
    assert slot.sizes == {"a": [1, 2]}


def test_plain_data_is_copied_so_that_generations_do_not_share_it() -> None:
    """Lists and dicts of one generation are its own: appending to one does not reach the one held for rollback."""
    slot, _ = swap(make_class(lambda m: setattr(m, "seen", [])))
    slot.seen.append(1)
    slot.rollback()
    assert slot.seen == []


class Stateful(Model):
    """A module with a `__getstate__` of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": "went its own way"}


class Deep(Model):
    """A module with a `__deepcopy__` of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = Deep.__new__(Deep)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.__dict__["note"] = "went its own way"
        return twin


@pytest.mark.parametrize("make", [Stateful, Deep])
def test_classes_that_copy_themselves_are_asked_to(make: type[Model]) -> None:
    """`__deepcopy__` and `__getstate__` of a module are used, with its weights mapped all the same."""
    slot, cold = swap(lambda: nn.Sequential(make()))
    assert same_bits(slot(X), cold(X))
    assert vars(slot.live.module.get_submodule("0"))["note"] == "went its own way"


def test_a_class_that_refuses_to_be_copied_is_named() -> None:
    """A `__deepcopy__` that raises refuses the update and names the module."""

    class Closed(Model):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("not this one")

    maker = build(lambda: nn.Sequential(Closed()))
    slot = hotglm.ModuleSlot(maker(1), name="model")
    before = slot(X)
    with pytest.raises(UncopyableError, match=r"'0\.Closed'.*not this one"):
        slot.update(maker(2).state_dict())
    assert same_bits(slot(X), before)


def test_flags_of_parameters_and_modules_are_carried_over() -> None:
    """requires_grad, attributes of parameters, train flags of each part and `nn.Buffer` stay as they were."""

    def prepare(model: Any) -> None:
        model.linear.bias.requires_grad_(requires_grad=False)
        model.linear.weight.partition = "rows"
        model.table = nn.Buffer(torch.arange(2), persistent=False)
        model.frozen = nn.BatchNorm1d(2).eval()
        model.none = None
        model.register_parameter("absent", None)

    slot, cold = swap(make_class(prepare))
    assert (slot.linear.weight.requires_grad, slot.linear.bias.requires_grad) == (True, False)
    assert slot.linear.weight.partition == "rows"
    assert type(slot.table) is type(cold.table)
    assert (slot.training, slot.linear.training, slot.frozen.training) == (True, True, False)
    assert (slot.none, slot.absent) == (None, None)
    assert all(p.grad is None and p.is_leaf for p in slot.parameters())


def test_what_parameters_refer_to_is_of_their_own_generation() -> None:
    """Attributes of parameters and buffers that lead to other parts lead to the new ones; other values are copied."""

    def prepare(model: Any) -> None:
        model.linear.weight.peer = model.linear.bias
        model.linear.bias.owner = {"of": [model.linear]}
        model.register_buffer("scale", torch.ones(2))
        model.scale.source = model.linear.weight.detach().t()

    slot, cold = swap(
        make_class(prepare, lambda self, x: (self.linear.weight.peer, self.linear.bias.owner["of"][0](x)))
    )
    assert same_bits(slot(X), cold(X))
    assert slot.linear.weight.peer is slot.linear.bias
    assert slot.linear.bias.owner["of"][0] is slot.linear
    assert slot.scale.source.data_ptr() == slot.linear.weight.data_ptr()
    slot.update(slot.state_dict())
    assert slot.linear.weight.peer is slot.linear.bias


def test_what_a_parameter_brings_along_is_judged_like_any_other_state() -> None:
    """A computed tensor, or a function that has captured a part, on a parameter is refused by the parameter's name."""

    def prepare(model: Any) -> None:
        model.linear.weight.scale = model.linear.weight.detach().norm()
        model.linear.bias.look = lambda: model

    maker = build(make_class(prepare))
    slot = hotglm.ModuleSlot(maker(1), name="model")
    before = slot(X)
    with pytest.raises(hotglm.StaleStateError) as caught:
        slot.update(maker(2).state_dict())
    assert caught.value.tensor == "linear.weight.scale"
    assert "'linear.bias.look'" in str(caught.value)
    assert same_bits(slot(X), before)


def test_a_compiled_slot_takes_updates_and_stays_compiled() -> None:
    """`slot.compile()` and a part that is compiled later are carried into every generation; a rollback is compiled."""
    maker = build(Model)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    slot.compile(backend="eager")
    slot.linear.compile(backend="eager")
    assert same_bits(slot(X), maker(1)(X))
    for seed in (2, 3):
        slot.update(maker(seed).state_dict(), version=f"1.0.{seed}")
        assert same_bits(slot(X), maker(seed)(X))
        assert slot.live.module._compiled_call_impl is not None
        assert slot.linear._compiled_call_impl is not None
    slot.rollback(to="1.0.2")
    assert same_bits(slot(X), maker(2)(X))


def test_parts_that_are_shared_stay_shared() -> None:
    """A layer used twice is one layer in the twin, and tied weights are one parameter under both names."""

    def prepare(model: Any) -> None:
        model.again = model.linear
        model.tied = nn.Linear(2, 2, bias=False)
        model.tied.weight = model.linear.weight

    slot, _ = swap(make_class(prepare))
    module = slot.live.module
    assert module.get_submodule("again") is module.get_submodule("linear")
    assert module.get_submodule("tied").weight is module.get_submodule("linear").weight


def test_a_container_that_changes_while_it_is_copied_is_tried_again() -> None:
    """A dict that a pass grows while the copier walks it costs another try, never a torn or failed update."""
    tries: list[int] = []

    class Growing(dict[str, int]):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("dictionary changed size during iteration")
            return Growing(self)

    slot, cold = swap(make_class(lambda m: setattr(m, "cache", Growing(a=1))))
    assert len(tries) == 3
    assert same_bits(slot(X), cold(X))


def test_a_container_that_never_stands_still_is_refused() -> None:
    """After a bounded number of tries the attribute's module is named and the live version serves on."""

    class Restless(dict[str, int]):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

    maker = build(make_class(lambda m: setattr(m, "cache", Restless())))
    slot = hotglm.ModuleSlot(maker(1), name="model")
    before = slot(X)
    with pytest.raises(UncopyableError) as caught:
        slot.update(maker(2).state_dict())
    assert caught.value.code == "CHANGING_ATTRIBUTE"
    assert same_bits(slot(X), before)
