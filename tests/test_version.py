"""Versions, ranges and bumps: PEP 440 read as semantic versioning."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version as PackagingVersion

from hotglm.errors import VersionSyntaxError
from hotglm.version import Bump, Version, VersionRange

numbers = st.integers(0, 30)
releases = st.builds("{}.{}.{}".format, numbers, numbers, numbers)
suffixes = st.sampled_from(["", "a1", "b2", "rc1", ".post1", ".dev3", "+abc", "rc1+d3b07384d113"])
versions = st.builds(lambda release, suffix: Version(release + suffix), releases, suffixes)
plain_versions = releases.map(Version)
bumps = st.sampled_from(Bump)


# -- Bump --------------------------------------------------------------------------------------------------------------


def test_bumps_are_ordered_by_what_a_caller_can_notice() -> None:
    """NONE < PATCH < MINOR < MAJOR."""
    assert sorted([Bump.MAJOR, Bump.NONE, Bump.MINOR, Bump.PATCH]) == [Bump.NONE, Bump.PATCH, Bump.MINOR, Bump.MAJOR]


@given(bumps)
def test_a_bump_parses_from_its_value_in_any_case(bump: Bump) -> None:
    """A bump may be written as a word, in any case, or given as itself."""
    assert Bump.parse(bump.value.upper()) is Bump.parse(bump.value) is Bump.parse(bump) is bump


@pytest.mark.parametrize("value", ["huge", "", None, 3, "\x1b[31m"])
def test_a_word_that_names_no_bump_is_refused(value: object) -> None:
    """Refusal of an unknown bump names the four that exist and prints the word escaped."""
    with pytest.raises(VersionSyntaxError, match="'none', 'patch', 'minor', 'major'") as caught:
        Bump.parse(value)  # type: ignore[arg-type]
    assert "\x1b" not in str(caught.value)


def test_a_bump_is_not_comparable_with_a_word() -> None:
    """Comparing a bump with text is a type error, not a silent answer."""
    with pytest.raises(TypeError):
        _ = Bump.PATCH < "minor"


# -- Version: a value --------------------------------------------------------------------------------------------------


@given(versions)
def test_a_version_survives_text_pickle_and_copy(version: Version) -> None:
    """Version(str(v)) == v, and so do pickle and copy."""
    again = [Version(str(version)), Version(version), pickle.loads(pickle.dumps(version)), copy.deepcopy(version)]
    assert all(other == version and hash(other) == hash(version) for other in again)
    assert eval(repr(version)) == version  # noqa: S307 - a repr in this test's own grammar


@given(versions, versions, versions)
def test_order_is_total(a: Version, b: Version, c: Version) -> None:
    """Exactly one of <, ==, > holds, and < is transitive."""
    assert (a < b) + (a == b) + (a > b) == 1
    assert not (a < b < c) or a < c


@given(versions, versions)
def test_order_is_that_of_pep_440(a: Version, b: Version) -> None:
    """A version orders as `packaging` orders its text."""
    assert (a < b) == (PackagingVersion(str(a)) < PackagingVersion(str(b)))


@given(versions, versions)
def test_equal_versions_hash_equal(a: Version, b: Version) -> None:
    """Equality implies equal hashes, so versions may be keys."""
    assert a != b or hash(a) == hash(b)


def test_missing_numbers_are_zero() -> None:
    """1.4 is 1.4.0."""
    assert Version("1.4") == Version("1.4.0") == "1.4"
    assert Version("2").release == (2, 0, 0)


def test_a_version_is_not_equal_to_what_is_not_one() -> None:
    """Text that does not parse, and other types, are unequal without an error."""
    assert Version("1.0") != "one"
    assert Version("1.0") != 1.0
    with pytest.raises(TypeError):
        _ = Version("1.0") < "2.0"


def test_a_version_cannot_be_changed() -> None:
    """Versions are immutable."""
    with pytest.raises(AttributeError, match="immutable"):
        Version("1.0").release = (2, 0, 0)  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "one", "1..2", "1.0 beta!", "1" * 129, None, 1.0, b"1.0", "1.0\x1b[31m"])
def test_text_that_is_no_version_is_refused(text: object) -> None:
    """What is not PEP 440, or longer than 128 characters, is refused with an example and never printed raw."""
    with pytest.raises(VersionSyntaxError, match=r"'2\.1\.0'") as caught:
        Version(text)  # type: ignore[arg-type]
    assert caught.value.code == "BAD_VERSION"
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


# -- Version: labels ---------------------------------------------------------------------------------------------------


@given(versions)
def test_a_label_changes_nothing_but_the_label(version: Version) -> None:
    """with_local(x).local == x, its public part is the version's, and the step to it claims nothing."""
    labelled = version.with_local("d3b07384d113")
    assert labelled.local == "d3b07384d113"
    assert labelled.public == version.public
    assert version.bump_to(labelled) is Bump.NONE
    assert version.public.local is None


def test_prereleases_are_told() -> None:
    """Development, alpha, beta and candidate versions are pre-releases."""
    assert [Version(text).is_prerelease for text in ("1.0rc1", "1.0.dev1", "1.0", "1.0.post1")] == [
        True,
        True,
        False,
        False,
    ]


# -- Version: steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "claimed"),
    [
        ("1.2.3", "1.2.3", Bump.NONE),
        ("1.2.3", "1.2.3+abc", Bump.NONE),
        ("1.2.3+abc", "1.2.3+def", Bump.NONE),
        ("1.2.3", "1.2.4", Bump.PATCH),
        ("1.2.3rc1", "1.2.3", Bump.PATCH),
        ("1.2.3", "1.2.3.post1", Bump.PATCH),
        ("1.2.3", "1.3.0", Bump.MINOR),
        ("1.2.3", "2.0.0", Bump.MAJOR),
        ("0.3.1", "0.3.2", Bump.MINOR),
        ("0.3.1", "0.4.0", Bump.MAJOR),
        ("0.9.0", "1.0.0", Bump.MAJOR),
        ("1.2.3", "1!1.2.3", Bump.MAJOR),
    ],
)
def test_what_a_step_claims(old: str, new: str, claimed: Bump) -> None:
    """The highest number that differs says what a step claims, below 1.0 one place further left; both ways alike."""
    assert Version(old).bump_to(Version(new)) is claimed
    assert Version(new).bump_to(Version(old)) is claimed


@given(versions, versions)
def test_a_step_claims_the_same_in_both_directions(a: Version, b: Version) -> None:
    """bump_to(a, b) == bump_to(b, a), and is NONE exactly when the public parts are equal."""
    assert a.bump_to(b) is b.bump_to(a)
    assert (a.bump_to(b) is Bump.NONE) == (a.public == b.public)


@given(versions, versions, versions)
def test_a_detour_never_claims_less(a: Version, b: Version, c: Version) -> None:
    """bump_to(a, c) <= max(bump_to(a, b), bump_to(b, c)): steps are distances in a tree."""
    assert a.bump_to(c) <= max(a.bump_to(b), b.bump_to(c))


@given(plain_versions, bumps)
def test_a_bumped_version_claims_at_least_that_bump_and_is_above(version: Version, bump: Bump) -> None:
    """v.bump_to(v.bumped(b)) >= b, and above v unless b is NONE."""
    honest = version.bumped(bump)
    assert version.bump_to(honest) >= bump
    assert honest > version or bump is Bump.NONE
    assert version.bumped(Bump.NONE) == version


@pytest.mark.parametrize(
    ("before", "after"),
    [("2.0.0rc1", "2.0.0"), ("1!0.3.1.dev2", "1!0.3.1"), ("1.0.0.post1.dev1", "1.0.1"), ("1.2.3.4rc1", "1.2.4")],
)
def test_the_patch_above_a_prerelease_is_its_release(before: str, after: str) -> None:
    """The smallest release above a pre-release that only changes values is the release itself, where that is above."""
    assert Version(before).bumped(Bump.PATCH) == after


@given(plain_versions, bumps, bumps)
def test_a_bigger_bump_never_gives_a_lower_version(version: Version, a: Bump, b: Bump) -> None:
    """`v.bumped(a) <= v.bumped(b)` when a <= b."""
    assert a > b or version.bumped(a) <= version.bumped(b)


@given(plain_versions, plain_versions, bumps)
def test_a_bumped_version_is_the_smallest_that_claims_it(version: Version, other: Version, bump: Bump) -> None:
    """No release version above v that claims at least b is below v.bumped(b)."""
    if other > version and version.bump_to(other) >= bump:
        assert version.bumped(bump) <= other


# -- VersionRange ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">=1.4,<3", ["1.4", "2.0.0", "2.9.9+abc", "1.5rc1"], ["1.3.9", "3.0.0"]),
        ("==1.4", ["1.4.0", "1.4.0+abc"], ["1.4.1"]),
        ("1.4", ["1.4.0", "1.4.0+abc"], ["1.4.1", "1.5"]),
        ("~=1.4", ["1.4", "1.9"], ["2.0", "1.3"]),
        ("!=1.5", ["1.4"], ["1.5"]),
        ("", ["0.0.1", "99!1.0", "1.0.dev1"], []),
        (">=1.4,!=1.7.2,<2", ["1.7.3"], ["1.7.2", "2.0"]),
    ],
)
def test_what_a_range_holds(text: str, inside: list[str], outside: list[str]) -> None:
    """Specifiers mean what PEP 440 says, with labels and pre-releases where their numbers are."""
    versions_in = VersionRange(text)
    assert all(version in versions_in and Version(version) in versions_in for version in inside)
    assert not any(version in versions_in for version in outside)


@given(plain_versions, plain_versions, versions)
def test_a_half_open_range_holds_what_lies_between(low: Version, high: Version, version: Version) -> None:
    """`v in ">=a,<b"` implies a <= v < b up to labels; a release version between is always inside."""
    versions_in = VersionRange(f">={low},<{high}")
    if version in versions_in:
        assert low <= version
        assert version.public < high
    if version == Version("{}.{}.{}".format(*version.release)) and low <= version < high:
        assert version in versions_in


@given(st.sampled_from([">=1.4,<3", "", "1.4", "!=2", "<3,>=1.4", "~=1.2.3"]))
def test_a_range_survives_text_and_copy(text: str) -> None:
    """VersionRange(str(r)) == r with an equal hash."""
    one = VersionRange(text)
    for other in (VersionRange(str(one)), VersionRange(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
        assert other == one
        assert hash(other) == hash(one)
    assert VersionRange("<3,>=1.4") == VersionRange(">=1.4,<3")
    assert VersionRange("1.4") != ">=1.4"


@pytest.mark.parametrize("text", [">=", "latest", ">1,,<<3", None, 3, ">=1" * 64, "\x1b[31m"])
def test_text_that_is_no_range_is_refused(text: object) -> None:
    """What is not a set of specifiers is refused with an example and never printed raw."""
    with pytest.raises(VersionSyntaxError, match=r">=1\.4,<3") as caught:
        VersionRange(text)  # type: ignore[arg-type]
    assert "\x1b" not in str(caught.value)
