"""State operations: each does what its torch call does, refuses what does not fit, and can be undone bit for bit."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.errors import ArgumentError, MigrationStepError
from hotglm.migration.expression import TensorSpec
from hotglm.migration.operation import Operation
from support.evaluation import bits, evaluate
from support.operations import draw_operation, make_sources, make_tensors, specs

F32 = "float32"


def spec(*shape: int, dtype: str = F32) -> TensorSpec:
    """Return the spec of a float32 tensor."""
    return TensorSpec(dtype=dtype, shape=shape)


def inverse_of(operation: Operation) -> Operation:
    """Return the inverse, which must be there."""
    inverse = operation.inverse()
    assert inverse is not None, operation.why_not()
    return inverse


def run(operation: Operation, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run one operation on real tensors."""
    state = {name: spec(*t.shape, dtype=str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    return evaluate(operation.apply(make_sources(state)), tensors)


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Hold two states bitwise equal."""
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(t) for name, t in wanted.items()}


def refuse(operation: Operation, state: Mapping[str, TensorSpec]) -> MigrationStepError:
    """Return the error of an operation that does not fit."""
    with pytest.raises(MigrationStepError) as caught:
        operation.apply(make_sources(state))
    return caught.value


# -- laws --------------------------------------------------------------------------------------------------------------


@st.composite
def journeys(draw: st.DrawFn) -> tuple[dict[str, TensorSpec], list[Operation]]:
    """Draw a state and up to six invertible operations, each of which fits what the ones before it leave."""
    state = draw(specs())
    current, operations = dict(state), list[Operation]()
    for _ in range(draw(st.integers(1, 6))):
        operation = draw_operation(draw, current)
        current = {name: e.spec for name, e in operation.apply(make_sources(current)).items()}
        operations.append(operation)
    return state, operations


@given(journeys())
def test_down_after_up_is_nothing(journey: tuple[dict[str, TensorSpec], list[Operation]]) -> None:
    """The inverses, last first, lead back to the very tensors that one came from, whatever the operations."""
    state, operations = journey
    current = start = make_sources(state)
    for operation in operations:
        current = operation.apply(current)
    for operation in reversed(operations):
        current = inverse_of(operation).apply(current)
    assert current == start


@given(journeys(), st.integers(0, 99))
def test_a_plan_is_its_operations_one_after_the_other(
    journey: tuple[dict[str, TensorSpec], list[Operation]], seed: int
) -> None:
    """Evaluating the composed expressions gives the bits of running the operations singly, there and back."""
    state, operations = journey
    whole = [*operations, *(inverse_of(o) for o in reversed(operations[1:]))]
    current = make_sources(state)
    tensors = original = make_tensors(state, seed)
    for operation in whole:
        current, tensors = operation.apply(current), run(operation, tensors)
    assert_same(evaluate(current, original), tensors)


@given(journeys())
def test_the_inverse_of_the_inverse_does_the_same(journey: tuple[dict[str, TensorSpec], list[Operation]]) -> None:
    """Where an inverse has an inverse, that does what the operation does."""
    state, operations = journey
    current = make_sources(state)
    for operation in operations:
        if (again := inverse_of(operation).inverse()) is not None:
            assert again.apply(current) == operation.apply(current)
        current = operation.apply(current)


@given(journeys())
def test_an_operation_never_changes_what_it_is_given(journey: tuple[dict[str, TensorSpec], list[Operation]]) -> None:
    """Apply leaves its argument as it was, and an operation survives pickling."""
    state, operations = journey
    start = make_sources(state)
    kept = dict(start)
    operations[0].apply(start)
    assert start == kept
    assert pickle.loads(pickle.dumps(operations)) == operations


# -- what each does ----------------------------------------------------------------------------------------------------

X = torch.arange(24.0).reshape(2, 3, 4)
QKV = torch.arange(12.0).reshape(6, 2)

CASES: list[tuple[Operation, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = [
    (hotglm.Rename("a.b", "c"), {"a.b": X, "axb": QKV}, {"c": X, "axb": QKV}),
    (hotglm.Rename(r"(\w+)\.(\w+)", r"\2.\1"), {"a.b": X, "b.c": QKV}, {"b.a": X, "c.b": QKV}),
    (hotglm.Rename(r"(a|b)", r"\1"), {"a": X}, {"a": X}),
    (hotglm.Split("w", ("q", "k", "v")), {"w": QKV}, {"q": QKV[:2], "k": QKV[2:4], "v": QKV[4:]}),
    (
        hotglm.Split("w", ("q", "k", "v"), sizes=(4096, 1024, 1024)),
        {"w": QKV},
        {"q": QKV[:4], "k": QKV[4:5], "v": QKV[5:]},
    ),
    (hotglm.Split("w", ("l", "r"), dim=-1), {"w": QKV}, {"l": QKV[:, :1], "r": QKV[:, 1:]}),
    (hotglm.Concatenate(("a", "b"), "w"), {"a": QKV, "b": -QKV}, {"w": torch.cat([QKV, -QKV])}),
    (hotglm.Concatenate(("a", "b"), "a"), {"a": QKV, "b": -QKV}, {"a": torch.cat([QKV, -QKV])}),
    (hotglm.Stack(("a", "b"), "w", dim=-1), {"a": QKV, "b": -QKV}, {"w": torch.stack([QKV, -QKV], -1)}),
    (hotglm.Unstack("w", ("a", "b", "c"), dim=1), {"w": X}, {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]}),
    (hotglm.Transpose("w", 0, -1), {"w": X}, {"w": X.transpose(0, -1)}),
    (hotglm.Permute("w", (2, 0, -2)), {"w": X}, {"w": X.permute(2, 0, 1)}),
    (hotglm.Reshape("w", (4, -1)), {"w": X}, {"w": X.reshape(4, 6)}),
    (hotglm.Slice("w", -1, 1, 3), {"w": X}, {"w": X[..., 1:3]}),
    (hotglm.Slice("w", 2, -2), {"w": X}, {"w": X[..., -2:]}),
    (hotglm.Slice("w", 2, stop=-1, was=4), {"w": X}, {"w": X[..., :-1]}),
    (hotglm.Pad("w", 1, after=1, value=9), {"w": QKV}, {"w": torch.cat([QKV, torch.full((6, 1), 9.0)], 1)}),
    (hotglm.Cast("w", "bfloat16"), {"w": X / 7}, {"w": (X / 7).bfloat16()}),
    (hotglm.Scale("w", 0.3), {"w": X}, {"w": X * 0.3}),
    (hotglm.Tie(("a", "b")), {"a": X, "b": X.clone()}, {"a": X}),
    (hotglm.Untie(("a", "b")), {"a": X}, {"a": X, "b": X}),
    (hotglm.Drop(r".*\.bias"), {"a.bias": X, "a.weight": QKV}, {"a.weight": QKV}),
    (hotglm.Add("b", (2,), "int64", hotglm.Constant(3)), {"a": X}, {"a": X, "b": torch.full((2,), 3)}),
    (hotglm.Add("b", initialiser=hotglm.Copy("a")), {"a": X}, {"a": X, "b": X}),
    (
        hotglm.Add(r"\1.bias", (1,), F32, each=r"(.*)\.weight"),
        {"a.weight": X, "b.weight": X},
        {"a.weight": X, "b.weight": X, "a.bias": torch.zeros(1), "b.bias": torch.zeros(1)},
    ),
    (
        hotglm.Apply(lambda t: {"s": t["x"] + t["y"]}, {"x": "a", "y": "b"}, {"s": lambda specs: specs["x"]}),
        {"a": X, "b": -2 * X, "c": QKV},
        {"s": X + -2 * X, "c": QKV},
    ),
    (
        hotglm.Apply(
            lambda t: {r"\1.norm": t[r"(.*)\.w"].norm(), r"\1.w": 2 * t[r"(.*)\.w"]},
            [r"(.*)\.w"],
            {r"\1.norm": spec(), r"\1.w": lambda specs: specs[r"(.*)\.w"]},
        ),
        {"a.w": X, "b.w": QKV},
        {"a.norm": X.norm(), "a.w": 2 * X, "b.norm": QKV.norm(), "b.w": 2 * QKV},
    ),
]


@pytest.mark.parametrize(("operation", "before", "after"), CASES, ids=[str(case[0])[:40] for case in CASES])
def test_an_operation_does_what_it_says(
    operation: Operation, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> None:
    """The tensors after an operation are those of the torch call that it stands for, and all others as they were."""
    assert_same(run(operation, before), after)


THERE_AND_BACK = [
    hotglm.Permute("w", (2, 0, 1)),
    hotglm.Permute("w", (-2, -1, 0)),
    hotglm.Transpose("w", 0, -1),
    hotglm.Reshape("w", (4, -1), was=(2, -1, 4)),
    hotglm.Pad("w", 1, before=2, value=9),
    hotglm.Pad("w", -1, before=1, after=3),
    hotglm.Split("w", ("a", "b"), dim=1, sizes=(2, 1)),
    hotglm.Unstack("w", ("a", "b", "c", "d"), dim=-1),
    hotglm.Cast("w", "float64", was=F32),
    hotglm.Scale("w", -0.25),
    hotglm.Untie(("w", "v", "u")),
    hotglm.Rename("w", "a[0]"),
    hotglm.Add("a[0]", (2,), F32, hotglm.Ones()),
]


@pytest.mark.parametrize("operation", THERE_AND_BACK, ids=str)
def test_an_operation_there_and_back_is_nothing(operation: Operation) -> None:
    """Each kind of operation, written out and undone, gives the bits that one came from; so does the inverse."""
    tensors = {"w": X}
    inverse = inverse_of(operation)
    there = run(operation, tensors)
    assert_same(run(inverse, there), tensors)
    if (again := inverse.inverse()) is not None:
        assert_same(run(again, tensors), there)


def test_dropping_with_restore_comes_back() -> None:
    """What was dropped comes back as restore says, also one for every layer."""
    state = {f"layers.{n}.{part}": spec(2) for n in range(3) for part in ("w", "ids")}
    drop = hotglm.Drop(
        r"layers\.(\d+)\.ids", hotglm.Add(r"layers.\1.ids", (2,), F32, hotglm.Ones(), each=r"layers\.(\d+)\.w")
    )
    down = drop.apply(make_sources(state))
    assert sorted(down) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    back = evaluate(inverse_of(drop).apply(down), make_tensors(state, 0))
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[f"layers.{n}.ids"], torch.ones(2)) for n in range(3))


def test_a_slice_of_what_was_padded_comes_back() -> None:
    """A vocabulary padded with zeros is cut, and padded again on the way back."""
    tensors = {"w": torch.cat([QKV, torch.zeros(2, 2)])}
    for cut in (hotglm.Slice("w", 0, 0, 6, was=8, restore=0.0), hotglm.Slice("w", 0, stop=-2, restore=0.0)):
        assert_same(run(inverse_of(cut), run(cut, tensors)), tensors)


def test_an_optional_operation_may_find_nothing() -> None:
    """An optional operation leaves a state alone that has none of its tensors, and still refuses half a group."""
    state = {"a": spec(2)}
    for operation in (
        hotglm.Rename("b", "c", optional=True),
        hotglm.Split(r"(b)", (r"\1.x", r"\1.y"), optional=True),
        hotglm.Concatenate(("b", "c"), "d", optional=True),
        hotglm.Drop("b", optional=True),
        hotglm.Untie(("b", "c"), optional=True),
    ):
        assert operation.apply(make_sources(state)) == make_sources(state)
        assert inverse_of(operation).optional if operation.inverse() else True
    error = refuse(hotglm.Concatenate(("b", "a"), "d", optional=True), state)
    assert [problem.tensor for problem in error.problems] == ["b"]


# -- what each refuses -------------------------------------------------------------------------------------------------

STATE = {"a": spec(4, 2), "b": spec(4, 3), "c.x": spec(4, 2), "c.y": spec(4, 2, dtype="int64"), "s": spec()}

REFUSED: list[tuple[Operation, str]] = [
    (hotglm.Rename("nothing", "x"), "TENSOR_MISSING"),
    (hotglm.Rename(r"no(.*)", r"\1"), "TENSOR_MISSING"),
    (hotglm.Rename("a", "b"), "NAME_TAKEN"),
    (hotglm.Rename(r"c\.(.*)", "same"), "NAME_TAKEN"),
    (hotglm.Split("b", ("x", "y"), dim=1), "SIZE_DIFFERS"),
    (hotglm.Split("s", ("x", "y")), "NO_DIMENSION"),
    (hotglm.Split("a", ("x", "b")), "NAME_TAKEN"),
    (hotglm.Split(r"(a)", (r"\1", "a")), "NAME_TWICE"),
    (hotglm.Concatenate(("a", "no"), "x"), "TENSOR_MISSING"),
    (hotglm.Concatenate(("a", "b"), "x"), "SPEC_DIFFERS"),
    (hotglm.Concatenate(("a", "b"), "x", dim=1), "SIZE_DIFFERS"),
    (hotglm.Concatenate(("a", "c.y"), "x"), "SPEC_DIFFERS"),
    (hotglm.Concatenate(("a", "s"), "x"), "SPEC_DIFFERS"),
    (hotglm.Concatenate((r"(a)", r"\1"), "x"), "NAME_TWICE"),
    (hotglm.Stack(("a", "b"), "x"), "SPEC_DIFFERS"),
    (hotglm.Stack(("a", "c.x"), "x", dim=4), "NO_DIMENSION"),
    (hotglm.Unstack("a", ("x", "y"), dim=0), "SIZE_DIFFERS"),
    (hotglm.Transpose("a", 0, 2), "NO_DIMENSION"),
    (hotglm.Permute("a", (0, 2, 1)), "NO_DIMENSION"),
    (hotglm.Reshape("a", (3, -1)), "SHAPE_DIFFERS"),
    (hotglm.Reshape("a", (8,), was=(2, 4)), "SHAPE_DIFFERS"),
    (hotglm.Slice("a", 0, 2, 5), "SIZE_DIFFERS"),
    (hotglm.Slice("a", 0, 0, 2, was=5), "SIZE_DIFFERS"),
    (hotglm.Pad("c.y", 0, after=1, value=0.5), "DTYPE_DIFFERS"),
    (hotglm.Pad("s", 0, after=1), "NO_DIMENSION"),
    (hotglm.Cast(".*", "float64", was=F32), "DTYPE_DIFFERS"),
    (hotglm.Scale("c.y", 2.0), "DTYPE_DIFFERS"),
    (hotglm.Tie(("a", "b")), "SPEC_DIFFERS"),
    (hotglm.Tie(("a", "no")), "TENSOR_MISSING"),
    (hotglm.Untie(("a", "b")), "NAME_TAKEN"),
    (hotglm.Add("a", (1,), F32), "NAME_TAKEN"),
    (hotglm.Add("x", initialiser=hotglm.Copy("no")), "TENSOR_MISSING"),
    (hotglm.Add("x", (1,), initialiser=hotglm.Copy("a")), "SPEC_DIFFERS"),
    (hotglm.Add("x", (1,), F32, each=r"c\..*"), "NAME_TWICE"),
    (hotglm.Drop("a", hotglm.Add("a", (4, 2), "float16")), "RESTORE_DIFFERS"),
    (hotglm.Drop(r"c\..*", hotglm.Add("c.x", (4, 2), F32)), "RESTORE_DIFFERS"),
    (hotglm.Apply(dict, ["a"], {"x": lambda specs: specs["y"]}), "SPEC_RULE"),
    (hotglm.Apply(dict, ["a"], {"x": lambda specs: specs["a"].shape}), "SPEC_RULE"),  # type: ignore[dict-item, return-value]
    (hotglm.Apply(dict, ["a", "no"], {"x": spec()}), "TENSOR_MISSING"),
]


@pytest.mark.parametrize(("operation", "code"), REFUSED, ids=[f"{code}-{op}"[:50] for op, code in REFUSED])
def test_an_operation_refuses_what_does_not_fit(operation: Operation, code: str) -> None:
    """One typed error names the operation and the tensors, and ends with the remedy; the state is as it was."""
    state = make_sources(STATE)
    error = refuse(operation, STATE)
    assert error.code == code
    assert error.operation == str(operation)
    assert type(operation).__name__ in str(error)
    assert "Remedy: " in str(error).splitlines()[-1]
    assert all(p.message.startswith("Expected ") and ", got " in p.message for p in error.problems)
    assert state == make_sources(STATE)


def test_all_problems_of_an_operation_are_named() -> None:
    """An operation over many layers reports each layer that it does not fit."""
    state = {f"layers.{n}.w": spec(n, 2) for n in range(1, 6)}
    error = refuse(hotglm.Split(r"layers\.(\d+)\.w", (r"l\1.x", r"l\1.y")), state)
    assert [problem.tensor for problem in error.problems] == ["layers.1.w", "layers.3.w", "layers.5.w"]


def test_a_missing_name_comes_with_the_nearest() -> None:
    """Who misspelt a name sees what is there."""
    error = refuse(hotglm.Rename("encoder.layer.0.weight", "x"), {"encoder.layers.0.weight": spec(), "head": spec()})
    assert "'encoder.layers.0.weight'" in str(error)


NOT_INVERTIBLE: list[tuple[Operation, str]] = [
    (hotglm.Rename("encoder.(.*)", r"backbone.\1"), "for a dot"),
    (hotglm.Rename(r"(a)(b)?", r"\1"), "plain text and groups"),
    (hotglm.Rename(r"(a)(b)", r"\1"), "every group"),
    (hotglm.Rename(r"(a)", r"\1\1"), "every group"),
    (hotglm.Rename(r"((a)b)", r"\1\2"), "plain text and groups"),
    (hotglm.Split(r"(.*)\.(.*)", (r"\1.x", r"\1.y")), "every group"),
    (hotglm.Reshape("a", (2, 2)), "`was`"),
    (hotglm.Slice("a", 0, 1), "`restore`"),
    (hotglm.Slice("a", 0, 0, 4, restore=0.0), "`was`"),
    (hotglm.Cast("a", "float64"), "`was`"),
    (hotglm.Cast("a", "bfloat16", was=F32), "does not hold"),
    (hotglm.Cast("a", "bfloat16", was="float16"), "does not hold"),
    (hotglm.Scale("a", 3.0), "power of two"),
    (hotglm.Drop("a"), "`restore`"),
    (hotglm.Apply(dict, ["a"], {"b": spec()}), "`down`"),
]


@pytest.mark.parametrize(("operation", "why"), NOT_INVERTIBLE, ids=[str(op)[:40] for op, _ in NOT_INVERTIBLE])
def test_what_cannot_be_undone_says_why(operation: Operation, why: str) -> None:
    """An operation that loses something has no inverse, and names what is missing; one that has says nothing."""
    assert operation.inverse() is None
    assert why in operation.why_not()
    assert inverse_of(hotglm.Rename("a", "b")).why_not() == ""


BAD: list[Callable[[], object]] = [
    lambda: hotglm.Rename("(", "x"),
    lambda: hotglm.Rename("", "x"),
    lambda: hotglm.Rename("a", r"\1"),
    lambda: hotglm.Rename(r"(a)", r"\2"),
    lambda: hotglm.Rename(r"(a)", r"\g<no>"),
    lambda: hotglm.Rename(r"(a)", "x\\"),
    lambda: hotglm.Rename(3, "x"),  # type: ignore[arg-type]
    lambda: hotglm.Split("a", "bc"),
    lambda: hotglm.Split("a", ("b", "b")),
    lambda: hotglm.Split("a", ("b", "c"), sizes=(1,)),
    lambda: hotglm.Split("a", ("b", "c"), sizes=(1, 0)),
    lambda: hotglm.Concatenate((), "x"),
    lambda: hotglm.Tie(("a",)),
    lambda: hotglm.Permute("a", (0, 0)),
    lambda: hotglm.Reshape("a", (-1, -1)),
    lambda: hotglm.Pad("a", 0, before=-1),
    lambda: hotglm.Cast("a", "half"),
    lambda: hotglm.Scale("a", 0.0),
    lambda: hotglm.Scale("a", float("nan")),
    lambda: hotglm.Add("a", (1,)),
    lambda: hotglm.Add("a", (1,), F32, 0.5),  # type: ignore[arg-type]
    lambda: hotglm.Add(r"\1.x", (1,), F32),
    lambda: hotglm.Normal(-1.0),
    lambda: hotglm.Drop("a", hotglm.Rename("a", "b")),  # type: ignore[arg-type]
    lambda: hotglm.Apply(dict, ["a"], {}),
    lambda: hotglm.Apply(dict, ["a"], {"b": spec()}, down=dict),  # type: ignore[arg-type]
    lambda: hotglm.Add("a", (1,), "half", hotglm.Zeros()),
    lambda: hotglm.Add("a", (1,), "uint8", hotglm.Constant(256)),
    lambda: hotglm.Add("a", (1,), "int64", hotglm.Constant(0.5)),
    lambda: hotglm.Add("a", (1,), "int64", hotglm.Normal(1.0)),
    lambda: hotglm.Apply(dict, ["a"], {"b": (1, 2)}),  # type: ignore[dict-item]
    lambda: hotglm.Apply(3, ["a"], {"b": spec()}),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("make", BAD, ids=range(len(BAD)))
def test_what_cannot_be_meant_is_refused_at_once(make: Callable[[], object]) -> None:
    """A declaration that contradicts itself fails where it is written, not when a file is loaded."""
    with pytest.raises(ArgumentError) as caught:
        make()
    assert "Remedy: " in str(caught.value)


def test_operations_are_frozen_data() -> None:
    """An operation cannot be changed, and shows itself as it was written."""
    operation = hotglm.Split(r"(.*)\.qkv", (r"\1.q", r"\1.k"), sizes=(4, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        operation.name = "x"  # type: ignore[misc]
    assert str(operation) == r"Split('(.*)\\.qkv', ('\\1.q', '\\1.k'), sizes=(4, 1))"
