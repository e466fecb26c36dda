"""What two versions give back differently, and what recordings prove about that.

Rules this module keeps:

- Recordings are compared where their inputs are the same in structure, dtypes and values other than tensors; with
  another argument, or `return_dict=False`, a version may rightly give back something else.
- Inputs of the same shapes: every size of the output is compared, because nothing else can have moved it.
- Inputs of other shapes: only sizes that are one and the same in all recordings of either side are compared, and only
  if each size of the inputs is either the same on both sides or varied on at least one of them. A size that a version
  keeps while its inputs vary does not follow them; what was never varied proves nothing. So a batch of another size is
  no difference, and neither is a feature map of another size under images of another size.
- Recordings of one version that disagree prove nothing where they do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

from hotglm.breakage import Breakage
from hotglm.output_breakage import (
    OutputAdded,
    OutputDtypeChanged,
    OutputRemoved,
    OutputRenamed,
    OutputShapeChanged,
    OutputStructureChanged,
)
from hotglm.output_spec import OutputSpec, ValueKind, ValueSpec

__all__ = ["WHOLE_OUTPUT", "find_in_outputs"]

WHOLE_OUTPUT = "result"
"""What the output is called where it is one thing, without names of its own."""

_FORMS: Mapping[str, frozenset[str]] = {
    "namedtuple": frozenset({"namedtuple", "tuple"}),
    "mapping_record": frozenset({"mapping_record", "mapping", "record"}),
}
"""What a kind can be used as, where that is more than itself."""


def find_in_outputs(old: OutputSpec, new: OutputSpec) -> Iterator[Breakage]:
    """Yield what callers that get `old` notice when they get `new`, each difference once."""
    found: dict[Breakage, None] = {}
    olds, news = _group(old), _group(new)
    for call in (call for call in olds if call in news):
        for before, after in _pair(olds[call], news[call]):
            found.update(dict.fromkeys(_compare(before, after, where="")))
    yield from found


_Group = dict[ValueSpec, ValueSpec]
"""Of calls that differ in the shapes of their tensors alone: layout of the inputs to layout of the output."""


def _group(spec: OutputSpec) -> dict[ValueSpec, _Group]:
    groups: dict[ValueSpec, _Group] = {}
    for recording in spec.recordings:
        group = groups.setdefault(_without_shapes(recording.inputs), {})
        known = group.get(recording.inputs)
        group[recording.inputs] = recording.output if known is None else _merge(known, recording.output)
    return groups


def _pair(old: _Group, new: _Group) -> Iterator[tuple[ValueSpec, ValueSpec]]:
    shared = [inputs for inputs in old if inputs in new]
    if shared:
        yield from ((old[inputs], new[inputs]) for inputs in shared)
        return
    before, after = (functools.reduce(_merge, group.values()) for group in (old, new))
    yield (before, after) if _is_decided(old, new) else (_without_shapes(before), _without_shapes(after))


def _is_decided(old: Iterable[ValueSpec], new: Iterable[ValueSpec]) -> bool:
    """Tell whether no size of the inputs moved from one version to the other without having been varied."""
    olds, news = (list(zip(*(list(_find_sizes(inputs)) for inputs in group), strict=True)) for group in (old, new))
    for before, after in zip(olds, news, strict=True):
        if len(set(before)) == len(set(after)) == 1 and before[0] != after[0]:
            return False
    return True


def _find_sizes(spec: ValueSpec) -> Iterator[int | None]:
    yield from spec.shape or ()
    for _, part in spec.parts:
        yield from _find_sizes(part)


def _without_shapes(spec: ValueSpec) -> ValueSpec:
    shape = None if spec.shape is None else (None,) * len(spec.shape)
    return dataclasses.replace(
        spec, shape=shape, parts=tuple((name, _without_shapes(part)) for name, part in spec.parts)
    )


# -- merging -----------------------------------------------------------------------------------------------------------


def _merge(one: ValueSpec, other: ValueSpec) -> ValueSpec:
    """Return what both agree about; `_merge(a, a) == a`."""
    if one == other:
        return one
    if one.kind != other.kind or (one.kind == "value" and one.type != other.type):
        return ValueSpec(kind="unknown")
    if one.is_tensor:
        return ValueSpec(
            kind=one.kind, type=one.type if one.type == other.type else "", shape=_merge_shapes(one.shape, other.shape)
        )
    if one.is_sequence and len(one.parts) != len(other.parts):
        return ValueSpec(kind="unknown")
    ours, theirs = dict(one.parts), dict(other.parts)
    missing = ValueSpec(kind="unknown")
    names = [*ours, *(name for name in theirs if name not in ours)]
    merged = [(name, _merge(ours.get(name, missing), theirs.get(name, missing))) for name in names]
    return ValueSpec(kind=one.kind, parts=tuple(merged))


_Shape = tuple[int | None, ...] | None


def _merge_shapes(one: _Shape, other: _Shape) -> _Shape:
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(size if size == another else None for size, another in zip(one, other, strict=True))


# -- comparing ---------------------------------------------------------------------------------------------------------


def _compare(old: ValueSpec, new: ValueSpec, *, where: str) -> Iterator[Breakage]:
    if "unknown" in (old.kind, new.kind):
        return
    subject = where or WHOLE_OUTPUT
    if not _serves(old.kind, new.kind) or (old.kind == "value" and old.type != new.type):
        yield OutputStructureChanged(subject=subject, old=old.describe(), new=new.describe())
    elif old.is_tensor:
        yield from _compare_tensors(old, new, subject=subject)
    elif old.is_sequence:
        if len(old.parts) != len(new.parts):
            yield OutputStructureChanged(subject=subject, old=old.describe(), new=new.describe())
        for place, ((name, before), (other, after)) in enumerate(zip(old.parts, new.parts, strict=False)):
            if old.kind == "namedtuple" and name != other:
                yield OutputRenamed(subject=f"{where}[{place}]", new=other)
            yield from _compare(before, after, where=f"{where}[{place}]")
    else:
        yield from _compare_named(old, new, where=where)


def _serves(old: ValueKind, new: ValueKind) -> bool:
    return old in _FORMS.get(new, {new})


def _compare_tensors(old: ValueSpec, new: ValueSpec, *, subject: str) -> Iterator[Breakage]:
    if old.type and new.type and old.type != new.type:
        yield OutputDtypeChanged(subject=subject, old=old.type, new=new.type)
    if old.shape is None or new.shape is None:
        return
    sizes = zip(old.shape, new.shape, strict=False)
    if len(old.shape) != len(new.shape) or any(a != b for a, b in sizes if a is not None and b is not None):
        yield OutputShapeChanged(subject=subject, old=old.shape, new=new.shape)


def _compare_named(old: ValueSpec, new: ValueSpec, *, where: str) -> Iterator[Breakage]:
    olds, news = _find_present(old), _find_present(new)
    removed = {name: part for name, part in olds.items() if name not in news}
    added = {name: part for name, part in news.items() if name not in olds}
    renamed = dict(_find_renamed(removed, added))
    for name, before in olds.items():
        path = f"{where}.{name}" if where else name
        if name in renamed:
            yield OutputRenamed(subject=path, new=renamed[name])
        elif name in removed:
            if before.kind != "unknown":  # as where only some recordings have it
                yield OutputRemoved(subject=path)
        else:
            yield from _compare(before, news[name], where=path)
    for name, after in added.items():
        if name not in renamed.values() and after.kind != "unknown":
            yield OutputAdded(subject=f"{where}.{name}" if where else name)


def _find_present(spec: ValueSpec) -> dict[str, ValueSpec]:
    """Return the parts by name; one that is None is not there, as the outputs of `transformers` have it."""
    return {name: part for name, part in spec.parts if part != ValueSpec(kind="value", type="NoneType")}


def _find_renamed(removed: Mapping[str, ValueSpec], added: Mapping[str, ValueSpec]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names whose layout no other removed or added part has; an unknown layout matches nothing."""
    for name, part in removed.items():
        ways = [other for other, its in added.items() if its == part]
        is_only = sum(its == part for its in removed.values()) == 1
        if len(ways) == 1 and is_only and part.kind != "unknown":
            yield name, ways[0]
