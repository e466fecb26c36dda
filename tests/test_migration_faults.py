"""What is wrong in a migration is refused with its name, or done bit for bit; never something in between."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import MigrationStepError
from hotglm.migration.expression import TensorSpec
from hotglm.migration.operation import Operation
from support.buffers import make_slot
from support.evaluation import bits
from support.steps import make, plan, run, spec

Tensors = Mapping[str, torch.Tensor]
MAX_CHAIN_S = 2.0


# -- the way back ------------------------------------------------------------------------------------------------------


def test_tensors_that_change_places_on_the_way_back_are_refused() -> None:
    """A derived way down after which the way up gives a name the tensor of another one is refused, also if all fit."""
    migrations = make(hotglm.Rename(r"(.*)\.(.*)", r"\2.\1"))
    state = {name: spec(2) for name in ("a.b.c", "c.a.b", "b.c.a")}
    with pytest.raises(MigrationStepError) as caught:
        migrations.plan("2.0", "1.0").plan_state(state)
    assert caught.value.code == "NOT_INVERTED"
    assert {problem.tensor for problem in caught.value.problems} == set(state)


@pytest.mark.parametrize(
    "operation",
    [hotglm.Add("b", initialiser=hotglm.Copy("a")), hotglm.Untie(("a", "b")), hotglm.Tie(("a", "b"))],
    ids=["copy", "untie", "tie"],
)
def test_copies_may_come_back_from_what_they_were_copied_from(operation: Operation) -> None:
    """A tensor that is left out on the way down, because it is a copy, may come back as one."""
    migrations = make(operation)
    state = {"a": torch.ones(2), **({} if isinstance(operation, hotglm.Tie) else {"b": torch.ones(2)})}
    assert plan(migrations, state, "2.0", "1.0").outputs


@pytest.mark.parametrize("factor", [2.0, -0.25])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_scaled_complex_number_keeps_the_signs_of_its_zeros(factor: float, dtype: torch.dtype) -> None:
    """Both parts of a complex number are scaled by themselves, so that scaling back gives the same bits."""
    values = [complex(one, other) for one in (0.0, -0.0, 1.0, -1.0) for other in (0.0, -0.0, 1.0, -1.0)]
    tensors = {"a": torch.tensor(values, dtype=dtype)}
    migrations = make(hotglm.Scale("a", factor))
    up = run(plan(migrations, tensors).outputs, tensors)
    assert bits(up["a"]) == bits(torch.view_as_complex(torch.view_as_real(tensors["a"]) * factor))
    assert bits(run(plan(migrations, up, "2.0", "1.0").outputs, up)["a"]) == bits(tensors["a"])


# -- long chains -------------------------------------------------------------------------------------------------------


def mix(tensors: Tensors) -> Tensors:
    """Read both tensors for each of two."""
    return {"a": tensors["a"] + tensors["b"], "b": tensors["a"] - tensors["b"]}


def test_a_chain_of_functions_that_read_each_others_results_takes_linear_time() -> None:
    """Steps whose function reads two results of the step before are planned, explained and run in time."""
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([0.0])}
    migrations = hotglm.Migrations("ranker")
    for number in range(40):
        migrations.state(
            f"{number}.0", f"{number + 1}.0", [hotglm.Apply(mix, ("a", "b"), {"a": spec(1), "b": spec(1)})]
        )
    start = time.perf_counter()
    found = plan(migrations, tensors, "0.0", "40.0")
    assert found.explain()
    made = run(found.outputs, tensors)
    assert time.perf_counter() - start < MAX_CHAIN_S
    assert (made["a"].item(), made["b"].item()) == (2.0**20, 0.0)


@pytest.mark.parametrize("num_steps", [60, 1000])
@pytest.mark.parametrize("kind", ["scale", "pad"])
def test_a_chain_may_be_longer_than_python_recurses(kind: str, num_steps: int) -> None:
    """A thousand steps that each change the same tensor are planned, explained and run."""
    tensors = {"a": torch.tensor([1.0, -2.0])}
    migrations = hotglm.Migrations("ranker")
    one: Operation = hotglm.Scale("a", -1.0) if kind == "scale" else hotglm.Pad("a", 0, after=1, value=3.0)
    for number in range(num_steps):
        odd = hotglm.Scale("a", 1.5 if number % 2 else -1.0)
        migrations.state(f"{number}.0", f"{number + 1}.0", [odd if kind == "scale" else one])
    found = plan(migrations, tensors, "0.0", f"{num_steps}.0")
    assert found.explain()
    wanted = tensors["a"]
    for number in range(num_steps):
        wanted = wanted * (1.5 if number % 2 else -1.0) if kind == "scale" else torch.cat([wanted, torch.tensor([3.0])])
    assert bits(run(found.outputs, tensors)["a"]) == bits(wanted)


# -- values and functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "live"),
    [
        (hotglm.Cast("a", "uint8"), torch.zeros(2, dtype=torch.uint8)),
        (hotglm.Pad("a", 0, after=1), torch.zeros(3, dtype=torch.bool)),
        (hotglm.Apply(lambda given: {"a": given["a"].float()}, ("a",), {"a": spec(2)}), torch.zeros(2)),
    ],
    ids=["cast", "pad", "apply"],
)
def test_bytes_that_are_no_truth_values_are_refused_whatever_becomes_of_them(
    operation: Operation, live: torch.Tensor, tmp_path: Path
) -> None:
    """A BOOL tensor with a byte of 2 is refused by its name in the file, also where it becomes something else."""
    header = b'{"a":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}'
    header += b" " * (-len(header) % 8)
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x02\x01")
    slot = make_slot(make(operation), a=live)
    with pytest.raises(hotglm.TensorValueError) as caught:
        slot.update(path, version="1.0")
    assert [(problem.code, problem.tensor) for problem in caught.value.problems] == [("BAD_BOOL", "a")]
    assert str(slot.version) == "2.0"
    assert bits(slot.state_dict()["a"]) == bits(live)


def test_one_function_may_make_different_tensors_of_the_same_ones() -> None:
    """Two uses of a function on the same tensors, under other keys or for other results, are two calls."""

    def branch(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"b": given["p"] + 1} if "p" in given else {"c": given["q"] + 2}

    tensors = {"a": torch.zeros(2)}
    migrations = make(
        hotglm.Untie(("a", "a2")),
        hotglm.Apply(branch, {"p": "a"}, {"b": spec(2)}),
        hotglm.Apply(branch, {"q": "a2"}, {"c": spec(2)}),
    )
    made = run(plan(migrations, tensors).outputs, tensors)
    assert (made["b"].tolist(), made["c"].tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_functions_may_pass_on_what_they_made_in_inference_mode() -> None:
    """A function that works in inference mode may be followed by another one."""

    def infer(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return {"a": given["a"] * 2}

    tensors = {"a": torch.ones(2)}
    twice = [hotglm.Apply(infer, ("a",), {"a": spec(2)})] * 2
    assert run(plan(make(*twice), tensors).outputs, tensors)["a"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("failing", [1.0, 2.0])
def test_the_step_that_failed_is_named_also_if_another_one_has_the_same_function(failing: float) -> None:
    """Of two steps with the same function, the one that failed is named."""

    def double(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if given["a"][0] == failing:
            raise ValueError("not this one")
        return {"a": given["a"] * 2}

    migrations = hotglm.Migrations("ranker")
    for source, target in (("1.0", "1.1"), ("1.1", "2.0")):
        migrations.state(source, target, [hotglm.Apply(double, ("a",), {"a": spec(2)})])
    slot = make_slot(migrations, a=torch.zeros(2))
    with pytest.raises(MigrationStepError) as caught:
        slot.update({"a": torch.ones(2)}, version="1.0")
    assert caught.value.step == ("1.0 -> 1.1" if failing == 1.0 else "1.1 -> 2.0")


# -- what is refused before anything is read ---------------------------------------------------------------------------

GROUPS = {"x.a": torch.ones(2), "y.a": torch.ones(2), "shared": torch.ones(2)}


@pytest.mark.parametrize(
    "operation",
    [
        hotglm.Concatenate((r"(.*)\.a", "shared"), r"\1.c"),
        hotglm.Stack((r"(.*)\.a", "shared"), r"\1.c"),
        hotglm.Tie((r"(.*)\.a", "shared")),
        hotglm.Apply(mix, (r"(.*)\.a", "shared"), {r"\1.c": spec(2)}),
    ],
    ids=lambda operation: type(operation).__name__,
)
def test_a_tensor_that_two_groups_would_take_is_named(operation: Operation) -> None:
    """A tensor that belongs to two groups of an operation is refused by name: the first would use it up."""
    with pytest.raises(MigrationStepError) as caught:
        plan(make(operation), GROUPS)
    assert [(problem.code, problem.tensor) for problem in caught.value.problems] == [("TENSOR_TWICE", "shared")]


@pytest.mark.parametrize(
    ("operation", "tensor"),
    [
        (hotglm.Pad("a", 0, after=1, value=float("nan")), torch.ones(2, dtype=torch.int64)),
        (hotglm.Pad("a", 0, after=1, value=float("inf")), torch.ones(2, dtype=torch.int64)),
        (hotglm.Pad("a", 0, after=1, value=300), torch.ones(2, dtype=torch.uint8)),
        (hotglm.Pad("a", 0, after=1, value=2), torch.ones(2, dtype=torch.bool)),
        (hotglm.Pad("a", 0, after=1, value=1e6), torch.ones(2, dtype=torch.float16)),
        (hotglm.Scale("a", 2.0**-200), torch.ones(2)),
        (hotglm.Scale("a", 2.0**200), torch.ones(2, dtype=torch.bfloat16)),
    ],
    ids=["nan", "inf", "too large", "no truth value", "half", "factor too small", "factor too large"],
)
def test_a_value_that_the_dtype_cannot_hold_is_refused_in_the_dry_run(
    operation: Operation, tensor: torch.Tensor
) -> None:
    """Padding and factors that would be rounded to something else altogether are refused by the tensor's name."""
    with pytest.raises(MigrationStepError) as caught:
        plan(make(operation), {"a": tensor})
    assert [(problem.code, problem.tensor) for problem in caught.value.problems] == [("DTYPE_DIFFERS", "a")]


LOOSE: Any = hotglm  # for what no type checker would let through


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, given: object) -> object:
        return given


@pytest.mark.parametrize(
    "construct",
    [
        lambda: LOOSE.Add("x", (2,), "float33"),
        lambda: LOOSE.Add("x", (-2,), "float32"),
        lambda: LOOSE.Add("x", 5, "float32"),
        lambda: LOOSE.Add("x", (2,), "int64", LOOSE.Constant(1.5)),
        lambda: LOOSE.Add("x", (2,), "uint8", LOOSE.Constant(300)),
        lambda: LOOSE.Constant("a"),
        lambda: LOOSE.Slice("a", 0, 0.5, 1.5),
        lambda: LOOSE.Slice("a", 0, 0, 1, was=3, restore="0"),
        lambda: LOOSE.Transpose("a", "x", 0),
        lambda: LOOSE.Split("a", ("b", "c"), dim=None),
        lambda: LOOSE.Split("a", ("b", "c"), sizes=2),
        lambda: LOOSE.Stack(("a", "b"), "c", dim=0.5),
        lambda: LOOSE.Permute("a", None),
        lambda: LOOSE.Permute("a", ("0", "1")),
        lambda: LOOSE.Reshape("a", 4),
        lambda: LOOSE.Reshape("a", None),
        lambda: LOOSE.Scale("a", "2"),
        lambda: LOOSE.Pad("a", None),
        lambda: LOOSE.Apply(_Unhashable(), ("a",), {"a": spec(2)}),
    ],
)
def test_an_operation_of_the_wrong_kind_of_values_is_refused_when_it_is_written(construct: Any) -> None:
    """Whoever writes an operation with something else than numbers, shapes and dtypes is told there and then."""
    with pytest.raises(hotglm.ArgumentError) as caught:
        construct()
    assert caught.value.remedy


def test_nothing_may_be_left_of_what_was_joined() -> None:
    """An empty range of tensors that were joined is an empty tensor."""
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    migrations = make(hotglm.Concatenate(("a", "b"), "c"), hotglm.Slice("c", 0, 1, 1))
    assert bits(run(plan(migrations, tensors).outputs, tensors)["c"]) == bits(torch.empty(0, 3))


def test_a_shape_may_be_written_as_a_list() -> None:
    """The shape of a spec that somebody writes as a list is the shape."""
    found = TensorSpec(dtype="float32", shape=[2, 2])  # type: ignore[arg-type]
    assert found == spec(2, 2)
    assert hash(found) == hash(spec(2, 2))


@pytest.mark.parametrize(
    ("source", "inside", "outside"),
    [
        ("==1!1.*", ["1!1.0", "1!1.9"], ["1.0", "1!2.0"]),
        ("~=1!2.3", ["1!2.3", "1!2.9"], ["2.3", "1!2.2", "1!3.0"]),
        ("~=1.4.post1", ["1.4.post1", "1.9"], ["1.4", "2.0"]),
        ("~=1.4.dev1", ["1.4", "1.9"], ["2.0"]),
    ],
)
def test_ranges_with_epochs_and_suffixes_are_read_as_they_are_defined(
    source: str, inside: list[str], outside: list[str]
) -> None:
    """A step starts from exactly the versions that PEP 440 counts into its range, epochs and suffixes included."""
    migrations = hotglm.Migrations("ranker")
    migrations.state(source, "1!9.0", [hotglm.Scale("a", 2.0)])
    assert all(migrations.plan(version, "1!9.0").hops for version in inside)
    for version in outside:
        with pytest.raises(hotglm.NoPathError):
            migrations.plan(version, "1!9.0")


def test_zeros_of_either_sign_stay_what_they_are() -> None:
    """Padding with zeros of one sign after such of the other is not taken for more of the same."""
    tensors = {"a": torch.ones(1)}
    migrations = make(hotglm.Pad("a", 0, after=1, value=0.0), hotglm.Pad("a", 0, after=1, value=-0.0))
    assert bits(run(plan(migrations, tensors).outputs, tensors)["a"]) == bits(torch.tensor([1.0, 0.0, -0.0]))
