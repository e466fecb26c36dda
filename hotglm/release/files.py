"""Weights on disk: a path -> open files whose headers were read and verified, and where each tensor stands in them.

Rules this module keeps:

- No torch. No byte of a tensor is read here, and none is believed: the loader copies and hashes them (P5).
- Descriptors are owned by one `WeightFiles` and closed when anything fails, whatever is raised. From then on paths mean
  nothing: a file that is renamed, replaced or unlinked is still read to its end (D04).
- Links are followed, as caches of models are made of them. Shards stand beside their index and nowhere else.
- All problems of all shards are named at once (P2).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType

from hotglm.document import Report, parse_json, verify_utf8
from hotglm.errors import (
    ArgumentError,
    HeaderError,
    Problem,
    ShardIndexError,
    SourceChangedError,
    SourceError,
    SourceReadError,
    shorten_repr,
)
from hotglm.header import (
    DEFAULT_LIMITS,
    PREFIX_NBYTES,
    Header,
    Limits,
    TensorEntry,
    parse_header,
    parse_header_length,
)
from hotglm.release.closing import Closing
from hotglm.release.index import index_report, parse_index, report_mismatches
from hotglm.release.metadata import merge_metadata
from hotglm.release.reading import (
    FileIdentity,
    close_quietly,
    is_directory,
    list_directory,
    open_regular,
    read_document,
    read_exactly,
    verify_identity,
)

__all__ = ["CONFIG_KEY", "FileIdentity", "TensorLocation", "WeightFile", "WeightFiles", "find_weights", "open_weights"]

CONFIG_KEY = "hotglm.config"
"""Key of a file's metadata that holds the model's config as a JSON object."""

_WEIGHTS = "model.safetensors"
_WEIGHTS_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_CONFIG = "config.json"
_FIRST_NBYTES = 2**16
"""How much of a file the first call reads: the headers of most are within it."""

_OF_THE_INDEX = frozenset({"BAD_PATH", "NOT_FOUND", "NOT_REGULAR"})
"""Codes of read errors that a wrong index explains; others (no descriptors, a bad disk) are raised as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One open safetensors file.

    Attributes:
        path: where it was opened; only for messages.
        fd: its descriptor, owned by the `WeightFiles` it is part of.
        size: in bytes, when it was opened.
        header: what its header says.
        header_sha256: hex digest of everything before the data: 8 bytes of length and the header.
        identity: what must not change while it is read.
    """

    path: str
    fd: int
    size: int
    header: Header
    header_sha256: str
    identity: FileIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """Where the bytes of one tensor stand.

    Attributes:
        file: the file they are in.
        entry: what its header says about the tensor.
        offset: of the first byte, from the start of the file.
    """

    file: WeightFile
    entry: TensorEntry
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.entry.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightFiles(Closing):
    """Open weights, of one file or of many shards; a context manager that closes them.

    Any thread may call any method; who closes it makes sure that nobody reads any more.

    Attributes:
        path: what was asked for.
        files: the files, in order of their names.
        tensors: name -> location, file by file in the order of the data; read-only.
        metadata: of all files together; read-only.
        config: the object under `hotglm.config` in the metadata, else that of `config.json` beside an index, in the
            directory that was asked for, or beside a `model.safetensors`; else None. Read-only at its first level.
    """

    path: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorLocation]
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None
    _descriptors: ExitStack = field(repr=False)

    @property
    def total_nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(location.nbytes for location in self.tensors.values())

    def verify_unchanged(self) -> None:
        """Refuse files that were written to or cut since they were opened; renamed or unlinked ones are still good.

        Raises:
            SourceChangedError: with every file that changed.
            SourceReadError: the OS did not say.
        """
        errors: list[SourceChangedError] = []
        for file in self.files:
            try:
                verify_identity(file.fd, identity=file.identity, path=file.path)
            except SourceChangedError as error:
                errors.append(error)
        if errors:
            problems = [problem for error in errors for problem in error.problems]
            raise SourceChangedError(errors[0].message, problems=problems, remedy=errors[0].remedy)

    def close(self) -> None:
        """Close all files. Again does nothing."""
        self._descriptors.close()


def open_weights(
    path: str | bytes | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, reads_config: bool = True
) -> WeightFiles:
    """Open the weights at `path` and verify their headers.

    Nothing stays open when it fails.

    Args:
        path: a safetensors file, a `*.safetensors.index.json`, or a directory in the layout of Hugging Face: with
            `model.safetensors`, else `model.safetensors.index.json`, else one other file or index.
        limits: our caps.
        reads_config: whether the config is looked for; a release has it in its manifest.

    Returns:
        The open files; the caller closes them.

    Raises:
        ArgumentError: `path` is no path.
        HeaderError: a header breaks the format or our caps.
        ShardIndexError: the index is broken, or says something else than its shards.
        SourceChangedError: a file changed while its header was read.
        SourceReadError: something cannot be opened or read.
        SourceError: it is not clear which file of a directory is meant, or the config is broken.
    """
    asked = _as_text(path)
    source = find_weights(asked) if is_directory(asked) else asked
    with ExitStack() as stack:
        if source.endswith(".json"):
            files, is_known_to_have_config = _open_shards(source, stack=stack, limits=limits), True
            if source != asked and os.path.basename(source) != f"{_WEIGHTS}.index.json":
                _verify_alone(asked, source=source, files=files)
        else:
            files = (_open_file(source, stack=stack, limits=limits),)
            is_known_to_have_config = source != asked or os.path.basename(source) == _WEIGHTS
        metadata = _merge_metadata(files, path=source)
        beside = os.path.join(os.path.dirname(source), _CONFIG) if is_known_to_have_config else None
        return WeightFiles(
            path=asked,
            files=files,
            tensors=MappingProxyType(dict(_locate(files))),
            metadata=MappingProxyType(metadata),
            config=_read_config(metadata, path=source, beside=beside, limits=limits) if reads_config else None,
            _descriptors=stack.pop_all(),
        )


def _as_text(path: str | bytes | os.PathLike[str]) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as error:
        remedy = "give a str, bytes or os.PathLike."
        raise ArgumentError(f"Expected a path, got {type(path).__name__}.", remedy=remedy) from error


def _open_file(path: str, *, stack: ExitStack, limits: Limits) -> WeightFile:
    fd, identity = open_regular(path)
    stack.callback(close_quietly, fd)
    first = read_exactly(fd, nbytes=min(identity.size, _FIRST_NBYTES), offset=0, path=path)
    nbytes = parse_header_length(first[:PREFIX_NBYTES], file_size=identity.size, file=path, limits=limits)
    end = PREFIX_NBYTES + nbytes
    if len(first) < end:
        first += read_exactly(fd, nbytes=end - len(first), offset=len(first), path=path)
    verify_identity(fd, identity=identity, path=path)
    return WeightFile(
        path=path,
        fd=fd,
        size=identity.size,
        header=parse_header(first[PREFIX_NBYTES:end], file_size=identity.size, file=path, limits=limits),
        header_sha256=hashlib.sha256(memoryview(first)[:end]).hexdigest(),
        identity=identity,
    )


def _open_shards(path: str, *, stack: ExitStack, limits: Limits) -> tuple[WeightFile, ...]:
    text = read_document(path, limit=limits.index_nbytes, error=ShardIndexError, code="INDEX_TOO_LARGE")
    index = parse_index(text, file=path, limits=limits)
    files: dict[str, WeightFile] = {}
    report = index_report(path)
    header_errors: list[HeaderError] = []
    for name in index.shards:
        try:
            files[name] = _open_file(os.path.join(os.path.dirname(path), name), stack=stack, limits=limits)
        except HeaderError as error:
            header_errors.append(error)
        except SourceReadError as error:
            if error.code not in _OF_THE_INDEX:
                raise
            report.extend(error.problems)
    report_mismatches(index, {name: file.header for name, file in files.items()}, report=report)
    _raise_for_shards(report, header_errors)
    return tuple(files.values())


def _raise_for_shards(report: Report, header_errors: list[HeaderError]) -> None:
    problems = [problem for error in header_errors for problem in error.problems]
    if header_errors and not report.problems:  # the index is right, its shards are not
        first = header_errors[0]
        message = (
            first.message if len(header_errors) == 1 else f"The headers of {len(header_errors)} shards were refused."
        )
        raise HeaderError(message, problems=problems, remedy=first.remedy)
    report.extend(problems)
    report.raise_if_any()


def _locate(files: Iterable[WeightFile]) -> Iterable[tuple[str, TensorLocation]]:
    for file in files:
        start = file.header.data_start
        for name, entry in file.header.tensors.items():
            yield name, TensorLocation(file=file, entry=entry, offset=start + entry.start)


def _merge_metadata(files: Iterable[WeightFile], *, path: str) -> dict[str, str]:
    report = index_report(path)
    merged = merge_metadata(((file.path, file.header.metadata) for file in files), report=report)
    report.raise_if_any()
    return merged


def _read_config(
    metadata: Mapping[str, str], *, path: str, beside: str | None, limits: Limits
) -> Mapping[str, object] | None:
    if (embedded := metadata.get(CONFIG_KEY)) is not None:
        what = f"metadata {CONFIG_KEY!r} of {shorten_repr(path)}"
        return parse_config(embedded.encode(), path=path, what=what, limit=limits.config_nbytes)
    if beside is None:
        return None
    try:
        text = read_document(beside, limit=limits.config_nbytes, error=SourceError, code="CONFIG_TOO_LARGE")
    except SourceReadError as error:
        if error.code != "NOT_FOUND":
            raise
        return None
    what = f"config {shorten_repr(beside)}"
    return parse_config(text, path=beside, what=what, limit=limits.config_nbytes, constants=True)


def parse_config(text: bytes, *, path: str, what: str, limit: int, constants: bool = False) -> Mapping[str, object]:
    """Return the object that the text of a config holds, read-only at its first level.

    Args:
        text: the whole of it.
        path: the file that it stands in.
        what: what it is called in a refusal.
        limit: most bytes that it may have.
        constants: whether `NaN` and `Infinity` may stand for numbers, as Hugging Face configs have them.

    Raises:
        SourceError: it is no JSON object.
    """
    report = Report(
        SourceError,
        headline=f"The {what} was refused",
        remedy="write a JSON object there, or remove it.",
        prefix="CONFIG",
        file=path,
    )
    if len(text) > limit:
        message = f"Expected at most {limit} bytes, got {len(text)}."
        report.stop("CONFIG_TOO_LARGE", message, expected=limit, found=len(text))
    verify_utf8(text, report=report)
    config = parse_json(text, report=report, constants=constants)
    if not isinstance(config, dict):
        report.stop("CONFIG_NOT_OBJECT", f"Expected a JSON object, got {shorten_repr(config)}.")
    return MappingProxyType(config)


def find_weights(path: str) -> str:
    """Return the file or index that is meant where the directory `path` is given as weights.

    Raises:
        SourceError: it is not clear which.
        SourceReadError: the directory cannot be listed.
    """
    names = [name for name in list_directory(path) if not name.startswith(".")]
    for name in (_WEIGHTS, f"{_WEIGHTS}.index.json"):
        if name in names:
            return os.path.join(path, name)
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    candidates = indexes or [name for name in names if name.endswith(_WEIGHTS_SUFFIX)]
    if len(candidates) == 1:
        return os.path.join(path, candidates[0])
    if candidates:
        raise _ambiguous(path, candidates)
    problem = Problem(code="NOT_FOUND", message=f"Expected {_WEIGHTS!r} or its index, got neither.", file=path)
    remedy = "give a directory that holds safetensors; other formats are not read."
    raise SourceReadError(f"No weights in {shorten_repr(path)}.", problems=[problem], remedy=remedy)


def _verify_alone(directory: str, *, source: str, files: Iterable[WeightFile]) -> None:
    """Refuse an index that was found by looking, when weights beside it are not its shards."""
    shards = {os.path.basename(file.path) for file in files}
    names = [name for name in list_directory(directory) if not name.startswith(".")]
    others = [name for name in names if name.endswith(_WEIGHTS_SUFFIX) and name not in shards]
    if others:
        raise _ambiguous(directory, [os.path.basename(source), *others])


def _ambiguous(directory: str, names: list[str]) -> SourceError:
    shown = ", ".join(shorten_repr(name) for name in names[:20])
    if len(names) > 20:
        shown += f" and {len(names) - 20} more"
    problem = Problem(
        code="AMBIGUOUS_SOURCE",
        message=f"Expected one file of weights or one index, got {shown}.",
        file=directory,
        found=tuple(names),
    )
    message = f"It is not clear which weights in {shorten_repr(directory)} are meant."
    return SourceError(message, problems=[problem], remedy="give the path of the file or index itself.")
