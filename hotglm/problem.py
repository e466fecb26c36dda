"""The root of all errors, one thing that is wrong as data, and texts from outside made safe to print.

Rules this module keeps: a name that comes from a file is printed with `ascii`, and the text of an exception that others
raised is escaped likewise (it may quote a file), so that no byte of either reaches a terminal or a log line raw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotglm.slot.receipt import Receipt

__all__ = ["HotglmError", "Problem", "describe_exception", "escape_text", "shorten_repr"]

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
            *([f"file {self.file!a}"] if self.file is not None else []),
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


_NUM_PROBLEMS_SHOWN = 20
"""How many problems the text of an error spells out; `problems` always holds all of them."""


class HotglmError(Exception):
    """The root of all errors of this library.

    Attributes:
        code: stable upper-case word for logs and tests; that of the first problem where there is one.
        problems: everything that is wrong, in the order found.
        remedy: what to do about it; the last sentence of the text.
        slot: name of the slot concerned, where there is one.
        version: the version that was being staged, where there is one.
        serving: the version that still serves, where there is one.
        receipt: the record of the refused stage, where there was one.
    """

    code = "HOTGLM"

    def __init__(
        self,
        message: str,
        *,
        problems: Iterable[Problem] = (),
        remedy: str = "",
        code: str | None = None,
    ) -> None:
        """Take the headline, the problems under it and the remedy."""
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.remedy = remedy
        self.slot: str | None = None
        self.version: str | None = None
        self.serving: str | None = None
        self.receipt: Receipt | None = None
        if code is not None:
            self.code = code
        elif self.problems:
            self.code = self.problems[0].code

    @property
    def file(self) -> str | None:
        """Path of the file of the first problem that names one."""
        return next((p.file for p in self.problems if p.file is not None), None)

    @property
    def tensor(self) -> str | None:
        """Name of the tensor of the first problem that names one."""
        return next((p.tensor for p in self.problems if p.tensor is not None), None)

    @property
    def offset(self) -> int | None:
        """Byte offset of the first problem that names one."""
        return next((p.offset for p in self.problems if p.offset is not None), None)

    def with_slot(self, *, slot: str, version: str | None, serving: str | None) -> HotglmError:
        """Note which slot and versions this concerns, where that is not known yet; return the error itself."""
        self.slot = self.slot or slot
        self.version = self.version or version
        self.serving = self.serving or serving
        return self

    def __str__(self) -> str:
        """Format headline, problems, what still serves and the remedy."""
        head = self.message
        if self.slot is not None:
            staged = f", version {self.version}" if self.version else ""
            head = f"[slot {self.slot!r}{staged}] {head}"
        lines = [head]
        lines += [f"  - {problem}" for problem in self.problems[:_NUM_PROBLEMS_SHOWN]]
        if (more := len(self.problems) - _NUM_PROBLEMS_SHOWN) > 0:
            lines.append(f"  - and {more} more (see `.problems`)")
        if self.serving is not None:
            lines.append(f"Version {self.serving} still serves, unchanged.")
        if self.remedy:
            lines.append(f"Remedy: {self.remedy}")
        return "\n".join(lines) if len(lines) > 2 else " ".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by attributes, so that an error survives the way out of a worker process."""
        return (type(self), (self.message,), self.__dict__)
