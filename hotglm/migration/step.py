"""One step of a registry: from a range of versions to one version.

Rules this module keeps:

- A step leads upwards: its whole range lies below its target. A bare version as source means all versions from it up to
  the target.
- Going down a step leads to the lowest version of its range, which must therefore be in it.
- Whether a step can be gone down, and why not, is known without a config or a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hotglm.errors import MigrationGraphError, VersionSyntaxError, shorten_repr
from hotglm.migration.config import ConfigChange, FieldChange
from hotglm.migration.operation import Operation
from hotglm.migration.origin import describe_function
from hotglm.version import Version, VersionRange

__all__ = ["Hop", "Step", "StepSource", "make_source"]

_OLDEST = "0"
_RELEASE = re.compile(r"v?(?P<epoch>[0-9]+!)?(?P<release>[0-9]+(?:\.[0-9]+)*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSource:
    """The versions that a step starts from.

    Attributes:
        text: as it is shown; a bare version stays one.
        range: the range, which ends below the target.
        low: its lowest version.
        high: the lowest version above it, or, where `has_high`, its highest.
        has_high: whether `high` is in it.
        is_plain: whether it has every version in between.
    """

    text: str
    range: VersionRange
    low: Version
    high: Version
    has_high: bool
    is_plain: bool

    @property
    def span(self) -> str:
        """The range in words: `>=1.4,<2.0` for a bare `1.4`."""
        return f">={self.low},<{self.high}" if self.is_plain and not self.has_high else self.text

    @property
    def key(self) -> object:
        """What is equal for two ranges of the same versions."""
        return (self.low, self.high, self.has_high, "" if self.is_plain else str(self.range))

    def __contains__(self, version: Version) -> bool:
        """Tell whether a step starts from `version`."""
        inside = self.low <= version and (version <= self.high if self.has_high else version < self.high)
        if inside and self.is_plain and not (version.is_prerelease or version.local):
            return True
        return (inside or version.local is not None) and version in self.range


def make_source(source: str | Version | VersionRange, target: Version) -> StepSource:
    """Read what a step starts from.

    Raises:
        VersionSyntaxError: it is neither a version nor a range.
        MigrationGraphError: it is not wholly below `target`, or does not say where it begins.
    """
    bare = _find_bare(source)
    text = str(source if bare is None else bare).strip()
    if bare is not None and bare >= target:
        raise _refuse(text, target, f"its target {target} is not above it")
    range_ = VersionRange(f">={bare},<{target}" if bare is not None else source)  # type: ignore[arg-type]
    low, (high, has_high), is_plain = _find_bounds(text, range_, target)
    if high > target or (has_high and high == target):
        raise _refuse(text, target, f"its range reaches {target} and beyond", f"write {text},<{target}")
    if low not in range_:
        raise _refuse(text, target, f"its lowest version {low} is not in it", "begin the range with >=")
    return StepSource(text=text, range=range_, low=low, high=high, has_high=has_high, is_plain=is_plain)


def _find_bare(source: str | Version | VersionRange) -> Version | None:
    if isinstance(source, VersionRange):
        return None
    try:
        return Version(source)
    except VersionSyntaxError:
        return None


def _find_bounds(text: str, range_: VersionRange, target: Version) -> tuple[Version, tuple[Version, bool], bool]:
    lows, highs, is_plain = [Version(_OLDEST)], list[tuple[Version, bool]](), True
    for operator, version in re.findall(r"(===|[<>=!~]=|[<>])\s*([^,\s]+)", str(range_)):
        if operator in (">", "==="):
            raise _refuse(text, target, f"{operator}{version} does not say where it begins", "write >= in place of it")
        if operator == ">=":
            lows.append(Version(version))
        elif operator in ("<", "<="):
            highs.append((Version(version), operator == "<="))
        elif operator == "!=":
            is_plain = False
        elif operator == "==" and not version.endswith(".*"):
            lows.append(Version(version))
            highs.append((Version(version), True))
        else:
            lows.append(Version(version.removesuffix(".*")))
            highs.append((_find_end(version, num_dropped=1 if operator == "~=" else 0), False))
    if not highs:
        raise _refuse(text, target, "its range has no end", f"write {text},<{target}".lstrip(","))
    return max(lows), min(highs), is_plain


def _find_end(text: str, *, num_dropped: int) -> Version:
    """Return the first version above all that begin with the release of `text` without its last `num_dropped` numbers.

    As PEP 440 says of `~=`, suffixes do not count: `~=1.4.post1` is `>=1.4.post1,==1.*`.
    """
    found = _RELEASE.match(text)
    numbers = [int(number) for number in found["release"].split(".")] if found else [0]
    numbers = numbers[: len(numbers) - num_dropped]
    epoch = found["epoch"] or "" if found else ""
    return Version(epoch + ".".join(map(str, (*numbers[:-1], numbers[-1] + 1))))


def _refuse(source: str, target: Version, why: str, remedy: str = "") -> MigrationGraphError:
    return MigrationGraphError(
        f"Expected the step from {shorten_repr(source)} to {target} to lead upwards, got one that may go in a "
        f"circle: {why}.",
        remedy=(remedy or "give the lower version as source; the way down is derived") + ".",
        code="CYCLE",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How to get from any version in `source` to `target`, and back.

    Attributes:
        source: the versions that it starts from.
        target: the version that it leads to, where a new layout begins.
        config: changes of the config, in order; None where it stays as it is.
        config_down: explicit changes for the way down.
        state: operations on the state, in order; None where it stays as it is.
        state_down: explicit operations for the way down.
    """

    source: StepSource
    target: Version
    config: tuple[ConfigChange, ...] | None = None
    config_down: tuple[ConfigChange, ...] | None = None
    state: tuple[Operation, ...] | None = None
    state_down: tuple[Operation, ...] | None = None
    one_way: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Work out once why it cannot be gone down; empty where it can."""
        object.__setattr__(self, "one_way", tuple(self._find_one_way()))

    def _find_one_way(self) -> Iterator[str]:
        for change in () if self.config_down is not None else self.config or ():
            if not isinstance(change, FieldChange):
                yield f"{describe_function(change)} is a free function (give `down`)"
            elif why := change.why_not():
                yield f"{change}: {why}"
        for operation in () if self.state_down is not None else self.state or ():
            if why := operation.why_not():
                yield f"{operation}: {why}"

    def __str__(self) -> str:
        """Format as `1.4 -> 2.0`."""
        return f"{self.source.text} -> {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One step of a path, and which way it is gone.

    Attributes:
        step: the step.
        is_up: whether it is gone up.
    """

    step: Step
    is_up: bool

    @property
    def arrives(self) -> Version:
        """The version that it leads to: the target, or on the way down the lowest version of the range."""
        return self.step.target if self.is_up else self.step.source.low

    @property
    def changes(self) -> tuple[ConfigChange, ...]:
        """What it does to a config, in order."""
        step = self.step
        if self.is_up:
            return step.config or ()
        if step.config_down is not None:
            return step.config_down
        inverses = [change.inverse() for change in reversed(step.config or ()) if isinstance(change, FieldChange)]
        return tuple(inverse for inverse in inverses if inverse is not None)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What it does to a state, in order."""
        step = self.step
        if self.is_up:
            return step.state or ()
        if step.state_down is not None:
            return step.state_down
        inverses = [operation.inverse() for operation in reversed(step.state or ())]
        return tuple(inverse for inverse in inverses if inverse is not None)

    @property
    def is_derived(self) -> bool:
        """Whether its operations are inverses that nobody wrote down."""
        return not self.is_up and self.step.state_down is None

    def __str__(self) -> str:
        """Format as `1.4 -> 2.0`, or on the way down `2.0 -> 1.4`."""
        return str(self.step) if self.is_up else f"{self.step.target} -> {self.step.source.low}"
