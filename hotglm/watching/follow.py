"""What is followed: a label, or the versions that a constraint admits.

Rules this module keeps: pure. A word that could be either is never guessed: a label is no version (S4).
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from hotglm.errors import ArgumentError, VersionSyntaxError, shorten_repr
from hotglm.release.ledger import verify_word
from hotglm.version import Version, VersionRange

__all__ = ["Follow", "parse_follow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """What is followed.

    Attributes:
        text: as it was written.
        label: the label; None for a constraint.
        versions: what the constraint admits; None for a label.
        prereleases: whether it admits pre-releases.
    """

    text: str
    label: str | None = None
    versions: VersionRange | None = None
    prereleases: bool = False

    def admits(self, version: Version) -> bool:
        """Tell whether the constraint admits a version."""
        is_wanted = self.prereleases or not version.is_prerelease
        return is_wanted and self.versions is not None and version in self.versions


def parse_follow(text: str, *, prereleases: bool = False) -> Follow:
    """Return what `text` says is to be followed.

    >>> parse_follow("stable").label, parse_follow(">=1.4,<2").label
    ('stable', None)
    >>> [parse_follow(text).admits(Version("2.0rc1")) for text in (">=1", "==2.0rc1")]
    [False, True]

    Args:
        text: a label, or a constraint such as `">=1.4,<2"`.
        prereleases: whether a constraint admits pre-releases; one that names a pre-release does.

    Raises:
        ArgumentError: it is neither.
    """
    try:
        return Follow(text=text, label=verify_word(text, what="label"))
    except ArgumentError:
        pass
    try:
        if not isinstance(text, str) or not text.strip():
            raise VersionSyntaxError("Expected a constraint, got none.")
        versions = VersionRange(text)
    except VersionSyntaxError as error:
        raise ArgumentError(
            f"Expected a label or a constraint on versions, got {shorten_repr(text)}.",
            remedy="follow a label such as 'stable', or versions such as '>=1.4,<2'.",
        ) from error
    names_one = bool(SpecifierSet(str(versions)).prereleases)
    return Follow(text=text, versions=versions, prereleases=prereleases or names_one)
