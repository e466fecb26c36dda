"""A manifest read: one walk through a JSON document, every value judged, every problem noted.

Rules this module keeps:

- Pure: no IO, no torch. What is returned is believed only when the report stayed empty.
- An unknown format and an unknown kind stop the reading (M3, M6); everything else is named at once.
- Clauses in parentheses are those of docs/release-format.md; B06 to B29 are rows of FAULTS.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from hotglm.contract import CONTRACT_SCHEMA, Contract
from hotglm.delta_fields import DeltaFields
from hotglm.delta_reader import read_delta, report_delta_faults
from hotglm.document import Report
from hotglm.environment import MAX_REQUIREMENTS, Environment, Unmet, find_distinct, parse_requirement
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.field_reader import FILE_DIGEST, SHA256, FieldReader
from hotglm.file_entry import FileEntry
from hotglm.header import DTYPES, find_name_fault
from hotglm.manifest_fields import MAX_SEQUENCE, CodeEntry, Manifest, ReleasedTensor, find_path_faults

__all__ = ["FORMAT", "MAX_FILES", "MAX_TENSORS", "ManifestReader"]

FORMAT = "hotglm.release/1"
"""What a manifest says it is; the number changes when the meaning does (M3)."""

MAX_FILES = 10_000
MAX_TENSORS = 200_000
_MAX_CAPABILITIES = 1000
_MAX_SIZE = 2**53 - 1

_FIELDS = (
    "capabilities", "code", "config", "contract", "created", "expires", "files", "format", "kind", "name", "requires",
    "sequence", "tensors", "version", "weights",
)  # fmt: skip
_ENTRY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_DTYPE_NAMES = {info.torch_name for info in DTYPES.values() if info.torch_name}


class ManifestReader(FieldReader):
    """One walk through one document."""

    def __init__(self, document: Mapping[str, Any], *, report: Report) -> None:
        """Note what is wrong with `document` in `report`."""
        super().__init__(report=report)
        self._document = document

    def read(self) -> Manifest:
        """Return what the document says; see the rules of this module."""
        document, report = self._document, self.report
        if (found := document.get("format")) != FORMAT:
            message = f"Expected format {FORMAT!r}, got {shorten_repr(found)}; this hotglm reads no other."
            report.stop("FORMAT_UNKNOWN", message, expected=FORMAT, found=found)
        if (kind := document.get("kind")) not in ("full", "delta"):
            message = f"Expected a release of kind 'full' or 'delta', got {shorten_repr(kind)}."
            report.stop("KIND_UNKNOWN", message, expected="full", found=kind if isinstance(kind, str) else None)
        fields = (*_FIELDS, "delta") if kind == "delta" else _FIELDS
        values = self.read_members(document, fields, where="the manifest")
        delta = read_delta(self, values["delta"]) if kind == "delta" else None
        contract = self._contract(values["contract"])
        created = self.read_members(values["created"], ("at", "environment"), where="created")
        files = self._files(values["files"])
        loadable = _find_result_files(files, delta)
        if values["weights"] is None and values["tensors"]:
            self.refuse("the file to load the tensors from", None, where="weights")
        requires = self._requires(values["requires"])
        now = datetime.fromtimestamp(0, UTC)
        manifest = Manifest(
            name=self.read_word(values["name"], where="name"),
            version=self.read_version(values["version"]),
            sequence=self.read_integer(values["sequence"], 1, MAX_SEQUENCE, where="sequence"),
            files=files,
            tensors=self._tensors(values["tensors"], files=loadable),
            weights=self._weights(values["weights"], files=loadable),
            config=self._config(values["config"]),
            requires=requires,
            capabilities=frozenset(self.read_words(values["capabilities"], _MAX_CAPABILITIES, where="capabilities")),
            call=contract.call,
            config_spec=contract.config,
            outputs=contract.outputs,
            created_at=self.read_time(created["at"], where="created.at") or now,
            created_in=self._environment(created["environment"]),
            expires_at=None if values["expires"] is None else self.read_time(values["expires"], where="expires"),
            code=self._code(values["code"], files=files),
            delta=delta,
        )
        if delta is not None:
            report_delta_faults(manifest, delta, report=report)
        return manifest

    def _files(self, value: object) -> dict[str, FileEntry]:
        files: dict[str, FileEntry] = {}
        members = self.read_object(value, limit=MAX_FILES, where="files")
        for path, fault in find_path_faults(members):
            self.report.add("BAD_PATH", f"Expected a plain relative path, got {shorten_repr(path)}, which has {fault}.")
        for path, member in members.items():
            where = f"files[{shorten_repr(path)}]"
            parts = self.read_members(member, ("digest", "size"), where=where)
            digest = self.read_digest(parts["digest"], FILE_DIGEST, where=f"{where}.digest")
            files[path] = FileEntry(
                size=self.read_integer(parts["size"], 0, _MAX_SIZE, where=f"{where}.size"), digest=digest
            )
        return files

    def _tensors(self, value: object, *, files: Mapping[str, FileEntry]) -> dict[str, ReleasedTensor]:
        tensors: dict[str, ReleasedTensor] = {}
        for name, member in self.read_object(value, limit=MAX_TENSORS, where="tensors").items():
            if (fault := find_name_fault(name)) is not None:
                self.report.add("BAD_NAME", f"Expected a plain name of a tensor, got {fault}.", tensor=name)
            where = f"tensors[{shorten_repr(name)}]"
            parts = self.read_members(member, ("digest", "dtype", "file", "shape"), where=where)
            file, dtype = parts["file"], parts["dtype"]
            if not isinstance(file, str) or file not in files or not files[file].digest.startswith("safetensors:"):
                self.refuse("a safetensors file of this release", file, where=f"{where}.file")
            if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
                self.refuse("a dtype", dtype, where=f"{where}.dtype")
            tensors[name] = ReleasedTensor(
                file=str(file),
                dtype=str(dtype),
                shape=self.read_shape(parts["shape"], where=f"{where}.shape"),
                digest=self.read_digest(parts["digest"], SHA256, where=f"{where}.digest"),
            )
        return tensors

    def _weights(self, value: object, *, files: Mapping[str, FileEntry]) -> str | None:
        if value is None:
            return None
        is_known = isinstance(value, str) and value in files
        if is_known and value.endswith((".safetensors", ".safetensors.index.json")):  # type: ignore[attr-defined]
            return value  # type: ignore[return-value]
        self.refuse("a .safetensors or .safetensors.index.json file of this release", value, where="weights")
        return None

    def _config(self, value: object) -> Mapping[str, object] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse("an object or null", value, where="config", code="BAD_CONFIG")
            return None
        return MappingProxyType(value)

    def _requires(self, value: object) -> tuple[str, ...]:
        words = self.read_words(value, MAX_REQUIREMENTS, where="requires")
        for judged in map(parse_requirement, find_distinct(words)):
            if isinstance(judged, Unmet):
                self.report.add(judged.code, judged.message)
        return words

    def _contract(self, value: object) -> Contract:
        parts = self.read_members(value, ("call", "config", "outputs"), where="contract")
        whole = {"schema": CONTRACT_SCHEMA, "state": [], "capabilities": [], "requires": [], **parts}
        try:
            return Contract.from_dict(whole)
        except ArgumentError as error:
            for problem in error.problems:
                self.report.add(problem.code, problem.message)
            return Contract()

    def _environment(self, value: object) -> Environment | None:
        if value is None:
            return None
        try:
            return Environment.from_dict(value)
        except ArgumentError as error:
            self.report.add("BAD_ENVIRONMENT", error.message)
            return None

    def _code(self, value: object, *, files: Mapping[str, FileEntry]) -> CodeEntry | None:
        if value is None:
            return None
        parts = self.read_members(value, ("entry", "files"), where="code")
        entry = parts["entry"]
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
            self.refuse("a name such as 'package.module:Class'", entry, where="code.entry")
        listed = self.read_words(parts["files"], MAX_FILES, where="code.files")
        for path in listed:
            if path not in files:
                self.refuse("a file of this release", path, where="code.files")
        return CodeEntry(entry=str(entry), files=tuple(sorted(listed)))


def _find_result_files(files: Mapping[str, FileEntry], delta: DeltaFields | None) -> Mapping[str, FileEntry]:
    """Return the files that weights may be loaded from: of a delta, those that it leads to."""
    if delta is None:
        return files
    return {path: entry for path, entry in files.items() if path != delta.payload} | dict(delta.files)
