"""Whatever leads back into the old module is found, however it hides; what is too large to search is refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import StaleStateError, UncopyableError
from hotglm.model import references
from support.swaps import Model, make_class, refused, same_bits, swap

X = torch.arange(4.0).reshape(2, 2)

# -- hiding places -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Holds one thing."""

    item: Any


class Slotted:
    """Holds one thing, and has no dictionary."""

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item = item


class Client(Config):
    """Holds one thing, and cannot be copied."""

    def __init__(self, item: Any) -> None:
        super().__init__(item)
        self.lock = threading.Lock()


class Unique(Config):
    """Holds one thing, and gives itself for its copy."""

    def __deepcopy__(self, memo: object) -> Unique:
        return self


def _with_attribute(item: Any) -> Callable[[], None]:
    def function() -> None: ...

    function.item = item  # type: ignore[attr-defined]
    return function


def _array_of_objects(item: Any) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = item
    return array


def _nested(item: Any) -> Any:
    for _ in range(6):
        item = [item]
    return item


HOLDERS: dict[str, Callable[[Any], object]] = {
    "namespace": lambda item: types.SimpleNamespace(item=item),
    "dataclass": Config,
    "slots": Slotted,
    "client": Client,
    "deque": lambda item: collections.deque([item]),
    "factory": lambda item: collections.defaultdict(functools.partial(Config, item)),
    "partial": lambda item: functools.partial(max, item),
    "lists": _nested,
    "key": lambda item: {Config: {(1, (id,)): item}},
    "array of objects": _array_of_objects,
    "function's attribute": _with_attribute,
    "unique": Unique,
    "read-only mapping": lambda item: types.MappingProxyType({"a": item}),
    "static method": staticmethod,
}


def _close_over(captured: Any) -> Callable[[], Any]:
    return lambda: captured


def _local_callable(captured: Any) -> Any:
    class Operator:
        def __call__(self) -> Any:
            return captured

    return Operator()


def _local_attribute(captured: Any) -> Any:
    class Operator:
        part = captured

    return Operator()


def _subclass_of_local(captured: Any) -> Any:
    class Base:
        @property
        def part(self) -> Any:
            return captured

    class Operator(Base):
        pass

    return Operator()


CAPTURES: dict[str, Callable[[Any], Any]] = {
    "function": lambda m: _close_over(m.linear),
    "function over a weight": lambda m: _close_over(m.linear.weight),
    "method of a local class": _local_callable,
    "attribute of a local class": lambda m: _local_attribute(m.linear),
    "base of a local class": lambda m: _subclass_of_local(m.linear),
    "function over a weak reference": lambda m: _close_over(weakref.ref(m.linear)),
    "function over a weak proxy": lambda m: _close_over(weakref.proxy(m.linear)),
    "method of a weight": lambda m: m.linear.weight.matmul,
    "array over a weight": lambda m: m.linear.weight.detach().numpy()[::-1],
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_captured_part_is_found_wherever_the_function_is_kept(holder: str, capture: str) -> None:
    """Functions, local classes, arrays and weak references that lead to the old module are refused by name."""

    def prepare(model: Any) -> None:
        model.f = HOLDERS[holder](CAPTURES[capture](model))

    error = refused(make_class(prepare), UncopyableError)
    assert {problem.code for problem in error.problems} == {"UNCOPYABLE"}
    assert "'f'" in str(error)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("make", [_close_over, lambda w: w.numpy()], ids=["function", "array"])
def test_a_computed_tensor_is_found_wherever_it_is_kept(holder: str, make: Callable[[Any], Any]) -> None:
    """What was computed from weights and is kept in a closure or an array is refused by the attribute's name."""

    def prepare(model: Any) -> None:
        model.f = HOLDERS[holder](make(model.linear.weight.detach() * 2))

    error = refused(make_class(prepare), StaleStateError)
    assert {problem.tensor for problem in error.problems} == {"f"}


@pytest.mark.parametrize("where", ["class attribute", "method"])
def test_a_class_that_has_captured_a_part_of_its_instance_is_refused(where: str) -> None:
    """Both generations would share the class, and with it the old part."""

    def make() -> nn.Module:
        model: Any = Model()
        if where == "method":

            class Closed(Model):
                def look(self) -> Any:
                    return model.linear

            model.__class__ = Closed
        else:
            model.__class__ = type("Marked", (Model,), {"first": model.linear.weight})
        return model  # type: ignore[no-any-return]

    assert "class" in str(refused(make, UncopyableError))


def test_a_constructor_and_a_cache_of_a_class_may_know_the_instances() -> None:
    """A register of instances that a constructor fills, or a cached method, makes no pass use an old one."""
    made: list[nn.Module] = []

    class Registered(Model):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        @functools.lru_cache(maxsize=8)  # noqa: B019 - the cache that keeps instances is what is tested
        def total(self) -> float:
            return float(self.linear.weight.detach().sum())

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x) * self.total()

    slot, cold = swap(Registered)
    assert same_bits(slot(X), cold(X))
    slot.update(slot.state_dict())


def test_a_tensor_that_both_generations_share_can_be_carried_again_and_again() -> None:
    """What a module without weights keeps in a function is carried over by every update, not only by the first."""

    def prepare(model: Any) -> None:
        model.table = nn.Identity()
        model.table.look = _close_over(torch.ones(2))

    slot, cold = swap(make_class(prepare, lambda self, x: self.linear(x) * self.table.look()))
    receipt = slot.update(cold.state_dict())
    assert receipt.carried == ("table.look",)
    assert same_bits(slot(X), cold(X))


def test_a_method_of_an_object_that_knows_the_module_is_copied_with_it() -> None:
    """A bound method of somebody else's object follows if that object leads back into the module."""

    class Scorer:
        def __init__(self, model: Any) -> None:
            self.model = model

        def score(self, x: torch.Tensor) -> Any:
            return self.model.linear(x)

    slot, cold = swap(
        make_class(lambda m: setattr(m, "score", Scorer(m).score), lambda self, x: self.score(x)),
    )
    assert same_bits(slot(X), cold(X))


def test_a_weak_method_follows_its_part() -> None:
    """`WeakMethod` of a part is one of the new part, and the same method."""

    def prepare(model: Any) -> None:
        model.shape = weakref.WeakMethod(model.linear.extra_repr)

    slot, _ = swap(make_class(prepare))
    method = slot.shape()
    assert method.__self__ is slot.linear
    assert method.__func__ is nn.Linear.extra_repr


def test_a_class_that_copies_itself_into_tensors_of_its_own_is_refused() -> None:
    """A `__deepcopy__` that makes new parameters would serve weights that no update reaches."""

    class Rebuilt(Model):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return Rebuilt()

    error = refused(lambda: nn.Sequential(Rebuilt()), StaleStateError)
    assert {(problem.tensor or "").split(".")[0] for problem in error.problems} == {"0"}


# -- how far a search goes ---------------------------------------------------------------------------------------------


class Vocabulary(Client):
    """Cannot be copied, and has many words before what it holds."""

    def __init__(self, item: Any) -> None:
        super().__init__(item)
        self.words = {f"word {i}": i for i in range(20_000)}
        self.scored = [(f"word {i}", float(i)) for i in range(20_000)]
        self.nodes = [object() for _ in range(20_000)]


def test_a_path_back_is_found_behind_a_vocabulary() -> None:
    """An object that cannot be copied and holds the module is refused however much else it holds."""
    assert "leads back" in str(refused(make_class(lambda m: setattr(m, "f", Vocabulary(m))), UncopyableError))


def test_words_and_numbers_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with an ordinary vocabulary is shared; only objects that lead on count against the limit."""
    monkeypatch.setattr(references, "MAX_OBJECTS", 1000)
    client = Vocabulary(None)
    slot, _ = swap(make_class(lambda m: setattr(m, "f", client)))
    assert slot.f is client


@pytest.mark.parametrize("make", [Client, list], ids=["shared", "copied"])
def test_what_is_too_large_to_be_searched_is_refused(
    make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the limit the answer is not "no": the attribute is named, with the way out."""
    monkeypatch.setattr(references, "MAX_OBJECTS", 1000)
    chain: list[Any] = [[[object()]] for _ in range(2000)]
    error = refused(make_class(lambda m: setattr(m, "f", make(chain))), UncopyableError)
    assert "'f'" in str(error)
    assert "too large" in str(error)
    assert "out of the module" in error.remedy


# -- what is shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["lists", "namespace", "client", "slots"])
def test_a_slot_kept_in_a_plain_attribute_is_shared(holder: str) -> None:
    """A slot that a module keeps outside its registered parts stays one slot, and its updates reach every version."""
    inner = hotglm.ModuleSlot(nn.Linear(2, 2), name="inner", version="1.0.0")
    slot, cold = swap(
        make_class(
            lambda m: setattr(m, "held", [inner, HOLDERS[holder](inner)]), lambda self, x: self.held[0](self.linear(x))
        )
    )
    assert slot.held[0] is inner
    inner.update(nn.Linear(2, 2), version="1.0.1")
    assert same_bits(slot(X), cold(X))
