"""A slot is an `nn.Module`: inside a parent, under hooks, and to code that asks it for attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError, SlotStateError
from support.swaps import Model, build, make_class, same_bits

X = torch.arange(4.0).reshape(2, 2)
MAKER = build(Model)


class Parent(nn.Module):
    """A model of its own, with a slot for one part."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.ranker = hotglm.ModuleSlot(MAKER(1), name="ranker", version="1.0.0")

    def forward(self, x: torch.Tensor) -> Any:
        return self.ranker(self.before(x))


@pytest.fixture
def parent() -> Parent:
    """A parent whose slot has been swapped once."""
    made = Parent()
    made.ranker.update(MAKER(2).state_dict(), version="1.0.1")
    return made


# -- inside a parent ---------------------------------------------------------------------------------------------------


def test_a_parents_pass_uses_what_is_live(parent: Parent) -> None:
    """The parent's forward runs the slot's live version, and the next one after the next swap."""
    inner = parent.before(X)
    assert same_bits(parent(X), MAKER(2)(inner))
    parent.ranker.update(MAKER(3).state_dict())
    assert same_bits(parent(X), MAKER(3)(inner))


def test_a_parent_sees_the_live_parts_under_the_slots_name(parent: Parent) -> None:
    """Names have no extra level: a checkpoint of the parent looks as if the module stood there itself."""
    plain = nn.ModuleDict({"before": nn.Linear(2, 2), "ranker": Model()})
    assert list(parent.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in parent.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in parent.named_modules()] == [name for name, _ in plain.named_modules()]
    assert same_bits(parent.state_dict()["ranker.linear.weight"], MAKER(2).linear.weight)
    assert parent.get_parameter("ranker.linear.weight") is parent.ranker.linear.weight
    assert parent.get_submodule("ranker.linear") is parent.ranker.linear


def test_a_checkpoint_of_the_parent_is_one_of_a_plain_model(parent: Parent) -> None:
    """What the parent saves, a parent without a slot loads."""
    plain = nn.ModuleDict({"before": nn.Linear(2, 2), "ranker": Model()})
    plain.load_state_dict(parent.state_dict())
    assert same_bits(plain["ranker"](plain["before"](X)), parent(X))


def test_training_mode_goes_through_and_stays(parent: Parent) -> None:
    """`parent.eval()` reaches the live module, the held one, and every later one."""
    parent.eval()
    assert not parent.ranker.training
    parent.ranker.update(MAKER(3).state_dict())
    assert not parent.ranker.live.module.training
    parent.ranker.rollback()
    assert not parent.ranker.training
    parent.train()
    assert parent.ranker.training


@pytest.mark.parametrize("convert", ["cpu", "float", "requires_grad_", "zero_grad"])
def test_conversions_that_change_nothing_pass(convert: str, parent: Parent) -> None:
    """`parent.cpu()`, `.float()` and `.to("cpu")` are no reason to fail."""
    before = parent(X)
    getattr(parent, convert)()
    parent.to("cpu", torch.float32)
    assert same_bits(parent(X), before)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("meta"),
        lambda module: module.to_empty(device="cpu"),
        lambda module: module.share_memory(),
    ],
    ids=["double", "bfloat16", "meta", "to_empty", "share_memory"],
)
def test_conversions_of_live_weights_are_refused(convert: Callable[[Any], object], parent: Parent) -> None:
    """What would move or convert live weights is refused with what to do instead, on the slot and on its parent."""
    before = parent.ranker(X)
    for module in (parent.ranker, parent):
        with pytest.raises(SlotStateError, match="Remedy: use slot"):
            convert(module)
    assert same_bits(parent.ranker(X), before)


def test_loading_a_state_dict_in_place_is_refused(parent: Parent) -> None:
    """`load_state_dict` on a slot, or through its parent, never writes live weights."""
    before = parent.ranker(X)
    state = {name: torch.zeros_like(tensor) for name, tensor in parent.state_dict().items()}
    with pytest.raises(SlotStateError, match="update"):
        parent.ranker.load_state_dict(MAKER(3).state_dict())
    with pytest.raises(SlotStateError, match="update"):
        parent.load_state_dict(state)
    assert same_bits(parent.ranker(X), before)


def test_a_parent_can_be_applied_to_and_counted(parent: Parent) -> None:
    """`apply`, `children` and `buffers` go through the live parts."""
    seen: list[str] = []
    parent.apply(lambda module: seen.append(type(module).__name__))
    assert seen.count("Linear") == 2
    assert sum(p.numel() for p in parent.parameters()) == 12
    assert isinstance(parent.ranker, nn.Module)
    assert list(parent.ranker.children()) == [parent.ranker.linear]


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_registered_on_a_slot_are_those_of_its_module() -> None:
    """Forward hooks run in the live version, are carried into the next, and can be removed while it is live."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    seen: list[int] = []
    handle = slot.register_forward_hook(lambda module, args, output: seen.append(slot.live.number))
    slot(X)
    slot.update(MAKER(2).state_dict())
    slot(X)
    assert seen == [1, 2]
    handle.remove()
    slot.rollback()
    slot(X)
    assert seen == [1, 2]


def test_a_forward_hook_can_change_the_output() -> None:
    """Hooks keep torch's meaning: what they return replaces the output."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    slot.register_forward_hook(lambda module, args, output: output * 0)
    slot.update(MAKER(2).state_dict())
    assert not slot(X).any()


# -- attributes --------------------------------------------------------------------------------------------------------


def test_attributes_and_methods_are_those_of_the_live_version() -> None:
    """Names that the slot does not have are looked up on the live module, each time anew."""

    def prepare(model: Any) -> None:
        model.limit = 3

    make = build(make_class(prepare))
    slot = hotglm.ModuleSlot(make(1), name="ranker")
    first = slot.forward
    assert slot.limit == 3
    slot.update(make(2).state_dict())
    assert slot.limit == 3
    assert same_bits(slot.linear(X), make(2)(X))
    assert same_bits(slot.forward(X), make(2)(X))
    assert same_bits(first(X), make(2)(X))  # the slot's own way in, not a method of a version


def test_a_bound_method_belongs_to_the_version_it_was_taken_from() -> None:
    """`f = slot.linear.forward` goes on in its version, whose memory is not reused under it."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    slot.update(MAKER(2).state_dict())
    f = slot.linear.forward
    for seed in range(3, 8):
        slot.update(MAKER(seed).state_dict())
    assert same_bits(f(X), MAKER(2)(X))


def test_a_missing_attribute_is_an_attribute_error_of_the_module() -> None:
    """`hasattr` works, and the text names the module's class."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    assert not hasattr(slot, "nothing")
    with pytest.raises(AttributeError, match=r"Model.*nothing"):
        _ = slot.nothing


@pytest.mark.parametrize(
    "assign",
    [
        lambda slot: setattr(slot, "limit", 4),
        lambda slot: setattr(slot, "linear", nn.Linear(2, 2)),
        lambda slot: setattr(slot, "extra", nn.Parameter(torch.ones(1))),
        lambda slot: slot.register_buffer("extra", torch.ones(1)),
        lambda slot: slot.register_parameter("extra", None),
        lambda slot: slot.add_module("extra", nn.Linear(1, 1)),
        lambda slot: setattr(slot, "version", "2.0"),
        lambda slot: delattr(slot, "linear"),
    ],
)
def test_what_the_next_update_would_undo_is_refused(assign: Callable[[Any], object]) -> None:
    """Setting names, parameters, buffers or submodules on a slot fails, and changes nothing."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    before, state = slot(X), list(slot.state_dict())
    with pytest.raises((AttributeError, HotglmError)):
        assign(slot)
    assert same_bits(slot(X), before)
    assert list(slot.state_dict()) == state


def test_frameworks_may_keep_their_own_notes_on_a_slot() -> None:
    """Names with a leading underscore are the slot's own and outlive versions."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    slot._note = 1
    slot.update(MAKER(2).state_dict())
    assert slot._note == 1
    del slot._note
    assert not hasattr(slot, "_note")


def test_dir_and_repr_show_slot_and_module() -> None:
    """`dir` lists both, `repr` says name, version and what is inside."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker", version="1.2.0")
    assert {"update", "rollback", "linear", "state_dict"} <= set(dir(slot))
    text = repr(slot)
    assert "'ranker'" in text
    assert "1.2.0" in text
    assert "Linear(in_features=2" in text


def test_setting_gradients_off_holds_for_the_live_version_and_its_copies() -> None:
    """`requires_grad_` on a slot reaches the live module; later versions copy it."""
    slot = hotglm.ModuleSlot(MAKER(1), name="ranker")
    slot.requires_grad_(requires_grad=False)
    slot.update(MAKER(2).state_dict())
    assert not any(p.requires_grad for p in slot.parameters())
    assert not slot(X).requires_grad


def test_an_attribute_set_on_the_live_module_is_in_later_versions() -> None:
    """`slot.live.module.limit = 4` is the way the refusal names."""
    slot = hotglm.ModuleSlot(make_class(lambda m: setattr(m, "limit", 3))(), name="ranker")
    slot.live.module.limit = 4  # type: ignore[assignment]  # torch types attributes as tensors
    slot.update(slot.state_dict())
    assert slot.limit == 4
