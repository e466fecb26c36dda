"""What is going to be a release: which files, which of them are the weights, and what they say about themselves.

Rules this module keeps:

- Headers and small documents are read here, no weights.
- Of a directory everything moves that is not hidden; of an index its shards and the config beside it; of a file the
  file. Links are followed, because caches of models are made of them; only a release has none (R4).
- A source that is a release already is believed as far as its manifest goes, and every byte of it is verified again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hotglm.document import Report, parse_json
from hotglm.errors import ArgumentError, ReleaseError, SourceError, SourceReadError, shorten_repr
from hotglm.manifest_fields import Manifest, find_path_faults
from hotglm.release.directory import is_release, open_release
from hotglm.release.files import WeightFiles, find_weights, open_weights
from hotglm.release.reading import is_directory, read_status
from hotglm.release.tree import find_entries

__all__ = ["Draft", "open_draft"]

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An opened source of a release; the stack it was opened with closes it.

    Attributes:
        path: of the source.
        root: directory that the names are relative to.
        sources: name in the release -> path on disk.
        weights: name of the file or index to load; None where an earlier release had none.
        files: the open weights; None where there are none.
        manifest: of the source, where that is a release itself.
    """

    path: str
    root: str
    sources: Mapping[str, str]
    weights: str | None
    files: WeightFiles | None
    manifest: Manifest | None = None

    def read_metadata(self, key: str, default: object) -> Any:
        """Return the JSON under `key` in the metadata of the weights; `default` where there is none.

        Raises:
            SourceError: it is no JSON, or not of the type of `default`.
        """
        text = None if self.files is None else self.files.metadata.get(key)
        if text is None:
            return default
        report = Report(
            SourceError,
            headline=f"The metadata {key!r} of {shorten_repr(self.path)} was refused",
            remedy="write the file with hotglm.save_weights.",
            prefix="METADATA",
            file=self.path,
        )
        value = parse_json(text.encode(), report=report)
        if not isinstance(value, type(default)):
            report.stop("BAD_METADATA", f"Expected a {type(default).__name__}, got {shorten_repr(value)}.")
        return value


def open_draft(source: str | os.PathLike[str], *, stack: ExitStack) -> Draft:
    """Open `source` and find everything that moves with it.

    Args:
        source: a safetensors file, a shard index, a directory of either, or a release.
        stack: closes what is opened.

    Raises:
        ArgumentError: it is no path.
        ReleaseError: names that a release cannot hold, all of them; or a source that is a broken release.
        SourceError: its weights cannot be used.
    """
    try:
        path = os.path.abspath(os.fsdecode(source))
    except TypeError as error:
        found = shorten_repr(type(source).__name__)
        raise ArgumentError(f"Expected a path, got {found}.", remedy="give a str or os.PathLike.") from error
    if not is_directory(path):
        draft = _draft_file(path, stack=stack)
    elif is_release(path):
        return _draft_release(path, stack=stack)
    else:
        draft = _draft_directory(path, stack=stack)
    report = Report(
        ReleaseError,
        headline=f"{shorten_repr(path)} cannot become a release as it is",
        remedy="rename or leave out what is named.",
        prefix="RELEASE",
        file=path,
    )
    for name, fault in find_path_faults(draft.sources):
        report.add("BAD_PATH", f"Expected a plain name, got {shorten_repr(name)}, which has {fault}.")
    report.raise_if_any()
    return draft


def _draft_file(path: str, *, stack: ExitStack) -> Draft:
    files = stack.enter_context(open_weights(path))
    directory = os.path.dirname(path)
    names = {os.path.basename(path), *(os.path.basename(file.path) for file in files.files)}
    if path.endswith(".json") and _is_there(os.path.join(directory, _CONFIG)):
        names.add(_CONFIG)
    sources = {name: os.path.join(directory, name) for name in sorted(names)}
    return Draft(path=path, root=directory, sources=sources, weights=os.path.basename(path), files=files)


def _draft_directory(path: str, *, stack: ExitStack) -> Draft:
    main = find_weights(path)
    files = stack.enter_context(open_weights(path))
    names = [name for name, status in find_entries(path) if not stat.S_ISDIR(status.st_mode)]
    sources = {name: os.path.join(path, *name.split("/")) for name in sorted(names)}
    return Draft(path=path, root=path, sources=sources, weights=os.path.basename(main), files=files)


def _draft_release(path: str, *, stack: ExitStack) -> Draft:
    release = stack.enter_context(open_release(path))
    manifest = release.manifest
    files = None if manifest.weights is None else stack.enter_context(release.open_weights())
    sources = {name: release.find_path(name) for name in manifest.files}
    return Draft(path=path, root=path, sources=sources, weights=manifest.weights, files=files, manifest=manifest)


def _is_there(path: str) -> bool:
    try:
        read_status(path)
    except SourceReadError as error:
        if error.code != "NOT_FOUND":
            raise
        return False
    return True
