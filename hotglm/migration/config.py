"""Changes of a config: plain dicts in, plain dicts out.

Rules this module keeps:

- A change gets a dict of its own, deeply copied: what it does to it never reaches the caller.
- A field that a change names must be there, and a field that it makes must not, unless it is `optional`: a config that
  does not fit is an error, not a guess.
- A change is invertible where it says what going back puts in place; a free function is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.origin import describe_function, format_call

__all__ = [
    "AddField",
    "ConfigChange",
    "ConfigFunction",
    "DropField",
    "FieldChange",
    "MapField",
    "RenameField",
    "UnfitConfigError",
    "as_changes",
]

ConfigFunction = Callable[[dict[str, Any]], dict[str, Any]]
"""A free function: takes a config that is its own, returns the new one."""


class UnfitConfigError(Exception):
    """A config does not fit a change; whoever runs the step turns this into a `MigrationStepError`."""


class _NothingGiven:
    __slots__ = ()

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "_NOTHING"


_NOTHING = _NothingGiven()


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A change of one field.

    Attributes:
        optional: whether the field may be absent; nothing happens then.
    """

    optional: bool = field(default=False, kw_only=True)

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config after the change; `config` stays as it is.

        Raises:
            UnfitConfigError: the field is missing, or the new one is there already.
        """
        raise NotImplementedError

    def inverse(self) -> FieldChange | None:
        """Return the change that leads back, or None; `why_not` then says why."""
        raise NotImplementedError

    def why_not(self) -> str:
        """Return why there is no inverse; empty when there is one."""
        return "" if self.inverse() is not None else self._fault()

    def __str__(self) -> str:
        """Format as it is written in code, without what is left at its default."""
        return format_call(self)

    def _fault(self) -> str:
        raise NotImplementedError

    def _has(self, config: Mapping[str, Any], name: str) -> bool:
        if name not in config and not self.optional:
            raise UnfitConfigError(
                f"Expected a field {shorten_repr(name)}, got {shorten_repr(sorted(map(str, config)))}."
            )
        return name in config


@dataclass(frozen=True, slots=True)
class RenameField(FieldChange):
    """Give the field `old` the name `new`; its place among the fields stays. Invertible."""

    old: str
    new: str

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the field."""
        if not self._has(config, self.old):
            return dict(config)
        _verify_free(config, self.new)
        return {self.new if name == self.old else name: value for name, value in config.items()}

    def inverse(self) -> FieldChange:
        """Return the renaming back."""
        return RenameField(self.new, self.old, optional=self.optional)


@dataclass(frozen=True, slots=True)
class AddField(FieldChange):
    """Add the field `name` with a copy of `value`; where it is `optional`, one that is there stays. Invertible."""

    name: str
    value: Any

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Add the field."""
        if self.optional and self.name in config:
            return dict(config)
        _verify_free(config, self.name)
        return {**config, self.name: copy.deepcopy(self.value)}

    def inverse(self) -> FieldChange:
        """Return the dropping of it."""
        return DropField(self.name, restore=self.value, optional=self.optional)


@dataclass(frozen=True, slots=True)
class DropField(FieldChange):
    """Leave out the field `name`. Invertible where `restore` says which value it has when it comes back."""

    name: str
    restore: Any = _NOTHING

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the field."""
        self._has(config, self.name)
        return {name: value for name, value in config.items() if name != self.name}

    def inverse(self) -> FieldChange | None:
        """Return the adding of `restore`."""
        if isinstance(self.restore, _NothingGiven):
            return None
        return AddField(self.name, self.restore, optional=self.optional)

    def _fault(self) -> str:
        return f"nothing says what {shorten_repr(self.name)} was (give `restore`)"


@dataclass(frozen=True, slots=True)
class MapField(FieldChange):
    """Replace the value of `name` by what `up` makes of a copy of it. Invertible where `down` is given."""

    name: str
    up: Callable[[Any], Any]
    down: Callable[[Any], Any] | None = None

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Map the value."""
        if not self._has(config, self.name):
            return dict(config)
        return {**config, self.name: self.up(copy.deepcopy(config[self.name]))}

    def inverse(self) -> FieldChange | None:
        """Return the mapping by `down`."""
        return None if self.down is None else MapField(self.name, self.down, self.up, optional=self.optional)

    def _fault(self) -> str:
        return f"{describe_function(self.up)} is a free function (give `down`)"


ConfigChange = FieldChange | ConfigFunction
"""One change: declared, or a free function."""


def as_changes(changes: object) -> tuple[ConfigChange, ...]:
    """Return one change, or a sequence of them, as a tuple.

    Raises:
        ArgumentError: something in it is neither a declared change nor a function.
    """
    given = tuple(changes) if isinstance(changes, Sequence) and not isinstance(changes, str) else (changes,)
    for change in given:
        if not (isinstance(change, FieldChange) or (callable(change) and not isinstance(change, type))):
            raise ArgumentError(
                f"Expected changes of a config, got {shorten_repr(change)}.",
                remedy="give RenameField, AddField, DropField, MapField, or a function from dict to dict.",
            )
    return given


def _verify_free(config: Mapping[str, Any], name: str) -> None:
    if name in config:
        raise UnfitConfigError(f"Expected no field {shorten_repr(name)}, got {shorten_repr(config[name])}.")
