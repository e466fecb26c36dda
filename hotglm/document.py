"""Untrusted text documents: one report of everything that is wrong in them, and a JSON scanner that cannot be bombed.

Rules this module keeps:

- Bytes in, values out: no IO, no torch. Positions are byte positions, so that a refusal can name the byte.
- Nothing recurses. Time is linear in the text, and no object is built per byte of a part that will be refused:
  patterns are possessive, flat arrays are matched whole, deeper values have a budget.
- All problems of a document are gathered; reading stops early only where the rest cannot be understood (broken JSON),
  where a cap is exceeded, or after `MAX_PROBLEMS`.
- JSON is RFC 8259 to the letter: no NaN, no leading zeros, no raw control characters, no lone surrogates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn

from hotglm.errors import HotglmError, Problem, shorten_repr

__all__ = ["MAX_PROBLEMS", "STRING", "Report", "Scanner", "Value", "parse_json", "verify_utf8"]

MAX_PROBLEMS = 1000
"""How many problems of one document are gathered before reading stops."""

_MAX_DEPTH = 64
_MAX_BRACKETS = 200_000
"""Depth and number of brackets of a nested value that is looked into at all."""

_MAX_NESTED_NBYTES = 2**20
"""Size of all nested values of a scanned document together, in bytes: none of our documents needs a large one."""

_MAX_INTEGERS_NBYTES = 4096
"""Length of an array that may still be a list of integers: 32 of them take 700 bytes."""

_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"'
_SCALAR = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+|true|false|null"
_ELEMENT = rb"(?:" + _STRING + rb"|" + _SCALAR + rb")"
STRING = re.compile(_STRING)
"""One JSON string, delimiters included."""

_KEY = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE)
_SPACES = re.compile(_SPACE)
_NEXT = re.compile(_SPACE + rb"([,}])")
_CLOSE = re.compile(_SPACE + rb"\}")
_VALUE = re.compile(
    _SPACE
    + rb"(?:(?P<string>"
    + _STRING
    + rb')|(?P<array>\[(?:[^\[\]{}"]++|'
    + _STRING
    + rb")*+\])|(?P<scalar>"
    + _SCALAR
    + rb"))"
)
_FLAT_ARRAY = re.compile(
    rb"\[" + _SPACE + rb"(?:" + _ELEMENT + _SPACE + rb"(?:," + _SPACE + _ELEMENT + _SPACE + rb")*+)?+\]"
)
_NUMBER = _SPACE + rb"(?:0|[1-9][0-9]{0,19}+)" + _SPACE  # 20 digits: `int` is never asked to read a longer one
_INTEGERS = re.compile(rb"\[(?:" + _NUMBER + rb"(?:," + _NUMBER + rb")*+|" + _SPACE + rb")\]")
_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)


class Report:
    """The problems of one document, gathered until nothing more of it can be understood.

    Not thread-safe; made for one document and thrown away.

    Attributes:
        problems: what was found so far.
        prefix: first word of the codes that every kind of document shares (`HEADER_BAD_JSON`).
    """

    __slots__ = ("_base", "_error", "_file", "_headline", "_remedy", "prefix", "problems")

    def __init__(
        self, error: type[HotglmError], *, headline: str, remedy: str, prefix: str, file: str | None, base: int = 0
    ) -> None:
        """Take what the refusal will say; `base` is the position of the document in its file, in bytes."""
        self.problems: list[Problem] = []
        self.prefix = prefix
        self._error = error
        self._headline = headline
        self._remedy = remedy
        self._file = file
        self._base = base

    def _problem(
        self, code: str, message: str, *, at: int | None, tensor: str | None, expected: object, found: object
    ) -> Problem:
        offset = None if at is None else self._base + at
        return Problem(
            code=code,
            message=message,
            file=self._file,
            tensor=tensor,
            offset=offset,
            expected=expected,
            found=found,
        )

    def add(
        self,
        code: str,
        message: str,
        *,
        at: int | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        """Note a problem at byte `at` of the document, and go on.

        Raises:
            HotglmError: the class given at construction, when this is the last problem that is gathered.
        """
        self.problems.append(self._problem(code, message, at=at, tensor=tensor, expected=expected, found=found))
        if len(self.problems) >= MAX_PROBLEMS:
            raise self._refusal("; reading stopped there")

    def stop(
        self,
        code: str,
        message: str,
        *,
        at: int | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> NoReturn:
        """Note a problem behind which nothing can be understood, in front of the others, and raise them all.

        Raises:
            HotglmError: always; the class given at construction.
        """
        self.problems.insert(0, self._problem(code, message, at=at, tensor=tensor, expected=expected, found=found))
        raise self._refusal("")

    def extend(self, problems: Iterable[Problem]) -> None:
        """Take over problems that were found elsewhere."""
        self.problems.extend(problems)

    def raise_if_any(self) -> None:
        """Raise all problems as one error, if there are any.

        Raises:
            HotglmError: the class given at construction.
        """
        if self.problems:
            raise self._refusal("")

    def _refusal(self, note: str) -> HotglmError:
        num = len(self.problems)
        count = "1 problem" if num == 1 else f"{num} problems"
        return self._error(f"{self._headline}: {count}{note}.", problems=self.problems, remedy=self._remedy)


class Value(NamedTuple):
    """One value as it stands in the text.

    Attributes:
        kind: `"string"`, `"array"` (flat), `"scalar"`, or `"nested"` (anything that holds brackets or is an object).
        raw: its bytes, delimiters included.
        at: position of its first byte in the text.
    """

    kind: str
    raw: bytes
    at: int

    def integers(self) -> tuple[int, ...] | None:
        """Return the elements of a flat array of plain non-negative integers up to 20 digits, else None.

        >>> Value("array", b"[2, 30]", 0).integers(), Value("array", b"[-0]", 0).integers()
        ((2, 30), None)
        """
        raw = self.raw
        if self.kind != "array" or len(raw) > _MAX_INTEGERS_NBYTES or not _INTEGERS.fullmatch(raw):
            return None
        inner = raw[1:-1]
        return tuple(map(int, inner.split(b","))) if inner.strip() else ()

    def show(self) -> str:
        """Return the beginning of it as it stands in the text, safe to print."""
        return shorten_repr(self.raw[:256].decode(errors="replace"))


class Scanner:
    """A cursor over one JSON text. The caller drives it and decides what each place may hold.

    Attributes:
        text: the document, valid UTF-8 (see `verify_utf8`).
        pos: position of the next byte.
    """

    __slots__ = ("_nested_room", "_report", "pos", "text")

    def __init__(self, text: bytes, *, report: Report) -> None:
        """Start at the first byte of `text`; refusals go to `report`."""
        self.text = text
        self.pos = 0
        self._report = report
        self._nested_room = _MAX_NESTED_NBYTES

    def take(self, byte: bytes) -> bool:
        """Step over `byte` if it is next, without skipping space; tell whether it was."""
        if self.text.startswith(byte, self.pos):
            self.pos += 1
            return True
        return False

    def skip_space(self) -> None:
        """Step over white space."""
        if match := _SPACES.match(self.text, self.pos):
            self.pos = match.end()

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield key and position of each member of the object whose `{` was just taken, up to and over its `}`.

        Each time, the caller reads the value before it asks for the next member. Keys are not compared: the caller
        knows what a duplicate means.
        """
        if match := _CLOSE.match(self.text, self.pos):
            self.pos = match.end()
            return
        while True:
            key = _KEY.match(self.text, self.pos)
            if key is None:
                self.stop_syntax('a key in double quotes and ":"')
            self.pos = key.end()
            at = key.start(1)
            yield self._decode(key[1], at), at
            end = _NEXT.match(self.text, self.pos)
            if end is None:
                self.stop_syntax('"," or "}"')
            self.pos = end.end()
            if end[1] == b"}":
                return

    def value(self) -> Value:
        """Step over the next value, whatever it is, and return it."""
        match = _VALUE.match(self.text, self.pos)
        if match is None:
            return self._nested()
        kind = match.lastgroup or ""
        if kind == "array" and not _FLAT_ARRAY.fullmatch(match[kind]):
            self.pos = match.start(kind)
            self.stop_syntax("an array of values")
        self.pos = match.end()
        return Value(kind, match[kind], match.start(kind))

    def decode(self, value: Value) -> str:
        """Return the text of a string value."""
        return self._decode(value.raw, value.at)

    def _decode(self, raw: bytes, at: int) -> str:
        if b"\\" not in raw:
            return raw[1:-1].decode()
        try:
            text = json.loads(raw.decode())
            text.encode()
        except json.JSONDecodeError:
            self.pos = at
            self.stop_syntax("a string with valid escapes")
        except UnicodeEncodeError:
            message = "Expected Unicode text, got an escaped lone surrogate."
            self._report.stop(f"{self._report.prefix}_NOT_UTF8", message, at=at)
        return str(text)

    def stop_syntax(self, expected: str) -> NoReturn:
        """Refuse the document because something else than `expected` stands at `pos`, or after the space there."""
        self.skip_space()
        at = self.pos
        found = shorten_repr(self.text[at : at + 16].decode(errors="replace")) if at < len(self.text) else "the end"
        line = self.text.count(b"\n", 0, at) + 1
        column = at - self.text.rfind(b"\n", 0, at)
        self._report.stop(
            f"{self._report.prefix}_BAD_JSON",
            f"Expected {expected}, got {found} at line {line} column {column}.",
            at=at,
        )

    def _nested(self) -> Value:
        self.skip_space()
        at = self.pos
        if self.text[at : at + 1] not in (b"[", b"{"):
            self.stop_syntax("a value")
        end = _scan_brackets(self.text, start=at, stop=at + self._nested_room, report=self._report)
        if end is None and at + self._nested_room < len(self.text):
            message = f"Expected at most {_MAX_NESTED_NBYTES} bytes of nested values, got more."
            self._report.stop(f"{self._report.prefix}_TOO_DEEP", message, at=at)
        if end is None:
            self.pos = len(self.text)
            self.stop_syntax("a closing bracket")
        self.pos = end
        self._nested_room -= end - at
        value = Value("nested", self.text[at:end], at)
        parse_json(value.raw, report=self._report, at=at)
        return value


def verify_utf8(text: bytes, *, report: Report) -> None:
    """Refuse text that is not UTF-8, or starts with a byte order mark, naming the first such byte."""
    code = f"{report.prefix}_NOT_UTF8"
    if text.startswith(b"\xef\xbb\xbf"):
        report.stop(code, "Expected JSON text, got a byte order mark in front of it.", at=0)
    if text.isascii():
        return
    try:
        text.decode()
    except UnicodeDecodeError as error:
        report.stop(code, f"Expected UTF-8, got byte {text[error.start]:#04x} ({error.reason}).", at=error.start)


def parse_json(
    text: bytes, *, report: Report, at: int = 0, constants: bool = False, max_brackets: int = _MAX_BRACKETS
) -> object:
    """Return the value that a small JSON text holds, nesting and number of brackets capped before anything is built.

    Args:
        text: valid UTF-8.
        report: takes the refusal: broken JSON, too deep, or a duplicate key in one object.
        at: position of `text` in the document of `report`.
        constants: whether `NaN` and `Infinity` may stand for numbers, as Hugging Face configs have them.
        max_brackets: how many brackets it may have; each becomes an object of its own.
    """
    _scan_brackets(text, report=report, at=at, max_brackets=max_brackets)
    hooks: dict[str, Callable[[str], object]] = {} if constants else {"parse_constant": _refuse_constant}
    try:
        # Decoded here: given bytes, `json` would guess at UTF-16 and UTF-32.
        return json.loads(text.decode(), object_pairs_hook=_unique, **hooks)  # type: ignore[arg-type]
    except _DuplicateKeyError as error:
        report.stop("DUPLICATE_KEY", f"Expected each key once, got {shorten_repr(error.args[0])} twice.", at=at)
    except json.JSONDecodeError as error:
        message = f"Expected JSON, got: {error.msg} at line {error.lineno} column {error.colno}."
        prefix = text.decode()[: error.pos].encode()
        report.stop(f"{report.prefix}_BAD_JSON", message, at=at + len(prefix))
    except ValueError as error:  # a number with more digits than `int` reads, or a constant
        report.stop(f"{report.prefix}_BAD_JSON", f"Expected JSON, got: {shorten_repr(str(error))}.", at=at)
    except RecursionError:  # the caller's own stack is nearly full
        report.stop(f"{report.prefix}_TOO_DEEP", "Expected room on the stack to read this value, got none.", at=at)


class _DuplicateKeyError(Exception):
    """Carries the key out of `json.loads`."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _scan_brackets(
    text: bytes,
    *,
    report: Report,
    start: int = 0,
    stop: int | None = None,
    at: int = 0,
    max_brackets: int = _MAX_BRACKETS,
) -> int | None:
    """Refuse nesting beyond the caps in `text[start:stop]`.

    Returns:
        Where `stop` is given, the position behind the bracket that closes the one at `start`; else None.
    """
    depth = num = 0
    for match in _BRACKET.finditer(text, start, len(text) if stop is None else stop):
        if match.lastindex is None:
            continue
        num += 1
        depth += 1 if match.lastindex == 1 else -1
        if depth > _MAX_DEPTH or num > max_brackets:
            message = f"Expected at most {_MAX_DEPTH} levels and {max_brackets} brackets in a value, got more."
            report.stop(f"{report.prefix}_TOO_DEEP", message, at=at + match.start())
        if depth <= 0 and stop is not None:
            return match.end()
    return None
