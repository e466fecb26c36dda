"""The kinds of differences between what two versions give back (see `hotglm.breakage` for the rules).

A new output under a name of its own is MINOR; everything else here is something that a caller can notice, MAJOR.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotglm.breakage import Breakage
from hotglm.problem import escape_text, shorten_repr
from hotglm.version import Bump

__all__ = [
    "OutputAdded",
    "OutputDtypeChanged",
    "OutputRemoved",
    "OutputRenamed",
    "OutputShapeChanged",
    "OutputStructureChanged",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRemoved(Breakage):
    """An output that callers could use is gone."""

    clause = "output {subject} was removed"
    remedy = "give the output back, until the next major version"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputAdded(Breakage):
    """There is a new output beside the others, under a name of its own."""

    bump = Bump.MINOR
    clause = "output {subject} was added"
    remedy = "nothing for callers of the old version; they need not read it"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRenamed(Breakage):
    """An output of the same layout has another name."""

    clause = "output {subject} was renamed to {new}"
    remedy = "keep the name, or give it under both names until the next major version"
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDtypeChanged(Breakage):
    """An output has another dtype."""

    clause = "output {subject} went from {old} to {new}"
    remedy = "convert the output to the dtype it had"
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShapeChanged(Breakage):
    """An output has another shape; a size that varies with the inputs is None."""

    clause = "output {subject} went from shape {old} to {new}"
    remedy = "cut or reshape the output to what it was"
    old: tuple[int | None, ...]
    new: tuple[int | None, ...]

    def explain(self) -> str:
        """Return a clause that says what changed; in words where it is the last size alone."""
        name, sizes = shorten_repr(self.subject), list(zip(self.old, self.new, strict=False))
        moved = [place for place, (a, b) in enumerate(sizes) if a is not None and b is not None and a != b]
        if len(self.old) == len(self.new) and moved == [len(self.old) - 1]:
            return f"output {name} went from {self.old[-1]} to {self.new[-1]} wide"
        before, after = (", ".join("*" if n is None else str(n) for n in shape) for shape in (self.old, self.new))
        return f"output {name} went from shape [{before}] to [{after}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStructureChanged(Breakage):
    """An output is another kind of thing, such as a dict where a tuple was, or has another number of parts."""

    clause = "output {subject} went from {old} to {new}"
    remedy = "give the output in the structure it had, until the next major version"
    old: str
    new: str

    def explain(self) -> str:
        """Return a clause that says what changed."""
        before, after = (escape_text(text, limit=80) for text in (self.old, self.new))
        return f"output {shorten_repr(self.subject)} went from {before} to {after}"
