"""Names, patterns and templates: what matches, and that whatever can be turned round leads back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.errors import MigrationStepError
from hotglm.migration.expression import TensorSpec
from hotglm.migration.naming import NamePattern, NameTemplate, turn_round
from support.operations import make_sources

SPEC = TensorSpec(dtype="int8", shape=())
TEXTS = st.text(st.sampled_from("ab.0-_[(\\*+é/"), min_size=1, max_size=4)
BODIES = st.sampled_from([r"\d+", r"[ab]+", r"a|b", r"[^.]+", r"[(\]]?x*", r".*", r"\w{1,3}"])


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, str, int]:
    """Draw a pattern of texts and groups, a template that uses each group once, and the number of groups."""
    num_groups = draw(st.integers(0, 3))
    pattern = re.escape(draw(TEXTS))
    for number in range(num_groups):
        body = draw(BODIES)
        named = draw(st.booleans())
        pattern += (f"(?P<g{number + 1}>{body})" if named else f"({body})") + re.escape(draw(TEXTS))
    template = draw(TEXTS).replace("\\", "\\\\")
    for number in draw(st.permutations(range(1, num_groups + 1))):
        template += rf"\g<{number}>" + draw(TEXTS).replace("\\", "\\\\")
    return pattern, template, num_groups


@given(patterns(), st.data())
def test_a_way_down_is_right_or_refused(drawn: tuple[str, str, int], data: st.DataObject) -> None:
    """Up writes what re does; down gives a name that up leads back from, or is refused as groups match otherwise."""
    pattern, template, _ = drawn
    name = data.draw(st.from_regex(pattern, fullmatch=True))
    found = re.fullmatch(pattern, name)
    assert found is not None
    migrations = hotglm.Migrations("drawn")
    migrations.state("1.0", "2.0", [hotglm.Rename(pattern, template)])
    up, down = migrations.plan("1.0", "2.0"), migrations.plan("2.0", "1.0")
    new = up.plan_state({name: SPEC}).specs
    assert list(new) == [found.expand(template)]
    refused, back = None, {}
    try:
        back = dict(down.plan_state(new).specs)
    except MigrationStepError as error:
        refused = error.code
    if refused is None:
        assert up.plan_state(back).specs == new
    assert refused in {None, "NOT_INVERTED", "TENSOR_MISSING"}
    assert list(back) == [name] or len(found.groups()) > 1


@given(patterns())
def test_turning_round_twice_is_nothing(drawn: tuple[str, str, int]) -> None:
    """The inverse of the inverse matches and writes what the pattern does."""
    pattern, template, num_groups = drawn
    once = hotglm.Rename(pattern, template).inverse()
    assert once is not None
    twice = once.inverse()
    assert isinstance(twice, hotglm.Rename)
    assert re.compile(twice.pattern).groups == num_groups or NamePattern.parse(twice.pattern).literal is not None
    assert twice.inverse() == once


@given(TEXTS)
def test_an_escaped_name_is_that_name(name: str) -> None:
    """re.escape makes a name of any text, which is looked up and not searched for."""
    pattern = NamePattern.parse(re.escape(name))
    assert pattern.literal == name
    assert pattern.find_in({name: 0, f"{name}x": 0}) == [(name, None)]


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("a.b", ["a.b"], ["axb", "a.b.c"]),
        (r"a\.b", ["a.b"], ["axb"]),
        (r"a.(b)", ["a.b", "axb"], ["a.bb"]),
        (r"layers\.(\d+)\.w", ["layers.0.w", "layers.12.w"], ["layers.x.w", "xlayers.0.w", "layers.0.w2"]),
        (r"(a|b)\.w", ["a.w", "b.w"], ["c.w"]),
        (r"x|y", ["x", "y"], ["xy"]),
        (r"ab*", ["a", "abb"], ["b"]),
        (r"ab?c", ["ac", "abc"], ["bc"]),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, matches: list[str], others: list[str]) -> None:
    """Plain text is a name; a pattern matches whole names, also where their beginning is looked at first."""
    found = NamePattern.parse(pattern).find_in(dict.fromkeys([*matches, *others], 0))
    assert [name for name, _ in found] == matches


@pytest.mark.parametrize(
    ("pattern", "template", "turned"),
    [
        (r"encoder\.(.*)", r"backbone.\1", (r"backbone\.(.*)", r"encoder.\1")),
        (r"(\d+)\.(\w+)", r"\2.\1", (r"(\w+)\.(\d+)", r"\2.\1")),
        (r"(?P<n>\d+)\.w", r"\g<n>0", (r"(?P<n>\d+)0", r"\1.w")),
        (r"w\.(\d+)", r"v\1", (r"v(\d+)", r"w.\1")),
        (r"(a)1(b)", r"\1\2", ("(a)(b)", r"\g<1>1\2")),
        (r"a\[0\]", "b", ("b", "a[0]")),
        ("b", "a[0]", (r"a\[0\]", "b")),
    ],
)
def test_turning_round_can_be_read(pattern: str, template: str, turned: tuple[str, str]) -> None:
    """What was derived is what somebody would have written."""
    parsed = NamePattern.parse(pattern)
    found = turn_round(parsed, [NameTemplate.parse(template, parsed)], anchor=0)
    assert not isinstance(found, str)
    assert (found.pattern, found.origin) == turned


def test_a_group_that_took_no_part_is_empty() -> None:
    """A group of an alternative that did not match writes nothing."""
    rename = hotglm.Rename(r"(?:(a)|(b))\.w", r"x\1\2")
    assert list(rename.apply(make_sources({"b.w": SPEC}))) == ["xb"]
    assert rename.inverse() is None
