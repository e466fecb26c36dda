"""The index of a sharded safetensors checkpoint (`*.safetensors.index.json`): bytes -> `ShardIndex`, strictly.

Rules this module keeps:

- Pure: no IO. Every problem is reported at once, with the byte offset in the index.
- A shard is a plain name of a file beside the index; nothing that could lead elsewhere is ever opened (B20).
- The index and its shards must say the same, both ways: no tensor that only one of them knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hotglm.document import Report, Scanner, Value, verify_utf8
from hotglm.errors import ShardIndexError, shorten_repr
from hotglm.header import DEFAULT_LIMITS, Header, Limits, find_name_fault

__all__ = ["ShardIndex", "index_report", "parse_index", "report_mismatches"]

_MAX_FILE_NAME = 255
_NOT_PLAIN = re.compile(r"[/\\\x00]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """Which shard holds which tensor.

    Attributes:
        weight_map: tensor -> file name of its shard; read-only.
        shards: the file names, sorted.
    """

    weight_map: Mapping[str, str]
    shards: tuple[str, ...]


def index_report(file: str | None) -> Report:
    """Return an empty report about the index `file`; its refusals are `ShardIndexError`."""
    return Report(
        ShardIndexError,
        headline=f"The shard index {'given' if file is None else shorten_repr(file)} was refused",
        remedy="fetch or write the index and all of its shards again, together.",
        prefix="INDEX",
        file=file,
    )


def parse_index(text: bytes, *, file: str | None = None, limits: Limits = DEFAULT_LIMITS) -> ShardIndex:
    """Return what a shard index says, or refuse it with everything that is wrong.

    >>> parse_index(b'{"weight_map": {"a": "x.safetensors"}}').shards
    ('x.safetensors',)

    Args:
        text: the whole file.
        file: its path, for the refusal.
        limits: our caps.

    Raises:
        ShardIndexError: it is no index, or names a shard that is not beside it.
    """
    report = index_report(file)
    verify_utf8(text, report=report)
    weight_map = _IndexReader(text, limits=limits, report=report).read()
    report.raise_if_any()
    return ShardIndex(weight_map=MappingProxyType(weight_map), shards=tuple(sorted(set(weight_map.values()))))


def report_mismatches(index: ShardIndex, headers: Mapping[str, Header], *, report: Report) -> None:
    """Report where the index and the shards say different things; a shard without a header here is left out.

    Raises:
        ShardIndexError: there are too many problems to go on.
    """
    for name, shard in index.weight_map.items():
        if shard in headers and name not in headers[shard].tensors:
            message = f"Expected the tensor in {shorten_repr(shard)}, as the index says, got none."
            report.add("TENSOR_NOT_IN_SHARD", message, tensor=name, expected=shard)
    for shard, header in headers.items():
        for name in header.tensors:
            expected = index.weight_map.get(name)
            if expected is None:
                message = f"Expected the tensor of {shorten_repr(shard)} in the index, got none."
                report.add("TENSOR_NOT_IN_INDEX", message, tensor=name, found=shard)
            elif expected != shard:
                message = f"Expected the tensor only in {shorten_repr(expected)}, got it in {shorten_repr(shard)}."
                report.add("TENSOR_IN_OTHER_SHARD", message, tensor=name, expected=expected, found=shard)


class _IndexReader:
    """One walk through one index."""

    def __init__(self, text: bytes, *, limits: Limits, report: Report) -> None:
        self._scanner = Scanner(text, report=report)
        self._limits = limits
        self._report = report
        self._weight_map: dict[str, str] = {}

    def read(self) -> dict[str, str]:
        scanner = self._scanner
        scanner.skip_space()
        if not scanner.take(b"{"):
            self._stop_not_object(scanner.value(), "the index")
        seen: set[str] = set()
        for key, at in scanner.members():
            if key in seen:
                self._report.add("DUPLICATE_KEY", f"Expected each key once, got {shorten_repr(key)} twice.", at=at)
            seen.add(key)
            if key == "weight_map":
                self._read_weight_map()
            else:
                scanner.value()  # "metadata" and what other tools add: JSON, but nothing to us
        scanner.skip_space()
        if scanner.pos < len(scanner.text):
            scanner.stop_syntax("nothing behind the index")
        if "weight_map" not in seen:
            self._report.stop("MISSING_FIELD", "Expected the field 'weight_map', got none.", expected="weight_map")
        if not self._weight_map:
            self._report.add("INDEX_EMPTY", "Expected at least one tensor in 'weight_map', got none.")
        return self._weight_map

    def _read_weight_map(self) -> None:
        if not self._scanner.take(b"{"):
            self._stop_not_object(self._scanner.value(), "'weight_map'")
        shards: set[str] = set()
        for name, at in self._scanner.members():
            if len(self._weight_map) >= self._limits.num_index_tensors:
                message = f"Expected at most {self._limits.num_index_tensors} tensors, got more."
                self._report.stop("INDEX_TOO_MANY_TENSORS", message, at=at)
            if (fault := find_name_fault(name, max_length=self._limits.name_length)) is not None:
                self._report.add("BAD_NAME", f"Expected a plain name, got {fault}.", at=at, tensor=name)
            if name in self._weight_map:
                message = "Expected each tensor once in 'weight_map', got it twice."
                self._report.add("DUPLICATE_KEY", message, at=at, tensor=name)
            value = self._scanner.value()
            shard = self._scanner.decode(value) if value.kind == "string" else ""
            if shard not in shards:
                self._verify_shard(shard, name, value)
                shards.add(shard)
            if len(shards) > self._limits.num_shards:
                message = f"Expected at most {self._limits.num_shards} shards, got more."
                self._report.stop("INDEX_TOO_MANY_SHARDS", message, at=value.at)
            self._weight_map[name] = shard

    def _verify_shard(self, shard: str, name: str, value: Value) -> None:
        is_plain = shard not in ("", ".", "..") and not _NOT_PLAIN.search(shard)
        if is_plain and find_name_fault(shard, max_length=_MAX_FILE_NAME) is None:
            return
        message = f"Expected the plain name of a file beside the index, got {value.show()}."
        self._report.add("BAD_SHARD_NAME", message, at=value.at, tensor=name)

    def _stop_not_object(self, value: Value, what: str) -> None:
        self._report.stop("INDEX_NOT_OBJECT", f"Expected an object as {what}, got {value.show()}.", at=value.at)
