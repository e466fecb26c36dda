"""Config migrations: plain dicts in and out, each change undone, each misfit one typed error that names its step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.errors import ArgumentError, MigrationStepError, NoPathError
from hotglm.migration.config import FieldChange

OLD = {"max_seq_len": 8, "use_fp16": True, "layers": [{"width": 4}], "legacy": None}
NEW = {"max_length": 8, "amp": "fp16", "layers": [{"width": 4}], "dropout": 0.1}


def make(*changes: Any, down: Any = None) -> hotglm.Migrations:
    """Return migrations with one step from 1.4 to 2.0."""
    migrations = hotglm.Migrations("ranker")
    migrations.config("1.4", "2.0", list(changes), down=down)
    return migrations


def up(migrations: hotglm.Migrations, config: dict[str, Any]) -> dict[str, Any]:
    """Migrate from 1.4 to 2.0."""
    return migrations.plan("1.4", "2.0").migrate_config(config)


def down(migrations: hotglm.Migrations, config: dict[str, Any]) -> dict[str, Any]:
    """Migrate from 2.0 to 1.4."""
    return migrations.plan("2.0", "1.4").migrate_config(config)


def to_amp(value: bool) -> str | None:
    """Return the new spelling of `use_fp16`."""
    return "fp16" if value else None


DECLARED = (
    hotglm.RenameField("max_seq_len", "max_length"),
    hotglm.MapField("use_fp16", to_amp, down=lambda value: value == "fp16"),
    hotglm.RenameField("use_fp16", "amp"),
    hotglm.DropField("legacy", restore=None),
    hotglm.AddField("dropout", 0.1),
)


def test_declared_changes_go_up_and_down() -> None:
    """The classic case: fields renamed, mapped, added and dropped, and back again to the very same config."""
    migrations = make(*DECLARED)
    assert up(migrations, OLD) == NEW
    assert down(migrations, NEW) == OLD
    assert down(migrations, up(migrations, OLD)) == OLD


def test_a_function_is_registered_by_decorator() -> None:
    """The decorator form registers the function, with or without a way down, and returns it unchanged."""
    migrations = hotglm.Migrations("ranker")

    def back(config: dict[str, Any]) -> dict[str, Any]:
        config["max_seq_len"] = config.pop("max_length")
        return config

    @migrations.config("1.4", "2.0", down=back)
    def forth(config: dict[str, Any]) -> dict[str, Any]:
        config["max_length"] = config.pop("max_seq_len")
        return config

    assert forth({"max_seq_len": 1}) == {"max_length": 1}
    assert up(migrations, {"max_seq_len": 8}) == {"max_length": 8}
    assert down(migrations, {"max_length": 8}) == {"max_seq_len": 8}
    assert "forth" in migrations.plan("1.4", "2.0").explain()


def test_functions_and_declared_changes_mix() -> None:
    """A step is a sequence of both, in the order that was given."""
    migrations = make(hotglm.RenameField("a", "b"), lambda config: {**config, "c": config["b"]}, hotglm.DropField("b"))
    assert up(migrations, {"a": 1}) == {"c": 1}


FIELDS = st.dictionaries(st.sampled_from("abcdef"), st.one_of(st.integers(), st.lists(st.integers())))


@st.composite
def journeys(draw: st.DrawFn) -> tuple[dict[str, Any], list[Any]]:
    """Draw a config and declared changes that fit it one after the other."""
    config = draw(FIELDS)
    current, changes = dict(config), list[FieldChange]()
    for number in range(draw(st.integers(1, 5))):
        fresh = hotglm.AddField(f"new{number}", draw(st.lists(st.integers())))
        there = draw(st.sampled_from(sorted(current))) if current else None
        kinds: list[FieldChange] = [fresh]
        if there is not None:
            kinds += [hotglm.RenameField(there, f"name{number}"), hotglm.DropField(there, restore=current[there])]
            kinds.append(hotglm.MapField(there, lambda value: [value], down=lambda value: value[0]))
        changes.append(draw(st.sampled_from(kinds)))
        current = changes[-1].apply(current)
    return config, changes


@given(journeys())
def test_down_after_up_is_nothing(journey: tuple[dict[str, Any], list[Any]]) -> None:
    """Invertible changes lead back to the config that one came from, and never write into what they are given."""
    config, changes = journey
    kept = copy.deepcopy(config)
    migrations = make(*changes)
    assert down(migrations, up(migrations, config)) == kept
    assert config == kept


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def spoil(config: dict[str, Any]) -> dict[str, Any]:
    """Write into everything that can be reached, then fail."""
    config["layers"][0]["width"] = -1
    config.clear()
    raise RuntimeError("no\x1b[31m such field")


def spoil_quietly(config: dict[str, Any]) -> dict[str, Any]:
    """Write into everything that can be reached."""
    config["layers"][0]["width"] = -1
    config["layers"].append(1)
    return config


def forget(config: dict[str, Any]) -> dict[str, Any]:
    """Return nothing."""
    return None  # type: ignore[return-value]


def leave(config: dict[str, Any]) -> dict[str, Any]:
    """Raise what a config with missing fields raises."""
    return {"x": config["no such field"]}


BAD: list[tuple[Any, str, str]] = [
    (spoil, "STEP_RAISED", "test_migration_config.spoil"),
    (leave, "STEP_RAISED", "KeyError"),
    (forget, "NO_DICT", "return config"),
    (lambda config: [*config], "NO_DICT", "['max_seq_len'"),
    (hotglm.RenameField("no", "x"), "CONFIG_UNFIT", "'no'"),
    (hotglm.RenameField("legacy", "layers"), "CONFIG_UNFIT", "'layers'"),
    (hotglm.AddField("legacy", 1), "CONFIG_UNFIT", "'legacy'"),
    (hotglm.DropField("no"), "CONFIG_UNFIT", "'no'"),
    (hotglm.MapField("no", str), "CONFIG_UNFIT", "'no'"),
    (hotglm.MapField("use_fp16", lambda value: value / 0), "STEP_RAISED", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("change", "code", "text"), BAD, ids=range(len(BAD)))
def test_a_change_that_fails_names_its_step(change: Any, code: str, text: str) -> None:
    """One typed error names the step, the change and the reason, ends with the remedy, and the config is as it was."""
    config = copy.deepcopy(OLD)
    with pytest.raises(MigrationStepError) as caught:
        up(make(hotglm.AddField("first", [1]), change), config)
    error = caught.value
    assert error.code == code
    assert error.step == "1.4 -> 2.0"
    assert error.operation
    assert error.operation in str(error)
    assert "1.4 -> 2.0" in str(error)
    assert text in str(error)
    assert "Remedy: " in str(error).splitlines()[-1]
    assert str(error).replace("\n", "").isprintable()
    assert config == OLD


def test_a_function_never_reaches_the_callers_config() -> None:
    """What a function writes into its argument stays in its result."""
    config = copy.deepcopy(OLD)
    assert up(make(spoil_quietly), config)["layers"] == [{"width": -1}, 1]
    assert config == OLD


def test_results_of_two_runs_share_nothing() -> None:
    """A value that a change adds, or that a function keeps, is copied into each result."""
    kept: list[int] = []
    migrations = make(hotglm.AddField("a", [1]), lambda config: {**config, "b": kept})
    first, second = up(migrations, {}), up(migrations, {})
    first["a"].append(2)
    first["b"].append(3)
    assert second == {"a": [1], "b": []}
    assert up(migrations, {}) == {"a": [1], "b": []}


def test_optional_changes_may_find_nothing() -> None:
    """A field that old configs left out is no error where the change says so, in either direction."""
    migrations = make(
        hotglm.RenameField("a", "b", optional=True),
        hotglm.MapField("c", str, int, optional=True),
        hotglm.DropField("d", restore=1, optional=True),
        hotglm.AddField("e", 5, optional=True),
    )
    assert up(migrations, {}) == {"e": 5}
    assert up(migrations, {"e": 6}) == {"e": 6}
    assert down(migrations, {"b": 2, "c": "3"}) == {"a": 2, "c": 3, "d": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hotglm.DropField("legacy"), "`restore`"),
        (hotglm.MapField("use_fp16", to_amp), "test_migration_config.to_amp"),
        (spoil_quietly, "test_migration_config.spoil_quietly"),
    ],
)
def test_what_cannot_be_undone_is_named(change: Any, why: str) -> None:
    """A step with a change that loses something has no way down until one is given."""
    with pytest.raises(NoPathError) as caught:
        down(make(change), {})
    assert why in str(caught.value)
    assert [problem.code for problem in make(change).check()] == ["NO_WAY_DOWN"]
    assert down(make(change, down=hotglm.AddField("x", 1)), {}) == {"x": 1}
    assert make(change, down=[]).check() == ()


@pytest.mark.parametrize(
    "act",
    [
        lambda: make("RenameField"),
        lambda: make(dict),
        lambda: make(hotglm.Rename("a", "b")),
        lambda: up(make(), [("a", 1)]),  # type: ignore[arg-type]
        lambda: up(make(), None),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_meant_is_refused(act: Callable[[], object]) -> None:
    """What is no change, and what is no config, is an argument error."""
    with pytest.raises(ArgumentError) as caught:
        act()
    assert "Remedy: " in str(caught.value)


def test_a_step_without_a_config_leaves_it() -> None:
    """A step of the state alone hands the config through, as a copy."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.4", "2.0", [])
    config = {"a": [1]}
    migrated = up(migrations, config)
    assert migrated == config
    assert migrated["a"] is not config["a"]
