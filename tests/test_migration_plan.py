"""Plans of state migrations: what each tensor is made of, what it costs, and errors that name step and tensors."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.errors import MigrationStepError
from hotglm.migration.expression import Source, TensorSpec, pad
from hotglm.migration.operation import Operation
from support.evaluation import bits, evaluate
from support.operations import draw_operation, make_sources, make_tensors, specs

MAX_PLAN_MS = 100


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    """Return the spec of a float32 tensor."""
    return TensorSpec(dtype=dtype, shape=shape)


def make(*operations: Operation, down: list[Operation] | None = None) -> hotglm.Migrations:
    """Return migrations with one step from 1.0 to 2.0."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.0", "2.0", operations, down=down)
    return migrations


def plan(migrations: hotglm.Migrations, state: Mapping[str, TensorSpec]) -> hotglm.StatePlan:
    """Plan the way from 1.0 to 2.0."""
    return migrations.plan("1.0", "2.0").plan_state(state)


@st.composite
def chains(draw: st.DrawFn) -> tuple[dict[str, TensorSpec], hotglm.Migrations, int]:
    """Draw a state and up to four steps of one or two invertible operations each, from version 1.0 on."""
    state = draw(specs())
    current, migrations = dict(state), hotglm.Migrations("drawn")
    num_steps = draw(st.integers(1, 4))
    for number in range(num_steps):
        operations = []
        for _ in range(draw(st.integers(1, 2))):
            operations.append(draw_operation(draw, current))
            current = {name: e.spec for name, e in operations[-1].apply(make_sources(current)).items()}
        migrations.state(f"{number + 1}.0", f"{number + 2}.0", operations)
    return state, migrations, num_steps + 1


@given(chains(), st.data())
def test_a_plan_through_a_version_is_two_plans(
    chain: tuple[dict[str, TensorSpec], hotglm.Migrations, int], data: st.DataObject
) -> None:
    """Tensors of plan(a, c) are bit for bit those of plan(a, b) and then plan(b, c), up and down."""
    state, migrations, newest = chain
    middle = data.draw(st.integers(1, newest))
    tensors = make_tensors(state, 3)
    first = migrations.plan("1.0", f"{middle}.0").plan_state(state)
    second = migrations.plan(f"{middle}.0", f"{newest}.0").plan_state(first.specs)
    whole = migrations.plan("1.0", f"{newest}.0").plan_state(state)
    new = evaluate(whole.outputs, tensors)
    assert _bits(evaluate(second.outputs, evaluate(first.outputs, tensors))) == _bits(new)
    back = migrations.plan(f"{newest}.0", "1.0").plan_state(whole.specs)
    assert back.specs == state
    assert _bits(evaluate(back.outputs, new)) == _bits(tensors)


def _bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


@given(chains())
def test_units_cover_everything_once(chain: tuple[dict[str, TensorSpec], hotglm.Migrations, int]) -> None:
    """Every output is in one unit, no source in two, and evaluating unit by unit gives what evaluating all gives."""
    state, migrations, newest = chain
    planned = migrations.plan("1.0", f"{newest}.0").plan_state(state)
    outputs = [name for unit in planned.units for name in unit.outputs]
    sources = [name for unit in planned.units for name in unit.sources]
    assert sorted(outputs) == sorted(planned.outputs)
    assert len(set(sources)) == len(sources)
    assert set(sources) | set(planned.dropped) == set(state)
    assert not set(sources) & set(planned.dropped)
    tensors = make_tensors(state, 1)
    singly: dict[str, torch.Tensor] = {}
    for unit in planned.units:
        needed = {name: tensors[name] for name in unit.sources}
        singly |= evaluate({name: planned.outputs[name] for name in unit.outputs}, needed)
    assert _bits(singly) == _bits(evaluate(planned.outputs, tensors))


def test_memory_is_that_of_the_largest_unit() -> None:
    """peak_nbytes is the sum of the largest units: their sources, and what lies between these and the outputs."""
    state = {"qkv": spec(12, 4), "a": spec(2), "b": spec(3), "moved": spec(100), "kept": spec(100), "gone": spec(9)}
    planned = plan(
        make(
            hotglm.Rename("moved", "there"),
            hotglm.Split("qkv", ("q", "k", "v")),
            hotglm.Concatenate(("a", "b"), "ab", sizes=(2, 3)),
            hotglm.Cast("ab", "float64"),
            hotglm.Scale("ab", 3.0),
            hotglm.Add("new", (1000,), "float32", hotglm.Zeros()),
            hotglm.Drop("gone"),
        ),
        state,
    )
    nbytes = {unit.outputs: unit.nbytes for unit in planned.units}
    assert nbytes == {
        ("there",): 0,
        ("kept",): 0,
        ("q", "k", "v"): 4 * 12 * 4,
        ("ab",): 4 * 5 + 4 * 5 + 8 * 5,  # the two sources, these joined, and that converted; scaled is the output
        ("new",): 0,
    }
    assert planned.peak_nbytes() == 192
    assert planned.peak_nbytes(num_workers=2) == 192 + 80
    assert planned.peak_nbytes(num_workers=9) == 192 + 80
    assert planned.dropped == ("gone",)


def test_a_plan_can_be_read() -> None:
    """Explain shows the path, every tensor that is not read as it is, and what is dropped."""
    migrations = make(
        hotglm.Rename(r"enc\.(.*)", r"body.\1"), hotglm.Split("body.w", ("body.q", "body.k")), hotglm.Drop("gone")
    )
    state = {"enc.w": spec(4, 2), "enc.b": spec(4), "head": spec(1), "gone": spec(1)}
    planned = plan(migrations, state)
    assert planned.explain().splitlines() == [
        "State 1.0 -> 2.0: 4 tensors, 3 changed, 1 dropped; 32 bytes beside them.",
        "  'body.b' = 'enc.b'",
        "  'body.q' = Narrow('enc.w', dim=0, start=0, length=2) [float32 [2, 2]]",
        "  'body.k' = Narrow('enc.w', dim=0, start=2, length=2) [float32 [2, 2]]",
        "  dropped: 'gone'",
    ]
    assert migrations.plan("1.0", "2.0").explain().splitlines() == [
        "'ranker' 1.0 -> 2.0: 1 step.",
        "  1.0 -> 2.0 (up)",
        r"    state: Rename('enc\\.(.*)', 'body.\\1')",
        "    state: Split('body.w', ('body.q', 'body.k'))",
        "    state: Drop('gone')",
    ]
    assert planned.outputs["head"] == Source("head", spec(1))
    assert not planned.is_identity
    assert pickle.loads(pickle.dumps(planned)) == planned


def test_a_failing_operation_names_step_and_tensors() -> None:
    """The error names the step, the operation and every tensor; what was planned before leaves nothing behind."""
    migrations = make(hotglm.Rename("a", "z"))
    migrations.state("2.0", "3.0", [hotglm.Split(r"(b\d)", (r"\1.x", r"\1.y"))])
    state = {"a": spec(1), "b1": spec(3), "b2": spec(4), "b3": spec(5)}
    kept = dict(state)
    with pytest.raises(MigrationStepError) as caught:
        migrations.plan("1.0", "3.0").plan_state(state)
    error = caught.value
    assert (error.step, error.code, error.tensor) == ("2.0 -> 3.0", "SIZE_DIFFERS", "b1")
    assert error.operation is not None
    assert error.operation.startswith("Split(")
    assert [problem.tensor for problem in error.problems] == ["b1", "b3"]
    assert "'ranker'" in str(error)
    assert state == kept
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.operation) == (error.step, error.operation)


def test_a_derived_way_down_is_verified_on_real_names() -> None:
    """Where a derived inverse does not lead back, going down is refused with the names, instead of being wrong."""
    migrations = make(hotglm.Rename(r"(.*)x(.*)", r"\1y\2"))
    good = {"axb": spec(1)}
    assert migrations.plan("2.0", "1.0").plan_state(plan(migrations, good).specs).specs == good
    with pytest.raises(MigrationStepError) as caught:
        migrations.plan("2.0", "1.0").plan_state({"ayxb": spec(1)})
    assert caught.value.code == "NOT_INVERTED"
    assert "`down`" in str(caught.value)


def test_what_was_added_is_dropped_only_as_it_was() -> None:
    """Going down past an Add refuses a tensor of another shape than the Add makes."""
    migrations = make(hotglm.Add("b", (2,), "float32", hotglm.Zeros()))
    path = migrations.plan("2.0", "1.0")
    assert path.plan_state({"a": spec(1), "b": spec(2)}).specs == {"a": spec(1)}
    with pytest.raises(MigrationStepError):
        path.plan_state({"a": spec(1), "b": spec(3)})


def test_an_explicit_way_down_is_taken() -> None:
    """Operations given for the way down replace the derived ones, also where none could be derived."""
    migrations = make(hotglm.Drop("a"), down=[hotglm.Add("a", (1,), "float32", hotglm.Ones())])
    assert list(migrations.plan("2.0", "1.0").plan_state({"b": spec(1)}).outputs) == ["b", "a"]
    assert migrations.check() == ()


def test_a_chain_may_be_long() -> None:
    """A thousand steps that all compute with one tensor are planned, and those that only grow it become one."""
    migrations = hotglm.Migrations("ranker")
    for n in range(1, 1001):
        migrations.state(f"{n}.0", f"{n + 1}.0", [hotglm.Scale("a", 3.0), hotglm.Pad("b", 0, after=1)])
    planned = migrations.plan("1.0", "1001.0").plan_state({"a": spec(2), "b": spec(2)})
    assert planned.outputs["b"] == pad(Source("b", spec(2)), 0, 0, 1000, 0.0)
    assert [(unit.sources, unit.nbytes) for unit in planned.units] == [(("a",), 8 * 1000), (("b",), 8)]
    assert "..." in planned.explain()


def test_a_random_tensor_keeps_the_name_it_was_made_for() -> None:
    """Normal is seeded with the name at the Add, so that a later renaming does not change its values."""
    planned = plan(make(hotglm.Add("a", (1,), "float32", hotglm.Normal(1.0, 5)), hotglm.Rename("a", "b")), {})
    made = planned.outputs["b"]
    assert getattr(made, "name", None) == "a"


# -- time --------------------------------------------------------------------------------------------------------------

STATE = {f"encoder.layers.{n}.weight": spec(4, 4) for n in range(1000)}


@pytest.mark.parametrize(
    "operations",
    [
        [hotglm.Rename(r"encoder\.(.*)", r"backbone.\1")],
        [hotglm.Rename(f"encoder.layers.{n}.weight", f"backbone.{n}.w") for n in range(1000)],
        [hotglm.Split(r"encoder\.(.*)", (r"q.\1", r"k.\1"))],
        [hotglm.Split(f"encoder.layers.{n}.weight", (f"q.{n}", f"k.{n}")) for n in range(1000)],
    ],
    ids=["one pattern", "1000 renames", "one split", "1000 splits"],
)
def test_planning_is_linear(operations: list[Operation]) -> None:
    """A plan of 1000 tensors with 1000 changed takes less than 100 ms, by one pattern or by 1000 operations."""
    path = make(*operations).plan("1.0", "2.0")

    def measure_ms() -> float:  # of this thread, so that a busy machine does not count
        start = time.thread_time()
        path.plan_state(STATE)
        return (time.thread_time() - start) * 1e3

    assert min(measure_ms() for _ in range(5)) < MAX_PLAN_MS
