"""The kinds of differences between two contracts that somebody can notice, and how big a step each calls for.

Rules this module keeps:

- One class per kind of difference; the class says who notices (`bump`) and what to do about it (`remedy`), the fields
  say what changed. `hotglm.comparison` finds them.
- MAJOR is what makes a call or a config that worked fail or mean something else; another default is one of these,
  because whoever left the argument out gets other behaviour. A state layout that differs is MINOR: no caller sees it,
  but the spare cannot be filled without new code or a migration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from hotglm.contract import StateSpec
from hotglm.problem import escape_text, shorten_repr
from hotglm.version import Bump

__all__ = [
    "ArgumentKindChanged",
    "ArgumentRemoved",
    "ArgumentRenamed",
    "ArgumentsReordered",
    "Breakage",
    "CapabilityGained",
    "CapabilityLost",
    "ConfigDefaultChanged",
    "ConfigDefaultRemoved",
    "ConfigFieldRemoved",
    "ConfigFieldTypeChanged",
    "ConfigFieldTypeWidened",
    "DefaultChanged",
    "DefaultRemoved",
    "DtypeChanged",
    "KindChanged",
    "OptionalArgumentAdded",
    "OptionalConfigFieldAdded",
    "PersistenceChanged",
    "RequiredArgumentAdded",
    "RequiredConfigFieldAdded",
    "ShapeChanged",
    "TensorMissing",
    "TensorUnexpected",
    "TieChanged",
    "required_bump",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakage:
    """One difference between two contracts that somebody can notice.

    Attributes:
        subject: the tensor, argument, output, field or capability it is about.
        bump: how big a step of the version it calls for.
        remedy: what would make it go away, as a clause without a full stop.
    """

    bump: ClassVar[Bump] = Bump.MAJOR
    clause: ClassVar[str]  # what `explain` says, with a field's value for its name in braces
    remedy: ClassVar[str]
    subject: str

    @property
    def code(self) -> str:
        """Return the class's name as an upper-case word, e.g. `SHAPE_CHANGED`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).upper()

    def explain(self) -> str:
        """Return a clause that says what changed, without a full stop; names in it are escaped."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return self.clause.format_map({name: _spell(value) for name, value in values.items()})

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        common = {"code": self.code, "bump": self.bump.value, "message": self.explain()}
        return common | dataclasses.asdict(self)


def required_bump(breakages: Iterable[Breakage]) -> Bump:
    """Return the biggest step that any of `breakages` calls for, NONE when there are none."""
    return max((breakage.bump for breakage in breakages), default=Bump.NONE)


def _spell(value: object) -> str:
    """Return a field's value as text that is safe to print: names quoted and escaped, shapes as lists."""
    match value:
        case StateSpec(dtype=dtype, shape=shape):
            return f"{shorten_repr(dtype)}, shape {_spell(shape)}"
        case tuple():
            return f"[{', '.join(_spell(member) for member in value)}]"
        case _:
            return shorten_repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMissing(Breakage):
    """A tensor of the old state is not in the new one."""

    bump = Bump.MINOR
    clause = "tensor {subject} ({old}) is missing"
    remedy = "keep the tensor, or register a migration that renames or drops it"
    old: StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorUnexpected(Breakage):
    """A tensor of the new state is not in the old one."""

    bump = Bump.MINOR
    clause = "tensor {subject} ({new}) was not there before"
    remedy = "leave the tensor out, or register a migration that adds it with an initialiser"
    new: StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChanged(Breakage):
    """A tensor has another shape."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from shape {old} to {new}"
    remedy = "keep the shape, or register a migration that pads, slices or reshapes it"
    old: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeChanged(Breakage):
    """A tensor has another dtype."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from {old} to {new}"
    remedy = "keep the dtype, register a migration that casts it, or stage with StagePolicy(convert_dtypes=True)"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistenceChanged(Breakage):
    """A buffer went into or out of the state dict."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from persistent={old} to persistent={new}"
    remedy = "keep `persistent` as it was, or register a migration that adds or drops the tensor"
    old: bool
    new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TieChanged(Breakage):
    """A tensor shares its memory with other names than before; None stands for none."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from tied={old} to tied={new}"
    remedy = "keep the tie, or register a migration that ties or unties the names"
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KindChanged(Breakage):
    """A parameter became a buffer, or the other way round."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from {old} to {new}"
    remedy = "nothing for files, which hold both alike; an optimizer sees another set of parameters"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRemoved(Breakage):
    """An argument that callers could pass is gone.

    Attributes:
        swallowed_by: the variadic argument that now takes the value silently, e.g. `"**kwargs"`; None for none.
    """

    clause = "argument {subject} was removed"
    remedy = "take the argument and ignore it until the next major version"
    swallowed_by: str | None = None

    def explain(self) -> str:
        """Return a clause that says what changed, and where the value goes now."""
        removed = f"argument {shorten_repr(self.subject)} was removed"
        return removed if self.swallowed_by is None else f"{removed}, and {self.swallowed_by} now swallows it silently"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRenamed(Breakage):
    """A positional argument that callers could also name has another name."""

    clause = "argument {subject} was renamed to {new}"
    remedy = "keep the name, or take both names until the next major version"
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredArgumentAdded(Breakage):
    """There is a new argument that callers must pass."""

    clause = "argument {subject} was added without a default"
    remedy = "give the argument a default"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalArgumentAdded(Breakage):
    """There is a new argument that callers may pass."""

    bump = Bump.MINOR
    clause = "optional argument {subject} was added"
    remedy = "nothing for callers of the old version; they need not pass it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentKindChanged(Breakage):
    """An argument can no longer be passed in a way it could, e.g. by position."""

    clause = "argument {subject} was {old} and is now {new}"
    remedy = "let it be passed in every way it could be before"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultRemoved(Breakage):
    """An argument that callers could leave out must now be passed."""

    clause = "argument {subject} lost its default, so callers must now pass it"
    remedy = "give the argument its default again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultChanged(Breakage):
    """An argument that callers may leave out means something else then; both defaults as text."""

    clause = "the default of argument {subject} went from {old} to {new}"
    remedy = "keep the default, or take None for one that is worked out"
    old: str
    new: str

    def explain(self) -> str:
        """Return a clause that says what changed; the defaults as they are written in code."""
        return _explain_default("argument", self.subject, self.old, self.new)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentsReordered(Breakage):
    """Values passed by position reach other arguments than before; `subject` is the first that moved."""

    clause = "positional arguments went from {old} to {new}"
    remedy = "keep the order, and add new arguments last or by keyword only"
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFieldRemoved(Breakage):
    """A config field that configs could set is gone."""

    clause = "config field {subject} was removed"
    remedy = "keep the field, or register a config migration that drops or renames it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFieldTypeChanged(Breakage):
    """A config field has another type."""

    clause = "config field {subject} went from type {old} to {new}"
    remedy = "accept both types, or register a config migration that converts the value"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFieldTypeWidened(Breakage):
    """A config field takes more types or values than before, and all that it took."""

    bump = Bump.MINOR
    clause = "config field {subject} went from type {old} to the wider {new}"
    remedy = "nothing for configs of the old version; what they have is taken as before"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredConfigFieldAdded(Breakage):
    """There is a new config field that configs must set."""

    clause = "config field {subject} was added without a default"
    remedy = "give the field a default, or register a config migration that adds it"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalConfigFieldAdded(Breakage):
    """There is a new config field that configs may set."""

    bump = Bump.MINOR
    clause = "optional config field {subject} was added"
    remedy = "nothing for configs of the old version; they need not set it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDefaultRemoved(Breakage):
    """A config field that configs could leave out must now be set."""

    clause = "config field {subject} lost its default, so configs must now set it"
    remedy = "give the field its default again, or register a config migration that adds it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDefaultChanged(Breakage):
    """A config that leaves a field out makes another model than before; both defaults as text."""

    clause = "the default of config field {subject} went from {old} to {new}"
    remedy = "keep the default, or register a config migration that writes the old one into configs without it"
    old: str
    new: str

    def explain(self) -> str:
        """Return a clause that says what changed; the defaults as they are written in code."""
        return _explain_default("config field", self.subject, self.old, self.new)


def _explain_default(kind: str, subject: str, old: str, new: str) -> str:
    before, after = (escape_text(text, limit=80) for text in (old, new))
    return f"the default of {kind} {shorten_repr(subject)} went from {before} to {after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityLost(Breakage):
    """The version can no longer do something that it promised."""

    clause = "capability {subject} was lost"
    remedy = "provide the capability again, or say so with a major version"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityGained(Breakage):
    """The version promises something new."""

    bump = Bump.MINOR
    clause = "capability {subject} was gained"
    remedy = "nothing for users of the old version"
