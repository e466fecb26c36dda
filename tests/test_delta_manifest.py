"""Manifests of deltas: one spelling, everything that is wrong at once, and the full manifest that one leads to."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from hotglm.errors import ReleaseError
from hotglm.manifest import digest_manifest, digest_result, format_manifest, parse_manifest
from hotglm.manifest_fields import Manifest
from support.deltas import PAYLOAD, delta_manifests, small_delta
from support.releases import SHA, small_manifest

GOOD = format_manifest(small_delta())
MODEL = "model.safetensors"


def refused(edit: Callable[[dict[str, Any]], object]) -> list[str]:
    """Return the codes that the good manifest is refused with after `edit`."""
    document = json.loads(GOOD)
    edit(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(ReleaseError) as refusal:
        parse_manifest(text)
    return [problem.code for problem in refusal.value.problems]


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    """Return an edit that puts `value` at `path`; `...` takes it away."""

    def edit(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        if value is ...:
            del document[path[-1]]
        else:
            document[path[-1]] = value

    return edit


@given(delta_manifests())
def test_writing_and_reading_are_inverse(manifest: Manifest) -> None:
    """M2, X2: `parse(format(m)) == m`, and `format(parse(b)) == b` for what was written."""
    text = format_manifest(manifest)
    assert parse_manifest(text) == manifest
    assert format_manifest(parse_manifest(text)) == text
    assert pickle.loads(pickle.dumps(manifest)) == copy.deepcopy(manifest) == manifest
    assert hash(manifest.delta) == hash(copy.deepcopy(manifest.delta))


def test_a_delta_leads_to_a_full_manifest() -> None:
    """D5: the result of a delta is full, has its own files, and gives the digest; a full release is its own result."""
    manifest = small_delta()
    assert manifest.kind == "delta"
    result = manifest.result
    assert (result.kind, result.delta, result.result) == ("full", None, result)
    assert set(result.files) == {MODEL, "code/model.py"}
    assert digest_result(manifest) == digest_result(result) == digest_manifest(format_manifest(result))
    assert digest_result(manifest) != digest_manifest(GOOD)


def test_a_full_manifest_has_no_delta() -> None:
    """M4: the field stands in a delta and nowhere else."""
    document = json.loads(format_manifest(small_manifest()))
    assert "delta" not in document
    assert refused(put("kind", value="full")) == ["UNKNOWN_FIELD"] + ["BAD_FIELD"] * 5
    assert "MISSING_FIELD" in refused(put("delta", value=...))


TENSOR = ("delta", "tensors")
BAD: list[tuple[tuple[str | int, ...], object, list[str]]] = [
    (("delta",), None, ["BAD_FIELD"]),
    (("delta", "base"), None, ["BAD_FIELD"]),
    (("delta", "base", "digest"), "sha256:0", ["BAD_DIGEST"]),
    (("delta", "base", "digest"), f"safetensors:{SHA}", ["BAD_DIGEST"]),
    (("delta", "base", "sequence"), 0, ["BAD_FIELD"]),
    (("delta", "base", "version"), "v1", ["BAD_VERSION"]),
    (("delta", "base", "more"), 1, ["UNKNOWN_FIELD"]),
    (("delta", "more"), 1, ["UNKNOWN_FIELD"]),
    (("delta", "payload"), None, ["DELTA_BAD_PAYLOAD"]),
    (("delta", "payload"), "code/model.py", ["DELTA_BAD_PAYLOAD"]),
    (("delta", "payload"), MODEL, ["DELTA_BAD_PAYLOAD"]),
    (("files", "more.safetensors"), {"digest": f"safetensors:{SHA}", "size": 9}, ["DELTA_BAD_PAYLOAD"]),
    (("files", PAYLOAD, "digest"), f"sha256:{SHA}", ["DELTA_BAD_PAYLOAD"]),
    (("delta", "files", MODEL, "digest"), f"sha256:{SHA}", ["BAD_DIGEST"]),
    (("delta", "files", MODEL, "size"), -1, ["BAD_FIELD", "DELTA_BAD_RANGE"]),
    (("delta", "files", MODEL, "size"), 79, ["DELTA_BAD_RANGE"]),  # C04: no room for a header and the tensors
    (("delta", "files", MODEL, "size"), 2**52, ["DELTA_BAD_RANGE"]),  # C06: 4 PiB for 80 bytes of tensors
    (("delta", "files", "../x"), {"digest": f"safetensors:{SHA}", "size": 20}, ["BAD_PATH", "DELTA_BAD_FILE"]),
    (("delta", "files", "code"), {"digest": f"safetensors:{SHA}", "size": 20}, ["BAD_PATH", "DELTA_BAD_FILE"]),
    (("files", MODEL), {"digest": f"sha256:{SHA}", "size": 9}, ["DELTA_BAD_FILE", "BAD_PATH"]),
    (("delta", "headers", MODEL), ..., ["DELTA_BAD_FILE"]),
    (("delta", "headers", "x"), "p", ["DELTA_BAD_FILE"]),
    (("delta", "headers", MODEL), "w", ["DELTA_PART_REUSED"]),
    (("delta", "headers", MODEL), 1, ["DELTA_BAD_PARTS"]),
    (("weights",), None, ["BAD_FIELD", "DELTA_NO_WEIGHTS"]),
    (("weights",), PAYLOAD, ["BAD_FIELD", "DELTA_NO_WEIGHTS"]),
    ((*TENSOR, "unknown"), {"base": None, "codec": "whole", "parts": ["p"]}, ["DELTA_UNKNOWN_TENSOR"]),  # C05
    ((*TENSOR, "w", "codec"), "add", ["DELTA_BAD_CODEC"]),  # C11: what is not exact is no codec
    ((*TENSOR, "w", "codec"), ["whole"], ["DELTA_BAD_CODEC"]),
    ((*TENSOR, "w", "parts"), [], ["DELTA_BAD_PARTS"]),
    ((*TENSOR, "w", "parts"), "w", ["DELTA_BAD_PARTS"]),
    ((*TENSOR, "w", "parts"), ["w", "more"], ["DELTA_BAD_PARTS"]),
    ((*TENSOR, "w", "parts"), ["a\x00"], ["DELTA_BAD_PARTS"]),
    ((*TENSOR, "w", "parts"), ["x.xor"], ["DELTA_PART_REUSED"]),
    ((*TENSOR, "s", "parts"), ["s.at", "s.at"], ["DELTA_PART_REUSED"]),
    ((*TENSOR, "w", "base"), f"sha256:{SHA}", ["DELTA_BAD_BASE"]),
    ((*TENSOR, "x", "base"), None, ["DELTA_NO_BASE"]),
    ((*TENSOR, "x", "base"), 5, ["BAD_DIGEST"]),
    ((*TENSOR, "x", "more"), 5, ["UNKNOWN_FIELD"]),
    (TENSOR, [], ["BAD_FIELD"]),
]


@pytest.mark.parametrize(("path", "value", "codes"), BAD)
def test_what_a_manifest_alone_can_decide_is_refused(
    path: tuple[str | int, ...], value: object, codes: list[str]
) -> None:
    """C04, C05, C06: a delta that does not fit the rest of its manifest is refused, by a code that says why."""
    found = refused(put(*path, value=value))
    assert set(codes) <= set(found), found


def test_everything_that_is_wrong_is_named_at_once() -> None:
    """P2: problems in different parts of a delta are in one refusal, with the tensor where there is one."""

    def edit(document: dict[str, Any]) -> None:
        put("delta", "base", "sequence", value=0)(document)
        put(*TENSOR, "w", "codec", value="add")(document)
        put(*TENSOR, "x", "base", value=None)(document)
        put("name", value="")(document)

    assert {"BAD_FIELD", "DELTA_BAD_CODEC", "DELTA_NO_BASE"} <= set(refused(edit))


def test_every_truncation_is_refused() -> None:
    """No beginning of a manifest is a manifest."""
    for length in range(len(GOOD)):
        with pytest.raises(ReleaseError):
            parse_manifest(GOOD[:length])
