"""The field `delta` of a manifest: read strictly, and judged against the rest of the manifest.

Rules this module keeps:

- Pure: no IO, no torch. Every problem is noted, in terms of the tensor where there is one (C04, C05).
- What a manifest alone can decide is decided here; what the header of the payload shows is judged in `delta_payload`,
  and what the base shows in `delta_plan`.
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hotglm.delta_fields import CODECS, BaseRelease, DeltaFields, TensorDelta
from hotglm.document import Report
from hotglm.errors import shorten_repr
from hotglm.field_reader import SHA256, WEIGHTS_DIGEST, FieldReader
from hotglm.file_entry import FileEntry
from hotglm.header import DEFAULT_LIMITS, PREFIX_NBYTES, find_name_fault
from hotglm.manifest_fields import MAX_SEQUENCE, Manifest, find_path_faults

__all__ = ["read_delta", "report_delta_faults"]

MAX_RESULT_FILES = 10_000
_MAX_TENSORS = 200_000
_MAX_PARTS = 8
_MAX_SIZE = 2**53 - 1
_FIELDS = ("base", "files", "headers", "payload", "tensors")


def read_delta(reader: FieldReader, value: object) -> DeltaFields:
    """Return what the field `delta` says; what stands in it alone is judged here (X2)."""
    values = reader.read_members(value, _FIELDS, where="delta")
    base = reader.read_members(values["base"], ("digest", "sequence", "version"), where="delta.base")
    tensors = reader.read_object(values["tensors"], limit=_MAX_TENSORS, where="delta.tensors")
    files = reader.read_object(values["files"], limit=MAX_RESULT_FILES, where="delta.files")
    headers = reader.read_object(values["headers"], limit=MAX_RESULT_FILES, where="delta.headers")
    payload = values["payload"]
    if not isinstance(payload, str):
        reader.refuse("the path of the payload", payload, where="delta.payload", code="DELTA_BAD_PAYLOAD")
    return DeltaFields(
        base=BaseRelease(
            version=reader.read_version(base["version"]),
            sequence=reader.read_integer(base["sequence"], 1, MAX_SEQUENCE, where="delta.base.sequence"),
            digest=reader.read_digest(base["digest"], SHA256, where="delta.base.digest"),
        ),
        payload=str(payload),
        tensors={name: _read_tensor(reader, member, name=name) for name, member in tensors.items()},
        files={path: _read_file(reader, member, path=path) for path, member in files.items()},
        headers={path: _read_part(reader, part, where="delta.headers") for path, part in headers.items()},
    )


def _read_tensor(reader: FieldReader, value: object, *, name: str) -> TensorDelta:
    where = f"delta.tensors[{shorten_repr(name)}]"
    values = reader.read_members(value, ("base", "codec", "parts"), where=where)
    base, codec, parts = values["base"], values["codec"], values["parts"]
    if not isinstance(codec, str) or codec not in CODECS:
        message = f"Expected one of {', '.join(CODECS)} as {where}.codec, got {shorten_repr(codec)}."
        reader.report.add("DELTA_BAD_CODEC", message, tensor=name, found=codec if isinstance(codec, str) else None)
    if not isinstance(parts, list) or not 0 < len(parts) <= _MAX_PARTS:
        reader.refuse(f"an array of 1 to {_MAX_PARTS} names", parts, where=f"{where}.parts", code="DELTA_BAD_PARTS")
        parts = []
    return TensorDelta(
        codec=codec if isinstance(codec, str) else "",
        base=None if base is None else reader.read_digest(base, SHA256, where=f"{where}.base"),
        parts=tuple(_read_part(reader, part, where=f"{where}.parts") for part in parts),
    )


def _read_file(reader: FieldReader, value: object, *, path: str) -> FileEntry:
    where = f"delta.files[{shorten_repr(path)}]"
    values = reader.read_members(value, ("digest", "size"), where=where)
    return FileEntry(
        size=reader.read_integer(values["size"], 0, _MAX_SIZE, where=f"{where}.size"),
        digest=reader.read_digest(values["digest"], WEIGHTS_DIGEST, where=f"{where}.digest"),
    )


def _read_part(reader: FieldReader, value: object, *, where: str) -> str:
    if isinstance(value, str) and find_name_fault(value) is None:
        return value
    reader.refuse("the plain name of a tensor of the payload", value, where=where, code="DELTA_BAD_PARTS")
    return ""


# -- against the rest of the manifest ----------------------------------------------------------------------------------


def report_delta_faults(manifest: Manifest, delta: DeltaFields, *, report: Report) -> None:
    """Note everything in which a delta and the rest of its manifest do not fit each other (X2 to X6)."""
    _report_files(manifest, delta, report=report)
    _report_sizes(manifest, delta, report=report)
    for name, one in delta.tensors.items():
        _report_tensor(manifest, name, one, report=report)
    for part in _find_repeated(
        [*delta.headers.values(), *(part for one in delta.tensors.values() for part in one.parts)]
    ):
        message = f"Expected each tensor of the payload to be used once, got {shorten_repr(part)} again."
        report.add("DELTA_PART_REUSED", message, tensor=part)


def _report_files(manifest: Manifest, delta: DeltaFields, *, report: Report) -> None:
    for path in sorted({delta.payload, *(p for p, e in manifest.files.items() if e.digest.startswith("safetensors:"))}):
        entry = manifest.files.get(path)
        if path != delta.payload:
            message = (
                f"Expected the payload to be the only safetensors file with tensors, got {shorten_repr(path)} too."
            )
            report.add("DELTA_BAD_PAYLOAD", message)
        elif entry is None or not entry.digest.startswith("safetensors:"):
            message = f"Expected a safetensors file of this release as delta.payload, got {shorten_repr(path)}."
            report.add("DELTA_BAD_PAYLOAD", message)
    for path in sorted(delta.files.keys() & manifest.files.keys()):
        report.add("DELTA_BAD_FILE", f"Expected {shorten_repr(path)} in files or in delta.files, got it in both.")
    for path, fault in find_path_faults([*(manifest.files.keys() - {delta.payload}), *delta.files]):
        if path in delta.files:
            message = f"Expected a plain relative path in delta.files, got {shorten_repr(path)}, which has {fault}."
            report.add("BAD_PATH", message)
    for path in sorted(delta.files.keys() ^ delta.headers.keys()):
        where, other = ("files", "headers") if path in delta.files else ("headers", "files")
        message = f"Expected {shorten_repr(path)} of delta.{where} in delta.{other}, got none."
        report.add("DELTA_BAD_FILE", message)
    if manifest.weights is None or not delta.files:
        report.add("DELTA_NO_WEIGHTS", "Expected a delta to lead to weights, got none.")


def _report_sizes(manifest: Manifest, delta: DeltaFields, *, report: Report) -> None:
    """Note files whose size cannot be that of a header and their tensors: nothing is ever made larger than said."""
    nbytes = dict.fromkeys(delta.files, 0)
    for one in manifest.tensors.values():
        if one.file in nbytes:
            nbytes[one.file] += one.nbytes
    for path, entry in delta.files.items():
        least = nbytes[path] + PREFIX_NBYTES + 2
        most = nbytes[path] + PREFIX_NBYTES + DEFAULT_LIMITS.header_nbytes
        if not least <= entry.size <= most:
            message = f"Expected {least} to {most} bytes for the tensors of {shorten_repr(path)}, got {entry.size}."
            report.add("DELTA_BAD_RANGE", message, expected=least, found=entry.size)


def _report_tensor(manifest: Manifest, name: str, one: TensorDelta, *, report: Report) -> None:
    if name not in manifest.tensors:
        report.add(
            "DELTA_UNKNOWN_TENSOR", "Expected a tensor of the result in delta.tensors, got another.", tensor=name
        )
    rule = CODECS.get(one.codec)
    if rule is None:
        return  # noted when it was read
    if one.parts and len(one.parts) != rule.num_parts:
        message = f"Expected {rule.num_parts} parts for the codec {one.codec!r}, got {len(one.parts)}."
        report.add("DELTA_BAD_PARTS", message, tensor=name, expected=rule.num_parts, found=len(one.parts))
    if rule.has_base and one.base is None:
        message = f"Expected the digest of the tensor that {one.codec!r} is applied to, got none."
        report.add("DELTA_NO_BASE", message, tensor=name)
    if not rule.has_base and one.base is not None:
        report.add("DELTA_BAD_BASE", f"Expected no base for the codec {one.codec!r}, got one.", tensor=name)


def _find_repeated(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            yield name
        seen.add(name)
