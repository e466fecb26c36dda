"""The registry: classes by name and version, each its own, and built from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import DefinitionError, VersionSyntaxError
from hotglm.model import registry
from hotglm.model.registry import find_definition, find_definitions, read_config


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a registry of its own."""
    monkeypatch.setattr(registry, "_definitions", {})


@dataclass(frozen=True)
class Config:
    """Fields of a model."""

    width: int
    bias: bool = True


def _define(version: str, name: str = "ranker", **options: Any) -> type[nn.Module]:
    @hotglm.versioned(name, version, **options)
    class Ranker(nn.Linear):
        def __init__(self, config: Config | None = None) -> None:
            super().__init__(config.width if config else 2, 2, bias=config.bias if config else True)
            self.config = config

    return Ranker


def test_a_class_keeps_its_definition_and_stays_itself() -> None:
    """The decorator returns the class, marked with what was declared."""
    ranker = _define("2.1.0", reads=">=1.4,<3", config=Config, requires=["torch>=2"], capabilities=["rank"])
    definition = find_definition(ranker)
    assert definition is not None
    assert (definition.name, str(definition.version), definition.model) == ("ranker", "2.1.0", ranker)
    assert definition.reads is not None
    assert "1.5" in definition.reads
    assert "3.0" not in definition.reads
    assert definition.requires == ("torch>=2",)
    assert definition.capabilities == {"rank"}


def test_a_subclass_is_another_model_until_it_says_otherwise() -> None:
    """The mark is on the decorated class alone."""
    ranker = _define("1.0.0")

    class Sub(ranker):  # type: ignore[misc, valid-type]
        pass

    assert find_definition(Sub) is None
    assert find_definition(nn.Linear) is None


def test_versions_live_side_by_side_newest_first() -> None:
    """All classes of a name are found, ordered by version and not by text."""
    for version in ("1.2.0", "1.10.0", "1.9.0"):
        _define(version)
    _define("9.0.0", name="other")
    assert [str(d.version) for d in find_definitions("ranker")] == ["1.10.0", "1.9.0", "1.2.0"]
    assert find_definitions("nobody") == ()


def test_a_class_defined_again_replaces_itself() -> None:
    """A notebook cell that is run twice is no conflict, and the newer class is the one that is built."""
    first = _define("1.0.0")
    second = _define("1.0.0")
    assert first is not second
    assert [d.model for d in find_definitions("ranker")] == [second]


def test_two_classes_of_one_version_are_refused() -> None:
    """Another class under a name and version that is taken fails where it is defined; the first stays."""
    ranker = _define("1.0.0")
    with pytest.raises(DefinitionError, match="its own version"):

        @hotglm.versioned("ranker", "1.0.0")
        class Impostor(nn.Linear):
            pass

    assert [d.model for d in find_definitions("ranker")] == [ranker]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_must_be_one(name: Any) -> None:
    """An empty name is refused."""
    with pytest.raises(DefinitionError):
        hotglm.versioned(name, "1.0")


@pytest.mark.parametrize(("version", "reads"), [("one", None), ("1.0", "> =1"), ("1.0", "banana")])
def test_versions_and_ranges_must_parse(version: str, reads: str | None) -> None:
    """A version or range that does not parse is refused at the decorator."""
    with pytest.raises(VersionSyntaxError):
        hotglm.versioned("ranker", version, reads=reads)


@pytest.mark.parametrize("thing", [int, lambda: None, nn.Linear(1, 1)])
def test_only_module_classes_are_versioned(thing: Any) -> None:
    """The decorator belongs on a class of modules."""
    with pytest.raises(DefinitionError):
        hotglm.versioned("ranker", "1.0")(thing)


@pytest.mark.parametrize("config", [{"width": 3, "bias": False}, Config(width=3, bias=False)])
def test_a_class_is_built_from_fields_or_a_config_object(config: Any) -> None:
    """`build` takes the fields by name, or the object itself."""
    _define("1.0.0", config=Config)
    built = find_definitions("ranker")[0].build(config)
    assert isinstance(built, nn.Linear)
    assert built.in_features == 3
    assert built.bias is None
    assert read_config(built) == {"width": 3, "bias": False}


@pytest.mark.parametrize("config", [{}, {"width": 2, "depth": 3}, None, {"width": "two"}])
def test_a_class_that_cannot_be_built_says_why(config: Any) -> None:
    """Missing, unknown and wrong fields are a DefinitionError with the class, the version and the cause."""
    _define("1.0.0", config=Config)
    with pytest.raises(DefinitionError, match=r"1\.0\.0") as caught:
        find_definitions("ranker")[0].build(config)
    assert caught.value.__cause__ is not None


def test_a_class_without_config_is_built_without_one() -> None:
    """Where no config is declared, the class is called with nothing, whatever the source carries."""
    _define("1.0.0")
    built = find_definitions("ranker")[0].build({"anything": 1})
    assert isinstance(built, nn.Linear)
    assert built.weight.shape == torch.Size([2, 2])


def test_only_dataclass_configs_are_read_back() -> None:
    """A config of another kind is not guessed at."""
    module = nn.Linear(1, 1)
    assert read_config(module) is None
    module.config = {"width": 3}  # type: ignore[assignment]
    assert read_config(module) is None
