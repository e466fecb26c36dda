"""Versions in descending order, as far down as somebody asks.

Rules this module keeps: pure. The highest of 12 000 is found without sorting them, in stretches of Python that give the
GIL up, and is not searched again while nothing was added or removed. Who asks for more than a few gets them sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

from hotglm.version import Version
from hotglm.weights.workers import yield_gil_when_due

__all__ = ["Ranking"]

_MAX_SEARCHES = 8
"""How many are searched for one by one; sorting 12 000 versions takes as long as some ten searches."""


class Ranking:
    """Names with their numbers and versions, the highest first; of equal versions the latest number.

    >>> ranking = Ranking()
    >>> for sequence, text in enumerate(["1.2", "1.10", "1.9"]):
    ...     ranking.add(f"{sequence}-{text}", sequence, Version(text))
    >>> [name for name, _ in ranking.descend()]
    ['1-1.10', '2-1.9', '0-1.2']
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._all: dict[str, tuple[int, Version]] = {}
        self._ordered: list[str] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._all)

    def add(self, name: str, sequence: int, version: Version) -> None:
        """Add one."""
        self._all[name] = (sequence, version)
        self._ordered = []

    def remove(self, name: str) -> None:
        """Remove one; a name that is not there is fine."""
        if self._all.pop(name, None) is not None:
            self._ordered = []

    def descend(self) -> Iterator[tuple[str, tuple[int, Version]]]:
        """Yield all, the highest first. Nothing may be added or removed meanwhile."""
        for at in range(len(self._all)):
            if at == len(self._ordered):
                self._ordered += [self._find_next()] if at < _MAX_SEARCHES else self._sort_rest()
            yield self._ordered[at], self._all[self._ordered[at]]

    def _sort_rest(self) -> list[str]:
        passed = set(self._ordered)
        rest = [(version, sequence, name) for name, (sequence, version) in self._all.items() if name not in passed]
        return [name for _, _, name in sorted(rest, reverse=True)]

    def _find_next(self) -> str:
        passed = set(self._ordered)
        best, highest = "", (-1, Version("0.dev0"))
        for name, one in self._all.items():
            if name not in passed and (not best or _is_above(one, highest)):
                best, highest = name, one
            yield_gil_when_due()
        return best


def _is_above(one: tuple[int, Version], other: tuple[int, Version]) -> bool:
    return other[1] < one[1] or (other[1] == one[1] and other[0] < one[0])
