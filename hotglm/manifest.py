"""A release's manifest: values -> canonical bytes and back, strictly.

Rules this module keeps:

- Pure: no IO, no torch. `parse_manifest(format_manifest(m)) == m`; and what `parse_manifest` takes, it takes in one
  spelling only: `format_manifest(parse_manifest(b)) == b` (M2).
- Every problem is named at once, up to the caps. Broken JSON, an unknown format and an unknown kind stop the reading.
- What reading would refuse is not written.
- Clauses in parentheses are those of docs/release-format.md; B06 to B29 are rows of FAULTS.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from hotglm.contract import Contract
from hotglm.delta_fields import DeltaFields
from hotglm.document import Report, parse_json
from hotglm.errors import ReleaseError, shorten_repr
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import CodeEntry, Manifest
from hotglm.manifest_reader import FORMAT, MAX_FILES, MAX_TENSORS, ManifestReader

__all__ = ["MAX_MANIFEST_NBYTES", "digest_manifest", "digest_result", "format_manifest", "parse_manifest"]

MAX_MANIFEST_NBYTES = 64 * 2**20
_MAX_BRACKETS = 8 * MAX_TENSORS + 6 * MAX_FILES + 200_000

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def format_manifest(manifest: Manifest) -> bytes:
    """Return the canonical bytes of a manifest: ASCII, keys sorted, no space, one newline behind it (M2).

    Raises:
        ReleaseError: reading them would be refused; `problems` has every reason.
    """
    try:
        text = _format(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        report = _report(None)
        report.stop("BAD_CONFIG", f"Expected values that JSON can hold, got: {shorten_repr(str(error))}.")
    if parse_manifest(text) != manifest:  # for example a config with the key 1, which comes back as "1"
        _report(None).stop("BAD_CONFIG", "Expected values that JSON gives back as they are, got others.")
    return text


def parse_manifest(text: bytes, *, file: str | None = None) -> Manifest:
    """Return what a manifest says, or refuse it with everything that is wrong.

    Args:
        text: the whole document.
        file: its path, for the refusal.

    Raises:
        ReleaseError: it breaks the format or a cap.
    """
    report = _report(file)
    if len(text) > MAX_MANIFEST_NBYTES:
        message = f"Expected at most {MAX_MANIFEST_NBYTES} bytes, got {len(text)}."
        report.stop("MANIFEST_TOO_LARGE", message, expected=MAX_MANIFEST_NBYTES, found=len(text))
    if not text.isascii():
        at = next(at for at, byte in enumerate(text) if byte > 0x7F)
        report.stop("MANIFEST_NOT_ASCII", f"Expected ASCII, got byte {text[at]:#04x}.", at=at)
    document = parse_json(text, report=report, max_brackets=_MAX_BRACKETS)
    if not isinstance(document, dict):
        report.stop("MANIFEST_NOT_OBJECT", f"Expected a JSON object, got {shorten_repr(document)}.")
    _verify_unicode(text, document, report=report)
    manifest = ManifestReader(document, report=report).read()
    report.raise_if_any()
    try:
        expected = _format(manifest)
    except ValueError:  # 1e999 is JSON, and no number that has a spelling
        report.stop("MANIFEST_BAD_JSON", "Expected finite numbers in config, got one that is too large.")
    _verify_canonical(text, expected, report=report)
    return manifest


def digest_manifest(text: bytes) -> str:
    """Return the digest of a release: that of the bytes of its manifest, which bind everything else (D4)."""
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def digest_result(manifest: Manifest) -> str:
    """Return the digest of the full manifest that a release leads to; of a full release, its own (D5).

    Raises:
        ReleaseError: it breaks the format.
    """
    return digest_manifest(format_manifest(manifest.result))


def _report(file: str | None) -> Report:
    return Report(
        ReleaseError,
        headline=f"The manifest {'given' if file is None else shorten_repr(file)} was refused",
        remedy="publish the release again with `hotglm pack`, or fetch it again if it was damaged on its way.",
        prefix="MANIFEST",
        file=file,
    )


def _verify_unicode(text: bytes, document: object, *, report: Report) -> None:
    if _SURROGATE.search(text) is None:
        return
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        report.stop("MANIFEST_NOT_UTF8", "Expected Unicode text, got an escaped lone surrogate.")


def _verify_canonical(text: bytes, expected: bytes, *, report: Report) -> None:
    if text == expected:
        return
    pairs = enumerate(zip(text, expected, strict=False))
    at = next((at for at, (found, wanted) in pairs if found != wanted), min(len(text), len(expected)))
    found = shorten_repr(text[at : at + 16].decode())
    wanted = shorten_repr(expected[at : at + 16].decode())
    report.stop("MANIFEST_NOT_CANONICAL", f"Expected the canonical spelling, {wanted} here, got {found}.", at=at)


# -- writing -----------------------------------------------------------------------------------------------------------


def _format(manifest: Manifest) -> bytes:
    whole = Contract(call=manifest.call, config=manifest.config_spec, outputs=manifest.outputs).to_dict()
    created_in = manifest.created_in
    document: dict[str, object] = {
        "capabilities": sorted(manifest.capabilities),
        "code": _format_code(manifest.code),
        "config": None if manifest.config is None else dict(manifest.config),
        "contract": {part: whole[part] for part in ("call", "config", "outputs")},
        "created": {
            "at": _format_time(manifest.created_at),
            "environment": None if created_in is None else created_in.to_dict(),
        },
        "expires": None if manifest.expires_at is None else _format_time(manifest.expires_at),
        "files": _format_files(manifest.files),
        "format": FORMAT,
        "kind": manifest.kind,
        "name": manifest.name,
        "requires": list(manifest.requires),
        "sequence": manifest.sequence,
        "tensors": {
            name: {"digest": one.digest, "dtype": one.dtype, "file": one.file, "shape": list(one.shape)}
            for name, one in manifest.tensors.items()
        },
        "version": str(manifest.version),
        "weights": manifest.weights,
    }
    if manifest.delta is not None:
        document["delta"] = _format_delta(manifest.delta)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode()


def _format_code(code: CodeEntry | None) -> object:
    return None if code is None else {"entry": code.entry, "files": sorted(code.files)}


def _format_time(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


def _format_files(files: Mapping[str, FileEntry]) -> object:
    return {path: {"digest": entry.digest, "size": entry.size} for path, entry in files.items()}


def _format_delta(delta: DeltaFields) -> object:
    base = delta.base
    return {
        "base": {"digest": base.digest, "sequence": base.sequence, "version": str(base.version)},
        "files": _format_files(delta.files),
        "headers": dict(delta.headers),
        "payload": delta.payload,
        "tensors": {
            name: {"base": one.base, "codec": one.codec, "parts": list(one.parts)}
            for name, one in delta.tensors.items()
        },
    }
