"""Compatibility over the whole history of a name, in the words of Confluent's schema registry.

Rules this module keeps:

- A mode is a set of directions and a reach. *Backward*: the new version takes the place of an earlier one; it serves
  its callers and reads its files and configs. *Forward*: the earlier version takes the place of the new one, as in a
  rollback or a fleet that is updated in turn; it is backward with the two exchanged. *Full* is both. Without
  *transitive* the next earlier version is looked at, with it all earlier ones.
- What callers notice (call, outputs, capabilities) counts when it calls for a major step. What is stored (tensors and
  configs) counts when it cannot be read as it is, unless a migration leads from the one version to the other: a
  migration changes files, never a caller.
- Everything is found, over all versions, newest first, and nothing raises. It is asked of contracts, not of version
  numbers: whether a number is honest is what `hotglm.verdict` asks.

Source of the words: Confluent Schema Registry, "Schema Evolution and Compatibility".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hotglm.breakage import (
    Breakage,
    ConfigDefaultChanged,
    ConfigDefaultRemoved,
    ConfigFieldRemoved,
    ConfigFieldTypeChanged,
    ConfigFieldTypeWidened,
    DtypeChanged,
    KindChanged,
    OptionalConfigFieldAdded,
    PersistenceChanged,
    RequiredConfigFieldAdded,
    ShapeChanged,
    TensorMissing,
    TensorUnexpected,
    TieChanged,
)
from hotglm.comparison import find_breakages
from hotglm.contract import Contract, StateSpec
from hotglm.errors import ArgumentError, VersionSyntaxError, shorten_repr
from hotglm.record import RecordReader
from hotglm.version import Bump, Version

__all__ = ["RELEASED_SCHEMA", "CompatibilityMode", "Incompatibility", "Released", "find_incompatibilities"]

RELEASED_SCHEMA = "hotglm.released/1"
"""What the document of a version says it is; its number changes when its meaning does."""

Direction = Literal["backward", "forward"]

_DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "none": (),
    "backward": ("backward",),
    "forward": ("forward",),
    "full": ("backward", "forward"),
}


class CompatibilityMode(enum.Enum):
    """What a version must get along with; the values are the words of the command line.

    >>> CompatibilityMode.parse("full_transitive").is_transitive
    True
    """

    NONE = "none"
    BACKWARD = "backward"
    BACKWARD_TRANSITIVE = "backward_transitive"
    FORWARD = "forward"
    FORWARD_TRANSITIVE = "forward_transitive"
    FULL = "full"
    FULL_TRANSITIVE = "full_transitive"

    @property
    def is_transitive(self) -> bool:
        """Whether all earlier versions count, and not only the next earlier one."""
        return self.value.endswith("_transitive")

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Which way round versions must be able to take each other's place."""
        return _DIRECTIONS[self.value.removesuffix("_transitive")]

    @classmethod
    def parse(cls, value: CompatibilityMode | str) -> CompatibilityMode:
        """Return the mode named by `value`, in upper or lower case.

        Raises:
            ArgumentError: `value` names none.
        """
        try:
            return value if isinstance(value, CompatibilityMode) else cls(value.lower())
        except (ValueError, AttributeError):
            raise ArgumentError(
                f"Expected a compatibility mode, got {shorten_repr(value)}.",
                remedy=f"use one of {', '.join(repr(mode.value) for mode in cls)}.",
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """One version of a name, and what it promises; as JSON values and back: `Released.from_dict(r.to_dict()) == r`."""

    version: Version
    contract: Contract

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"schema": RELEASED_SCHEMA, "version": str(self.version), "contract": self.contract.to_dict()}

    @classmethod
    def from_dict(cls, document: object) -> Released:
        """Return what `to_dict` wrote, strictly.

        Raises:
            ArgumentError: `document` is not what `to_dict` writes; everything that is wrong is named.
        """
        reader = RecordReader(code="BAD_CONTRACT")
        members = reader.read_members(document, ("schema", "version", "contract"), where="released")
        if members["schema"] != RELEASED_SCHEMA:
            reader.add(f"{RELEASED_SCHEMA!r}", members["schema"], where="schema")
        problems, contract, version = reader.problems, Contract(), Version("0")
        try:
            version = Version(members["version"])
        except VersionSyntaxError:
            reader.add("a version", members["version"], where="version")
        try:
            contract = Contract.from_dict(members["contract"])
        except ArgumentError as error:
            problems += error.problems
        if problems:
            remedy = "write it again with Released.to_dict()."
            raise ArgumentError(
                "Expected a version and its contract as Released.to_dict writes them.", problems=problems, remedy=remedy
            )
        return cls(version=version, contract=contract)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incompatibility:
    """One thing that keeps two versions of a name from getting along.

    Attributes:
        earlier: the earlier version.
        later: the version that was asked about.
        direction: `"backward"` where the later one cannot take the place of the earlier one, `"forward"` where the
            earlier one cannot take that of the later one.
        breakage: what changes on the way from the one whose place is taken to the one that takes it.
        is_stored: whether it is about tensors or configs, which a migration can carry over.
    """

    earlier: Version
    later: Version
    direction: Direction
    breakage: Breakage
    is_stored: bool

    @property
    def code(self) -> str:
        """The code of the breakage."""
        return self.breakage.code

    @property
    def remedy(self) -> str:
        """What would make it go away, as a clause."""
        return self.breakage.remedy

    @property
    def is_config(self) -> bool:
        """Whether it is about configs, which only a config migration carries over."""
        return isinstance(self.breakage, _CONFIG)

    def explain(self) -> str:
        """Return one sentence that says who cannot take whose place, and why; names in it are escaped."""
        new, old = (self.later, self.earlier) if self.direction == "backward" else (self.earlier, self.later)
        cannot = f"cannot read what {old} has stored" if self.is_stored else f"cannot serve the callers of {old}"
        return f"{new} {cannot}: {self.breakage.explain()}."

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {
            "earlier": str(self.earlier),
            "later": str(self.later),
            "direction": self.direction,
            "is_stored": self.is_stored,
            "message": self.explain(),
            "remedy": self.remedy,
            "breakage": self.breakage.to_dict(),
        }


def _has_no_path(_start: Version, _end: Version) -> bool:
    return False


def find_incompatibilities(
    history: Iterable[Released],
    candidate: Released,
    mode: CompatibilityMode,
    *,
    has_path: Callable[[Version, Version], bool] = _has_no_path,
) -> list[Incompatibility]:
    """Return what keeps `candidate` from getting along with the versions before it; empty when it does.

    Versions above the candidate's are not looked at: 1.4.3 may follow 1.4.2 when 2.0.0 is there. A version of the same
    number is, a number is given once, unless it is the candidate itself, which a whole history has in it.

    Args:
        history: the versions of the name, in any order.
        candidate: the version that is asked about.
        mode: what it must get along with.
        has_path: tells whether a migration of at least one step leads from one version to another, up or down.

    >>> plain = Contract.of_tensors({"w": ("float32", (2,))})
    >>> wider = Contract.of_tensors({"w": ("float32", (3,))})
    >>> history = [Released(version=Version("1.0.0"), contract=plain)]
    >>> candidate = Released(version=Version("1.1.0"), contract=wider)
    >>> [found.explain() for found in find_incompatibilities(history, candidate, CompatibilityMode.BACKWARD)]
    ["1.1.0 cannot read what 1.0.0 has stored: tensor 'w' went from shape [2] to [3]."]
    """
    earlier = [one for one in history if one.version <= candidate.version and one != candidate]
    earlier.sort(key=lambda one: one.version)
    reach = earlier if mode.is_transitive else earlier[-1:]
    return [
        found
        for one in reversed(reach)
        for direction in mode.directions
        for found in _find_between(one, candidate, direction=direction, has_path=has_path)
    ]


def _find_between(
    earlier: Released, later: Released, *, direction: Direction, has_path: Callable[[Version, Version], bool]
) -> Iterator[Incompatibility]:
    start, end = (earlier, later) if direction == "backward" else (later, earlier)
    is_migrated: bool | None = None
    for breakage in find_breakages(start.contract, end.contract):
        is_stored = isinstance(breakage, _STORED)
        if is_stored:
            if not _hinders_reading(breakage, start.contract, end.contract):
                continue
            if is_migrated is None:  # asked once, and only if it matters: a search through a graph
                is_migrated = has_path(start.version, end.version)
            if is_migrated:
                continue
        elif breakage.bump < Bump.MAJOR:
            continue
        yield Incompatibility(
            earlier=earlier.version,
            later=later.version,
            direction=direction,
            breakage=breakage,
            is_stored=is_stored,
        )


# -- what is stored ----------------------------------------------------------------------------------------------------

_STATE = (
    DtypeChanged,
    KindChanged,
    PersistenceChanged,
    ShapeChanged,
    TensorMissing,
    TensorUnexpected,
    TieChanged,
)
_CONFIG = (
    ConfigDefaultChanged,
    ConfigDefaultRemoved,
    ConfigFieldRemoved,
    ConfigFieldTypeChanged,
    ConfigFieldTypeWidened,
    OptionalConfigFieldAdded,
    RequiredConfigFieldAdded,
)
_STORED = (*_STATE, *_CONFIG)


def _hinders_reading(breakage: Breakage, written: Contract, read: Contract) -> bool:
    """Tell whether code with the contract `read` cannot hold files of `written` as they are because of `breakage`."""
    if isinstance(breakage, _CONFIG):
        return breakage.bump is Bump.MAJOR
    if isinstance(breakage, KindChanged):
        return False  # a file holds parameters and buffers alike
    if isinstance(breakage, (PersistenceChanged, TieChanged)):
        return True
    there, wanted = written.state.get(breakage.subject), read.state.get(breakage.subject)
    return _is_in_files(there, written) or (wanted is not None and _must_be_filled(wanted, written, read))


def _is_in_files(spec: StateSpec | None, contract: Contract) -> bool:
    """Tell whether the files of a version hold this name; of tied names, the first one is written."""
    if spec is None or not spec.persistent:
        return False
    return spec.tied is None or spec.tied == spec.name or spec.tied not in contract.state


def _must_be_filled(spec: StateSpec, written: Contract, read: Contract) -> bool:
    """Tell whether a name needs a tensor from the files: it is persistent, and no other of its group is filled."""
    if not spec.persistent:
        return False
    group = [one for one in read.state.values() if spec.tied is not None and one.tied == spec.tied] or [spec]
    return not any(_is_in_files(written.state.get(one.name), written) for one in group)
