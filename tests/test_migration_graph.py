"""The version graph: the shortest path, the same as a search of all paths finds; gaps, forks and circles as errors."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.errors import AmbiguousPathError, MigrationGraphError, NoPathError, VersionSyntaxError
from hotglm.migration.step import Hop, Step
from hotglm.version import Version

MAX_PATH_MS = 50


def make(*steps: tuple[str, str] | tuple[str, str, bool]) -> hotglm.Migrations:
    """Return migrations with config steps that do nothing; a third False makes one that cannot be gone down."""
    migrations = hotglm.Migrations("ranker")
    for source, target, *is_two_way in steps:
        migrations.config(source, target, [] if is_two_way != [False] else [hotglm.DropField("x")])
    return migrations


def path_of(migrations: hotglm.Migrations, source: str, target: str) -> str:
    """Return the hops as text."""
    return ", ".join(map(str, migrations.plan(source, target).hops))


# -- the reference: every path, by the sentences of the documentation --------------------------------------------------


def layout_of(steps: tuple[Step, ...], version: Version) -> Version | None:
    """Return the target that began the layout of `version`."""
    return max((step.target for step in steps if step.target <= version), default=None)


def find_next(steps: tuple[Step, ...], version: Version) -> list[Step]:
    """Return the steps that may be gone up from `version`."""
    direct = [step for step in steps if version in step.source.range]
    own = layout_of(steps, version)
    return direct or [step for step in steps if own is not None and layout_of(steps, step.source.low) == own]


def find_paths(steps: tuple[Step, ...], source: Version, target: Version) -> Iterator[tuple[Hop, ...]]:
    """Yield every path, however long."""
    if layout_of(steps, source) == layout_of(steps, target):
        yield ()
    elif source < target:
        yield from find_paths_up(steps, source, target)
    else:
        yield from find_paths_down(steps, source, target)


def find_paths_up(steps: tuple[Step, ...], source: Version, target: Version) -> Iterator[tuple[Hop, ...]]:
    """Yield every path up, at least one step."""
    wanted = layout_of(steps, target)
    assert wanted is not None
    for step in find_next(steps, source):
        if step.target <= wanted:
            for rest in find_paths(steps, step.target, target):
                yield (Hop(step=step, is_up=True), *rest)


def find_paths_down(steps: tuple[Step, ...], source: Version, target: Version) -> Iterator[tuple[Hop, ...]]:
    """Yield every path down, at least one step."""
    own, wanted = layout_of(steps, source), layout_of(steps, target)
    for step in steps:
        if step.target != own or step.one_way:
            continue
        below = layout_of(steps, step.source.low)
        if below == wanted:
            if wanted is not None or target in step.source.range:
                yield (Hop(step=step, is_up=False),)
        elif below is not None and (wanted is None or below > wanted):
            for rest in find_paths_down(steps, step.source.low, target):
                yield (Hop(step=step, is_up=False), *rest)


def show(hop: Hop) -> str:
    """Return a hop with the whole range that it leads from or to."""
    ends = [hop.step.source.text, str(hop.step.target)]
    return " -> ".join(ends if hop.is_up else ends[::-1])


@st.composite
def graphs(draw: st.DrawFn) -> hotglm.Migrations:
    """Draw up to ten steps with every kind of source between versions 1.0 and 1.10."""
    migrations = hotglm.Migrations("drawn")
    for _ in range(draw(st.integers(1, 10))):
        low, target = sorted(draw(st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True)))
        end = draw(st.integers(low + 1, target))
        source = draw(
            st.sampled_from(
                [
                    f"1.{low}",
                    f">=1.{low},<1.{end}",
                    f"==1.{low}",
                    f"==1.{low}.*",
                    f">=1.{low},<1.{end},!=1.{low + 1}",
                ]
            )
        )
        with contextlib.suppress(MigrationGraphError):  # the same range and target drawn again
            migrations.config(source, f"1.{target}", [] if draw(st.integers(0, 4)) else [hotglm.DropField("x")])
    return migrations


VERSIONS = st.builds("1.{}{}".format, st.integers(0, 11), st.sampled_from(["", ".1", ".1+local"]))


@given(graphs(), VERSIONS, VERSIONS)
def test_the_path_is_the_shortest_of_all_paths(migrations: hotglm.Migrations, source: str, target: str) -> None:
    """The path chosen is the only shortest of all there are; several or none are the errors that say so."""
    paths = list(find_paths(migrations.history(), Version(source), Version(target)))
    shortest = [path for path in paths if len(path) == min(map(len, paths))]
    if not paths:
        with pytest.raises(NoPathError) as missing:
            migrations.plan(source, target)
        assert "Remedy: " in str(missing.value)
    elif len(shortest) > 1:
        with pytest.raises(AmbiguousPathError) as ambiguous:
            migrations.plan(source, target)
        named = {problem.message for problem in ambiguous.value.problems}
        assert len(named) == 2
        assert named <= {", ".join(map(show, path)) for path in shortest}
    else:
        assert migrations.plan(source, target).hops == shortest[0]


@given(graphs(), VERSIONS, VERSIONS)
def test_a_path_through_a_version_is_two_paths(migrations: hotglm.Migrations, source: str, target: str) -> None:
    """plan(a, c) is plan(a, b) and then plan(b, c) for every b that it comes by."""
    try:
        hops = migrations.plan(source, target).hops
    except (NoPathError, AmbiguousPathError):
        return
    for hop in hops[:-1]:
        middle = str(hop.arrives)
        assert (*migrations.plan(source, middle).hops, *migrations.plan(middle, target).hops) == hops


@given(graphs(), VERSIONS)
def test_nothing_to_do_is_an_empty_path(migrations: hotglm.Migrations, version: str) -> None:
    """From a version to itself nothing is done, wherever it lies."""
    path = migrations.plan(version, version)
    assert path.is_empty
    assert path.migrate_config({"a": [1]}) == {"a": [1]}
    assert path.plan_state({}).is_identity


@given(graphs())
def test_problems_are_what_planning_runs_into(migrations: hotglm.Migrations) -> None:
    """Where check finds one head, no gap and no fork, every version that a step starts from reaches the head."""
    steps = migrations.history()
    problems = {problem.code for problem in migrations.check()}
    heads = migrations.heads()
    assert ("TWO_HEADS" in problems) == (len(heads) > 1)
    assert set(heads) == {step.target for step in steps if not find_next(steps, step.target)}
    assert ("NO_WAY_DOWN" in problems) == any(step.one_way for step in steps)
    if problems <= {"NO_WAY_DOWN"}:
        migrations.verify()
        for step in steps:
            assert migrations.plan(step.source.low, heads[0]).hops
    elif problems - {"NO_WAY_DOWN"}:
        with pytest.raises(MigrationGraphError):
            migrations.verify()


# -- named cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "path"),
    [
        ("1.4.2", "2.3.0", "1.4 -> 2.0, 2.0 -> 2.2"),
        ("1.4", "2.0", "1.4 -> 2.0"),
        ("1.9", "2.1.7", "1.4 -> 2.0"),
        ("2.0.5", "2.1", ""),
        ("2.1", "9.0", "2.0 -> 2.2, 2.2 -> 3.0"),
        ("3.1", "1.5", "3.0 -> 2.2, 2.2 -> 2.0, 2.0 -> 1.4"),
        ("3.1", "2.9", "3.0 -> 2.2"),
        ("1.4.0+d3b07384d113", "3.0.0+nightly", "1.4 -> 2.0, 2.0 -> 2.2, 2.2 -> 3.0"),
    ],
)
def test_a_chain_is_gone_up_and_down(source: str, target: str, path: str) -> None:
    """A layout begins at the target of a step and lasts until the next one, for every version in between."""
    assert path_of(make(("1.4", "2.0"), ("2.0", "2.2"), ("2.2", "3.0")), source, target) == path


def test_a_shortcut_is_taken() -> None:
    """One step that leads past others is shorter than these."""
    migrations = make(("1.0", "1.5"), ("1.5", "2.0"), (">=1.0,<1.5", "2.0"))
    assert path_of(migrations, "1.2", "2.4") == ">=1.0,<1.5 -> 2.0"
    assert path_of(migrations, "1.2", "1.7") == "1.0 -> 1.5"
    assert path_of(migrations, "1.6", "2.4") == "1.5 -> 2.0"


def test_branches_merge() -> None:
    """Two lines of versions that were developed side by side lead to one version, each by a step of its own."""
    migrations = make((">=1.0,<1.5", "2.0"), (">=1.5,<2.0", "3.0"), (">=2.0,<3.0", "3.0"), ("==1.4.*", "1.5"))
    assert path_of(migrations, "1.6", "3.0") == ">=1.5,<2.0 -> 3.0"
    assert path_of(migrations, "1.2", "3.0") == ">=1.0,<1.5 -> 2.0, >=2.0,<3.0 -> 3.0"
    assert migrations.heads() == (Version("3.0"),)


def test_a_layout_reaches_into_a_later_source() -> None:
    """A step that begins in the middle of a layout may be taken by all of it."""
    migrations = make(("1.0", "2.0"), (">=2.3,<3.0", "3.0"))
    assert path_of(migrations, "1.0", "3.0") == "1.0 -> 2.0, >=2.3,<3.0 -> 3.0"
    assert path_of(migrations, "2.1", "3.0") == ">=2.3,<3.0 -> 3.0"
    assert path_of(migrations, "3.0", "1.0") == "3.0 -> 2.3, 2.0 -> 1.0"


def test_a_gap_is_named_with_the_nearest_versions() -> None:
    """Where no step starts, the error names the ends that are nearest, and what to do."""
    migrations = make((">=1.0,<1.2", "2.0"), (">=1.6,<2.0", "2.0"))
    with pytest.raises(NoPathError) as caught:
        migrations.plan("1.4", "2.1")
    text = str(caught.value)
    assert "1.4" in text
    assert "2.1" in text
    assert ">=1.0,<1.2 -> 2.0" in text
    assert ">=1.6,<2.0 -> 2.0" in text
    assert text.splitlines()[-1].startswith("Remedy: register")
    assert [problem.code for problem in migrations.check()] == ["GAP"]
    assert "between 1.2 and 1.6" in migrations.check()[0].message


def test_a_way_that_ends_half_way_is_named() -> None:
    """The furthest version that was reached is in the error."""
    migrations = make(("1.0", "2.0"), ("2.0", "2.1"), ("==1.5.*", "3.0"))
    with pytest.raises(NoPathError, match=r"to 2\.1 and no further") as caught:
        migrations.plan("1.0", "3.0")
    assert "==1.5.* -> 3.0" in str(caught.value)


def test_two_heads_are_reported() -> None:
    """A layout that nothing leads up from, beside the newest, is a problem and an error of verify."""
    migrations = make((">=1.0,<1.5", "1.5"), (">=1.0,<1.5", "2.0"))
    assert migrations.heads() == (Version("1.5"), Version("2.0"))
    assert [problem.code for problem in migrations.check()] == ["TWO_HEADS"]
    with pytest.raises(MigrationGraphError, match=r"1\.5 beside 2\.0"):
        migrations.verify()
    with pytest.raises(NoPathError):
        migrations.plan("1.6", "2.0")


def test_an_ambiguous_path_names_both() -> None:
    """Two shortest paths are never chosen between."""
    migrations = make((">=1.0,<1.5", "1.5"), (">=1.0,<1.5", "1.7"), (">=1.5,<1.7", "2.0"), (">=1.7,<2.0", "2.0"))
    with pytest.raises(AmbiguousPathError) as caught:
        migrations.plan("1.2", "2.0")
    assert [problem.message for problem in caught.value.problems] == [
        ">=1.0,<1.5 -> 1.5, >=1.5,<1.7 -> 2.0",
        ">=1.0,<1.5 -> 1.7, >=1.7,<2.0 -> 2.0",
    ]
    assert "disjoint" in str(caught.value).splitlines()[-1]
    assert [problem.code for problem in migrations.check()] == ["AMBIGUOUS_PATH"] * 2


def test_a_one_way_step_is_named_on_the_way_down() -> None:
    """Who cannot go back learns which step, which change and what is missing; another way down is taken if there is."""
    migrations = make(("1.0", "2.0", False), ("2.0", "3.0"))
    with pytest.raises(NoPathError) as caught:
        migrations.plan("3.0", "1.0")
    assert "1.0 -> 2.0" in str(caught.value)
    assert "give `restore`" in str(caught.value)
    migrations.config(">=1.0,<2.0,!=1.7", "3.0", [])
    assert path_of(migrations, "3.0", "1.0") == "3.0 -> 1.0"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("2.0", "1.0"),
        ("2.0", "2.0"),
        (">=1.0", "2.0"),
        (">=1.0,<3.0", "2.0"),
        (">=1.0,<=2.0", "2.0"),
        ("==2.*", "2.0"),
        ("~=2.1", "2.5"),
        ("", "2.0"),
        (">1.0,<2.0", "2.0"),
        (">=1.0,!=1.0,<2.0", "2.0"),
        (">=3.0,<2.0", "2.0"),
    ],
)
def test_a_step_that_does_not_lead_upwards_is_refused(source: str, target: str) -> None:
    """Nothing can go in a circle, because each step leads above its whole range; the error names the step."""
    migrations = hotglm.Migrations("ranker")
    with pytest.raises(MigrationGraphError) as caught:
        migrations.config(source, target, [])
    assert caught.value.code == "CYCLE"
    assert repr(source) in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert migrations.history() == ()


@pytest.mark.parametrize(("source", "target"), [("one", "2.0"), ("1.0", "two"), (">=one", "2.0"), ("1.0", "")])
def test_a_version_that_does_not_parse_is_refused(source: str, target: str) -> None:
    """A source or target that is no version is the syntax error of versions."""
    with pytest.raises(VersionSyntaxError):
        hotglm.Migrations("ranker").config(source, target, [])


@pytest.mark.parametrize(
    ("source", "inside", "outside"),
    [
        ("==1.4.*", "1.4.9", "1.5"),
        ("~=1.4.2", "1.4.3", "1.5"),
        ("~=1.4", "1.9", "1.3"),
        ("~=1.4.post3", "1.9", "1.4.post2"),
        ("~=1.4.2rc1", "1.4.2", "1.5"),
        ("==0!1.*", "1.9", "0.9"),
        ("==1.4.2", "1.4.2", "1.4.3"),
        (">=1.4,<=1.5", "1.5", "1.5.1"),
        ("<1.4", "0.1", "1.4"),
        (">=1.0,<2.0,!=1.5", "1.6", "1.5"),
        ("1.4.*", "1.4.7", "1.5"),
        ("1.4", "1.99", "1.3"),
    ],
)
def test_every_kind_of_range_is_a_source(source: str, inside: str, outside: str) -> None:
    """A step starts from exactly the versions of its range."""
    migrations = make((source, "2.0"))
    assert path_of(migrations, inside, "2.0") == f"{source} -> 2.0"
    assert path_of(migrations, "2.0", inside).startswith("2.0 -> ")
    for there, back in ((outside, "2.0"), ("2.0", outside)):
        with pytest.raises(NoPathError):
            migrations.plan(there, back)


def test_a_prerelease_of_a_target_has_no_known_layout() -> None:
    """A candidate of the version that begins a layout may have the old or the new one; a step to a .dev0 says which."""
    with pytest.raises(NoPathError, match=r"2\.0\.dev0"):
        make(("1.4", "2.0")).plan("2.0rc1", "2.0")
    assert path_of(make(("1.4", "2.0.dev0")), "1.4", "2.0rc1") == "1.4 -> 2.0.dev0"


def test_what_there_is_can_be_read() -> None:
    """history, current, heads and explain say what is registered."""
    migrations = make(("2.0", "2.2"), ("1.4", "2.0", False))
    assert [str(step) for step in migrations.history()] == ["1.4 -> 2.0", "2.0 -> 2.2"]
    assert [str(migrations.current(v)) for v in ("1.3", "1.5", "2.0", "2.1.9", "7")] == [
        "None",
        "1.4",
        "2.0",
        "2.0",
        "2.2",
    ]
    assert migrations.explain().splitlines() == [
        "'ranker': 2 steps, heads: 2.2.",
        "  1.4 -> 2.0: config, up only",
        "  2.0 -> 2.2: config",
    ]
    assert hotglm.Migrations("empty").explain() == "'empty': 0 steps, heads: none."
    assert "nothing to do" in migrations.plan("2.0", "2.1").explain()


# -- size --------------------------------------------------------------------------------------------------------------


def median_ms(function: Callable[[], object], *, num_tries: int = 5) -> float:
    """Return the median time of a call, in ms of this thread, so that a busy machine does not count."""

    def measure() -> float:
        start = time.thread_time()
        function()
        return (time.thread_time() - start) * 1e3

    return statistics.median(measure() for _ in range(num_tries))


def test_a_thousand_versions_are_found_in_time() -> None:
    """A path through a chain of 1000 versions, or among 1000 steps from all versions below, takes under 50 ms."""
    chain = make(*((f"1.{n}", f"1.{n + 1}") for n in range(1, 1000)))
    wide = make(*(("1.1", f"1.{n + 1}") for n in range(1, 1000)))
    assert len(chain.plan("1.1", "1.1000").hops) == 999
    assert len(chain.plan("1.1000", "1.1").hops) == 999
    assert len(wide.plan("1.1", "1.1000").hops) == 1
    for migrations in (chain, wide):
        assert median_ms(lambda: migrations.plan("1.1", "1.1000")) < MAX_PATH_MS  # noqa: B023  # called at once
        assert median_ms(lambda: migrations.plan("1.1000", "1.1")) < MAX_PATH_MS  # noqa: B023  # called at once


def test_a_thousand_versions_are_indexed_in_time() -> None:
    """The first path after a step was registered, which indexes all of them, is found in under 50 ms too."""
    migrations = make(*((f"1.{n}", f"1.{n + 1}") for n in range(1, 1000)))

    def plan_afresh() -> None:
        migrations.config("1.1000", "1.1001", [])
        migrations.plan("1.1", "1.1001")

    assert median_ms(plan_afresh) < MAX_PATH_MS


def test_exponentially_many_paths_are_counted_only_to_two() -> None:
    """A graph with 2**200 shortest paths is refused as quickly as one with two."""
    migrations = make(
        *(
            step
            for n in range(200)
            for step in ((f"==1.{3 * n}", f"1.{3 * n + 3}"), (f">=1.{3 * n},<1.{3 * n}.1", f"1.{3 * n + 3}"))
        )
    )
    with pytest.raises(AmbiguousPathError):
        migrations.plan("1.0", "1.600")
    assert migrations.check()
