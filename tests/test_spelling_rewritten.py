"""Annotations and defaults that a formatter, an upgrade of Python's syntax or an import moves are no change."""

from __future__ import annotations

import collections.abc
import dataclasses
import pathlib
import subprocess
import sys
import typing
from typing import Any

import pytest

from hotglm.breakage import required_bump
from hotglm.comparison import find_breakages
from hotglm.compatibility import CompatibilityMode, Released, find_incompatibilities
from hotglm.config_spec import ConfigSpec, FieldSpec
from hotglm.contract import Contract
from hotglm.spelling import spell_type, spell_value
from hotglm.version import Bump, Version


class Inner:
    """A type of this module."""


@pytest.mark.parametrize(
    "spellings",
    [
        ("List[int]", "list[int]", "typing.List[int]", typing.List[int], list[int]),  # noqa: UP006
        ("Dict[str, int]", dict[str, int], "t.Dict[str, int]"),
        ("Tuple[int, ...]", tuple[int, ...], typing.Tuple[int, ...]),  # noqa: UP006
        ("Type[int]", type[int]),
        ("List", "list"),
        (typing.Sequence[int], collections.abc.Sequence[int], "Sequence[int]", "abc.Sequence[int]"),
        (typing.Callable[[int], str], collections.abc.Callable[[int], str], "Callable[[int], str]"),
        ("Optional['Inner']", "'Inner' | None", "Inner | None", typing.Optional["Inner"]),
        ("pathlib.Path", "Path", pathlib.Path),
        ("Inner", "models.Inner", Inner),
        ("Literal['int', 'a']", typing.Literal["int", "a"], "typing.Literal['int', 'a']"),
        ("Annotated[int, 'unit']", "int", typing.Annotated[int, "unit"]),
        ("Optional[List[int]]", list[int] | None),
    ],
    ids=str,
)
def test_a_type_has_one_text(spellings: tuple[Any, ...]) -> None:
    """However an annotation is written or imported, as text or as an object, its text is the same."""
    assert len({spell_type(annotation) for annotation in spellings}) == 1, list(map(spell_type, spellings))


@pytest.mark.parametrize(
    ("one", "other"),
    [("List[int]", "list[str]"), ("Literal['a']", "Literal['b']"), ("Literal['a']", "Literal[a]"), ("int", "float")],
)
def test_other_types_have_other_texts(one: str, other: str) -> None:
    """What is normalised away is spelling alone."""
    assert spell_type(one) != spell_type(other)


@pytest.mark.parametrize(
    ("old", "new", "codes", "back"),
    [
        ("int", "Optional[int]", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("int | str", "str | None | int", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("Literal['a']", "Literal['b', 'a']", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("Literal['a'] | None", "None | Literal['b', 'a']", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("int", "Any", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("list[int]", "list[int] | None", "CONFIG_FIELD_TYPE_WIDENED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("int", "float", "CONFIG_FIELD_TYPE_CHANGED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("int | None", "int | str", "CONFIG_FIELD_TYPE_CHANGED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("list[int]", "list[Any]", "CONFIG_FIELD_TYPE_CHANGED", "CONFIG_FIELD_TYPE_CHANGED"),
        ("", "int", "", ""),
    ],
)
def test_a_wider_type_is_minor_one_way(old: str, new: str, codes: str, back: str) -> None:
    """Old configs fit a field that takes more, new ones need not fit one that takes less; no annotation is unknown."""
    specs = (FieldSpec(name="x", type=spell_type(text) if text else "", has_default=True) for text in (old, new))
    one, other = (Contract(config=ConfigSpec(fields=(spec,))) for spec in specs)
    assert [found.code for found in find_breakages(one, other)] == ([codes] if codes else [])
    assert [found.code for found in find_breakages(other, one)] == ([back] if back else [])
    bump = {"CONFIG_FIELD_TYPE_WIDENED": Bump.MINOR, "CONFIG_FIELD_TYPE_CHANGED": Bump.MAJOR, "": Bump.NONE}[codes]
    assert required_bump(find_breakages(one, other)) is bump
    before, after = Released(version=Version("1.0"), contract=one), Released(version=Version("1.1"), contract=other)
    assert bool(find_incompatibilities([before], after, CompatibilityMode.BACKWARD)) is (bump is Bump.MAJOR)
    assert bool(find_incompatibilities([before], after, CompatibilityMode.FORWARD)) is bool(codes)


def test_a_factory_of_nothing_is_an_empty_default() -> None:
    """`field(default_factory=list)` and a plain `[]`, as pydantic and a mapping have it, are one default."""

    @dataclasses.dataclass
    class Config:
        layers: list[int] = dataclasses.field(default_factory=list)
        extra: dict[str, int] = dataclasses.field(default_factory=dict)

    before = Contract(config=ConfigSpec.of(Config))
    after = Contract(config=ConfigSpec.of({"layers": (list[int], []), "extra": (dict[str, int], {})}))
    assert list(find_breakages(before, after)) == []


@dataclasses.dataclass
class Options:
    """A default that holds a set."""

    names: Any


class Pair(typing.NamedTuple):
    """Likewise."""

    names: Any


def test_a_default_that_holds_a_set_has_one_text_in_every_process() -> None:
    """The order of a set, which another process shuffles, never makes another default."""
    code = (
        "import collections, test_spelling_rewritten as t; s = set('abcdefgh');"
        "print([t.spell_value(v) for v in (t.Options(s), t.Pair(s), collections.OrderedDict(a=s), {1: t.Pair(s)})])"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1


def test_a_dataclass_and_a_named_tuple_still_have_a_text() -> None:
    """What is in them is compared."""
    assert spell_value(Options((1, 2))) == "Options(names=(1, 2))"
    assert spell_value(Pair("a")) == "Pair(names='a')"
    assert spell_value(Options(object())) is None
