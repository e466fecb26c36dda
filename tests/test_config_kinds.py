"""Classes whose config is a mapping, a TypedDict or a pydantic model are built, saved and staged like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
import torch
from torch import nn

import hotglm
from hotglm.model.registry import find_definition, read_config


class AsTypedDict(TypedDict):
    width: int
    depth: NotRequired[int]


AS_MAPPING = {"width": int, "depth": (int, 2)}
AS_SCHEMA = {"required": ["width"], "properties": {"width": {"type": "integer"}, "depth": {"default": 2}}}


def make_pydantic() -> Any:
    pydantic = pytest.importorskip("pydantic")
    return pydantic.create_model("Config", width=(int, ...), depth=(int, pydantic.Field(2, alias="layers")))


def make_class(config: Any, name: str) -> type[nn.Module]:
    @hotglm.versioned(name, "1.0.0", config=config)
    class Model(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            width = config["width"] if isinstance(config, dict) else config.width
            self.w = nn.Parameter(torch.zeros(width))

        def forward(self) -> torch.Tensor:
            return self.w

    return Model


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mapping", {"width": 3, "depth": 2}),
        ("schema", {"width": 3, "depth": 2}),
        ("typed dict", {"width": 3}),
        ("pydantic", {"width": 3, "layers": 2}),
    ],
)
def test_a_config_of_any_kind_travels_with_the_weights(kind: str, fields: dict[str, int], tmp_path: Path) -> None:
    """The class is built from the fields, the file carries them, and another config builds the class anew."""
    kinds: dict[str, Any] = {"mapping": AS_MAPPING, "schema": AS_SCHEMA, "typed dict": AsTypedDict}
    model = make_class(kinds[kind] if kind in kinds else make_pydantic(), f"config-kinds-{kind}")
    definition = find_definition(model)
    assert definition is not None
    small, large = definition.build({"width": 3}), definition.build({"width": 5})
    assert read_config(small) == fields
    hotglm.save_weights(large, tmp_path / "large.safetensors", version="1.1.0")
    slot = hotglm.ModuleSlot(small)
    slot.update(tmp_path / "large.safetensors")
    assert slot().shape == (5,)
    assert read_config(slot.live.module) == {**fields, "width": 5}


@pytest.mark.parametrize(
    ("declared", "config", "text"),
    [
        (AS_MAPPING, {}, "missing fields ['width'], unknown fields []"),
        (AS_MAPPING, {"width": 1, "wdith": 2}, "missing fields [], unknown fields ['wdith']"),
        ({**AS_SCHEMA, "additionalProperties": False}, {"width": 1, "x": 2}, "unknown fields ['x']"),
        (AsTypedDict, None, "KeyError"),
    ],
)
def test_fields_that_do_not_fit_are_named(declared: Any, config: Any, text: str) -> None:
    """Fields that are missing or unknown are one typed error that names all of them."""
    definition = find_definition(make_class(declared, f"config-misfit-{text}"))
    assert definition is not None
    with pytest.raises(hotglm.DefinitionError) as caught:
        definition.build(config)
    assert text in str(caught.value)


def test_a_schema_that_is_open_takes_fields_it_does_not_know() -> None:
    """A JSON schema takes further properties unless it says not; defaults are copies."""
    shared: dict[str, Any] = {"properties": {"names": {"default": []}, "width": {}}}
    definition = find_definition(make_class(shared, "config-open"))
    assert definition is not None
    config: Any = definition.make_config({"width": 1, "more": 2})
    assert config == {"names": [], "width": 1, "more": 2}
    config["names"].append("mine")
    assert shared["properties"]["names"]["default"] == []
