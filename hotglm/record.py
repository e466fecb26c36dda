"""Frozen records as JSON values and back, strictly.

Rules this module keeps:

- The annotations of a record are its grammar: text, integers, booleans, literals, None, tuples and other records.
- `read` is the inverse of `write`, and takes nothing else: every field must be there, none may be unknown, True is no
  integer. All problems are gathered, each with the place it was found at.
- What is read may come from a file: depth and number of problems are capped, and names are escaped.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hotglm.problem import Problem, shorten_repr

__all__ = ["RecordReader", "write_record"]

_MAX_DEPTH = 64
_MAX_PROBLEMS = 1000
_WORDS = {str: "text", int: "an integer", bool: "true or false"}

T = TypeVar("T")


def write_record(value: object) -> Any:
    """Return a record, or a tuple of them, as JSON values: records as objects, tuples as arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: write_record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [write_record(member) for member in value] if isinstance(value, tuple) else value


@functools.cache
def _read_hints(record: type) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record)}


class RecordReader:
    """Reads records from JSON values and gathers what is wrong with them.

    Attributes:
        problems: everything that is wrong so far.
    """

    def __init__(self, *, code: str) -> None:
        """Start without problems; each will have this code."""
        self.problems: list[Problem] = []
        self._code = code

    def add(self, expected: str, found: object, *, where: str) -> None:
        """Note that something else than `expected` stands at `where`."""
        if len(self.problems) < _MAX_PROBLEMS:
            message = f"Expected {expected} at {shorten_repr(where)}, got {shorten_repr(found)}"
            self.problems.append(Problem(code=self._code, message=message))

    def read_all(self, kind: type[T], value: object, *, where: str) -> tuple[T, ...]:
        """Return the elements of an array, each of which must be a `kind`; one that is not is noted and left out."""
        if not isinstance(value, (list, tuple)):
            self.add("an array", value, where=where)
            return ()
        read = []
        for place, member in enumerate(value):
            num_problems = len(self.problems)
            made = self._read(kind, member, where=f"{where}[{place}]", depth=0)
            if len(self.problems) == num_problems:
                read.append(made)
        return tuple(read)

    def read_members(self, document: object, names: tuple[str, ...], *, where: str) -> dict[str, Any]:
        """Return the members of an object that must have exactly `names`; a missing one is None and noted."""
        if not isinstance(document, Mapping):
            self.add("an object", document, where=where)
            return dict.fromkeys(names)
        for name in document:
            if name not in names:
                self.add(f"only the members {', '.join(names)}", name, where=where)
        for name in names:
            if name not in document:
                self.add(f"a member {name!r}", None, where=where)
        return {name: document.get(name) for name in names}

    def _read(self, hint: Any, value: object, *, where: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.add(f"at most {_MAX_DEPTH} levels", "more", where=where)
            return None
        origin, members = get_origin(hint), get_args(hint)
        if origin is tuple:
            return self._read_tuple(members, value, where=where, depth=depth)
        if origin in (Union, types.UnionType):
            (inner,) = (member for member in members if member is not type(None))
            return None if value is None else self._read(inner, value, where=where, depth=depth)
        if dataclasses.is_dataclass(hint):
            return self._read_record(hint, value, where=where, depth=depth)
        fits = value in members if origin is Literal and isinstance(value, str) else type(value) is hint  # True: no int
        if not fits:
            self.add(f"one of {', '.join(members)}" if members else _WORDS[hint], value, where=where)
        return value

    def _read_tuple(self, members: tuple[Any, ...], value: object, *, where: str, depth: int) -> Any:
        if not isinstance(value, (list, tuple)):
            self.add("an array", value, where=where)
            return ()
        hints = [members[0]] * len(value) if members[-1] is ... else list(members)
        if len(hints) != len(value):
            self.add(f"{len(hints)} elements", list(value), where=where)
            return ()
        return tuple(
            self._read(hint, member, where=f"{where}[{place}]", depth=depth + 1)
            for place, (hint, member) in enumerate(zip(hints, value, strict=True))
        )

    def _read_record(self, record: Any, value: object, *, where: str, depth: int) -> Any:
        num_problems = len(self.problems)
        hints = _read_hints(record)
        members = self.read_members(value, tuple(hints), where=where)
        if len(self.problems) > num_problems:
            return None
        read = {
            name: self._read(hint, members[name], where=f"{where}.{name}", depth=depth + 1)
            for name, hint in hints.items()
        }
        return record(**read) if len(self.problems) == num_problems else None
