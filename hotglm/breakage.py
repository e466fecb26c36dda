"""What differs between two contracts in a way that somebody can notice, and how big a step that calls for.

Rules this module keeps:

- One class per kind of difference; the class says who notices (`bump`), the fields say what changed.
- `find_breakages(c, c)` is empty for every contract `c`, and a part that one side does not know (None) is not compared.
- `find_` functions never raise. Every difference is found, not only the first.
- MAJOR is what makes a call or a config that worked fail or mean something else. A state layout that differs is MINOR:
  no caller sees it, but the spare cannot be filled without new code or a migration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hotglm.contract import ArgumentSpec, CallSpec, ConfigSpec, Contract, StateSpec, pair_arguments
from hotglm.errors import shorten_repr
from hotglm.version import Bump

__all__ = [
    "ArgumentKindChanged",
    "ArgumentRemoved",
    "ArgumentRenamed",
    "ArgumentsReordered",
    "Breakage",
    "CapabilityGained",
    "CapabilityLost",
    "ConfigDefaultRemoved",
    "ConfigFieldRemoved",
    "ConfigFieldTypeChanged",
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
    "find_breakages",
    "find_unfilled",
    "required_bump",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakage:
    """One difference between two contracts that somebody can notice.

    Attributes:
        subject: the tensor, argument, field or capability it is about.
        bump: how big a step of the version it calls for.
    """

    bump: ClassVar[Bump] = Bump.MAJOR
    clause: ClassVar[str]  # what `explain` says, with a field's value for its name in braces
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
    old: StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorUnexpected(Breakage):
    """A tensor of the new state is not in the old one."""

    bump = Bump.MINOR
    clause = "tensor {subject} ({new}) was not there before"
    new: StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChanged(Breakage):
    """A tensor has another shape."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from shape {old} to {new}"
    old: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeChanged(Breakage):
    """A tensor has another dtype."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from {old} to {new}"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistenceChanged(Breakage):
    """A buffer went into or out of the state dict."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from persistent={old} to persistent={new}"
    old: bool
    new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TieChanged(Breakage):
    """A tensor shares its memory with other names than before; None stands for none."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from tied={old} to tied={new}"
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KindChanged(Breakage):
    """A parameter became a buffer, or the other way round."""

    bump = Bump.MINOR
    clause = "tensor {subject} went from {old} to {new}"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRemoved(Breakage):
    """An argument that callers could pass is gone.

    Attributes:
        swallowed_by: the variadic argument that now takes the value silently, e.g. `"**kwargs"`; None for none.
    """

    clause = "argument {subject} was removed"
    swallowed_by: str | None = None

    def explain(self) -> str:
        """Return a clause that says what changed, and where the value goes now."""
        removed = f"argument {shorten_repr(self.subject)} was removed"
        return removed if self.swallowed_by is None else f"{removed}, and {self.swallowed_by} now swallows it silently"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRenamed(Breakage):
    """A positional argument that callers could also name has another name."""

    clause = "argument {subject} was renamed to {new}"
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredArgumentAdded(Breakage):
    """There is a new argument that callers must pass."""

    clause = "argument {subject} was added without a default"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalArgumentAdded(Breakage):
    """There is a new argument that callers may pass."""

    bump = Bump.MINOR
    clause = "optional argument {subject} was added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentKindChanged(Breakage):
    """An argument can no longer be passed in a way it could, e.g. by position."""

    clause = "argument {subject} was {old} and is now {new}"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultRemoved(Breakage):
    """An argument that callers could leave out must now be passed."""

    clause = "argument {subject} lost its default, so callers must now pass it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentsReordered(Breakage):
    """Values passed by position reach other arguments than before; `subject` is the first that moved."""

    clause = "positional arguments went from {old} to {new}"
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFieldRemoved(Breakage):
    """A config field that configs could set is gone."""

    clause = "config field {subject} was removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFieldTypeChanged(Breakage):
    """A config field has another type."""

    clause = "config field {subject} went from type {old} to {new}"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredConfigFieldAdded(Breakage):
    """There is a new config field that configs must set."""

    clause = "config field {subject} was added without a default"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalConfigFieldAdded(Breakage):
    """There is a new config field that configs may set."""

    bump = Bump.MINOR
    clause = "optional config field {subject} was added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDefaultRemoved(Breakage):
    """A config field that configs could leave out must now be set."""

    clause = "config field {subject} lost its default, so configs must now set it"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityLost(Breakage):
    """The version can no longer do something that it promised."""

    clause = "capability {subject} was lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityGained(Breakage):
    """The version promises something new."""

    bump = Bump.MINOR
    clause = "capability {subject} was gained"


# -- finding -----------------------------------------------------------------------------------------------------------


def find_breakages(old: Contract, new: Contract) -> Iterator[Breakage]:
    """Yield everything that a step from `old` to `new` changes, state first, in the order of the contracts."""
    yield from _find_in_state(old.state, new.state)
    if old.call is not None and new.call is not None:
        yield from _find_in_call(old.call, new.call)
    if old.config is not None and new.config is not None:
        yield from _find_in_config(old.config, new.config)
    yield from (CapabilityLost(subject=name) for name in sorted(old.capabilities - new.capabilities))
    yield from (CapabilityGained(subject=name) for name in sorted(new.capabilities - old.capabilities))


def find_unfilled(code: Contract, offered: Contract) -> Iterator[Breakage]:
    """Yield what keeps the tensors `offered` from filling the persistent state of `code` exactly.

    In what it yields, `code` is the old side. Any one name of a tied group fills the whole group. Non-persistent
    buffers are not filled from outside, so they are not missing when absent and are unexpected when present.
    """
    persistent = {name: spec for name, spec in code.state.items() if spec.persistent}
    filled_groups = {persistent[name].tied or name for name in offered.state if name in persistent}
    for name, spec in persistent.items():
        if name in offered.state:
            yield from _find_in_layout(spec, offered.state[name])
        elif (spec.tied or name) not in filled_groups:
            yield TensorMissing(subject=name, old=spec)
    yield from (TensorUnexpected(subject=n, new=spec) for n, spec in offered.state.items() if n not in persistent)


def required_bump(breakages: Iterable[Breakage]) -> Bump:
    """Return the biggest step that any of `breakages` calls for, NONE when there are none."""
    return max((breakage.bump for breakage in breakages), default=Bump.NONE)


def _find_in_state(old: Mapping[str, StateSpec], new: Mapping[str, StateSpec]) -> Iterator[Breakage]:
    for name, spec in old.items():
        if name not in new:
            yield TensorMissing(subject=name, old=spec)
            continue
        yield from _find_in_layout(spec, new[name])
        yield from _find_in_registration(spec, new[name])
    yield from (TensorUnexpected(subject=name, new=spec) for name, spec in new.items() if name not in old)


def _find_in_layout(old: StateSpec, new: StateSpec) -> Iterator[Breakage]:
    if old.shape != new.shape:
        yield ShapeChanged(subject=old.name, old=old.shape, new=new.shape)
    if old.dtype != new.dtype:
        yield DtypeChanged(subject=old.name, old=old.dtype, new=new.dtype)


def _find_in_registration(old: StateSpec, new: StateSpec) -> Iterator[Breakage]:
    if old.kind is None or new.kind is None:
        return  # a file's view, which knows nothing of how tensors are registered
    if old.kind != new.kind:
        yield KindChanged(subject=old.name, old=old.kind, new=new.kind)
    if old.persistent != new.persistent:
        yield PersistenceChanged(subject=old.name, old=old.persistent, new=new.persistent)
    if old.tied != new.tied:
        yield TieChanged(subject=old.name, old=old.tied, new=new.tied)


def _find_in_config(old: ConfigSpec, new: ConfigSpec) -> Iterator[Breakage]:
    olds, news = ({field.name: field for field in spec.fields} for spec in (old, new))
    for name, field in olds.items():
        if name not in news:
            yield ConfigFieldRemoved(subject=name)
            continue
        if field.type != news[name].type:
            yield ConfigFieldTypeChanged(subject=name, old=field.type, new=news[name].type)
        if field.has_default and not news[name].has_default:
            yield ConfigDefaultRemoved(subject=name)
    for name in (name for name in news if name not in olds):
        yield (OptionalConfigFieldAdded if news[name].has_default else RequiredConfigFieldAdded)(subject=name)


def _find_in_call(old: CallSpec, new: CallSpec) -> Iterator[Breakage]:
    pairs = pair_arguments(old, new)
    kept, filled = {before for before, _ in pairs}, {after for _, after in pairs}
    for argument in (argument for argument in old.arguments if argument not in kept):
        yield ArgumentRemoved(subject=argument.label, swallowed_by=_find_swallower(argument, new))
    takes_any_name = any(argument.kind == "VAR_KEYWORD" for argument in old.arguments)
    for before, after in pairs:
        yield from _find_in_argument(before, after, takes_any_name=takes_any_name)
    yield from _find_reordered(old, new, pairs)
    for argument in (argument for argument in new.arguments if argument not in filled):
        is_optional = argument.has_default or argument.is_variadic
        yield (OptionalArgumentAdded if is_optional else RequiredArgumentAdded)(subject=argument.label)


def _find_in_argument(before: ArgumentSpec, after: ArgumentSpec, *, takes_any_name: bool) -> Iterator[Breakage]:
    if before.kind == "POSITIONAL_OR_KEYWORD" and before.name != after.name:
        yield ArgumentRenamed(subject=before.name, new=after.name)
    # Beside `**kwargs`, callers could pass the name of a positional-only argument as a name of their own.
    takes_name = takes_any_name and before.kind == "POSITIONAL_ONLY" and "name" in after.ways
    if takes_name or not before.ways <= after.ways:
        yield ArgumentKindChanged(subject=after.name, old=before.kind, new=after.kind)
    if before.has_default and not after.has_default:
        yield DefaultRemoved(subject=after.name)


def _find_swallower(removed: ArgumentSpec, new: CallSpec) -> str | None:
    swallowing = {"position": "VAR_POSITIONAL", "name": "VAR_KEYWORD"}
    kinds = {swallowing[way] for way in removed.ways if not removed.is_variadic}
    return next((argument.label for argument in new.arguments if argument.kind in kinds), None)


def _find_reordered(
    old: CallSpec, new: CallSpec, pairs: Sequence[tuple[ArgumentSpec, ArgumentSpec]]
) -> Iterator[Breakage]:
    """Compare the places of the arguments that both sides take by position; `*args` is the last place of all."""
    old_label = {after.label: before.label for before, after in pairs if "position" in before.ways & after.ways}
    kept = list(old_label.values())
    places = [old_label.get(a.label, a.label) for a in new.arguments if "position" in a.ways]
    moved = next((label for place, label in enumerate(kept) if places[place] != label), None)
    if moved is not None:
        before, after = (tuple(a.label for a in spec.arguments if "position" in a.ways) for spec in (old, new))
        yield ArgumentsReordered(subject=moved, old=before, new=after)
