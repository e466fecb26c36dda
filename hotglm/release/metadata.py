"""The metadata of several shards as one: what hotglm reads must agree, what others wrote there may differ.

Rules this module keeps:

- Digests are those of each shard's own tensors, so they are united; one tensor has one digest.
- Of the other keys of hotglm each has one value, or the shards are from different versions.
- A key of somebody else's that differs from shard to shard says nothing about all of them and is left out; so does the
  environment that shards were made in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

from hotglm.document import Report, parse_json
from hotglm.errors import ShardIndexError, shorten_repr
from hotglm.release.environment import CREATION_KEY

__all__ = ["merge_metadata"]

_OURS = "hotglm."
_DIGESTS = "hotglm.digests"


def merge_metadata(shards: Iterable[tuple[str, Mapping[str, str]]], *, report: Report) -> dict[str, str]:
    """Return the metadata of all shards together.

    Args:
        shards: path and metadata of each.
        report: takes what they disagree about.

    Raises:
        ShardIndexError: there are too many problems to go on.
    """
    values: dict[str, dict[str, str]] = {}  # key -> value -> first shard with it
    for path, metadata in shards:
        for key, value in metadata.items():
            values.setdefault(key, {}).setdefault(value, path)
    merged: dict[str, str] = {}
    for key, found in values.items():
        if len(found) == 1:
            merged[key] = next(iter(found))
        elif key == _DIGESTS:
            merged[key] = _unite_digests(found, report=report)
        elif key.startswith(_OURS) and key != CREATION_KEY:  # shards may be made on several machines
            _report_conflict(key, found, report=report)
    return merged


def _report_conflict(key: str, found: Mapping[str, str], *, report: Report) -> None:
    expected, *others = found
    for other in others:
        message = (
            f"Expected metadata {shorten_repr(key)} to be {shorten_repr(expected)} in all shards, "
            f"got {shorten_repr(other)} in {shorten_repr(os.path.basename(found[other]))}."
        )
        report.add("METADATA_CONFLICT", message, expected=expected, found=other)


def _unite_digests(found: Mapping[str, str], *, report: Report) -> str:
    united: dict[str, object] = {}
    for text, path in found.items():
        shard = shorten_repr(os.path.basename(path))
        digests = _parse_digests(text, path)
        if digests is None:
            report.add("BAD_METADATA", f"Expected a JSON object in metadata {_DIGESTS!r}, got none in {shard}.")
            continue
        for name, digest in digests.items():
            if (expected := united.setdefault(name, digest)) != digest:
                message = f"Expected digest {shorten_repr(expected)}, got {shorten_repr(digest)} in {shard}."
                report.add("METADATA_CONFLICT", message, tensor=name, expected=expected, found=digest)
    return json.dumps(united)


def _parse_digests(text: str, path: str) -> dict[str, object] | None:
    report = Report(ShardIndexError, headline="Refused", remedy="", prefix="METADATA", file=path)
    try:
        digests = parse_json(text.encode(), report=report)
    except ShardIndexError:
        return None
    return digests if isinstance(digests, dict) else None
