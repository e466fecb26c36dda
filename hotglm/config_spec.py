"""What a config can be made from: its fields, their types and their defaults, however it was declared.

Rules this module keeps:

- A dataclass, a pydantic model, a `TypedDict`, a mapping of names to types, a JSON schema and a callable that takes its
  fields by name all come to the same fields; rewriting one as another is not a change.
- Libraries are recognised by what their classes carry, never imported.
- Types and defaults are text (`hotglm.spelling`); nothing is evaluated, and no default factory is called.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hotglm.spelling import spell_type, spell_value

__all__ = ["ConfigSource", "ConfigSpec", "FieldSpec", "fill_config"]

ConfigSource = Callable[..., Any] | Mapping[str, Any]
"""A dataclass, pydantic model, `TypedDict` or other callable that takes its fields by name, or a mapping (see `of`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSpec:
    """One field of a config.

    Attributes:
        name: its name.
        type: its annotation as normalised text, empty for none; `Optional[int]`, `None | int` and `int | None` are one.
        has_default: whether a config may leave it out.
        default: the default as text, e.g. `"128"`, or `"make_layers()"` for what a factory makes; None where there
            is none, or none that has a lasting text.
    """

    name: str
    type: str
    has_default: bool
    default: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSpec:
    """The fields of a config, in the order declared."""

    fields: tuple[FieldSpec, ...]

    @classmethod
    def of(cls, config: ConfigSource | None) -> ConfigSpec | None:
        """Return what `config` can be made from; None for None and where Python cannot tell: both mean unknown.

        A mapping is either a JSON schema (it has `properties`), or maps each name to a type, or to a pair of a type and
        a default.

        >>> ConfigSpec.of(lambda width, depth=2: None).fields[1]
        FieldSpec(name='depth', type='', has_default=True, default='2')
        >>> ConfigSpec.of({"width": int, "depth": (int, 2)}).fields[1]
        FieldSpec(name='depth', type='int', has_default=True, default='2')
        """
        if config is None:
            return None
        fields = _read_fields(config)
        return None if fields is None else cls(fields=tuple(fields))


def _read_fields(config: ConfigSource) -> Iterator[FieldSpec] | None:
    if isinstance(config, Mapping):
        properties = config.get("properties")
        return _read_json_schema(config, properties) if isinstance(properties, Mapping) else _read_mapping(config)
    if isinstance(model_fields := getattr(config, "model_fields", None), Mapping):
        return _read_pydantic(config, model_fields)
    if isinstance(optional := getattr(config, "__optional_keys__", None), frozenset):
        return _read_typed_dict(config, optional)
    return _read_signature(config)


def _read_signature(config: Callable[..., object]) -> Iterator[FieldSpec] | None:
    try:
        parameters = inspect.signature(config).parameters.values()
    except (TypeError, ValueError):
        return None
    module = getattr(config, "__module__", None)
    made: Mapping[str, dataclasses.Field[Any]] = getattr(config, "__dataclass_fields__", {})
    return (
        FieldSpec(
            name=parameter.name,
            type=spell_type(parameter.annotation, module=module),
            has_default=parameter.default is not inspect.Parameter.empty,
            default=_spell_default(parameter.default, made.get(parameter.name)),
        )
        for parameter in parameters
        if not parameter.kind.name.startswith("VAR_")
    )


def _spell_default(default: object, made: dataclasses.Field[Any] | None) -> str | None:
    if default is inspect.Parameter.empty:
        return None
    if made is not None and made.default_factory is not dataclasses.MISSING:
        return _spell_factory(made.default_factory)
    return spell_value(default)


_EMPTY: Mapping[object, object] = {list: [], dict: {}, tuple: (), set: set(), frozenset: frozenset(), str: ""}
"""What these factories make, which may as well be written as a default."""


def _spell_factory(factory: object) -> str | None:
    if isinstance(factory, type) and factory in _EMPTY:
        return spell_value(_EMPTY[factory])
    name = spell_value(factory)
    return None if name is None else f"{name}()"


def _read_pydantic(config: object, fields: Mapping[str, Any]) -> Iterator[FieldSpec]:
    """Read a pydantic model (2 or later); a field goes by the name that a config has to write."""
    module = getattr(config, "__module__", None)
    settings = getattr(config, "model_config", None) or {}
    takes_names = any(settings.get(key) for key in ("populate_by_name", "validate_by_name"))
    for name, field in fields.items():
        aliases = [alias for alias in (field.validation_alias, field.alias) if isinstance(alias, str)]
        is_required = bool(field.is_required())
        factory = getattr(field, "default_factory", None)
        spelled = _spell_factory(factory) if factory is not None else spell_value(field.default)
        yield FieldSpec(
            name=name if takes_names or not aliases else aliases[0],
            type=spell_type(field.annotation, module=module),
            has_default=not is_required,
            default=None if is_required else spelled,
        )


_NOT_REQUIRED = re.compile(r"\s*(\w+\.)*NotRequired\[")


def _read_typed_dict(config: object, optional: frozenset[str]) -> Iterator[FieldSpec]:
    module = getattr(config, "__module__", None)
    for name, annotation in getattr(config, "__annotations__", {}).items():
        text = getattr(annotation, "__forward_arg__", annotation)
        # Under `from __future__ import annotations` Python itself cannot see the wrapper, and calls the key required.
        is_optional = name in optional or (isinstance(text, str) and _NOT_REQUIRED.match(text) is not None)
        yield FieldSpec(name=name, type=spell_type(text, module=module), has_default=is_optional)


def _read_mapping(config: Mapping[str, Any]) -> Iterator[FieldSpec]:
    for name, declared in config.items():
        has_default = isinstance(declared, tuple) and len(declared) == 2
        annotation, default = declared if has_default else (declared, None)
        yield FieldSpec(
            name=str(name),
            type=spell_type(annotation),
            has_default=has_default,
            default=spell_value(default) if has_default else None,
        )


# -- JSON schemas ------------------------------------------------------------------------------------------------------

_JSON_TYPES = {
    "array": "list",
    "boolean": "bool",
    "integer": "int",
    "null": "None",
    "number": "float",
    "object": "dict",
    "string": "str",
}
_ANNOTATIONS = frozenset({"$comment", "default", "deprecated", "description", "examples", "title"})
"""Keywords of a JSON schema that say nothing about which values are valid."""


def _read_json_schema(schema: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[FieldSpec]:
    required = schema.get("required") or ()
    for name, part in properties.items():
        has_default = name not in required
        known = has_default and isinstance(part, Mapping) and "default" in part
        yield FieldSpec(
            name=str(name),
            type=_spell_json_type(part),
            has_default=has_default,
            default=spell_value(part["default"]) if known else None,
        )


def _spell_json_type(part: object) -> str:
    """Return the type of one property: Python's word where JSON's has one, else the schema itself as JSON."""
    if not isinstance(part, Mapping):
        return spell_value(part) or ""
    plain = {key: value for key, value in part.items() if key not in _ANNOTATIONS}
    kinds, items = plain.get("type"), plain.get("items")
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if names and plain.keys() == {"type"} and all(name in _JSON_TYPES for name in names):
        return spell_type(" | ".join(_JSON_TYPES[name] for name in names))
    if kinds == "array" and plain.keys() == {"type", "items"}:
        inner = _spell_json_type(items)
        return f"list[{inner}]" if inner and not inner.startswith("{") else _spell_json(plain)
    branches = plain.get("anyOf")
    if plain.keys() == {"anyOf"} and isinstance(branches, list):
        inners = [_spell_json_type(branch) for branch in branches]
        if inners and not any(inner.startswith("{") or not inner for inner in inners):
            return spell_type(" | ".join(inners))
    return _spell_json(plain)


def _spell_json(plain: Mapping[str, object]) -> str:
    if not plain:
        return ""
    try:
        return json.dumps(plain, sort_keys=True, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        return spell_value(dict(plain)) or ""


# -- configs that are mappings -----------------------------------------------------------------------------------------


def fill_config(declared: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the defaults of the mapping it was declared by; both are left as they are.

    >>> fill_config({"width": int, "depth": (int, 2)}, {"width": 8})
    {'width': 8, 'depth': 2}

    Raises:
        TypeError: fields are missing or unknown; all are named. A JSON schema knows every field unless it says
            `"additionalProperties": false`.
    """
    spec = ConfigSpec.of(declared)
    fields = {} if spec is None else {field.name: field for field in spec.fields}
    properties = declared.get("properties")
    is_schema = isinstance(properties, Mapping)
    is_open = is_schema and declared.get("additionalProperties", True) is not False
    missing = [name for name, field in fields.items() if not field.has_default and name not in config]
    unknown = [] if is_open else [name for name in config if name not in fields]
    if missing or unknown:
        raise TypeError(f"missing fields {missing!a}, unknown fields {unknown!a}")
    filled = {}
    for name in fields:
        part = properties[name] if isinstance(properties, Mapping) else declared[name]
        if name in config:
            filled[name] = config[name]
        elif not is_schema:
            filled[name] = copy.deepcopy(part[1])
        elif isinstance(part, Mapping) and "default" in part:
            filled[name] = copy.deepcopy(part["default"])
    return {**filled, **config}
