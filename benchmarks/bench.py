"""What every benchmark is given: sizes, rounds and a directory; and the rows it answers with.

Rules this module keeps: no torch. A row is data; whether its target is met is decided where it is measured, and is None
where no target stands (a control, or a peer's best case).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.worker import Stand, Worker

__all__ = ["Bench", "Row", "Sample", "alternate", "at_least", "at_most", "describe_size"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Sizes and rounds of one run.

    Attributes:
        directory: scratch space; weights are written there once and shared by the groups.
        quick: whether this is the smoke test, whose figures mean nothing.
        nbytes: size of the model that the figures are about.
        parts: of the group `device`, those that are wanted; all, where none is named.
    """

    directory: str
    quick: bool = False
    nbytes: int = 1024 * MIB
    parts: tuple[str, ...] = ()

    def size(self, nbytes: int) -> int:
        """Return a size that goes with a model of 1 GiB, in proportion to the size of this run."""
        return max(MIB // 4, nbytes * self.nbytes // (1024 * MIB))

    def rounds(self, full: int) -> int:
        """Return how often to measure."""
        return 1 if self.quick else full

    def start(self, kind: str, /, **arguments: Any) -> Worker | Stand:
        """Start a child process that holds one object (see `Worker`); the smoke test keeps it in this process."""
        return (Stand if self.quick else Worker)(kind, **arguments)

    def ask_once(self, kind: str, method: str, /, **arguments: Any) -> Any:
        """Call a method without arguments in a child that lives for that one call."""
        with self.start(kind, **arguments) as worker:
            return worker.ask(method)


@dataclass(frozen=True, slots=True)
class Sample:
    """Measurements of one thing, in seconds unless it is said otherwise, in the order they were taken."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Make a sample of one or more values."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle value."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The tenth percentile."""
        return self._decile(0)

    @property
    def high(self) -> float:
        """The ninetieth percentile."""
        return self._decile(8)

    @property
    def worst(self) -> float:
        """The largest value."""
        return max(self.values)

    def _decile(self, index: int) -> float:
        if len(self.values) == 1:
            return self.values[0]
        return quantiles(self.values, n=10, method="inclusive")[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        group: key of the group, as `--rows` takes it.
        name: what was measured.
        hotglm: our figure.
        peer: the other one.
        peer_name: what the peer does.
        unit: of both: `"ns"`, `"us"`, `"ms"` (given in seconds), `"x"` or `"MiB"` (given as they are).
        ratio: what the target is about.
        ratio_name: how it was made.
        target: in words; empty where none stands.
        met: whether the ratio meets it; None where none stands.
        note: what a reader must know to judge it.
    """

    group: str
    name: str
    hotglm: Sample
    peer: Sample
    peer_name: str
    unit: str
    ratio: float
    ratio_name: str
    target: str = ""
    met: bool | None = None
    note: str = ""


def describe_size(nbytes: int) -> str:
    """Return a size in words, rounded.

    Example:
        >>> describe_size(1 << 30), describe_size(10 << 20), describe_size(41000)
        ('1 GiB', '10 MiB', '40 KiB')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.0f} {name}"
    return f"{nbytes / 1024:.0f} KiB"


def at_least(ratio: float, limit: float) -> bool:
    """Tell whether a factor of improvement is reached."""
    return ratio >= limit


def at_most(ratio: float, limit: float) -> bool:
    """Tell whether a factor of cost is kept."""
    return ratio <= limit


def alternate(sides: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, Sample]:
    """Measure every side once a round; each round begins with another one, so that drift and neighbours hit all."""
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        turn = index % len(names)
        for name in (*names[turn:], *names[:turn]):
            values[name].append(sides[name]())
    return {name: Sample.of(found) for name, found in values.items()}
