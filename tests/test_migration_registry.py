"""The registry of migrations: definitions, model classes, threads, and telling versions by their tensors."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import (
    ArgumentError,
    DefinitionError,
    MigrationGraphError,
    UnknownVersionError,
)
from hotglm.migration.expression import TensorSpec
from hotglm.model import registry
from hotglm.version import Version


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a registry of its own."""
    monkeypatch.setattr(registry, "_definitions", {})
    monkeypatch.setattr(registry, "_migrations", {})


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    """Return the spec of a float32 tensor."""
    return TensorSpec(dtype=dtype, shape=shape)


# -- definitions -------------------------------------------------------------------------------------------------------


def test_config_and_state_of_one_range_are_one_step() -> None:
    """Both parts of a step may be registered apart, in any order, in any spelling of the range."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.4", "2.0", [hotglm.Rename("a", "b")])
    migrations.config(">=1.4,<2.0", "2.0.0", [hotglm.RenameField("a", "b")])
    (step,) = migrations.history()
    assert step.config == (hotglm.RenameField("a", "b"),)
    assert step.state == (hotglm.Rename("a", "b"),)


def define(number: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a new function object of the same place every time."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "number": number}

    return change


def test_the_same_definition_replaces_itself() -> None:
    """A cell that runs twice, or a module that is loaded again, registers what it registered before."""
    migrations = hotglm.Migrations("ranker")
    for number in (1, 2):
        migrations.config("1.4", "2.0")(define(number))
        migrations.state(
            "1.4",
            "2.0",
            [hotglm.Split("a", ["b", "c"]), hotglm.Apply(define(number), ["b"], {"d": spec(1)})],
            down=[hotglm.Apply(define(number), {"x": "d"}, {"b": lambda specs: specs["x"]})],
        )
    assert len(migrations.history()) == 1
    assert migrations.plan("1.4", "2.0").migrate_config({}) == {"number": 2}


@pytest.mark.parametrize(
    "again",
    [
        lambda m: m.config("1.4", "2.0", lambda config: config),
        lambda m: m.config("1.4", "2.0", [hotglm.RenameField("a", "b")]),
        lambda m: m.state("1.4", "2.0", [hotglm.Rename("a", "c")]),
        lambda m: m.state("1.4", "2.0", [hotglm.Rename("a", "b")], down=[hotglm.Rename("b", "c")]),
    ],
)
def test_another_definition_of_a_step_is_refused(again: Callable[[hotglm.Migrations], object]) -> None:
    """Two definitions of one step contradict each other; the error names the step, and the first one stays."""
    migrations = hotglm.Migrations("ranker")
    migrations.config("1.4", "2.0", define(1))
    migrations.state("1.4", "2.0", [hotglm.Rename("a", "b")], down=[hotglm.Rename("b", "a")])
    before = migrations.history()
    with pytest.raises(MigrationGraphError) as caught:
        again(migrations)
    assert caught.value.code == "DUPLICATE_STEP"
    assert "1.4 -> 2.0" in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert migrations.history() == before


@pytest.mark.parametrize(
    "act",
    [
        lambda: hotglm.Migrations(""),
        lambda: hotglm.Migrations(3),  # type: ignore[arg-type]
        lambda: hotglm.Migrations("m").state("1.0", "2.0", "Rename"),  # type: ignore[arg-type]
        lambda: hotglm.Migrations("m").state("1.0", "2.0", [hotglm.RenameField("a", "b")]),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_meant_is_refused(act: Callable[[], object]) -> None:
    """A registry without a name, or a state step that is made of something else, is an argument error."""
    with pytest.raises(ArgumentError) as caught:
        act()
    assert "Remedy: " in str(caught.value)


def test_threads_may_register_and_ask_at_once() -> None:
    """Whoever asks while others register sees whole steps and never an error; nothing that was registered is lost."""
    migrations = hotglm.Migrations("ranker")
    num_threads, num_steps = 4, 50
    begin, errors = threading.Barrier(num_threads + 1), list[BaseException]()

    def register(thread: int) -> None:
        begin.wait()
        for number in range(num_steps):
            major = thread * num_steps + number + 1
            migrations.config(f"{major}.0", f"{major + 1}.0", [hotglm.RenameField(f"f{major}", f"f{major + 1}")])

    def ask() -> None:
        begin.wait()
        try:
            while len(migrations.history()) < num_threads * num_steps:
                for step in migrations.history():
                    low, high = step.source.low, step.target
                    assert migrations.plan(low, high).migrate_config({f"f{low.release[0]}": 1}) == {
                        f"f{high.release[0]}": 1
                    }
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=register, args=(n,)) for n in range(num_threads)] + [
        threading.Thread(target=ask)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(migrations.plan("1.0", f"{num_threads * num_steps + 1}.0").hops) == num_threads * num_steps


def test_migrations_run_without_torch() -> None:
    """Configs and states are planned in a process that has no torch, and so no model class."""
    code = """
import sys
sys.modules["torch"] = None
import hotglm
m = hotglm.Migrations("ranker")
m.config("1.4", "2.0", [hotglm.RenameField("a", "b")])
m.state("1.4", "2.0", [hotglm.Split("w", ("x", "y"))])
path = m.plan("1.4", "2.0")
print(path.migrate_config({"a": 1}), sorted(path.plan_state({"w": hotglm.TensorSpec(dtype="int8", shape=(4,))}).specs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{'b': 1} ['x', 'y']\n"


# -- classes -----------------------------------------------------------------------------------------------------------


def test_all_versions_of_a_name_share_their_migrations() -> None:
    """A versioned class has the migrations of its name, and so has every other class of it."""

    @hotglm.versioned("ranker", "2.0")
    class Ranker(nn.Linear):
        pass

    @hotglm.versioned("ranker", "1.0")
    class Old(nn.Linear):
        pass

    @hotglm.versioned("other", "1.0")
    class Other(Old):
        pass

    class Plain(Ranker):
        pass

    shared = hotglm.migrations_of("ranker")
    assert shared.name == "ranker"
    assert hotglm.migrations_of(Ranker) is hotglm.migrations_of(Old) is hotglm.migrations_of(Plain) is shared
    assert Ranker.migrations is Old.migrations is Plain.migrations is shared  # type: ignore[attr-defined]
    assert Other.migrations is hotglm.migrations_of("other")  # type: ignore[attr-defined]
    with pytest.raises(DefinitionError, match="Linear"):
        hotglm.migrations_of(nn.Linear)


def test_an_attribute_of_the_class_is_left_alone() -> None:
    """A class that has `migrations` of its own keeps it, and its migrations are found by the function."""

    @hotglm.versioned("ranker", "2.0")
    class Ranker(nn.Linear):
        migrations = ("mine",)

    assert Ranker.migrations == ("mine",)
    assert hotglm.migrations_of(Ranker).name == "ranker"


@pytest.mark.parametrize("kind", ["submodule", "parameter", "buffer", "attribute"])
def test_an_instance_may_have_migrations_of_its_own(kind: str) -> None:
    """A submodule, parameter, buffer or attribute called `migrations` is found on the instance, not hidden."""

    @hotglm.versioned("ranker", "2.0")
    class Ranker(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            if kind == "submodule":
                self.migrations = nn.Linear(2, 2)
            elif kind == "parameter":
                self.register_parameter("migrations", nn.Parameter(torch.ones(2)))
            elif kind == "buffer":
                self.register_buffer("migrations", torch.ones(2))
            else:
                self.migrations = 3  # type: ignore[assignment]

    model = Ranker()
    assert not isinstance(model.migrations, hotglm.Migrations)
    assert getattr(Ranker, "migrations") is hotglm.migrations_of(Ranker)  # noqa: B009  # mypy refuses the plain form
    plain = hotglm.versioned("plain", "1.0")(type("Plain", (nn.Linear,), {}))(2, 2)
    assert not hasattr(plain, "migrations")


# -- stamp -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "1.0": {"enc.qkv": spec(6, 2), "head": spec(4)},
    "2.0": {"body.qkv": spec(6, 2), "head": spec(4)},
    "3.0": {"body.q": spec(2, 2), "body.k": spec(2, 2), "body.v": spec(2, 2), "head": spec(4)},
}


def make() -> hotglm.Migrations:
    """Return migrations over the three layouts, the last of which changes only the config once more."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.0", "2.0", [hotglm.Rename(r"enc\.(.*)", r"body.\1")])
    migrations.state("2.0", "3.0", [hotglm.Split("body.qkv", ("body.q", "body.k", "body.v"))])
    return migrations


@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_a_version_is_told_by_its_tensors(version: str, target: str) -> None:
    """The layout of which the dry run leads exactly to the target is the one, up and down."""
    assert make().find_version(LAYOUTS[version], None, target, LAYOUTS[target]) == Version(version)


def test_dtypes_decide_only_where_they_can() -> None:
    """Tensors in another precision are told by names and shapes, unless one layout has their very dtypes."""
    halved = {name: spec(*s.shape, dtype="bfloat16") for name, s in LAYOUTS["2.0"].items()}
    assert make().find_version(halved, None, "3.0", LAYOUTS["3.0"]) == Version("2.0")
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.0", "2.0", [hotglm.Cast("w", "float32", was="bfloat16")])
    wanted = {"w": spec(1)}
    assert migrations.find_version({"w": spec(1, dtype="bfloat16")}, None, "2.0", wanted) == Version("1.0")
    assert migrations.find_version(wanted, None, "2.0", wanted) == Version("2.0")


def test_tensors_of_no_layout_are_refused() -> None:
    """What fits no layout is unknown; the error says of each layout why not."""
    with pytest.raises(UnknownVersionError) as caught:
        make().find_version({"enc.qkv": spec(5, 2), "head": spec(4)}, None, "3.0", LAYOUTS["3.0"])
    assert [problem.message[:7] for problem in caught.value.problems] == ["Not 1.0", "Not 2.0", "Not 3.0"]
    assert "Remedy: say which version" in str(caught.value)


def test_tensors_of_several_layouts_are_refused_unless_the_config_tells() -> None:
    """Layouts that differ only in their config are told apart by it; without one, all that fit are named."""
    migrations = make()
    migrations.config("3.0", "4.0", [hotglm.RenameField("max_seq_len", "max_length")])
    with pytest.raises(UnknownVersionError) as caught:
        migrations.find_version(LAYOUTS["3.0"], None, "4.0", LAYOUTS["3.0"])
    assert [problem.message for problem in caught.value.problems] == ["3.0 fits.", "4.0 fits."]
    found = migrations.find_version(LAYOUTS["3.0"], {"max_seq_len": 8}, "4.0", LAYOUTS["3.0"])
    assert found == Version("3.0")


def test_a_model_without_migrations_has_one_layout() -> None:
    """Where nothing is registered, tensors that fit the target have its version, and others are unknown."""
    migrations = hotglm.Migrations("ranker")
    assert migrations.find_version(LAYOUTS["2.0"], None, "2.0", LAYOUTS["2.0"]) == Version("2.0")
    with pytest.raises(UnknownVersionError):
        migrations.find_version(LAYOUTS["1.0"], None, "2.0", LAYOUTS["2.0"])
