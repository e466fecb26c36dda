"""Manifests: one spelling for every value, everything that is wrong at once, and nothing else is taken (M1 to M14)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given

from hotglm.errors import ReleaseError
from hotglm.file_entry import FileEntry
from hotglm.manifest import MAX_MANIFEST_NBYTES, format_manifest, parse_manifest
from hotglm.manifest_fields import Manifest
from support.releases import manifests, small_manifest

GOOD = format_manifest(small_manifest())


def spell(document: object) -> bytes:
    """Return the canonical spelling of a document that may say anything."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the good manifest after `edit`."""
    document = json.loads(GOOD)
    edit(document)
    return spell(document)


def refused(text: bytes) -> list[str]:
    """Return the codes that a manifest is refused with."""
    with pytest.raises(ReleaseError) as refusal:
        parse_manifest(text, file="r/hotglm-manifest.json")
    assert refusal.value.file == "r/hotglm-manifest.json"
    return [problem.code for problem in refusal.value.problems]


# -- there and back ----------------------------------------------------------------------------------------------------


@given(manifests())
def test_writing_and_reading_are_inverse(manifest: Manifest) -> None:
    """M2: `parse(format(m)) == m`, and `format(parse(b)) == b` for what was written."""
    text = format_manifest(manifest)
    assert parse_manifest(text) == manifest
    assert format_manifest(parse_manifest(text)) == text
    assert text.isascii()
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_a_manifest_says_everything_that_it_was_given() -> None:
    """The golden bytes of a manifest with all parts: a change of them is a change of the format."""
    document = json.loads(GOOD)
    assert document["created"] == {
        "at": "2026-01-02T03:04:05Z",
        "environment": {"markers": {"sys_platform": "linux"}, "packages": {"torch": "2.13.0"}, "python": "3.12.1"},
    }
    assert document["expires"] == "2027-01-02T00:00:00Z"
    assert document["capabilities"] == ["explain", "rank"]
    assert document["code"] == {"entry": "model.net:Ranker", "files": ["code/model.py"]}
    assert document["contract"] == {"call": None, "config": None, "outputs": None}
    assert spell(document) == GOOD
    assert parse_manifest(GOOD).contract.state["w"].shape == (2, 3)


def test_expiry_counts_from_its_instant_on() -> None:
    """M13: at the very instant a release is expired; one without is never."""
    manifest = small_manifest()
    assert manifest.is_expired(datetime(2027, 1, 2, tzinfo=UTC))
    assert not manifest.is_expired(datetime(2027, 1, 1, 23, 59, 59, tzinfo=UTC))
    assert not replace(manifest, expires_at=None).is_expired(datetime(9999, 1, 1, tzinfo=UTC))


# -- one spelling ------------------------------------------------------------------------------------------------------


def test_every_bit_flip_is_refused_or_says_something_else() -> None:
    """A flipped bit makes a manifest that is refused, or one that says something else; never the same once more."""
    manifest, num_taken = replace(small_manifest(), config=None, code=None, created_in=None, tensors={}), 0
    good = format_manifest(manifest)
    for at in range(len(good) * 8):
        text = bytearray(good)
        text[at // 8] ^= 1 << at % 8
        try:
            found = parse_manifest(bytes(text))
        except ReleaseError:
            continue
        num_taken += 1
        assert found != manifest
        assert format_manifest(found) == bytes(text)
    assert num_taken  # a digit of a digest: what binds it is the digest of the manifest


def test_every_truncation_is_refused() -> None:
    """No beginning of a manifest is a manifest."""
    for length in range(len(GOOD)):
        with pytest.raises(ReleaseError):
            parse_manifest(GOOD[:length])


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b'"sequence":7', b'"sequence": 7', "MANIFEST_NOT_CANONICAL"),
        (b'"sequence":7', b'"sequence":7.0', "BAD_FIELD"),
        (b'"ranker"', b'"\\u0072anker"', "MANIFEST_NOT_CANONICAL"),
        (b"caf\\u00e9", b"caf\\u00E9", "MANIFEST_NOT_CANONICAL"),
        (b"caf\\u00e9", b"caf\xc3\xa9", "MANIFEST_NOT_ASCII"),
        (b"\\u4e2d", b"\\ud800", "MANIFEST_NOT_UTF8"),
        (b'"eps":1e-05', b'"eps":0.00001', "MANIFEST_NOT_CANONICAL"),
        (b'"eps":1e-05', b'"eps":NaN', "MANIFEST_BAD_JSON"),
        (b'"eps":1e-05', b'"eps":1e999', "MANIFEST_BAD_JSON"),
        (b'"kind":"full"', b'"kind":"full","kind":"full"', "DUPLICATE_KEY"),
        (b'"hidden":3', b'"hidden":3,"hidden":3', "DUPLICATE_KEY"),
        (b"}\n", b"}", "MANIFEST_NOT_CANONICAL"),
        (b"}\n", b"}\n\n", "MANIFEST_NOT_CANONICAL"),
    ],
)
def test_only_one_spelling_is_taken(old: bytes, new: bytes, code: str) -> None:
    """M2, B06: another spelling of the same values is refused, and so is what JSON parsers read differently."""
    assert old in GOOD
    assert refused(GOOD.replace(old, new)) == [code]


# -- fields ------------------------------------------------------------------------------------------------------------


def set_member(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    """Return an edit that puts `value` at `path`."""

    def edit(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return edit


BAD_FIELDS: list[tuple[tuple[str | int, ...], object, str]] = [
    *(((name,), 12.5, "") for name in json.loads(GOOD)),
    *((("sequence",), value, "BAD_FIELD") for value in (0, -1, 1.5, "2", 2**53, 2**64, True, None)),  # B15
    *((("version",), value, "BAD_VERSION") for value in ("", "x", "01.4", "1.4.0 ", 1, None, "v1")),
    *((("name",), value, "BAD_FIELD") for value in ("", "a\x1b[0m", "x" * 256, None)),
    *(
        (("expires",), value, "BAD_FIELD")
        for value in ("2026-02-31T00:00:00Z", "2026-01-01", 0, "2026-01-01T00:00:00+00:00")
    ),
    (("created", "at"), None, "BAD_FIELD"),
    (("created", "environment"), {"python": 3}, "BAD_ENVIRONMENT"),
    (("kind",), "delta", "MISSING_FIELD"),
    (("kind",), "patch", "KIND_UNKNOWN"),
    (("format",), "hotglm.release/2", "FORMAT_UNKNOWN"),
    (("weights",), "code/model.py", "BAD_FIELD"),
    (("weights",), "other.safetensors", "BAD_FIELD"),
    (("weights",), None, "BAD_FIELD"),
    (("requires",), ["a @ https://x.y/z"], "BAD_REQUIREMENT"),
    (("requires",), ["a", "a"], "BAD_FIELD"),
    (("capabilities",), ["a"] * 1001, "BAD_FIELD"),
    (("config",), [], "BAD_CONFIG"),
    (("contract", "call"), [{}], "BAD_CONTRACT"),
    (("code", "entry"), "os.system('x')", "BAD_FIELD"),
    (("code", "files"), ["missing.py"], "BAD_FIELD"),
    (("code", "extra"), 1, "UNKNOWN_FIELD"),
    (("trust_code",), True, "UNKNOWN_FIELD"),  # B26
    (("tensors", "w", "dtype"), "float33", "BAD_FIELD"),
    (("tensors", "w", "shape"), [-1], "BAD_FIELD"),
    (("tensors", "w", "shape"), [True], "BAD_FIELD"),
    (("tensors", "w", "shape"), [1] * 33, "BAD_FIELD"),
    (("tensors", "w", "file"), "code/model.py", "BAD_FIELD"),
    (("tensors", "w", "digest"), f"safetensors:{'0' * 64}", "BAD_DIGEST"),
    (("tensors", "a\nb"), json.loads(GOOD)["tensors"]["w"], "BAD_NAME"),
    *(
        (("files", "model.safetensors", "digest"), digest, "BAD_DIGEST")  # B08
        for digest in ("", "md5:" + "0" * 32, "none", "sha256:" + "0" * 63, "sha256:" + "A" * 64, "0" * 64, None)
    ),
    *((("files", "model.safetensors", "size"), size, "BAD_FIELD") for size in (-1, 1.0, "1", True, 2**53)),
]


@pytest.mark.parametrize(("path", "value", "code"), BAD_FIELDS)
def test_a_bad_field_is_refused(path: tuple[str | int, ...], value: object, code: str) -> None:
    """M3 to M14, B08, B15, B26: what a field may not hold is refused, by its code."""
    codes = refused(edited(set_member(*path, value=value)))
    assert code in codes or not code


@pytest.mark.parametrize("name", json.loads(GOOD))
def test_a_missing_field_is_refused(name: str) -> None:
    """M4: every field has to be there."""
    codes = refused(edited(lambda document: document.pop(name)))
    assert {"format": "FORMAT_UNKNOWN", "kind": "KIND_UNKNOWN"}.get(name, "MISSING_FIELD") in codes


def test_everything_that_is_wrong_is_named_at_once() -> None:
    """Several mistakes are one refusal with all of them."""

    def spoil(document: dict[str, Any]) -> None:
        document |= {"sequence": 0, "version": "x", "extra": 1}
        document["files"]["../x"] = {"size": -1, "digest": "md5:0"}

    expected = ["UNKNOWN_FIELD", "BAD_PATH", "BAD_FIELD", "BAD_DIGEST", "BAD_VERSION", "BAD_FIELD"]
    assert sorted(refused(edited(spoil))) == sorted(expected)


PATHS = [
    "../x", "/abs", "a/../../x", "a\\..\\b", "a\x00b", ".", "", "a//b", "a/", ".hidden", "a/.b", "dot.", "space ",
    "c:d",
    "hotglm-manifest.json", "HOTGLM-MANIFEST.json", "hotglm-manifest.sig", "e\u0301", "a\u202eb", "\ud800", "x" * 256,
    "/".join("a" * 17), "a/" * 600 + "b", "line\nbreak", "code", "CODE/model.py", "Code/other", "code/MODEL.py",
    "code/model.py/x",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_a_path_that_could_lead_elsewhere_is_refused(path: str) -> None:
    """R6, R7, B20: no way out, no twins where case or normal form is not told apart, nothing that cannot be a file."""
    entry = {"size": 1, "digest": f"sha256:{'0' * 64}"}
    codes = refused(edited(set_member("files", path, value=entry)))
    assert codes[0] in ("BAD_PATH", "MANIFEST_NOT_UTF8")


@pytest.mark.parametrize("text", [b"[]\n", b"12\n", b"null\n", b"", b"{}\n", b"\xef\xbb\xbf{}\n", b"[" * 100_000])
def test_what_is_no_object_is_refused(text: bytes) -> None:
    """Anything but one JSON object is refused without an untyped error."""
    assert refused(text)


def test_caps_hold_before_anything_is_built() -> None:
    """M1, B29: a manifest that is too large, or lists too much, is refused by its code."""
    assert refused(b" " * (MAX_MANIFEST_NBYTES + 1)) == ["MANIFEST_TOO_LARGE"]
    entry = {"size": 1, "digest": f"sha256:{'0' * 64}"}
    assert refused(edited(set_member("files", value={f"f{n}": entry for n in range(10_001)}))) == ["TOO_MANY_FILES"]
    assert refused(b'{"a":' + b"[]," * 2_000_000 + b"1}") == ["MANIFEST_TOO_DEEP"]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"x": float("nan")}},
        {"config": {1: "x"}},
        {"config": {"x": (1, 2)}},
        {"config": {"x": {1, 2}}},
        {"config": {"x": "\ud800"}},
        {"sequence": 0},
        {"name": ""},
        {"files": {"../x": FileEntry(size=1, digest="sha256:" + "0" * 64)}},
    ],
)
def test_what_reading_would_refuse_is_not_written(changes: dict[str, Any]) -> None:
    """A manifest that could not be read again, as what it was, is refused when it is written."""
    with pytest.raises(ReleaseError):
        format_manifest(replace(small_manifest(), **changes))
