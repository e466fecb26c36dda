"""A release's manifest: values -> canonical bytes and back, strictly.

Rules this module keeps:

- Pure: no IO, no torch. `parse_manifest(format_manifest(m)) == m`; and what `parse_manifest` takes, it takes in one
  spelling only: `format_manifest(parse_manifest(b)) == b` (M2).
- Every problem is named at once, up to the caps. Broken JSON, an unknown format and an unknown kind stop the reading.
- What reading would refuse is not written.
- Clauses in parentheses are those of docs/release-format.md; B06 to B29 are rows of FAULTS.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from hotglm.contract import CONTRACT_SCHEMA, Contract
from hotglm.document import Report, parse_json
from hotglm.environment import MAX_REQUIREMENTS, Environment, Unmet, find_distinct, parse_requirement
from hotglm.errors import ArgumentError, ReleaseError, VersionSyntaxError, shorten_repr
from hotglm.header import DEFAULT_LIMITS, DTYPES, find_name_fault
from hotglm.manifest_fields import (
    MAX_SEQUENCE,
    CodeEntry,
    FileEntry,
    Manifest,
    ReleasedTensor,
    find_path_faults,
)
from hotglm.version import Version

__all__ = ["FORMAT", "MAX_FILES", "MAX_MANIFEST_NBYTES", "format_manifest", "parse_manifest"]

FORMAT = "hotglm.release/1"
"""What a manifest says it is; the number changes when the meaning does (M3)."""

MAX_MANIFEST_NBYTES = 64 * 2**20
MAX_FILES = 10_000
MAX_TENSORS = 200_000
MAX_CAPABILITIES = 1000
_MAX_BRACKETS = 4 * MAX_TENSORS + 2 * MAX_FILES + 200_000
_MAX_SIZE = 2**53 - 1
_MAX_WORD = 255

_FIELDS = (
    "capabilities", "code", "config", "contract", "created", "expires", "files", "format", "kind", "name", "requires",
    "sequence", "tensors", "version", "weights",
)  # fmt: skip
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST = re.compile(r"(?:sha256|safetensors):[0-9a-f]{64}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_ENTRY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_DTYPE_NAMES = {info.torch_name for info in DTYPES.values() if info.torch_name}


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
    manifest = _Reader(document, report=report).read()
    report.raise_if_any()
    try:
        expected = _format(manifest)
    except ValueError:  # 1e999 is JSON, and no number that has a spelling
        report.stop("MANIFEST_BAD_JSON", "Expected finite numbers in config, got one that is too large.")
    _verify_canonical(text, expected, report=report)
    return manifest


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
    document = {
        "capabilities": sorted(manifest.capabilities),
        "code": _format_code(manifest.code),
        "config": None if manifest.config is None else dict(manifest.config),
        "contract": {part: whole[part] for part in ("call", "config", "outputs")},
        "created": {
            "at": _format_time(manifest.created_at),
            "environment": None if created_in is None else created_in.to_dict(),
        },
        "expires": None if manifest.expires_at is None else _format_time(manifest.expires_at),
        "files": {path: {"digest": entry.digest, "size": entry.size} for path, entry in manifest.files.items()},
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
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode()


def _format_code(code: CodeEntry | None) -> object:
    return None if code is None else {"entry": code.entry, "files": sorted(code.files)}


def _format_time(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    """One walk through one document. What it returns is believed only when the report stayed empty."""

    def __init__(self, document: Mapping[str, Any], *, report: Report) -> None:
        self._document = document
        self._report = report

    def read(self) -> Manifest:
        document, report = self._document, self._report
        if (found := document.get("format")) != FORMAT:
            message = f"Expected format {FORMAT!r}, got {shorten_repr(found)}; this hotglm reads no other."
            report.stop("FORMAT_UNKNOWN", message, expected=FORMAT, found=found)
        if (kind := document.get("kind")) != "full":
            code = "DELTA_UNSUPPORTED" if kind == "delta" else "KIND_UNKNOWN"
            note = "; deltas are reserved and cannot be read yet" if kind == "delta" else ""
            message = f"Expected a release of kind 'full', got {shorten_repr(kind)}{note}."
            report.stop(code, message, expected="full", found=kind)
        values = self._members(document, _FIELDS, where="the manifest")
        contract = self._contract(values["contract"])
        created = self._members(values["created"], ("at", "environment"), where="created")
        files = self._files(values["files"])
        if values["weights"] is None and values["tensors"]:
            self._refuse("the file to load the tensors from", None, where="weights")
        requires = self._requires(values["requires"])
        now = datetime.fromtimestamp(0, UTC)
        return Manifest(
            name=self._word(values["name"], where="name"),
            version=self._version(values["version"]),
            sequence=self._integer(values["sequence"], 1, MAX_SEQUENCE, where="sequence"),
            files=files,
            tensors=self._tensors(values["tensors"], files=files),
            weights=self._weights(values["weights"], files=files),
            config=self._config(values["config"]),
            requires=requires,
            capabilities=frozenset(self._words(values["capabilities"], MAX_CAPABILITIES, where="capabilities")),
            call=contract.call,
            config_spec=contract.config,
            outputs=contract.outputs,
            created_at=self._time(created["at"], where="created.at") or now,
            created_in=self._environment(created["environment"]),
            expires_at=None if values["expires"] is None else self._time(values["expires"], where="expires"),
            code=self._code(values["code"], files=files),
        )

    def _refuse(self, expected: str, found: object, *, where: str, code: str = "BAD_FIELD") -> None:
        message = f"Expected {expected} as {where}, got {shorten_repr(found)}."
        self._report.add(code, message, expected=expected, found=found if isinstance(found, (str, int)) else None)

    def _members(self, value: object, names: tuple[str, ...], *, where: str) -> dict[str, Any]:
        """Return the members of an object that must have exactly `names`; a missing one is None and reported (M4)."""
        if not isinstance(value, dict):
            self._refuse("an object", value, where=where)
            return dict.fromkeys(names)
        for name in value:
            if name not in names:
                self._report.add("UNKNOWN_FIELD", f"Expected no field {shorten_repr(name)} in {where}, got one.")
        for name in names:
            if name not in value:
                self._report.add("MISSING_FIELD", f"Expected the field {name!r} in {where}, got none.", expected=name)
        return {name: value.get(name) for name in names}

    def _object(self, value: object, *, limit: int, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse("an object", value, where=where)
            return {}
        if len(value) > limit:
            message = f"Expected at most {limit} members in {where}, got {len(value)}."
            self._report.stop(f"TOO_MANY_{where.upper()}", message, expected=limit, found=len(value))
        return value

    def _integer(self, value: object, least: int, most: int, *, where: str) -> int:
        if type(value) is int and least <= value <= most:  # True is no integer (B15)
            return value
        self._refuse(f"an integer from {least} to {most}", value, where=where)
        return least

    def _word(self, value: object, *, where: str) -> str:
        if isinstance(value, str) and find_name_fault(value, max_length=_MAX_WORD) is None:
            return value
        self._refuse(f"text of 1 to {_MAX_WORD} characters without control characters", value, where=where)
        return ""

    def _words(self, value: object, limit: int, *, where: str) -> tuple[str, ...]:
        if not isinstance(value, list) or len(value) > limit:
            found = f"one of {len(value)}" if isinstance(value, list) else value
            self._refuse(f"an array of at most {limit} texts", found, where=where)
            return ()
        words = [self._word(member, where=f"{where}[{place}]") for place, member in enumerate(value)]
        if len(set(words)) < len(words):
            self._refuse("each text once", "one again", where=where)
        return tuple(words)

    def _version(self, value: object) -> Version:
        try:
            version = Version(value)  # type: ignore[arg-type]  # it refuses what is no text
            if str(version) == value:
                return version
            self._refuse(f"the normal form {str(version)!r}", value, where="version", code="BAD_VERSION")
        except VersionSyntaxError:
            self._refuse("a PEP 440 version", value, where="version", code="BAD_VERSION")
        return Version("0")

    def _time(self, value: object, *, where: str) -> datetime | None:
        if isinstance(value, str) and _TIME.fullmatch(value):
            try:
                return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            except ValueError:
                pass  # the 31st of February; refused below
        self._refuse("a time in UTC such as '2026-01-31T23:59:59Z'", value, where=where)
        return None

    def _files(self, value: object) -> dict[str, FileEntry]:
        files: dict[str, FileEntry] = {}
        members = self._object(value, limit=MAX_FILES, where="files")
        for path, fault in find_path_faults(members):
            self._report.add(
                "BAD_PATH", f"Expected a plain relative path, got {shorten_repr(path)}, which has {fault}."
            )
        for path, member in members.items():
            where = f"files[{shorten_repr(path)}]"
            parts = self._members(member, ("digest", "size"), where=where)
            digest = self._digest(parts["digest"], _DIGEST, where=f"{where}.digest")
            files[path] = FileEntry(
                size=self._integer(parts["size"], 0, _MAX_SIZE, where=f"{where}.size"), digest=digest
            )
        return files

    def _digest(self, value: object, pattern: re.Pattern[str], *, where: str) -> str:
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        algorithms = "sha256: or safetensors:" if pattern is _DIGEST else "sha256:"
        self._refuse(f"{algorithms} and 64 lower-case hexadecimal digits", value, where=where, code="BAD_DIGEST")
        return ""

    def _tensors(self, value: object, *, files: Mapping[str, FileEntry]) -> dict[str, ReleasedTensor]:
        tensors: dict[str, ReleasedTensor] = {}
        for name, member in self._object(value, limit=MAX_TENSORS, where="tensors").items():
            if (fault := find_name_fault(name)) is not None:
                self._report.add("BAD_NAME", f"Expected a plain name of a tensor, got {fault}.", tensor=name)
            where = f"tensors[{shorten_repr(name)}]"
            parts = self._members(member, ("digest", "dtype", "file", "shape"), where=where)
            file, dtype = parts["file"], parts["dtype"]
            if not isinstance(file, str) or file not in files or not files[file].digest.startswith("safetensors:"):
                self._refuse("a safetensors file of this release", file, where=f"{where}.file")
            if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
                self._refuse("a dtype", dtype, where=f"{where}.dtype")
            tensors[name] = ReleasedTensor(
                file=str(file),
                dtype=str(dtype),
                shape=self._shape(parts["shape"], where=f"{where}.shape"),
                digest=self._digest(parts["digest"], _SHA256, where=f"{where}.digest"),
            )
        return tensors

    def _shape(self, value: object, *, where: str) -> tuple[int, ...]:
        limits = DEFAULT_LIMITS
        is_known = isinstance(value, list) and len(value) <= limits.rank
        if is_known and all(type(size) is int and 0 <= size <= limits.dim for size in value):  # type: ignore[attr-defined]
            return tuple(value)  # type: ignore[arg-type]
        self._refuse(f"at most {limits.rank} sizes from 0 to {limits.dim}", value, where=where)
        return ()

    def _weights(self, value: object, *, files: Mapping[str, FileEntry]) -> str | None:
        if value is None:
            return None
        is_known = isinstance(value, str) and value in files
        if is_known and value.endswith((".safetensors", ".safetensors.index.json")):  # type: ignore[attr-defined]
            return value  # type: ignore[return-value]
        self._refuse("a .safetensors or .safetensors.index.json file of this release", value, where="weights")
        return None

    def _config(self, value: object) -> Mapping[str, object] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            self._refuse("an object or null", value, where="config", code="BAD_CONFIG")
            return None
        return MappingProxyType(value)

    def _requires(self, value: object) -> tuple[str, ...]:
        words = self._words(value, MAX_REQUIREMENTS, where="requires")
        for judged in map(parse_requirement, find_distinct(words)):
            if isinstance(judged, Unmet):
                self._report.add(judged.code, judged.message)
        return words

    def _contract(self, value: object) -> Contract:
        parts = self._members(value, ("call", "config", "outputs"), where="contract")
        whole = {"schema": CONTRACT_SCHEMA, "state": [], "capabilities": [], "requires": [], **parts}
        try:
            return Contract.from_dict(whole)
        except ArgumentError as error:
            for problem in error.problems:
                self._report.add(problem.code, problem.message)
            return Contract()

    def _environment(self, value: object) -> Environment | None:
        if value is None:
            return None
        try:
            return Environment.from_dict(value)
        except ArgumentError as error:
            self._report.add("BAD_ENVIRONMENT", error.message)
            return None

    def _code(self, value: object, *, files: Mapping[str, FileEntry]) -> CodeEntry | None:
        if value is None:
            return None
        parts = self._members(value, ("entry", "files"), where="code")
        entry = parts["entry"]
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
            self._refuse("a name such as 'package.module:Class'", entry, where="code.entry")
        listed = self._words(parts["files"], MAX_FILES, where="code.files")
        for path in listed:
            if path not in files:
                self._refuse("a file of this release", path, where="code.files")
        return CodeEntry(entry=str(entry), files=tuple(sorted(listed)))
