"""What a capture can see of a module: what differs is told apart, what is the same is not; nothing is kept alive."""

from __future__ import annotations

import enum
import functools
import gc
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from hotglm.model.sight import Sight, look_at
from support.wrapped import Blocked


class Colour(enum.Enum):
    """A setting."""

    RED = 1
    BLUE = 2


@dataclass(slots=True)
class Settings:
    """An object of slots."""

    width: int


class Plain:
    """An object of attributes."""

    def __init__(self, value: object) -> None:
        """Keep it."""
        self.value = value


def add(number: float, x: float) -> float:
    return x + number


def close_over(value: object) -> Callable[[], object]:
    return lambda: value


FUNCTION = close_over(1)


def look(value: object) -> Sight:
    module = nn.Linear(2, 2)
    module.weight, module.bias = WEIGHT, BIAS
    setattr(module, "extra", value)  # noqa: B010 - of any type
    return look_at(module)


WEIGHT, BIAS = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

DIFFERENT: list[tuple[object, object]] = [
    (1, 2),
    (1, True),
    (0.0, -0.0),
    ("a", b"a"),
    (None, 0),
    ([1, 2], [2, 1]),
    ([1], (1,)),
    ({"a": 1}, {"a": 2}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1}, {2}),
    ({"a": 1}, OrderedDict(a=1)),
    (Colour.RED, Colour.BLUE),
    (torch.float32, torch.bfloat16),
    (Settings(width=1), Settings(width=2)),
    (Plain([1.0]), Plain([2.0])),
    (Plain(1), Settings(width=1)),
    (functools.partial(add, 1.0), functools.partial(add, 2.0)),
    (add, len),
    (torch.ones(2), torch.ones(2)),
    ([WEIGHT], [WEIGHT.t()]),
    (WEIGHT[0], WEIGHT[1]),
    (re.compile("a"), re.compile("b")),
    (close_over(1), close_over(1)),
    ([WEIGHT, WEIGHT], [WEIGHT, BIAS]),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_is_told_apart(one: object, other: object) -> None:
    """Whatever attribute differs in a way that a pass could notice, it is named."""
    assert list(look(one).find_differences(look(other))) == ["extra"]


SAME: list[Callable[[], object]] = [
    lambda: 1.5,
    lambda: float("nan"),
    lambda: [1, {"a": (2, "x")}],
    lambda: {1, 2, 3},
    lambda: Colour.RED,
    lambda: Settings(width=3),
    lambda: Plain({"a": Plain(None)}),
    lambda: functools.partial(add, 1.0),
    lambda: add,
    lambda: FUNCTION,
    lambda: WEIGHT,
    WEIGHT.t,
    lambda: [WEIGHT, WEIGHT[0]],
    lambda: weakref.ref(WEIGHT),
    lambda: torch.Size((1, 2)),
]


@pytest.mark.parametrize("make", SAME)
def test_what_is_the_same_is_found_to_be(make: Callable[[], object]) -> None:
    """Equal values made anew, the same code, and the same memory look alike."""
    assert list(look(make()).find_differences(look(make()))) == []


def test_what_a_function_has_captured_is_seen() -> None:
    """The value of a closure that changes is a difference of the function."""
    cell: list[float] = [1.0]

    def scale() -> float:
        return cell[0]

    before = look(scale)
    assert list(before.find_differences(look(scale))) == []
    cell[0] = 2.0
    assert list(before.find_differences(look(scale))) == ["extra"]


def test_flags_hooks_and_classes_are_seen() -> None:
    """Training, a hook on a part, a parameter that is frozen, another class: each is named."""

    class Other(nn.Linear):
        """Another class of the same layout."""

    module = nn.Sequential(nn.Linear(2, 2))
    before = look_at(module)
    changes: list[tuple[Callable[[], Any], Callable[[], Any], str]] = [
        (module.eval, module.train, "training"),
        (lambda: setattr(module[0], "__class__", Other), lambda: setattr(module[0], "__class__", nn.Linear), "0"),
        (lambda: module.requires_grad_(requires_grad=False), module.requires_grad_, "0._parameters"),
    ]
    for change, undo, name in changes:
        change()
        assert name in list(before.find_differences(look_at(module)))
        undo()
        assert list(before.find_differences(look_at(module))) == []
    handle = module[0].register_forward_hook(lambda *_: None)
    assert "0._forward_hooks" in list(before.find_differences(look_at(module)))
    handle.remove()
    assert list(before.find_differences(look_at(module))) == []


def test_objects_that_lead_back_to_themselves_end() -> None:
    """Circles are seen once."""
    one, other = Plain(None), Plain(None)
    one.value, other.value = one, other
    assert list(look(one).find_differences(look(other))) == []


class Linked:
    """An object that leads to another one."""

    def __init__(self, after: object) -> None:
        """Keep it."""
        self.after = after


class Bare(int):
    """An object that nobody can refer to weakly."""

    __slots__ = ()


def test_what_nobody_can_tell_is_not_taken_for_the_same() -> None:
    """Objects without weak references, or that lie too deep, are themselves in one module, and in no other."""
    deep: object = None
    for _ in range(5000):
        deep = Linked(deep)
    for value in (Bare(3), deep):
        module = nn.Linear(2, 2)
        setattr(module, "extra", value)  # noqa: B010 - of any type
        assert look_at(module).unsure == ("extra",)
        assert not list(look_at(module).find_differences(look_at(module)))
        assert not look_at(module).is_like(look_at(module))
    assert look(1).is_like(look(1))


def test_the_context_of_a_wrapper_is_seen() -> None:
    """What a tensor subclass knows beside its memory, such as a block size, is a difference of the parameter."""
    parts = (torch.ones(4, dtype=torch.int8), torch.ones(2))
    seen = []
    for block in (2, 2, 4):
        module = nn.Module()
        module.register_buffer("weight", Blocked(*parts, block=block))
        seen.append(look_at(module))
    assert list(seen[0].find_differences(seen[1])) == []
    assert list(seen[0].find_differences(seen[2])) == ["_buffers"]


def test_nothing_is_kept_alive() -> None:
    """A sight outlives what it was of, tensors and objects, and is then like nothing."""
    module = nn.Linear(2, 2)
    module.extra = pattern = type("Opaque", (dict,), {})()
    seen = look_at(module)
    references = [weakref.ref(module.weight), weakref.ref(pattern)]
    assert list(seen.find_differences(look_at(module))) == []
    del module, pattern
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_tensors_of_the_processor_are_named() -> None:
    """Whatever leads to one is: a capture would use its values up."""
    assert set(look(Plain([torch.ones(1)])).host) == {"_parameters", "extra"}
