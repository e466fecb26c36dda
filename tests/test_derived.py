"""Derived state: declared and recomputed, provably constant and carried over, or refused by name; never left stale."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import DefinitionError, RefreshError, StaleStateError
from hotglm.weights.digest import digest_tensor
from support.swaps import Model, build, make_class, refused, same_bits, swap

X = torch.arange(4.0).reshape(2, 2)


class Cached(Model):
    """Keeps two things computed from its weights: a buffer and an attribute."""

    norm: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm", torch.zeros(2), persistent=False)
        self.transposed = torch.zeros(2, 2)
        self.compute_norm()
        self.compute_transposed()

    @hotglm.refresh("norm")
    def compute_norm(self) -> None:
        self.norm.copy_(self.linear.weight.norm(dim=1))

    @hotglm.refresh("transposed")
    def compute_transposed(self) -> None:
        self.transposed = self.linear.weight.detach().t().contiguous() + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transposed / self.norm


def _cold(make: type[Cached], state: dict[str, torch.Tensor]) -> Cached:
    cold = make()
    cold.load_state_dict(state)
    cold.compute_norm()
    cold.compute_transposed()
    return cold


# -- refresh -----------------------------------------------------------------------------------------------------------


def test_declared_state_is_recomputed_from_the_new_weights() -> None:
    """What a refresh method names is right after every swap, in a buffer or an attribute, at any depth."""
    maker = build(lambda: nn.Sequential(Cached()))
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    for seed in (2, 3, 2):
        state = maker(seed).state_dict()
        receipt = slot.update(state)
        cold = _cold(Cached, {name.removeprefix("0."): tensor for name, tensor in state.items()})
        assert same_bits(slot(X), cold(X))
        assert set(receipt.refreshed) == {"0.compute_norm", "0.compute_transposed"}


def test_refresh_runs_children_before_parents_and_base_classes_first_once_each() -> None:
    """A parent may use what its children recomputed, a subclass what its base did; an override runs once."""
    ran: list[str] = []

    class Base(Model):
        @hotglm.refresh("a")
        def first(self) -> None:
            ran.append(f"{type(self).__name__}.first")

    class Derived(Base):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        @hotglm.refresh("b")
        def second(self) -> None:
            ran.append(f"{type(self).__name__}.second")

        @hotglm.refresh("a")
        def first(self) -> None:
            super().first()

    slot, _ = swap(lambda: Derived(Base(), Base()))
    assert ran == ["Base.first", "Base.first", "Derived.first", "Derived.second"]
    slot.update(slot.state_dict())
    assert len(ran) == 8


def test_refresh_runs_without_gradients_in_the_spare_alone() -> None:
    """A refresh sees the staged module with its new weights, with autograd off, while the old one serves unchanged."""
    seen: list[tuple[bool, int]] = []

    class Watching(Model):
        @hotglm.refresh("nothing")
        def look(self) -> None:
            seen.append((torch.is_grad_enabled(), id(self)))

    slot, _ = swap(Watching)
    assert seen == [(False, id(slot.live.module))]


def test_all_refreshes_that_fail_are_named_and_nothing_changes() -> None:
    """Two failing refresh methods are two problems of one error, and the old version serves, bit for bit."""

    class Failing(Model):
        @hotglm.refresh("a")
        def one(self) -> None:
            raise ZeroDivisionError("of course")

        @hotglm.refresh("b")
        def two(self) -> None:
            raise KeyError("b")

    error = refused(lambda: nn.Sequential(Failing()), RefreshError)
    text = str(error)
    assert [problem.code for problem in error.problems] == ["REFRESH_FAILED"] * 2
    assert "0.one" in text
    assert "0.two" in text


def test_a_slot_can_refresh_somebody_elses_model() -> None:
    """`ModuleSlot(..., refresh=f)` recomputes the state of a class that cannot be decorated."""

    def recompute(module: nn.Module) -> None:
        module.get_buffer("scale").copy_(module.get_parameter("linear.weight").sum().reshape(1))

    def prepare(model: Any) -> None:
        model.register_buffer("scale", model.linear.weight.detach().sum().reshape(1), persistent=False)

    make = make_class(prepare, lambda self, x: self.linear(x) * self.scale)
    slot, cold = swap(make, refresh=recompute)
    recompute(cold)
    assert same_bits(slot(X), cold(X))


def test_digests_are_of_what_a_refresh_has_written_in_whatever_way() -> None:
    """Writes through `.data`, which no counter of torch shows, are in the receipt's digests all the same (P12)."""
    slot = hotglm.ModuleSlot(
        nn.Linear(3, 2), name="m", version="1.0.0", refresh=lambda module: module.get_parameter("weight").data.mul_(2)
    )
    receipt = slot.update(nn.Linear(3, 2).state_dict(), version="1.0.1")
    live = slot.live.module.get_parameter("weight")
    assert receipt.digests["weight"] == digest_tensor(live)
    assert slot.verify_live().num_compared == 2


def test_a_slots_refresh_that_fails_changes_nothing() -> None:
    """An exception of the slot's own refresh function is a RefreshError that names the function."""

    def broken(module: nn.Module) -> None:
        raise ValueError("no such table")

    assert "no such table" in str(refused(Model, RefreshError, refresh=broken))


@pytest.mark.parametrize("names", [(), ("",), ("a", 3)])
def test_a_refresh_without_names_is_refused_where_it_is_written(names: tuple[Any, ...]) -> None:
    """`@refresh()` and names that are no names fail at the decorator, not at the first swap."""
    with pytest.raises(DefinitionError):
        hotglm.refresh(*names)


# -- the carry-over rule -----------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """A module without weights that keeps a table of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / torch.arange(1.0, 3.0), persistent=False)
        self.original = self.inv_freq


class Packed(nn.Module):
    """A module without weights that keeps a table of small integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(2, 2, dtype=torch.int32)


CONSTANT: dict[str, Callable[[Any], object]] = {
    "table of a module without weights": lambda m: setattr(m, "rotary", Rotary()),
    "mask": lambda m: m.register_buffer("mask", torch.ones(2, 2).tril().bool(), persistent=False),
    "positions": lambda m: m.register_buffer("ids", torch.arange(4), persistent=False),
    "index attribute": lambda m: setattr(m, "index", torch.arange(4)),
    "scalar attribute": lambda m: setattr(m, "offset", torch.tensor(3)),
    "mask attribute": lambda m: setattr(m, "used", torch.tensor([True, False])),
    "array of indices": lambda m: setattr(m, "index", np.arange(4)),
    "table of indices": lambda m: m.register_buffer("ids", torch.arange(6).reshape(2, 3), persistent=False),
    "packed table of a module without weights": lambda m: setattr(m, "rotary", Packed()),
    "refreshed attribute": lambda m: None,
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_what_cannot_depend_on_weights_is_carried_over(kind: str) -> None:
    """Tables of modules without weights, masks and indices keep their values and need no declaration."""
    slot, cold = swap(make_class(CONSTANT[kind]))
    assert same_bits(dict(slot.named_buffers()), dict(cold.named_buffers()))
    assert same_bits(slot(X), cold(X))


STALE: dict[str, Callable[[Any], object]] = {
    "float buffer": lambda m: m.register_buffer("cache", m.linear.weight.detach() * 2, persistent=False),
    "float attribute": lambda m: setattr(m, "cache", m.linear.weight.detach() * 2),
    "packed weight": lambda m: setattr(m, "cache", (m.linear.weight.detach() * 9).to(torch.int8)),
    "weights packed in int32": lambda m: setattr(m, "cache", pack(m.linear.weight, torch.int32)),
    "weights packed in int16": lambda m: setattr(m, "cache", pack(m.linear.weight, torch.int16)),
    "buffer packed in int32": lambda m: m.register_buffer("cache", pack(m.linear.weight, torch.int32), False),
    "pruning mask": lambda m: setattr(m, "cache", m.linear.weight.detach() > 0),
    "order of all weights": lambda m: setattr(m, "cache", m.linear.weight.detach().argsort()),
    "long vector": lambda m: setattr(m, "cache", torch.zeros(1 + (1 << 16), dtype=torch.int64)),
    "numpy mask": lambda m: setattr(m, "cache", (m.linear.weight.detach() > 0).numpy()),
    "fp8 weight": lambda m: setattr(m, "cache", m.linear.weight.detach().to(torch.float8_e4m3fn)),
    "complex attribute": lambda m: setattr(m, "cache", torch.fft.fft(m.linear.weight.detach())),
    "deep in containers": lambda m: setattr(m, "cache", {"a": [({"b": m.linear.weight.detach() * 2},)]}),
    "in an object": lambda m: setattr(m, "cache", Holder(m.linear.weight.detach() * 2)),
    "in an object with a lock": lambda m: setattr(m, "cache", Locked(m.linear.weight.detach() * 2)),
    "numpy copy": lambda m: setattr(m, "cache", m.linear.weight.detach().numpy().copy()),
    "closure": lambda m: setattr(m, "cache", keep(m.linear.weight.detach() * 2)),
    "hidden parameter": lambda m: object.__setattr__(m, "cache", nn.Parameter(torch.randn(2))),
    "parameter in nested lists": lambda m: setattr(m, "cache", [[nn.Parameter(torch.randn(2))]]),
    "expanded weight": lambda m: setattr(m, "cache", m.linear.bias.detach().expand(3, 2)),
}


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight` as integers of `dtype`."""
    return (weight.detach() * 9).to(dtype)


def keep(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that brings a tensor along."""
    return lambda: tensor


class Holder:
    """Keeps a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Locked(Holder):
    """Keeps a tensor behind something that cannot be copied."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.lock = threading.Lock()
        super().__init__(tensor)


@pytest.mark.parametrize("kind", STALE)
def test_what_may_have_been_computed_from_weights_is_refused_by_name(kind: str) -> None:
    """Undeclared floats, packed and quantised copies of weights are refused wherever they hide (G03, G04)."""
    error = refused(make_class(STALE[kind]), StaleStateError)
    assert [(problem.code, problem.tensor) for problem in error.problems] == [("STALE_STATE", "cache")]


@pytest.mark.parametrize("kind", ["float buffer", "float attribute", "packed weight", "hidden parameter"])
def test_a_staged_module_brings_its_own_derived_state(kind: str) -> None:
    """What a module source has computed from its weights is right for them, and comes along without a declaration."""
    maker = build(make_class(STALE[kind], lambda self, x: (self.linear(x), self.cache)))
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    offered = maker(2)
    slot.update(offered, version="1.0.1")
    assert same_bits(slot(X), offered(X))
    with pytest.raises(StaleStateError):
        slot.update(maker(3).state_dict(), version="1.0.2")
    assert same_bits(slot(X), offered(X))


def test_modules_in_a_plain_list_are_refused() -> None:
    """Weights that no state dict lists would keep their old values; each is named."""
    error = refused(make_class(lambda m: setattr(m, "layers", [nn.Linear(2, 2)])), StaleStateError)
    assert {problem.tensor for problem in error.problems} == {"layers"}


def test_every_stale_tensor_of_a_model_is_named_at_once() -> None:
    """One error lists them all, in full dotted names, with the remedy."""

    def prepare(model: Any) -> None:
        model.wt = model.linear.weight.detach() * 2
        model.child = make_class(STALE["float buffer"])()

    error = refused(make_class(prepare), StaleStateError)
    assert sorted(problem.tensor or "" for problem in error.problems) == ["child.cache", "wt"]
    assert "@hotglm.refresh" in error.remedy
    assert "constants" in error.remedy


@pytest.mark.parametrize("pattern", ["cache", "ca*", "*"])
def test_constants_vouch_by_pattern(pattern: str) -> None:
    """A pattern of full names lets named state keep its value; the receipt says which."""
    make = make_class(STALE["float buffer"])
    maker = build(make)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0", constants=[pattern])
    value = slot.get_buffer("cache").clone()
    receipt = slot.update(maker(2).state_dict())
    assert receipt.carried == ("cache",)
    assert same_bits(slot.get_buffer("cache"), value)


def test_a_pattern_of_another_name_vouches_for_nothing() -> None:
    """Constants are matched against the whole dotted name."""
    make = make_class(lambda m: setattr(m, "child", make_class(STALE["float buffer"])()))
    refused(make, StaleStateError, constants=["cache", "other.*"])


def test_carried_state_is_a_copy() -> None:
    """Generations do not share carried tensors: writing the live one's leaves that held for rollback alone."""
    slot, _ = swap(make_class(CONSTANT["positions"]))
    slot.get_buffer("ids").fill_(7)
    slot.rollback()
    assert same_bits(slot.get_buffer("ids"), torch.arange(4))


def test_a_cache_of_activations_in_a_module_without_weights_is_not_carried_over() -> None:
    """A key-value cache depends on the weights it was filled under; the next version must not answer from it."""

    def prepare(model: Any) -> None:
        model.cache = nn.Module()
        model.cache.register_buffer("keys", torch.zeros(2, 2), persistent=False)

    def forward(self: Any, x: torch.Tensor) -> Any:
        self.cache.keys += self.linear(x).detach()
        return self.cache.keys.clone()

    maker = build(make_class(prepare, forward))
    slot = hotglm.ModuleSlot(maker(1), name="model")
    slot(X)
    with pytest.raises(StaleStateError, match=r"cache\.keys"):
        slot.update(maker(2).state_dict())
    assert str(slot.version) == "0.0.0"


def test_a_buffer_that_a_refresh_replaces_goes_back_to_its_place() -> None:
    """A refresh may assign a new tensor; the arena holds its values, the digest is of them, and no memory is shared."""

    class Cached(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.linear = nn.Linear(2, 2)
            self.register_buffer("doubled", self.linear.weight.detach() * 2)

        doubled: torch.Tensor

        @hotglm.refresh("doubled")
        def _double(self) -> None:
            self.doubled = self.linear.weight.detach() * 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.doubled

    slot = hotglm.ModuleSlot(Cached(1), name="m", version="1.0.0")
    state = Cached(2).state_dict()
    state["doubled"] = torch.zeros(2, 2)
    receipt = slot.update(state, version="1.0.1")
    assert torch.equal(slot(X[:, :2]), X[:, :2] @ (state["linear.weight"] * 2))
    doubled = slot.state_dict()["doubled"]
    assert receipt.digests["doubled"] == digest_tensor(doubled)
    arena = slot.live.arena
    assert arena is not None
    assert arena.address <= doubled.data_ptr() < arena.address + arena.nbytes
