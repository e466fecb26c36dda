"""Which release a word of the command line means: a directory; or in a store a label, a version or a number."""

from __future__ import annotations

from hotglm.release.directory import Release, open_release
from hotglm.release.store_opening import open_store

__all__ = ["open_target", "parse_target"]

_MAX_DIGITS = 16  # a number has no more (M5)


def parse_target(word: str) -> str | int:
    """Return a number where the word is one, else the word.

    >>> parse_target("7"), parse_target("1.0"), parse_target("stable")
    (7, '1.0', 'stable')
    """
    return int(word) if word.isascii() and word.isdecimal() and len(word) <= _MAX_DIGITS else word


def open_target(word: str, *, store: str | None) -> Release:
    """Open the release that is meant; the caller closes it.

    Raises:
        SourceError: it is not what its manifest says.
        StoreError: `store` is no store, or has no such release.
    """
    return open_release(word) if store is None else open_store(store).open_release(parse_target(word))
