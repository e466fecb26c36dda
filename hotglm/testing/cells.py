"""The cells of a compatibility matrix: what is planned, what is expected, and what came out. No torch.

Rules this module keeps:

- A cell is one running version, one incoming version and one value of every axis; all are text, so that a cell travels
  between processes and into reports as it is.
- What is declared is checked when cells are planned: an expectation that fits no cell is a mistake, and so is a name
  given twice; all are named at once.
- `CellResult.from_dict(result.to_dict()) == result`.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hotglm.errors import ArgumentError, Problem, VersionSyntaxError, shorten_repr
from hotglm.version import Version, VersionRange

__all__ = ["ANY", "Cell", "CellResult", "Outcome", "plan_cells"]

ANY = "*"
"""Stands for every version in the key of an expectation."""

_OPERATORS = ("<", ">", "=", "!", "~")


class Outcome(enum.StrEnum):
    """What became of a cell."""

    WORKS = "works"
    REFUSED = "refused"
    FAILED = "failed"
    WORKS_UNEXPECTEDLY = "works unexpectedly"
    REFUSED_UNEXPECTEDLY = "refused unexpectedly"
    SKIPPED = "skipped"
    NOT_RUN = "not run"

    @property
    def is_good(self) -> bool:
        """Whether it is as it was declared."""
        return self in (Outcome.WORKS, Outcome.REFUSED)

    @property
    def is_bad(self) -> bool:
        """Whether it is not as it was declared."""
        return not self.is_good and self is not Outcome.SKIPPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One running version, one incoming version, one value of every axis.

    Attributes:
        matrix: what the matrix is known by: the test that it belongs to.
        model: name of the model.
        running: version whose code runs.
        incoming: version that arrives.
        axes: name and value of every axis, in the order they were declared.
        expected: codes of which each alone is the declared reason to refuse; empty if it must work.
    """

    matrix: str
    model: str
    running: str
    incoming: str
    axes: tuple[tuple[str, str], ...] = ()
    expected: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """What the cell is called in the name of its test."""
        return ",".join([f"running={self.running}", f"incoming={self.incoming}", *map("=".join, self.axes)])

    def axis(self, name: str, default: str = "") -> str:
        """Return the value of an axis, or `default` where the matrix has no such axis."""
        return dict(self.axes).get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """Return it as data that `json.dumps` takes."""
        return {
            "matrix": self.matrix,
            "model": self.model,
            "running": self.running,
            "incoming": self.incoming,
            "axes": dict(self.axes),
            "expected": list(self.expected),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """Return the cell that `to_dict` described."""
        return cls(
            matrix=data["matrix"],
            model=data["model"],
            running=data["running"],
            incoming=data["incoming"],
            axes=tuple(data["axes"].items()),
            expected=tuple(data["expected"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What came out of one cell.

    Attributes:
        cell: which one.
        outcome: what became of it.
        code_version: version of the code that held the incoming weights; empty where it did not come to that.
        path: versions that the weights went through on their way to that code, the first and the last included; empty
            where no migration was needed.
        codes: why it was refused, where it was.
        message: the error, where there was one.
        num_passes: passes that ran under the swap.
        duration_s: how long the cell took, in seconds.
    """

    cell: Cell
    outcome: Outcome
    code_version: str = ""
    path: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    message: str = ""
    num_passes: int = 0
    duration_s: float = 0.0

    @property
    def num_up(self) -> int:
        """Migrations that lead upwards."""
        return sum(Version(a) < Version(b) for a, b in itertools.pairwise(self.path))

    @property
    def num_down(self) -> int:
        """Migrations that lead downwards."""
        return len(self.path[1:]) - self.num_up

    def to_dict(self) -> dict[str, Any]:
        """Return it as data that `json.dumps` takes, that of the cell included."""
        return {
            **self.cell.to_dict(),
            "outcome": self.outcome.value,
            "code_version": self.code_version,
            "path": list(self.path),
            "codes": list(self.codes),
            "message": self.message,
            "num_passes": self.num_passes,
            "duration_s": round(self.duration_s, 6),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CellResult:
        """Return the result that `to_dict` described."""
        return cls(
            cell=Cell.from_dict(data),
            outcome=Outcome(data["outcome"]),
            code_version=data["code_version"],
            path=tuple(data["path"]),
            codes=tuple(data["codes"]),
            message=data["message"],
            num_passes=data["num_passes"],
            duration_s=data["duration_s"],
        )


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_cells(
    *,
    matrix: str,
    model: str,
    running: Sequence[str],
    incoming: Sequence[str] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    expected: Mapping[tuple[str, ...], str | Sequence[str]] | None = None,
) -> tuple[Cell, ...]:
    """Return every cell of a matrix, running versions slowest, the last axis fastest.

    Args:
        matrix: what the matrix is known by.
        model: name of the model.
        running: versions whose code runs.
        incoming: versions that arrive; those that run where it is None.
        axes: further axes, each with its values.
        expected: which cells must be refused, and the code why, or several codes of which any will do. A key is
            (running, incoming), each a version, a range such as `"<2"` or `"*"`; what follows, `"axis=value"`, narrows
            it to cells with that value. The last key that fits a cell counts; the code `""` says that it works.

    Raises:
        ArgumentError: with everything that cannot be meant.
    """
    incoming, axes, expected = running if incoming is None else incoming, axes or {}, expected or {}
    problems = list(_find_problems(model=model, running=running, incoming=incoming, axes=axes, expected=expected))
    if problems:
        raise _mistake(problems)
    combinations = [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    cells = [
        Cell(matrix=matrix, model=model, running=one, incoming=other, axes=combination)
        for one in running
        for other in incoming
        for combination in combinations
    ]
    codes = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in expected.items()}
    fitting = [[key for key in codes if _fits(key, cell)] for cell in cells]
    if useless := [key for key in codes if not any(key in keys for keys in fitting)]:
        raise _mistake([_problem(f"Expected keys that fit a cell, got {shorten_repr(key)}") for key in useless])
    return tuple(
        Cell(
            matrix=matrix,
            model=model,
            running=cell.running,
            incoming=cell.incoming,
            axes=cell.axes,
            expected=tuple(filter(None, codes[keys[-1]])) if keys else (),
        )
        for cell, keys in zip(cells, fitting, strict=True)
    )


def _find_problems(
    *,
    model: object,
    running: object,
    incoming: object,
    axes: object,
    expected: object,
) -> Iterator[Problem]:
    if not (isinstance(model, str) and model):
        yield _problem(f"Expected the name of a model, got {shorten_repr(model)}")
    for name, versions in (("running", running), ("incoming", incoming)):
        yield from _find_bad_list(name, versions)
        yield from _find_bad_versions(name, versions if isinstance(versions, (list, tuple)) else ())
    if isinstance(axes, Mapping):
        for name, values in axes.items():
            if not isinstance(name, str) or not name.isidentifier() or name in ("running", "incoming"):
                yield _problem(f"Expected an axis with a plain name, got {shorten_repr(name)}")
            yield from _find_bad_list(f"axis {name}", values)
    else:
        yield _problem(f"Expected a mapping of axes, got {shorten_repr(axes)}")
    if isinstance(expected, Mapping):
        for key, codes in expected.items():
            yield from _find_bad_expectation(key, codes)
    else:
        yield _problem(f"Expected a mapping of expectations, got {shorten_repr(expected)}")


def _find_bad_list(name: str, values: object) -> Iterator[Problem]:
    texts = isinstance(values, (list, tuple)) and all(isinstance(value, str) and value for value in values)
    if not texts or not values:
        yield _problem(f"Expected a list of texts as {name}, got {shorten_repr(values)}")
    elif isinstance(values, (list, tuple)) and len(set(values)) < len(values):
        yield _problem(f"Expected each of {name} once, got {shorten_repr(values)}")


def _find_bad_versions(name: str, versions: Iterable[object]) -> Iterator[Problem]:
    for version in versions:
        try:
            Version(str(version))
        except VersionSyntaxError:
            yield _problem(f"Expected versions as {name}, got {shorten_repr(version)}")


def _find_bad_expectation(key: object, codes: object) -> Iterator[Problem]:
    if not (isinstance(key, tuple) and len(key) >= 2 and all(isinstance(part, str) for part in key)):
        yield _problem(f"Expected (running, incoming, 'axis=value', ...) as a key, got {shorten_repr(key)}")
        return
    if any("=" not in part for part in key[2:]):
        yield _problem(f"Expected 'axis=value' after the versions, got {shorten_repr(key)}")
    for part in key[:2]:
        if part.startswith(_OPERATORS):
            try:
                VersionRange(part)
            except VersionSyntaxError:
                yield _problem(f"Expected a range of versions, got {shorten_repr(part)}")
    texts = [codes] if isinstance(codes, str) else codes
    if not isinstance(texts, (list, tuple)) or not all(isinstance(code, str) for code in texts):
        yield _problem(f"Expected a code or a list of codes, got {shorten_repr(codes)}")


def _fits(key: tuple[str, ...], cell: Cell) -> bool:
    axes = {f"{name}={value}" for name, value in cell.axes}
    return (
        _has_version(key[0], cell.running) and _has_version(key[1], cell.incoming) and all(p in axes for p in key[2:])
    )


def _has_version(part: str, version: str) -> bool:
    return Version(version) in VersionRange(part) if part.startswith(_OPERATORS) else part in (version, ANY)


def _problem(message: str) -> Problem:
    return Problem(code="BAD_MATRIX", message=message)


def _mistake(problems: list[Problem]) -> ArgumentError:
    remedy = "see docs/testing.md: hotglm_matrix(model=..., running=[...], incoming=[...], axes={...}, expected={...})."
    return ArgumentError("Expected a matrix that can be meant.", problems=problems, remedy=remedy)
