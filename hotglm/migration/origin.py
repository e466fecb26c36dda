"""Definitions as they were written: how they are shown, and whether two are the same one, run twice.

Rules this module keeps: functions are the same when they were written at the same place (module and qualified name),
because running a notebook cell again makes new function objects of the same text; everything else is compared by value.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

from hotglm.errors import shorten_repr

__all__ = ["describe_function", "format_call", "origin_of"]


def describe_function(function: Callable[..., object]) -> str:
    """Return `module.qualname` of a function, or what it is where it has no name."""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if isinstance(name, str) else shorten_repr(function)


def format_call(definition: Any) -> str:
    """Return a dataclass as the call that makes it, without what is left at its default; functions by their names."""
    arguments = []
    for field in sorted(dataclasses.fields(definition), key=lambda field: field.kw_only is True):
        value = getattr(definition, field.name)
        if field.default is field.default_factory is dataclasses.MISSING:
            arguments.append(_show(value))
        elif value != field.default:
            arguments.append(f"{field.name}={_show(value)}")
    return f"{type(definition).__name__}({', '.join(arguments)})"


def _show(value: object) -> str:
    return describe_function(value) if isinstance(value, types.FunctionType) else shorten_repr(value)


def origin_of(definition: object) -> object:
    """Return a value that is equal for two definitions exactly if they are the same."""
    if isinstance(definition, types.FunctionType):
        return (definition.__module__, definition.__qualname__)
    if isinstance(definition, tuple | list):
        return [origin_of(part) for part in definition]
    if isinstance(definition, Mapping):
        return {key: origin_of(value) for key, value in definition.items()}
    if dataclasses.is_dataclass(definition) and not isinstance(definition, type):
        parts = [origin_of(getattr(definition, field.name)) for field in dataclasses.fields(definition)]
        return [type(definition).__module__, type(definition).__qualname__, *parts]
    return definition
