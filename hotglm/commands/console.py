"""What several commands print: one JSON document, counts, sizes, and which weights these are."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping

from hotglm.errors import VersionSyntaxError, shorten_repr
from hotglm.release.files import WeightFiles
from hotglm.version import Version

__all__ = [
    "NAME_KEY",
    "foreign_output",
    "identify_weights",
    "print_json",
    "read_declared_version",
    "show_count",
    "show_headline",
    "show_size",
]

NAME_KEY, _VERSION_KEY = "hotglm.name", "hotglm.version"


def identify_weights(weights: WeightFiles) -> dict[str, object]:
    """Return path, name and version of weights as JSON values."""
    version = read_declared_version(weights)
    return {
        "path": weights.path,
        "name": weights.metadata.get(NAME_KEY),
        "version": None if version is None else str(version),
    }


def show_headline(weights: WeightFiles) -> str:
    """Return path, name and version of weights on one line."""
    name, version = weights.metadata.get(NAME_KEY), read_declared_version(weights)
    parts = [
        shorten_repr(weights.path),
        *([f"model {shorten_repr(name)}"] if name is not None else []),
        f"version {version}" if version is not None else "no version",
    ]
    return ", ".join(parts)


def read_declared_version(weights: WeightFiles) -> Version | None:
    """Return the version that the metadata names; None where there is none, or one that does not parse."""
    text = weights.metadata.get(_VERSION_KEY)
    try:
        return None if text is None else Version(text)
    except VersionSyntaxError:
        return None


def show_count(num: int, noun: str) -> str:
    """Return a number with its noun.

    >>> show_count(1, "file"), show_count(2, "file")
    ('1 file', '2 files')
    """
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def show_size(nbytes: int) -> str:
    """Return a size for people, with the exact number where it is rounded.

    >>> show_size(1000), show_size(3 * 2**20)
    ('1000 bytes', '3.00 MiB (3145728 bytes)')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit} ({nbytes} bytes)"
    return show_count(nbytes, "byte")


@contextlib.contextmanager
def foreign_output() -> Iterator[None]:
    """Lead what the user's own code prints in the body to standard error; the answer stands alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(schema: str, document: Mapping[str, object]) -> None:
    """Print the one document of a `--json` answer; `schema` names its meaning and number, e.g. `hotglm.diff/1`."""
    print(json.dumps({"schema": schema, **document}, indent=2, ensure_ascii=True, allow_nan=False))
