"""The fields of a document of ours, read one by one: every value is judged, every problem is noted, reading goes on.

Rules this module keeps:

- Pure: no IO, no torch. A value that is refused is noted in the report, and a harmless one stands in for it.
- An object has exactly the members that it must have (M4). `True` is no integer (B15).
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from hotglm.document import Report
from hotglm.errors import VersionSyntaxError, shorten_repr
from hotglm.header import DEFAULT_LIMITS, find_name_fault
from hotglm.version import Version

__all__ = ["FILE_DIGEST", "SHA256", "WEIGHTS_DIGEST", "FieldReader"]

SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
WEIGHTS_DIGEST = re.compile(r"safetensors:[0-9a-f]{64}")
FILE_DIGEST = re.compile(r"(?:sha256|safetensors):[0-9a-f]{64}")

_KINDS = {SHA256: "sha256:", WEIGHTS_DIGEST: "safetensors:", FILE_DIGEST: "sha256: or safetensors:"}
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_MAX_WORD = 255


class FieldReader:
    """Reads values that stand in one document; what it returns is believed only when the report stayed empty."""

    def __init__(self, *, report: Report) -> None:
        """Note what is wrong in `report`."""
        self.report = report

    def refuse(self, expected: str, found: object, *, where: str, code: str = "BAD_FIELD") -> None:
        """Note that `found` stands where `expected` should."""
        message = f"Expected {expected} as {where}, got {shorten_repr(found)}."
        self.report.add(code, message, expected=expected, found=found if isinstance(found, (str, int)) else None)

    def read_members(self, value: object, names: tuple[str, ...], *, where: str) -> dict[str, Any]:
        """Return the members of an object that must have exactly `names`; a missing one is None and reported (M4)."""
        if not isinstance(value, dict):
            self.refuse("an object", value, where=where)
            return dict.fromkeys(names)
        for name in value:
            if name not in names:
                self.report.add("UNKNOWN_FIELD", f"Expected no field {shorten_repr(name)} in {where}, got one.")
        for name in names:
            if name not in value:
                self.report.add("MISSING_FIELD", f"Expected the field {name!r} in {where}, got none.", expected=name)
        return {name: value.get(name) for name in names}

    def read_object(self, value: object, *, limit: int, where: str) -> dict[str, Any]:
        """Return an object of any names; one of more than `limit` members ends the reading."""
        if not isinstance(value, dict):
            self.refuse("an object", value, where=where)
            return {}
        if len(value) > limit:
            message = f"Expected at most {limit} members in {where}, got {len(value)}."
            self.report.stop(f"TOO_MANY_{where.upper()}", message, expected=limit, found=len(value))
        return value

    def read_integer(self, value: object, least: int, most: int, *, where: str) -> int:
        """Return an integer from `least` to `most`, `True` not being one (B15)."""
        if type(value) is int and least <= value <= most:
            return value
        self.refuse(f"an integer from {least} to {most}", value, where=where)
        return least

    def read_word(self, value: object, *, where: str) -> str:
        """Return a short text that can be printed."""
        if isinstance(value, str) and find_name_fault(value, max_length=_MAX_WORD) is None:
            return value
        self.refuse(f"text of 1 to {_MAX_WORD} characters without control characters", value, where=where)
        return ""

    def read_words(self, value: object, limit: int, *, where: str) -> tuple[str, ...]:
        """Return at most `limit` short texts, each of them once."""
        if not isinstance(value, list) or len(value) > limit:
            found = f"one of {len(value)}" if isinstance(value, list) else value
            self.refuse(f"an array of at most {limit} texts", found, where=where)
            return ()
        words = [self.read_word(member, where=f"{where}[{place}]") for place, member in enumerate(value)]
        if len(set(words)) < len(words):
            self.refuse("each text once", "one again", where=where)
        return tuple(words)

    def read_version(self, value: object) -> Version:
        """Return a version, which stands in its normal form."""
        try:
            version = Version(value)  # type: ignore[arg-type]  # it refuses what is no text
            if str(version) == value:
                return version
            self.refuse(f"the normal form {str(version)!r}", value, where="version", code="BAD_VERSION")
        except VersionSyntaxError:
            self.refuse("a PEP 440 version", value, where="version", code="BAD_VERSION")
        return Version("0")

    def read_time(self, value: object, *, where: str) -> datetime | None:
        """Return a time in UTC, to the second (M12)."""
        if isinstance(value, str) and _TIME.fullmatch(value):
            try:
                return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            except ValueError:
                pass  # the 31st of February; refused below
        self.refuse("a time in UTC such as '2026-01-31T23:59:59Z'", value, where=where)
        return None

    def read_digest(self, value: object, pattern: re.Pattern[str], *, where: str) -> str:
        """Return a digest of the kind `pattern` (D1, D2)."""
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        self.refuse(f"{_KINDS[pattern]} and 64 lower-case hexadecimal digits", value, where=where, code="BAD_DIGEST")
        return ""

    def read_shape(self, value: object, *, where: str) -> tuple[int, ...]:
        """Return the sizes of the dimensions of a tensor."""
        limits = DEFAULT_LIMITS
        is_known = isinstance(value, list) and len(value) <= limits.rank
        if is_known and all(type(size) is int and 0 <= size <= limits.dim for size in value):  # type: ignore[attr-defined]
            return tuple(value)  # type: ignore[arg-type]
        self.refuse(f"at most {limits.rank} sizes from 0 to {limits.dim}", value, where=where)
        return ()
