"""The metadata of several shards as one."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from hotglm.errors import ShardIndexError
from hotglm.release.index import index_report
from hotglm.release.metadata import merge_metadata


def merge(*shards: Mapping[str, str]) -> dict[str, str]:
    report = index_report("index.json")
    merged = merge_metadata(((f"{n}.safetensors", metadata) for n, metadata in enumerate(shards)), report=report)
    report.raise_if_any()
    return merged


def digests(**of: str) -> dict[str, str]:
    return {"hotglm.digests": json.dumps(of)}


def test_foreign_keys_that_differ_are_left_out() -> None:
    """What another writer noted of one shard is not true of all, and refuses nothing."""
    assert merge({"format": "pt", "shard": "1"}, {"format": "pt", "shard": "2", "only": "x"}) == {
        "format": "pt",
        "only": "x",
    }


@pytest.mark.parametrize("key", ["hotglm.name", "hotglm.version", "hotglm.config", "hotglm.requires", "hotglm.new"])
def test_our_keys_that_differ_are_refused(key: str) -> None:
    """Every shard that disagrees about a key of hotglm's is named."""
    with pytest.raises(ShardIndexError) as caught:
        merge({key: "1"}, {key: "2"}, {}, {key: "3"})
    assert [(p.code, p.expected, p.found) for p in caught.value.problems] == [
        ("METADATA_CONFLICT", "1", "2"),
        ("METADATA_CONFLICT", "1", "3"),
    ]


def test_digests_are_united() -> None:
    """Each shard brings the digests of its own tensors; saying the same twice is no conflict."""
    merged = merge(digests(a="sha256:1"), digests(b="sha256:2", a="sha256:1"), {})
    assert json.loads(merged["hotglm.digests"]) == {"a": "sha256:1", "b": "sha256:2"}


def test_two_digests_of_one_tensor_are_refused() -> None:
    """Shards that promise different bytes for one tensor are refused with its name."""
    with pytest.raises(ShardIndexError) as caught:
        merge(digests(a="sha256:1"), digests(a="sha256:2"))
    assert (caught.value.code, caught.value.tensor) == ("METADATA_CONFLICT", "a")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 5000])
def test_digests_that_are_none_are_refused(text: str) -> None:
    """Digests that are no JSON object, among several, are refused with the shard."""
    with pytest.raises(ShardIndexError) as caught:
        merge(digests(a="sha256:1"), {"hotglm.digests": text})
    assert caught.value.code == "BAD_METADATA"
    assert "1.safetensors" in str(caught.value)
