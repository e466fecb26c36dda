"""What code of torch may write through a slot: refused, or on the list in docs/concepts.md; never lost, never torn."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import hotglm
from hotglm.errors import SlotStateError
from support.swaps import Model, build, same_bits

X = torch.arange(4.0).reshape(2, 2)
MAKER = build(Model)
CONCEPTS = (Path(__file__).resolve().parent.parent / "docs" / "concepts.md").read_text(encoding="utf-8")


@pytest.fixture
def slot() -> hotglm.ModuleSlot:
    """A slot that has been updated once."""
    made = hotglm.ModuleSlot(MAKER(1), name="ranker", version="1.0.0")
    made.update(MAKER(2).state_dict(), version="1.0.1")
    return made


# -- functional_call ---------------------------------------------------------------------------------------------------

OTHER = {"linear.weight": torch.zeros(2, 2)}
IN_PARENT = {"0.weight": torch.zeros(2, 2), "1.linear.weight": torch.zeros(2, 2)}


def test_a_functional_call_of_a_slot_is_refused(slot: hotglm.ModuleSlot) -> None:
    """It would write the live module, for all threads, and restore it in whichever is live afterwards."""
    weight = slot.linear.weight
    with pytest.raises(SlotStateError, match="deepcopy"):
        torch.func.functional_call(slot, OTHER, (X,))
    assert slot.linear.weight is weight
    assert same_bits(slot(X), MAKER(2)(X))
    found = torch.func.functional_call(copy.deepcopy(slot.live.module), OTHER, (X,))  # the way that the remedy names
    assert same_bits(found, slot.linear.bias.expand(2, 2))


def test_a_functional_call_of_a_flat_slot_is_refused() -> None:
    """Where the tensor hangs on the module itself, its dictionary refuses the write."""
    slot = hotglm.ModuleSlot(nn.BatchNorm1d(2), name="norm")
    before = slot.live.module.state_dict()
    for name in ("weight", "running_mean"):
        with pytest.raises(SlotStateError, match="functional_call"):
            torch.func.functional_call(slot, {name: torch.zeros(2)}, (X,))
    assert same_bits(dict(slot.state_dict()), dict(before))
    assert all(type(parameter) is nn.Parameter for parameter in slot.live.module._parameters.values())


def test_a_functional_call_of_a_parent_leaves_both_as_they_were(slot: hotglm.ModuleSlot) -> None:
    """A call that names tensors of the slot is refused, and torch puts back what it had replaced outside the slot."""
    parent = nn.Sequential(nn.Linear(2, 2), slot)
    before = parent(X)
    with pytest.raises(SlotStateError):
        torch.func.functional_call(parent, IN_PARENT, (X,))
    assert same_bits(parent(X), before)
    outside = {"0.weight": torch.zeros(2, 2)}
    found = torch.func.functional_call(parent, outside, (X,))
    assert same_bits(found, slot(parent.get_parameter("0.bias").expand(2, 2)))
    assert same_bits(parent(X), before)


# -- the dictionaries --------------------------------------------------------------------------------------------------

NAMES = ("_parameters", "_buffers", "_modules")
WRITES: dict[str, Callable[[Any], object]] = {
    "set": lambda d: d.__setitem__("linear", None),
    "delete": lambda d: d.__delitem__("linear"),
    "pop": lambda d: d.pop("linear", None),
    "popitem": lambda d: d.popitem(),
    "update": lambda d: d.update(linear=None),
    "clear": lambda d: d.clear(),
    "setdefault": lambda d: d.setdefault("other", None),
    "or": lambda d: d.__ior__({"linear": None}),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_a_slots_dictionaries_cannot_be_written(name: str, write: str, slot: hotglm.ModuleSlot) -> None:
    """Every way to change one is refused with what to do instead, and changes nothing."""
    before = dict(getattr(slot.live.module, name))
    with pytest.raises(SlotStateError, match="Remedy"):
        WRITES[write](getattr(slot, name))
    assert getattr(slot.live.module, name) == before
    assert same_bits(slot(X), MAKER(2)(X))


def test_every_method_of_a_dictionary_that_writes_is_refused() -> None:
    """The list above is complete for this Python."""
    reads = {"copy", "fromkeys", "get", "items", "keys", "values"}
    writes = {name for name in vars(dict) if not name.startswith("_")} - reads
    assert writes == {"pop", "popitem", "update", "clear", "setdefault"}


def test_a_slots_dictionaries_read_like_the_live_modules(slot: hotglm.ModuleSlot) -> None:
    """Reading, iterating, copying and pickling work, and show what is live at the time."""
    first = slot._modules
    assert isinstance(first, dict)
    assert first == slot.live.module._modules
    assert list(first.items()) == list(slot.live.module._modules.items())
    assert type(pickle.loads(pickle.dumps(first))) is dict
    assert type(copy.deepcopy(first)) is dict
    slot.update(MAKER(3).state_dict())
    assert slot._modules["linear"] is slot.linear
    assert first["linear"] is not slot.linear
    assert slot._non_persistent_buffers_set == set()
    with pytest.raises(AttributeError):
        slot._non_persistent_buffers_set.add("x")


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        functools.partial(prune.l1_unstructured, name="weight", amount=1),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda linear: setattr(linear, "__class__", nn.Linear),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "old weight_norm", "old spectral_norm", "class"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_wrapping_a_weight_of_a_slot_fails_and_changes_nothing(wrap: Callable[[Any], object]) -> None:
    """Parametrizing or pruning a slot is refused before the slot or the live module is changed."""
    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="linear")
    before, names, attributes = slot(X), list(slot.state_dict()), set(vars(slot.live.module))
    with pytest.raises((SlotStateError, AttributeError)):
        wrap(slot)
    assert type(slot) is hotglm.ModuleSlot
    assert list(slot.state_dict()) == names
    assert set(vars(slot.live.module)) == attributes
    assert same_bits(slot(X), before)


# -- methods -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, ...]] = {
    "add_module": ("x", nn.Identity()),
    "register_module": ("x", nn.Identity()),
    "set_submodule": ("linear", nn.Identity()),
    "register_parameter": ("x", None),
    "register_buffer": ("x", None),
    "set_extra_state": ({},),
    "load_state_dict": ({},),
    "share_memory": (),
}
REFUSED_UNLESS_THEY_CHANGE_NOTHING: dict[str, tuple[Any, ...]] = {
    "to": (torch.float64,),
    "to_empty": ("meta",),
    "type": (torch.float64,),
    "double": (),
    "half": (),
    "bfloat16": (),
}
CONVERSIONS = {"float", "cpu", "cuda", "ipu", "mtia", "xpu"}  # pass here, or need a device
HOOKS = {name for name in vars(nn.Module) if name.startswith("register_") and name.endswith("_hook")}
WRITE_THE_LIVE_MODULE = {"apply", "requires_grad_", "zero_grad", "train", "eval", "compile"} | HOOKS
READ = {
    *("buffers", "children", "modules", "parameters", "state_dict", "forward", "extra_repr"),
    *("named_buffers", "named_children", "named_modules", "named_parameters"),
    *("get_buffer", "get_extra_state", "get_parameter", "get_submodule"),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_UNLESS_THEY_CHANGE_NOTHING])
def test_methods_that_would_write_the_live_structure_are_refused(name: str, slot: hotglm.ModuleSlot) -> None:
    """Each is refused with what to do instead, and the live version is as it was."""
    arguments = {**REFUSED, **REFUSED_UNLESS_THEY_CHANGE_NOTHING}[name]
    before = list(slot.live.module.named_modules())
    keywords = {"device": arguments[0]} if name == "to_empty" else {}
    with pytest.raises(SlotStateError, match="Remedy: use"):
        getattr(slot, name)(*(() if keywords else arguments), **keywords)
    assert list(slot.live.module.named_modules()) == before
    assert same_bits(dict(slot.state_dict()), dict(MAKER(2).state_dict()))
    assert same_bits(slot(X), MAKER(2)(X))


def test_every_method_of_a_module_is_judged_here() -> None:
    """A method that a new torch adds has to be refused, or put on the list in docs/concepts.md, or be known to read."""
    own = {name: value for name, value in vars(nn.Module).items() if callable(value) and not name.startswith("_")}
    methods = {name for name, value in own.items() if value.__module__ == nn.Module.__module__}  # others are patched in
    known = {*REFUSED, *REFUSED_UNLESS_THEY_CHANGE_NOTHING} | CONVERSIONS | WRITE_THE_LIVE_MODULE | READ
    assert methods <= known
    for name in {*REFUSED, *REFUSED_UNLESS_THEY_CHANGE_NOTHING} | WRITE_THE_LIVE_MODULE - HOOKS:
        assert f"`{name}`" in CONCEPTS
    assert "`register_*_hook`" in CONCEPTS


def test_apply_goes_to_the_live_module(slot: hotglm.ModuleSlot) -> None:
    """`apply` is delegated: what the function writes is written in the live version."""

    def clear(module: Any) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    slot.apply(clear)
    assert not slot.live.module.get_parameter("linear.bias").any()
