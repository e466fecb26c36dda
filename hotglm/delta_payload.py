"""The payload of a delta, as its header shows it, judged against the manifest before a byte of it is read.

Rules this module keeps:

- Pure: no IO, no torch. Every problem is noted, with the tensor or the part that it concerns.
- What will be allocated follows from what the manifest says alone; a payload that asks for more is refused (C06).
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

import hashlib

from hotglm.delta_fields import WHOLE, DeltaFields, TensorDelta
from hotglm.document import Report
from hotglm.errors import HeaderError, shorten_repr
from hotglm.file_entry import combine_pieces
from hotglm.header import PREFIX_NBYTES, Header, TensorEntry, parse_header, parse_header_length
from hotglm.manifest_fields import Manifest, ReleasedTensor

__all__ = ["report_payload_faults", "report_result_faults"]


def report_payload_faults(manifest: Manifest, delta: DeltaFields, header: Header, *, report: Report) -> None:
    """Note in what the tensors of a payload are not those that the manifest of its delta names (X4 to X6)."""
    used = {part for one in delta.tensors.values() for part in one.parts} | set(delta.headers.values())
    for part in sorted(used - header.tensors.keys()):
        report.add("DELTA_PART_MISSING", "Expected the part in the payload, got none.", tensor=part)
    for part in sorted(header.tensors.keys() - used):
        report.add("DELTA_PART_UNUSED", "Expected only parts that the manifest names, got another.", tensor=part)
    for name, one in delta.tensors.items():
        parts = [header.tensors[part] for part in one.parts if part in header.tensors]
        if len(parts) == len(one.parts):
            _report_parts(name, manifest.tensors[name], one, parts, report=report)
    nbytes = _add_up(manifest, delta)
    for path, part in delta.headers.items():
        if (entry := header.tensors.get(part)) is None:
            continue
        if entry.dtype != "U8" or len(entry.shape) != 1:
            report.add("DELTA_BAD_PART", "Expected the bytes of a header, as U8 in one dimension.", tensor=part)
        if (found := entry.nbytes + nbytes[path]) != (expected := delta.files[path].size):
            message = f"Expected {expected} bytes of header and tensors for {shorten_repr(path)}, got {found}."
            report.add("DELTA_BAD_RANGE", message, tensor=part, expected=expected, found=found)


def _add_up(manifest: Manifest, delta: DeltaFields) -> dict[str, int]:
    nbytes = dict.fromkeys(delta.files, 0)
    for one in manifest.tensors.values():
        nbytes[one.file] += one.nbytes
    return nbytes


def _report_parts(
    name: str, tensor: ReleasedTensor, one: TensorDelta, parts: list[TensorEntry], *, report: Report
) -> None:
    if one.codec == WHOLE:
        found, expected = (parts[0].torch_dtype, parts[0].shape), (tensor.dtype, tensor.shape)
        if found != expected:
            message = f"Expected {expected[0]} {list(expected[1])} in the payload, got {found[0]} {list(found[1])}."
            report.add("DELTA_BAD_PART", message, tensor=name)
        return
    nbytes = sum(part.nbytes for part in parts)
    if nbytes > tensor.nbytes:
        message = f"Expected parts of at most the {tensor.nbytes} bytes of the tensor, got {nbytes}."
        report.add("DELTA_TOO_LARGE", message, tensor=name, expected=tensor.nbytes, found=nbytes)


def report_result_faults(manifest: Manifest, delta: DeltaFields, path: str, text: bytes, *, report: Report) -> None:
    """Note in what the bytes in front of the data of a result's file are not what the manifest promises (X4).

    Args:
        manifest: of the delta.
        delta: its field.
        path: of the file.
        text: 8 bytes of length and the header.
        report: takes the problems.
    """
    part, entry = delta.headers[path], delta.files[path]
    try:
        nbytes = parse_header_length(text[:PREFIX_NBYTES], file_size=entry.size, file=path)
        header = parse_header(text[PREFIX_NBYTES:], file_size=entry.size, file=path)
    except HeaderError as error:
        report.extend(error.problems)
        return
    if nbytes != len(text) - PREFIX_NBYTES:
        message = f"Expected a header of {len(text) - PREFIX_NBYTES} bytes, got one that says {nbytes}."
        report.add("DELTA_BAD_PART", message, tensor=part)
        return
    expected = {name: (one.dtype, one.shape) for name, one in manifest.tensors.items() if one.file == path}
    if {name: (found.torch_dtype, tuple(found.shape)) for name, found in header.tensors.items()} != expected:
        message = f"Expected the header of {shorten_repr(path)} to name its tensors, got others."
        report.add("TENSOR_MISMATCH", message, tensor=part)
        return
    inside = [manifest.tensors[name].digest.removeprefix("sha256:") for name in header.tensors]
    digest = combine_pieces([hashlib.sha256(text).hexdigest(), *inside])
    if digest != entry.digest:
        message = f"Expected digest {entry.digest} for {shorten_repr(path)}, got {digest}."
        report.add("DIGEST_MISMATCH", message, tensor=part, expected=entry.digest, found=digest)
