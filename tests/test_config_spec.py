"""One config schema, however it was declared: dataclass, pydantic model, TypedDict, mapping, JSON schema, callable."""

from __future__ import annotations

import enum
import subprocess
import sys
import typing
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import pytest

from hotglm.config_spec import ConfigSpec
from hotglm.spelling import spell_value
from support.contracts import field


def read(config: Any) -> dict[str, tuple[str, bool, str | None]]:
    spec = ConfigSpec.of(config)
    assert spec is not None
    return {one.name: (one.type, one.has_default, one.default) for one in spec.fields}


EXPECTED = {
    "width": ("int", False, None),
    "depth": ("int | None", True, "2"),
    "names": ("list[str]", True, "[]"),
}


@dataclass
class AsDataclass:
    width: int
    depth: int | None = 2
    names: list[str] = dataclass_field(default_factory=list)


class AsTypedDict(typing.TypedDict):
    width: int
    depth: typing.NotRequired[int | None]
    names: typing.NotRequired[list[str]]


AS_JSON_SCHEMA = {
    "type": "object",
    "required": ["width"],
    "properties": {
        "width": {"type": "integer", "description": "how wide"},
        "depth": {"type": ["null", "integer"], "default": 2},
        "names": {"type": "array", "items": {"type": "string"}},
    },
}


def test_a_dataclass_has_types_and_defaults() -> None:
    """A factory is spelled as a call of it, and is not called."""
    assert read(AsDataclass) == EXPECTED


def test_a_typed_dict_has_types_and_optional_keys() -> None:
    """Keys that need not be there may be left out, also under postponed annotations; none has a default."""
    assert read(AsTypedDict) == {name: (kind, optional, None) for name, (kind, optional, _) in EXPECTED.items()}


def test_a_typed_dict_may_be_partial() -> None:
    """Without `total`, every key may be left out."""
    partial = typing.TypedDict("partial", {"width": int, "depth": typing.Required[int]}, total=False)  # noqa: UP013
    assert read(partial) == {"width": ("int", True, None), "depth": ("int", False, None)}


@pytest.mark.parametrize(
    "config",
    [
        {"width": int, "depth": (int | None, 2), "names": list[str]},
        {"width": "int", "depth": ("Optional[int]", 2), "names": "list[str]"},
    ],
    ids=["types", "text"],
)
def test_a_mapping_of_names_has_types(config: object) -> None:
    """A mapping gives each name a type, or a type and a default."""
    assert read(config) == {**EXPECTED, "names": ("list[str]", False, None)}


def test_a_json_schema_has_types_and_defaults() -> None:
    """JSON's words for types become Python's, and what only describes a field is passed over."""
    assert read(AS_JSON_SCHEMA) == {**EXPECTED, "names": ("list[str]", True, None)}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "integer", "minimum": 1}, '{"minimum": 1, "type": "integer"}'),
        ({"anyOf": [{"type": "null"}, {"type": "number"}]}, "float | None"),
        ({"type": "array", "items": {"enum": [1]}}, '{"items": {"enum": [1]}, "type": "array"}'),
        ({}, ""),
        (True, "True"),
    ],
)
def test_what_python_has_no_word_for_stays_json(part: object, text: str) -> None:
    """A schema that says more than a type is compared as it is, whatever the order of its keys."""
    assert read({"properties": {"n": part}})["n"] == (text, True, None)


def test_a_pydantic_model_has_types_defaults_and_aliases() -> None:
    """A model of pydantic is read by its fields, and each goes by the name that a config has to write."""
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model(
        "AsModel",
        width=(int, ...),
        depth=(int | None, 2),
        names=(list[str], pydantic.Field(default_factory=list)),
        lr=(float, pydantic.Field(default=0.5, alias="learning_rate")),
    )
    assert read(model) == {**EXPECTED, "learning_rate": ("float", True, "0.5")}


def test_reading_a_config_imports_no_pydantic() -> None:
    """Hotglm recognises a model of pydantic without importing it."""
    code = """
import sys
sys.modules["pydantic"] = None
from hotglm.config_spec import ConfigSpec

class Field:
    annotation, default, default_factory, alias, validation_alias = int, 1, None, None, None
    def is_required(self): return False

class Model:
    model_fields = {"n": Field()}

print(ConfigSpec.of(Model).fields[0].default)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_rewriting_a_config_is_no_change() -> None:
    """The same fields declared in another way make the same contract."""
    assert ConfigSpec.of({"width": int, "depth": (int, 2)}) == ConfigSpec(
        fields=(field("width"), field("depth", default="2"))
    )


# -- defaults as text --------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


class Odd:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (-0.0, "-0.0"),
        ("\u00e9\n", "'\\xe9\\n'"),
        ((1,), "(1,)"),
        ((), "()"),
        ({"b": [1], "a": {2}}, "{'b': [1], 'a': {2}}"),
        (frozenset({"x", "y", "z"}), "{'x', 'y', 'z'}"),
        (Color.RED, "Color.RED"),
        (int, "int"),
        (len, "len"),
        (lambda: 0, None),
        (object(), None),
        ([object()], None),
        (Odd(), None),
        (range(3), "range(0, 3)"),
    ],
)
def test_a_default_has_one_text_or_none(value: object, text: str | None) -> None:
    """The text of a value is the same in every process; what has no such text is unknown."""
    assert spell_value(value) == text


def test_a_long_default_is_cut_and_still_compared() -> None:
    """Two long values that differ at the end have different texts, both short."""
    one, other = (spell_value(["x" * 5000, end]) for end in (1, 2))
    assert one is not None
    assert other is not None
    assert one != other
    assert len(one) < 200


def test_a_structure_that_contains_itself_has_no_text() -> None:
    """A circle ends, as unknown."""
    circle: list[object] = []
    circle.append(circle)
    assert spell_value(circle) is None
