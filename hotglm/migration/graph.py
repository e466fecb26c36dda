"""The steps of one model as a graph, and the shortest path through it.

Rules this module keeps:

- A layout begins at the target of each step and lasts until the next one. Before the first target, what is known of a
  version is only whether a step starts from it.
- A step may be taken from a version in its source; where no step has that very version in its source, also by the
  layout in which its source begins. The same rule holds for the version that a path starts from and for each version
  that it arrives at, so `plan(a, c)` is `plan(a, b)` and then `plan(b, c)` wherever it comes by `b`.
- A path only goes up or only goes down. The shortest has the fewest hops; two of the same length are an error, never a
  choice.
- Finding a path takes one pass over the layouts between its ends. `tests/test_migration_graph.py` compares with a
  search of all paths.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hotglm.errors import AmbiguousPathError, NoPathError, Problem
from hotglm.migration.step import Hop, Step
from hotglm.version import Version

__all__ = ["Graph", "format_hops"]

_FAR = 1 << 60
_START = -1
"""Stands for the version that a path starts from, where others stand for a layout that it arrived at."""


@dataclass(slots=True)
class _Reached:
    """The best ways to one layout: how many hops, and the last hops of up to two of them with where those begin."""

    num_hops: int = _FAR
    last: list[tuple[Hop, int]] = field(default_factory=list)

    def offer(self, num_hops: int, hop: Hop, origin: int) -> None:
        if num_hops < self.num_hops:
            self.num_hops, self.last = num_hops, []
        if num_hops == self.num_hops and len(self.last) < 2:
            self.last.append((hop, origin))


@dataclass(slots=True)
class _Place:
    """Where a step hangs: runs of layouts that it may be taken from, and the layout that its source begins in."""

    step: Step
    origins: tuple[range, ...]
    below: int


class Graph:
    """The steps of one model, immutable. Layout 0 is what came before the first target; layout n begins at target n.

    Attributes:
        steps: oldest target first.
        targets: where layouts begin, lowest first, each once.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        """Index the steps."""
        self.steps: tuple[Step, ...] = tuple(sorted(steps, key=lambda s: (s.target, s.source.low, s.source.high)))
        self.targets: tuple[Version, ...] = tuple(dict.fromkeys(step.target for step in self.steps))
        self._into: list[list[_Place]] = [[] for _ in range(len(self.targets) + 1)]
        number = {target: index for index, target in enumerate(self.targets, start=1)}
        is_regular = not any(target.is_prerelease or target.local for target in self.targets)
        direct = [self._find_direct(step, is_regular=is_regular) for step in self.steps]
        covered = set[int]().union(*{run for runs in direct for run in runs})
        for step, runs in zip(self.steps, direct, strict=True):
            below = number.get(step.source.low) or self.find_layout(step.source.low)
            if below > 0 and below not in covered:
                runs = (range(below, below + 1), *runs)
            self._into[number[step.target]].append(_Place(step=step, origins=runs, below=below))

    def _find_direct(self, step: Step, *, is_regular: bool) -> tuple[range, ...]:
        """Return the runs of layouts whose first version is in the source of `step`."""
        source = step.source
        low, high = (bisect.bisect_left(self.targets, version) for version in (source.low, source.high))
        if source.has_high and high < len(self.targets) and self.targets[high] == source.high:
            high += 1
        if is_regular and source.is_plain:
            return (range(low + 1, high + 1),) if low < high else ()
        inside = [index + 1 for index in range(low, high) if self.targets[index] in source]
        return tuple(range(index, index + 1) for index in inside)

    def find_layout(self, version: Version) -> int:
        """Return the number of the layout that `version` has."""
        return bisect.bisect_right(self.targets, version.public if version.local else version)

    def find_layouts(self, target: Version) -> tuple[Version, ...]:
        """Return one version of every known layout, that of `target` included; several where layout 0 has several."""
        oldest = {step.source.low for step in self.steps if self.find_layout(step.source.low) == 0}
        known = sorted({*oldest, *self.targets})
        own = self.find_layout(target)
        return tuple(known) if any(self.find_layout(version) == own for version in known) else (*known, target)

    def find_current(self, version: Version) -> Version | None:
        """Return the first version of the layout of `version`; None where no step leads to or from it."""
        layout = self.find_layout(version)
        if layout > 0:
            return self.targets[layout - 1]
        return min((step.source.low for step in self.steps if version in step.source), default=None)

    def find_heads(self) -> tuple[Version, ...]:
        """Return the layouts that no step leads up from, lowest first."""
        left = {layout for places in self._into for place in places for run in place.origins for layout in run}
        return tuple(target for layout, target in enumerate(self.targets, start=1) if layout not in left)

    def find_problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the steps as a whole; see `Migrations.check`."""
        yield from self._find_forks()
        yield from self._find_gaps()
        for place in (place for places in self._into for place in places):
            if not place.origins and place.below > 0:
                yield Problem(
                    code="UNREACHABLE",
                    message=f"Expected some step to arrive where {place.step} starts, got none: from "
                    f"{self.targets[place.below - 1]} others lead on.",
                )
        for step in self.steps:
            for why in step.one_way:
                yield Problem(code="NO_WAY_DOWN", message=f"Expected {step} to have a way down, got none: {why}.")

    def _find_forks(self) -> Iterator[Problem]:
        heads = self.find_heads()
        for head in heads[:-1]:
            yield Problem(
                code="TWO_HEADS",
                message=f"Expected one head, got {head} beside {heads[-1]}: no step leads up from {head}.",
            )
        last = len(self.targets)
        for start in self._find_ambiguous(last):
            ways = itertools.islice(_find_ways(self._search_up(start, last), last), 2)
            yield from _describe_ambiguity(start, self.targets[-1], list(ways)).problems

    def _find_ambiguous(self, last: int) -> list[Version]:
        """Return where several shortest paths to the layout `last` begin, of the versions that steps start from."""
        targets = set(self.targets)
        distance, num_ways = [*[_FAR] * last, 0], [*[0] * last, 1]
        between = {step.source.low: (_FAR, 0) for step in self.steps if step.source.low not in targets}

        def relax(known: tuple[int, int], layout: int) -> tuple[int, int]:
            there = distance[layout] + 1
            if there > known[0]:
                return known
            return there, num_ways[layout] if there < known[0] else min(2, num_ways[layout] + known[1])

        for layout in range(last, 0, -1):
            for place in self._into[layout] if distance[layout] < _FAR else ():
                for origin in itertools.chain(*place.origins):
                    distance[origin], num_ways[origin] = relax((distance[origin], num_ways[origin]), layout)
                for start, known in between.items():
                    if start in place.step.source:
                        between[start] = relax(known, layout)
        starts = [start for start, (_, ways) in between.items() if ways > 1]
        return sorted(starts + [self.targets[k - 1] for k in range(1, last) if num_ways[k] > 1])

    def _find_gaps(self) -> Iterator[Problem]:
        """Yield the stretches before the first target that lie between the sources of steps."""
        oldest = [step.source for step in self.steps if self.find_layout(step.source.low) == 0]
        if not oldest:
            return
        reach = min(source.low for source in oldest)
        spans = sorted((source.low, source.high) for source in oldest)
        for low, high in [*spans, (self.targets[0], self.targets[0])]:
            if low > reach:
                yield Problem(
                    code="GAP",
                    message=f"Expected a step from every version up to {self.targets[0]}, got none from those between "
                    f"{reach} and {low}.",
                )
            reach = max(reach, high)

    def find_path(self, source: Version, target: Version) -> tuple[Hop, ...]:
        """Return the hops of the one shortest path; none where both have the same layout.

        Raises:
            NoPathError: there is no path; the problems name the nearest versions on both sides.
            AmbiguousPathError: there are several shortest paths; the problems name two.
        """
        for version in (source, target):
            self._verify_settled(version)
        first, last = self.find_layout(source), self.find_layout(target)
        if first == last:
            return ()
        found = self._search_up(source, last) if first < last else self._search_down(source, target)
        arrived = found.get(last)
        if arrived is None:
            raise self._describe_gap(source, target, found)
        ways = list(itertools.islice(_find_ways(found, last), 2))
        if len(ways) > 1:
            raise _describe_ambiguity(source, target, ways)
        return ways[0]

    def _verify_settled(self, version: Version) -> None:
        """Refuse a pre-release of a target: it may have the old layout or the new one."""
        if not version.is_prerelease:
            return
        layout = self.find_layout(version)
        if layout < len(self.targets) and self.targets[layout].release == version.release:
            target = self.targets[layout]
            raise NoPathError(
                f"Expected a version whose layout is known, got {version}, which comes before {target}, where a layout "
                "begins.",
                remedy=f"give the step {target}.dev0 as its target if its pre-releases have the new layout already.",
            )

    def _search_up(self, source: Version, last: int) -> dict[int, _Reached]:
        """Return the best ways from `source` to each layout above it, up to `last`."""
        first = self.find_layout(source)
        places = [place for layout in range(first + 1, last + 1) for place in self._into[layout]]
        starts = {id(place) for place in places if source in place.step.source}
        if not starts and first > 0:
            is_direct = any(source in place.step.source for rest in self._into[last + 1 :] for place in rest)
            starts = {id(place) for place in places if place.below == first and not is_direct}
        distance, found = [_FAR] * (last + 1), dict[int, _Reached]()
        for layout in range(first + 1, last + 1):
            reached = _Reached()
            for place in self._into[layout]:
                hop = Hop(step=place.step, is_up=True)
                if id(place) in starts:
                    reached.offer(1, hop, _START)
                for run in place.origins:
                    for origin in _find_least(distance, max(run.start, first + 1), min(run.stop, layout)):
                        reached.offer(distance[origin] + 1, hop, origin)
            if reached.last:
                distance[layout], found[layout] = reached.num_hops, reached
        return found

    def _search_down(self, source: Version, target: Version) -> dict[int, _Reached]:
        """Return the best ways from `source` to each layout below it, down to that of `target`."""
        first, last = self.find_layout(source), self.find_layout(target)
        found: dict[int, _Reached] = {}
        for layout in range(first, last, -1):
            if layout != first and layout not in found:
                continue
            origin = _START if layout == first else layout
            num_hops = 0 if layout == first else found[layout].num_hops
            for place in self._into[layout]:
                if place.step.one_way or place.below < last or (place.below == 0 and target not in place.step.source):
                    continue
                found.setdefault(place.below, _Reached()).offer(num_hops + 1, Hop(step=place.step, is_up=False), origin)
        return found

    def _describe_gap(self, source: Version, target: Version, found: dict[int, _Reached]) -> NoPathError:
        is_up = source < target
        reached = [self.targets[layout - 1] for layout in found if layout > 0]
        furthest = (max if is_up else min)(reached, default=source)
        return NoPathError(
            f"Expected steps from {source} {'up' if is_up else 'down'} to {target}, got "
            + ("none that starts there." if furthest == source else f"a way to {furthest} and no further."),
            problems=list(
                self._find_missing_up(furthest, target) if is_up else self._find_missing_down(furthest, target)
            ),
            remedy="register the missing step, or what a step lacks to be gone down (`down`, `restore`, `was`).",
        )

    def _find_missing_up(self, furthest: Version, target: Version) -> Iterator[Problem]:
        """Yield the steps nearest to `furthest` on both sides that would lead on to `target`."""
        leading, last = set[int](), self.find_layout(target)
        for layout in range(last, 0, -1):
            if layout == last or layout in leading:
                leading.update(below for place in self._into[layout] for run in place.origins for below in run)
        steps = [place.step for layout in {last, *leading} for place in self._into[layout]]
        below = max((s for s in steps if s.source.low <= furthest), key=lambda s: s.source.high, default=None)
        above = min((s for s in steps if s.source.low > furthest), key=lambda s: s.source.low, default=None)
        for step in (below, above):
            if step is not None:
                yield Problem(
                    code="NEAREST_STEP",
                    message=f"Expected {furthest} in the source of {step}, got {step.source.span}.",
                )

    def _find_missing_down(self, furthest: Version, target: Version) -> Iterator[Problem]:
        """Yield why each step that leads down from `furthest` cannot be gone, or does not lead on to `target`."""
        for place in self._into[self.find_layout(furthest)]:
            step = place.step
            if step.one_way:
                message = f"Expected {step} to have a way down, got none: {'; '.join(step.one_way)}."
            else:
                message = f"Expected {target} in the source of {step}, got {step.source.span}."
            yield Problem(code="NO_WAY_DOWN" if step.one_way else "NEAREST_STEP", message=message)


def _find_least(distance: Sequence[int], start: int, stop: int) -> Iterator[int]:
    """Yield up to two layouts in the run that are nearest to where the search began."""
    part = distance[start:stop]
    least = min(part, default=_FAR)
    at = -1
    for _ in range(min(2, part.count(least)) if least < _FAR else 0):
        at = part.index(least, at + 1)
        yield start + at


def _find_ways(found: dict[int, _Reached], layout: int) -> Iterator[tuple[Hop, ...]]:
    """Yield the best ways to `layout`; stop after two, there may be very many."""
    open_: list[tuple[int, tuple[Hop, ...]]] = [(layout, ())]
    while open_:
        at, hops = open_.pop()
        if at == _START:
            yield hops
            continue
        open_.extend((origin, (hop, *hops)) for hop, origin in reversed(found[at].last))


def _describe_ambiguity(source: Version, target: Version, ways: Sequence[tuple[Hop, ...]]) -> AmbiguousPathError:
    return AmbiguousPathError(
        f"Expected one shortest path from {source} to {target}, got several of {len(ways[0])} hops.",
        problems=[
            Problem(
                code="AMBIGUOUS_PATH",
                message=", ".join(str(h) if h.is_up else f"{h.step.target} -> {h.step.source.text}" for h in hops),
            )
            for hops in ways
        ],
        remedy="make the sources of the steps disjoint, or register one step that leads there directly.",
    )


def format_hops(hops: Sequence[Hop]) -> str:
    """Return the hops as one line: `1.4 -> 2.0, 2.0 -> 2.2`."""
    return ", ".join(map(str, hops))
