"""Whether two definitions are the same one, written once and run twice.

Rules this module keeps: functions are the same when they were written at the same place (module and qualified name),
because running a notebook cell again makes new function objects of the same text; everything else is compared by value.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

__all__ = ["origin_of"]


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
