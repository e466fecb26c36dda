"""The payload of a delta on disk: opened, and its header judged before anything else of it is read.

Rules this module keeps:

- No torch. Nothing is decoded here, and no tensor of the result is made.
- A payload with other parts than its manifest names, or parts of another size, is refused whole (C04 to C06).
"""

from __future__ import annotations

from collections.abc import Mapping

from hotglm.delta_fields import WHOLE, DeltaFields
from hotglm.delta_payload import report_payload_faults, report_result_faults
from hotglm.document import Report
from hotglm.errors import DeltaError, shorten_repr
from hotglm.header import PREFIX_NBYTES, Limits, parse_header
from hotglm.manifest_fields import Manifest
from hotglm.release.files import WeightFile, WeightFiles, open_weights
from hotglm.release.index import index_report
from hotglm.release.metadata import merge_metadata
from hotglm.release.reading import read_exactly

__all__ = [
    "find_promises",
    "open_payload",
    "read_result_header",
    "read_result_metadata",
    "report_delta",
    "verify_results",
]


def open_payload(path: str, manifest: Manifest, *, limits: Limits) -> WeightFiles:
    """Open the payload at `path` of the delta `manifest`; see `Release.open_payload`."""
    files, delta = open_weights(path, limits=limits, reads_config=False), manifest.delta
    try:
        if delta is not None:
            report = report_delta(path)
            report_payload_faults(manifest, delta, files.files[0].header, report=report)
            report.raise_if_any()
    except BaseException:
        files.close()
        raise
    return files


def verify_results(file: WeightFile, manifest: Manifest) -> None:
    """Refuse an open payload whose headers are not those of the files that its delta leads to (X4).

    Raises:
        DeltaError: with everything that is wrong.
        SourceReadError: it cannot be read. SourceChangedError: it changed meanwhile.
    """
    report, delta = report_delta(file.path), manifest.delta
    if delta is not None:
        for path in delta.files:
            read_result_header(file, manifest, delta, path, report=report)
    report.raise_if_any()


def read_result_header(file: WeightFile, manifest: Manifest, delta: DeltaFields, path: str, *, report: Report) -> bytes:
    """Return the bytes in front of the data of the file `path` of a result, verified against what the manifest says.

    Raises:
        SourceReadError: they cannot be read. SourceChangedError: the payload changed meanwhile.
    """
    entry = file.header.tensors[delta.headers[path]]
    text = read_exactly(file.fd, nbytes=entry.nbytes, offset=file.header.data_start + entry.start, path=file.path)
    report_result_faults(manifest, delta, path, text, report=report)
    return text


def read_result_metadata(files: WeightFiles, manifest: Manifest) -> dict[str, str]:
    """Return the metadata of the files that a delta leads to, together, as its open payload holds their headers.

    Raises:
        DeltaError: the headers are not those of the files that the manifest promises (X4).
        ShardIndexError: the files disagree.
        SourceReadError: they cannot be read. SourceChangedError: the payload changed meanwhile.
    """
    file, delta, report = files.files[0], manifest.delta, report_delta(files.path)
    if delta is None:
        return {}
    texts = {path: read_result_header(file, manifest, delta, path, report=report) for path in delta.files}
    report.raise_if_any()
    headers = [
        (path, parse_header(text[PREFIX_NBYTES:], file_size=delta.files[path].size, file=path))
        for path, text in texts.items()
    ]
    shards = index_report(files.path)
    merged = merge_metadata(((path, header.metadata) for path, header in headers), report=shards)
    shards.raise_if_any()
    return merged


def find_promises(manifest: Manifest) -> Mapping[str, tuple[str, str]]:
    """Return what a manifest promises about the tensors in its own files: by name there, the file and the digest."""
    if (delta := manifest.delta) is None:
        return {name: (one.file, one.digest) for name, one in manifest.tensors.items()}
    whole = {one.parts[0]: name for name, one in delta.tensors.items() if one.codec == WHOLE}
    return {part: (delta.payload, manifest.tensors[name].digest) for part, name in whole.items()}


def report_delta(path: str) -> Report:
    """Return an empty report about the payload at `path`; its refusals are `DeltaError`."""
    return Report(
        DeltaError,
        headline=f"The payload {shorten_repr(path)} was refused",
        remedy="fetch the delta again if it was damaged on its way, or publish it again.",
        prefix="DELTA",
        file=path,
    )
