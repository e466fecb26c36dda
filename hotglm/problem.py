"""One thing that is wrong, as data, and names and texts from outside made safe to print.

Rules this module keeps: a name that comes from a file is printed with `ascii`, and the text of an exception that others
raised is escaped likewise (it may quote a file), so that no byte of either reaches a terminal or a log line raw.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Problem", "describe_exception", "escape_text", "shorten_repr"]

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where.

    Attributes:
        code: a stable upper-case word, one per kind of problem (`"OFFSET_GAP"`).
        message: one sentence, usually "Expected ..., got ...".
        file: path of the file it was found in.
        tensor: name of the tensor it concerns, as it stands in the file.
        offset: byte offset in `file`, from its start.
        expected: what the reader needed, as data.
        found: what it found, as data.
    """

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    offset: int | None = None
    expected: object = None
    found: object = None

    def __str__(self) -> str:
        """Format as `CODE: message (file, tensor, offset)`."""
        where = [
            *([f"file {self.file!r}"] if self.file is not None else []),
            *([f"tensor {shorten_repr(self.tensor)}"] if self.tensor is not None else []),
            *([f"byte offset {self.offset}"] if self.offset is not None else []),
        ]
        return f"{self.code}: {self.message}" + (f" ({', '.join(where)})" if where else "")


def shorten_repr(value: object, *, limit: int = 120) -> str:
    r"""Return `repr(value)`, cut in the middle to about `limit` characters, for names that come from outside.

    >>> shorten_repr("a\x1b[31m")
    "'a\\x1b[31m'"
    """
    return _shorten(ascii(value[: 4 * limit] if isinstance(value, str) else value), limit)


def describe_exception(error: BaseException, *, limit: int = 400) -> str:
    r"""Return `TypeName: text` on one line of plain ASCII, cut in the middle to about `limit` characters; never raises.

    >>> describe_exception(ValueError("bad\n\x1b[31mkey"))
    'ValueError: bad\\n\\x1b[31mkey'
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception is foreign code
        text = "(its text cannot be had)"
    plain = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return escape_text(plain, limit=limit)


def escape_text(text: str, *, limit: int = 120) -> str:
    r"""Return text that is not to be quoted on one line of plain ASCII, cut in the middle to about `limit` characters.

    >>> escape_text("(1, 'a')\x1b[31m")
    "(1, 'a')\\x1b[31m"
    """
    return _shorten(_NOT_PRINTABLE.sub(_escape, _shorten(text, 4 * limit)), limit)


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 3 :]}"
