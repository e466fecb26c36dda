"""Versions of models: immutable, ordered, PEP 440 read as semantic versioning.

Rules this module keeps:

- The grammar is `packaging`'s; there is no second one. Epochs, pre-releases and local labels mean what PEP 440 says.
- The first three release numbers are major, minor and patch; missing ones are zero. Below 1.0 the minor number plays
  the part of the major one, as in Cargo's reading of semantic versioning: 0.3 to 0.4 may break callers.
- Nothing here reads a file, a clock or torch.
"""

from __future__ import annotations

import enum
import re
from functools import total_ordering

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion
from packaging.version import Version as _PackagingVersion

from hotglm.errors import VersionSyntaxError, shorten_repr

__all__ = ["Bump", "Version", "VersionRange"]

_MAX_LENGTH = 128
"""Longest version or range text that is parsed; anything longer is an attack or a mistake."""


@total_ordering
class Bump(enum.Enum):
    """How much a version number has to grow: `NONE < PATCH < MINOR < MAJOR`.

    >>> max(Bump.PATCH, Bump.MINOR)
    <Bump.MINOR: 'minor'>
    """

    NONE = "none"
    PATCH = "patch"
    MINOR = "minor"
    MAJOR = "major"

    def __lt__(self, other: object) -> bool:
        """Order by how much a caller can notice."""
        if not isinstance(other, Bump):
            return NotImplemented
        order = list(Bump)
        return order.index(self) < order.index(other)

    @classmethod
    def parse(cls, value: Bump | str) -> Bump:
        """Return the bump named by `value`.

        Raises:
            VersionSyntaxError: `value` names none.
        """
        try:
            return value if isinstance(value, Bump) else cls(value.lower())
        except (ValueError, AttributeError):
            raise VersionSyntaxError(
                f"Expected a bump, got {shorten_repr(value)}.",
                remedy=f"use one of {', '.join(repr(bump.value) for bump in cls)}.",
            ) from None


@total_ordering
class Version:
    """One version of a model, e.g. `2.1.0` or `1.4.0+d3b07384d113`.

    Immutable and hashable; equal to another version, or to a string that parses to it (a convenience for comparing; use
    one of the two, not both, as keys of one dictionary).

    >>> Version("1.4.0") < Version("1.10.0") and Version("1.4") == "1.4.0"
    True
    """

    __slots__ = ("_parsed",)
    _parsed: _PackagingVersion

    def __init__(self, text: str | Version) -> None:
        """Parse `text`.

        Raises:
            VersionSyntaxError: it is not a PEP 440 version, or longer than 128 characters.
        """
        if isinstance(text, Version):
            parsed = text._parsed
        else:
            try:
                if not isinstance(text, str) or len(text) > _MAX_LENGTH:
                    raise InvalidVersion
                parsed = _PackagingVersion(text)
            except InvalidVersion:
                raise VersionSyntaxError(
                    f"Expected a version as text, got {shorten_repr(text)}.",
                    remedy="write MAJOR.MINOR.PATCH with an optional local label, e.g. '2.1.0' or '2.1.0+nightly'.",
                ) from None
        object.__setattr__(self, "_parsed", parsed)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: versions are immutable."""
        raise AttributeError(f"Version is immutable; cannot set {name!r}")

    @property
    def release(self) -> tuple[int, int, int]:
        """Major, minor and patch number."""
        return (self._parsed.major, self._parsed.minor, self._parsed.micro)

    @property
    def epoch(self) -> int:
        """The number before `!`, which comes before all others in the order; 0 where there is none."""
        return self._parsed.epoch

    @property
    def local(self) -> str | None:
        """The local label after `+`, or None."""
        return self._parsed.local

    @property
    def public(self) -> Version:
        """The same version without its local label."""
        return Version(self._parsed.public)

    @property
    def is_prerelease(self) -> bool:
        """Whether it is a development, alpha, beta or candidate version."""
        return self._parsed.is_prerelease

    def with_local(self, label: str) -> Version:
        """Return this version with the local label `label` in place of its own.

        >>> str(Version("1.4.0+old").with_local("d3b07384d113"))
        '1.4.0+d3b07384d113'
        """
        return Version(f"{self._parsed.public}+{label}")

    def bumped(self, bump: Bump) -> Version:
        """Return the smallest release version that is `bump` above this one; for a pre-release, PATCH is its release.

        >>> str(Version("2.3.0").bumped(Bump.MAJOR)), str(Version("0.3.1").bumped(Bump.MAJOR))
        ('3.0.0', '0.4.0')
        >>> str(Version("2.0.0rc1").bumped(Bump.PATCH))
        '2.0.0'
        """
        major, minor, patch = self.release
        if bump is Bump.NONE:
            return self
        if bump is Bump.MAJOR and major > 0:
            numbers = (major + 1, 0, 0)
        elif bump is Bump.MAJOR or (bump is Bump.MINOR and major > 0):
            numbers = (major, minor + 1, 0)
        else:
            numbers = (major, minor, patch + 1)
        own, bumped = (self._with_release(release) for release in (self.release, numbers))
        return own if bump is Bump.PATCH and own > self else bumped

    def _with_release(self, numbers: tuple[int, int, int]) -> Version:
        epoch = f"{self._parsed.epoch}!" if self._parsed.epoch else ""
        return Version(epoch + ".".join(map(str, numbers)))

    def bump_to(self, other: Version) -> Bump:
        """Return what the step between this version and `other` claims, in either direction.

        Below 1.0 a step of the minor number claims MAJOR, and one of the patch number claims MINOR.

        >>> Version("1.4.0").bump_to(Version("1.5.2")), Version("0.4.0").bump_to(Version("0.3.0"))
        (<Bump.MINOR: 'minor'>, <Bump.MAJOR: 'major'>)
        """
        ours, theirs = self.release, other.release
        if self._parsed.epoch != other._parsed.epoch or ours[0] != theirs[0]:
            return Bump.MAJOR
        unstable = ours[0] == 0
        if ours[1] != theirs[1]:
            return Bump.MAJOR if unstable else Bump.MINOR
        if ours[2] != theirs[2]:
            return Bump.MINOR if unstable else Bump.PATCH
        return Bump.NONE if self._parsed.public == other._parsed.public else Bump.PATCH

    def __str__(self) -> str:
        """Return the normal form of PEP 440."""
        return str(self._parsed)

    def __repr__(self) -> str:
        """Return `Version('...')`."""
        return f"Version({str(self)!r})"

    def __hash__(self) -> int:
        """Hash by value."""
        return hash(self._parsed)

    def __eq__(self, other: object) -> bool:
        """Compare with a version, or with text that parses to one."""
        if isinstance(other, str):
            try:
                other = Version(other)
            except VersionSyntaxError:
                return False
        return self._parsed == other._parsed if isinstance(other, Version) else NotImplemented

    def __lt__(self, other: object) -> bool:
        """Order as PEP 440 does."""
        return self._parsed < other._parsed if isinstance(other, Version) else NotImplemented

    def __reduce__(self) -> tuple[type[Version], tuple[str]]:
        """Pickle as text."""
        return (Version, (str(self),))


class VersionRange:
    """A set of versions, e.g. `>=1.4,<3`. Empty text admits everything.

    Pre-releases and local labels are members where their numbers are: a range says what code can read, not what an
    installer should prefer.

    >>> Version("2.0.0+abc") in VersionRange(">=1.4,<3")
    True
    """

    __slots__ = ("_specifiers",)
    _specifiers: SpecifierSet

    def __init__(self, text: str | VersionRange = "") -> None:
        """Parse `text` as PEP 440 specifiers, or as one bare version, which then means that release and its locals.

        Raises:
            VersionSyntaxError: it does not parse.
        """
        if isinstance(text, VersionRange):
            self._specifiers = text._specifiers
            return
        try:
            if not isinstance(text, str) or len(text) > _MAX_LENGTH:
                raise InvalidSpecifier
            bare = re.fullmatch(r"\s*v?\d[^,<>=!~]*", text)
            self._specifiers = SpecifierSet(f"=={text.strip()}" if bare else text)
        except InvalidSpecifier:
            raise VersionSyntaxError(
                f"Expected a version range, got {shorten_repr(text)}.",
                remedy="write PEP 440 specifiers, e.g. '>=1.4,<3'.",
            ) from None

    def __contains__(self, version: Version | str) -> bool:
        """Tell whether `version` is in the range."""
        return self._specifiers.contains(str(Version(version)), prereleases=True)

    def __str__(self) -> str:
        """Return the specifiers, sorted."""
        return ",".join(sorted(str(specifier) for specifier in self._specifiers))

    def __repr__(self) -> str:
        """Return `VersionRange('...')`."""
        return f"VersionRange({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        """Compare by the set of specifiers."""
        return self._specifiers == other._specifiers if isinstance(other, VersionRange) else NotImplemented

    def __hash__(self) -> int:
        """Hash by the set of specifiers."""
        return hash(self._specifiers)
