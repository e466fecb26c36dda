"""What differs between two contracts in a way that somebody can notice.

Rules this module keeps:

- `find_breakages(c, c)` is empty for every contract `c`, and a part that one side does not know (None) is not compared.
- `find_` functions never raise. Every difference is found, not only the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hotglm.breakage import (
    ArgumentKindChanged,
    ArgumentRemoved,
    ArgumentRenamed,
    ArgumentsReordered,
    Breakage,
    CapabilityGained,
    CapabilityLost,
    ConfigDefaultChanged,
    ConfigDefaultRemoved,
    ConfigFieldRemoved,
    ConfigFieldTypeChanged,
    ConfigFieldTypeWidened,
    DefaultChanged,
    DefaultRemoved,
    DtypeChanged,
    KindChanged,
    OptionalArgumentAdded,
    OptionalConfigFieldAdded,
    PersistenceChanged,
    RequiredArgumentAdded,
    RequiredConfigFieldAdded,
    ShapeChanged,
    TensorMissing,
    TensorUnexpected,
    TieChanged,
)
from hotglm.call_spec import ArgumentSpec, CallSpec, pair_arguments
from hotglm.config_spec import ConfigSpec
from hotglm.contract import Contract, StateSpec
from hotglm.output_comparison import find_in_outputs
from hotglm.spelling import is_wider

__all__ = ["find_breakages", "find_unfilled"]


def find_breakages(old: Contract, new: Contract) -> Iterator[Breakage]:
    """Yield everything that a step from `old` to `new` changes, state first, in the order of the contracts."""
    yield from _find_in_state(old.state, new.state)
    if old.call is not None and new.call is not None:
        yield from _find_in_call(old.call, new.call)
    if old.outputs is not None and new.outputs is not None:
        yield from find_in_outputs(old.outputs, new.outputs)
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
        yield from _find_in_type(name, field.type, news[name].type)
        if field.has_default and not news[name].has_default:
            yield ConfigDefaultRemoved(subject=name)
        before, after = field.default, news[name].default
        if before is not None and after is not None and before != after:
            yield ConfigDefaultChanged(subject=name, old=before, new=after)
    for name in (name for name in news if name not in olds):
        yield (OptionalConfigFieldAdded if news[name].has_default else RequiredConfigFieldAdded)(subject=name)


def _find_in_type(name: str, old: str, new: str) -> Iterator[Breakage]:
    if old and new and old != new:  # an annotation that was left out says nothing
        yield (ConfigFieldTypeWidened if is_wider(old, new) else ConfigFieldTypeChanged)(subject=name, old=old, new=new)


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
    if before.default is not None and after.default is not None and before.default != after.default:
        yield DefaultChanged(subject=after.name, old=before.default, new=after.default)


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
