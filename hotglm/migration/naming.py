r"""Patterns and templates of tensor names, and turning them round.

Rules this module keeps:

- A text without any of the characters ``\ ( ) [ ] { } * + ? | ^ $`` is a name as it stands: its dots are dots, and it
  is looked up, not searched for. Any other text is a regular expression that must match a whole name.
- A template is text with ``\1``, ``\g<1>`` or ``\g<name>`` for what a group matched, and ``\\`` for a backslash.
- A pattern can be turned round when it is literal text and groups that are not nested. One with a bare dot, a class or
  a repetition outside a group cannot, because it does not say which text to write back.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.problem import describe_exception

__all__ = ["Match", "NamePattern", "NameTemplate", "Turned", "turn_round"]

_SPECIAL = re.compile(r"[\\()\[\]{}*+?|^$]")
_PLAIN = re.compile("")
_GROUP = re.compile(
    r"\((?:\?P<(?P<name>[^\W\d]\w*)>|(?!\?))(?P<body>(?:[^()\[\]\\]|\\[^1-9]|\[\]?(?:[^\]\\]|\\.)*\])*)\)"
)
_LITERAL = re.compile(r"[^\\()\[\]{}*+?|^$.]|\\[^0-9A-Za-z]")
_REFERENCE = re.compile(r"\\(?:(?P<digits>[1-9][0-9]?)|g<(?P<named>\w+)>|(?P<backslash>\\))|\\")
_REPEATED = ("*", "+", "?", "{")


@dataclass(frozen=True, slots=True)
class _Group:
    body: str
    name: str | None


Match = re.Match[str] | None
"""What a pattern found in one name; None for a name that is written out."""


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A name, or a regular expression over whole names.

    Attributes:
        text: as it was written.
        literal: the one name that it means, or None.
        parts: literal texts and groups in order, or None where it is not made of these alone.
        regex: the compiled expression; one without groups for a name as it stands.
        prefix: text that every name it matches begins with.
    """

    text: str
    literal: str | None
    parts: tuple[str | _Group, ...] | None
    regex: re.Pattern[str]
    prefix: str

    @classmethod
    def parse(cls, text: str) -> NamePattern:
        """Read a name or pattern.

        Raises:
            ArgumentError: it is not text, is empty, or is not a regular expression.
        """
        if not isinstance(text, str) or not text:
            raise ArgumentError(
                f"Expected the name of a tensor or a pattern, got {shorten_repr(text)}.", remedy="give non-empty text."
            )
        if _SPECIAL.search(text) is None:
            return cls(text=text, literal=text, parts=(text,), regex=_PLAIN, prefix=text)
        return _parse_pattern(text)

    def find_in(self, state: Mapping[str, object]) -> list[tuple[str, Match]]:
        """Return the names of `state` that it matches, each with its match, in the order of `state`."""
        if self.literal is not None:
            return [(self.literal, None)] if self.literal in state else []
        prefix, match = self.prefix, self.regex.fullmatch
        return [(name, found) for name in state if name.startswith(prefix) and (found := match(name))]

    def expand(self, template: NameTemplate, match: Match) -> str:
        """Return `template` with what the groups matched."""
        return template.literal if match is None or not template.references else template.expand(match)

    @property
    def why_not(self) -> str:
        """Why it cannot be turned round; empty when it can."""
        if self.parts is not None:
            return ""
        return f"the pattern {shorten_repr(self.text)} is not made of plain text and groups alone (write \\. for a dot)"


@dataclass(frozen=True, slots=True)
class NameTemplate:
    """A name with places for what the groups of a pattern matched.

    Attributes:
        text: as it was written.
        parts: literal texts and references (number or name of a group) in order.
        literal: the literal texts, joined.
        references: the references, in order.
    """

    text: str
    parts: tuple[str | _Reference, ...]

    @property
    def literal(self) -> str:
        """The literal texts, joined; the name itself where nothing is referred to."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def references(self) -> tuple[_Reference, ...]:
        """What it refers to, in order."""
        return tuple(part for part in self.parts if isinstance(part, _Reference))

    @classmethod
    def parse(cls, text: str, pattern: NamePattern) -> NameTemplate:
        """Read a template for the groups of `pattern`.

        Raises:
            ArgumentError: it is not text, is empty, has a lone backslash, or refers to a group that is not there.
        """
        if not isinstance(text, str) or not text:
            raise ArgumentError(
                f"Expected the name of a tensor or a template, got {shorten_repr(text)}.",
                remedy="give non-empty text.",
            )
        return _parse_template(text, pattern)

    def expand(self, match: re.Match[str]) -> str:
        """Return the name for one match; a group that took no part is empty."""
        return "".join(part if isinstance(part, str) else match[part.group] or "" for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Reference:
    group: int


@functools.lru_cache(maxsize=4096)
def _parse_pattern(text: str) -> NamePattern:
    try:
        regex = re.compile(text)
    except re.error as error:
        raise ArgumentError(
            f"Expected a regular expression over names of tensors, got {shorten_repr(text)} "
            f"({describe_exception(error)}).",
            remedy="correct it, or re.escape() a name that has special characters in it.",
        ) from error
    parts, prefix, literal = _split_pattern(text)
    return NamePattern(text=text, literal=literal, parts=parts, regex=regex, prefix=prefix)


def _split_pattern(text: str) -> tuple[tuple[str | _Group, ...] | None, str, str | None]:
    """Return the parts (None if it has others), the literal prefix, and the one name it means, if any."""
    parts: list[str | _Group] = []
    at = 0
    while at < len(text):
        group, letter = _GROUP.match(text, at), _LITERAL.match(text, at)
        found = group or letter
        if found is None or text[found.end() : found.end() + 1] in _REPEATED:
            prefix = parts[0] if parts and isinstance(parts[0], str) and "|" not in text else ""
            return None, prefix, None
        if group:
            parts.append(_Group(group["body"], group["name"]))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += found[0][-1]
        else:
            parts.append(found[0][-1])
        at = found.end()
    prefix = parts[0] if isinstance(parts[0], str) else ""
    return tuple(parts), prefix, prefix if len(parts) == 1 and prefix else None


@functools.lru_cache(maxsize=16384)
def _parse_template(text: str, pattern: NamePattern) -> NameTemplate:
    parts: list[str | _Reference] = []
    literal, at = "", 0
    for found in _REFERENCE.finditer(text):
        literal += text[at : found.start()]
        at = found.end()
        if found["backslash"]:
            literal += "\\"
            continue
        reference = found["digits"] or found["named"]
        group = _find_group(reference, pattern)
        if group is None:
            raise ArgumentError(
                f"Expected a template for the groups of {shorten_repr(pattern.text)}, got {shorten_repr(text)}, which "
                + (f"refers to group {reference!r}." if reference else "has a lone backslash in it."),
                remedy=r"refer to groups as \1 or \g<name>, and write \\ for a backslash.",
            )
        if literal:
            parts.append(literal)
        literal = ""
        parts.append(_Reference(group))
    literal += text[at:]
    return NameTemplate(text=text, parts=(*parts, *([literal] if literal else [])))


def _find_group(reference: str | None, pattern: NamePattern) -> int | None:
    if reference is None:
        return None
    if not reference.isdigit():
        return pattern.regex.groupindex.get(reference)
    return int(reference) if 1 <= int(reference) <= pattern.regex.groups else None


@dataclass(frozen=True, slots=True)
class Turned:
    """A pattern and its templates, seen from one of the templates.

    Attributes:
        pattern: matches what the template gave.
        origin: the template, over that pattern, of the name that the old pattern matched.
        others: the remaining templates, over that pattern, in their order.
    """

    pattern: str
    origin: str
    others: tuple[str, ...]


def turn_round(pattern: NamePattern, templates: Sequence[NameTemplate], *, anchor: int) -> Turned | str:
    """Return the pattern that templates[anchor] becomes, with the rest as templates over it; or why there is none."""
    if pattern.parts is None:
        return pattern.why_not
    groups = [part for part in pattern.parts if isinstance(part, _Group)]
    order = [reference.group for reference in templates[anchor].references]
    if sorted(order) != list(range(1, len(groups) + 1)):
        return (
            f"{shorten_repr(templates[anchor].text)} does not use every group of {shorten_repr(pattern.text)} "
            "exactly once"
        )
    number = {group: place for place, group in enumerate(order, start=1)}
    counter = iter(range(1, len(groups) + 1))
    origin = [part if isinstance(part, str) else _Reference(number[next(counter)]) for part in pattern.parts]
    return Turned(
        pattern=_render_pattern(
            [part if isinstance(part, str) else groups[part.group - 1] for part in templates[anchor].parts]
        ),
        origin=_render_template(origin),
        others=tuple(
            _render_template(
                [part if isinstance(part, str) else _Reference(number[part.group]) for part in template.parts]
            )
            for index, template in enumerate(templates)
            if index != anchor
        ),
    )


def _render_pattern(parts: Iterable[str | _Group]) -> str:
    parts = list(parts)
    if all(isinstance(part, str) for part in parts) and not _SPECIAL.search("".join(map(str, parts))):
        return "".join(map(str, parts))
    return "".join(
        re.escape(part) if isinstance(part, str) else f"(?P<{part.name}>{part.body})" if part.name else f"({part.body})"
        for part in parts
    )


def _render_template(parts: Sequence[str | _Reference]) -> str:
    text = ""
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if isinstance(part, str):
            text += part.replace("\\", "\\\\")
        else:
            is_apart = not (isinstance(after, str) and after[:1].isdigit())
            text += f"\\{part.group}" if is_apart else f"\\g<{part.group}>"
    return text
