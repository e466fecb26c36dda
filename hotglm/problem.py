"""One thing that is wrong, as data, and names from outside made safe to print.

Rules this module keeps: a name that comes from a file is printed with `ascii`, so that no byte of it reaches a
terminal or a log line raw.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Problem", "shorten_repr"]


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
    text = ascii(value[: 4 * limit] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 3 :]}"
