"""Matrices gathered from the results of their cells, as data, for the terminal and as Markdown. No torch.

Rules this module keeps:

- Results may come in any order and from any number of processes: everything is sorted here, so that the same results
  always give the same report.
- Of two results of one cell (a test with further parameters) the worse one counts, else one could hide the other; of a
  test that was run again the reporter keeps the last result only.
- Combinations of axes whose grids are alike are shown once, under all their names.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hotglm.problem import shorten_repr
from hotglm.testing.cells import CellResult, Outcome
from hotglm.version import Version

__all__ = ["SCHEMA", "Grid", "Matrix", "describe", "gather", "label_of", "show_markdown", "show_text"]

SCHEMA = "hotglm.matrix/1"
"""Of the JSON document; changes when the meaning of a field does."""

Axes = tuple[tuple[str, str], ...]

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")
_MARKDOWN = {"<": "&lt;", ">": "&gt;", "&": "&amp;", **{character: f"\\{character}" for character in "\\`*_[]|#"}}

_MARKS = {
    Outcome.FAILED: "FAILED",
    Outcome.WORKS_UNEXPECTEDLY: "WORKS!",
    Outcome.REFUSED_UNEXPECTEDLY: "REFUSED!",
    Outcome.REFUSED: "refused",
    Outcome.SKIPPED: "skipped",
    Outcome.NOT_RUN: "not run",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Incoming versions down, running versions across, for combinations of axes that came out alike.

    Attributes:
        combinations: the combinations, each a name and value of every axis.
        rows: for every incoming version the results under each running version, None where there is none; those of the
            first combination.
    """

    combinations: tuple[Axes, ...]
    rows: Mapping[str, tuple[CellResult | None, ...]]

    @property
    def results(self) -> tuple[CellResult, ...]:
        """The results shown, row by row."""
        return tuple(result for row in self.rows.values() for result in row if result is not None)

    @property
    def title(self) -> str:
        """The combinations in words; empty where there are no axes."""
        return "; ".join(", ".join(map("=".join, combination)) for combination in self.combinations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """All results of one test.

    Attributes:
        name: the test.
        model: name of the model.
        results: sorted by incoming version, running version and axes.
    """

    name: str
    model: str
    results: tuple[CellResult, ...]

    @property
    def running(self) -> tuple[str, ...]:
        """The running versions, lowest first."""
        return tuple(sorted({result.cell.running for result in self.results}, key=Version))

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many cells came out how."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome: counted[outcome] for outcome in Outcome if counted[outcome]}

    @property
    def headline(self) -> str:
        """What came out, in one line."""
        counts = ", ".join(f"{count} {_word(outcome)}" for outcome, count in self.counts.items())
        return f"{len(self.results)} cells: {counts}"

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Every path of migrations that a cell took, once."""
        paths = {result.path for result in self.results if len(result.path) > 1}
        return tuple(sorted(paths, key=lambda path: (Version(path[0]), Version(path[-1]), path)))

    def find_grids(self) -> Iterator[Grid]:
        """Yield the grids to show, one for each group of combinations that came out alike."""
        groups: dict[object, list[Axes]] = {}
        found = {(r.cell.axes, r.cell.incoming, r.cell.running): r for r in self.results}
        incoming = tuple(sorted({result.cell.incoming for result in self.results}, key=Version))
        for axes in sorted({result.cell.axes for result in self.results}):
            shape = tuple(
                (label_of(result), result.path, result.codes, result.message)
                if (result := found.get((axes, i, r)))
                else None
                for i in incoming
                for r in self.running
            )
            groups.setdefault(shape, []).append(axes)
        for combinations in groups.values():
            rows = {i: tuple(found.get((combinations[0], i, r)) for r in self.running) for i in incoming}
            yield Grid(combinations=tuple(combinations), rows=rows)


def gather(results: Iterable[CellResult]) -> tuple[Matrix, ...]:
    """Return the matrices that `results` belong to, sorted by name."""
    worst: dict[tuple[str, str], CellResult] = {}
    for result in results:
        key = (result.cell.matrix, result.cell.id)
        if key not in worst or _badness(result) > _badness(worst[key]):
            worst[key] = result
    by_name: dict[str, list[CellResult]] = {}
    for result in worst.values():
        by_name.setdefault(result.cell.matrix, []).append(result)
    return tuple(
        Matrix(name=name, model=found[0].cell.model, results=tuple(sorted(found, key=_order)))
        for name, found in sorted(by_name.items())
    )


def _badness(result: CellResult) -> tuple[object, ...]:
    """Return what results of one cell are ranked by: first what went wrong, last what was skipped."""
    outcome = result.outcome
    return outcome.is_bad, outcome is not Outcome.SKIPPED, result.message, result.codes, result.path


def _order(result: CellResult) -> tuple[Version, Version, Axes]:
    return Version(result.cell.incoming), Version(result.cell.running), result.cell.axes


def label_of(result: CellResult) -> str:
    """Return what stands in a cell of a grid: whether it works, and how many migrations up and down it needs."""
    if result.outcome is not Outcome.WORKS:
        return _MARKS[result.outcome]
    if result.path:
        hops = [f"{num} {way}" for num, way in ((result.num_up, "up"), (result.num_down, "down")) if num]
        return f"ok, {', '.join(hops)}"
    return "ok, new code" if result.code_version not in ("", result.cell.running) else "ok"


def _word(outcome: Outcome) -> str:
    return {Outcome.WORKS: "work", Outcome.REFUSED: "refused as declared", Outcome.FAILED: "FAILED"}.get(
        outcome, outcome.value.upper() if outcome.is_bad else outcome.value
    )


# -- data --------------------------------------------------------------------------------------------------------------


def describe(matrices: Sequence[Matrix]) -> dict[str, Any]:
    """Return the matrices as data that `json.dumps` takes, with what they were made on."""
    return {
        "schema": SCHEMA,
        "made_on": {
            "hotglm": _find_version("hotglm"),
            "torch": _find_version("torch"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "is_good": not any(result.outcome.is_bad for matrix in matrices for result in matrix.results),
        "matrices": [
            {
                "name": matrix.name,
                "model": matrix.model,
                "counts": {outcome.value: count for outcome, count in matrix.counts.items()},
                "cells": [result.to_dict() for result in matrix.results],
            }
            for matrix in matrices
        ],
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- text --------------------------------------------------------------------------------------------------------------


def show_text(matrix: Matrix, *, with_paths: bool = True) -> Iterator[str]:
    """Yield the lines of a matrix for a terminal, in plain ASCII; at the end the paths of migrations, if asked for."""
    return map(_make_printable, _show_lines(matrix, with_paths=with_paths))


def _show_lines(matrix: Matrix, *, with_paths: bool) -> Iterator[str]:
    yield f"{matrix.model} ({matrix.name}): {matrix.headline}"
    for grid in matrix.find_grids():
        if grid.title:
            yield f"  with {grid.title}"
        head = ("incoming \\ running", *matrix.running)
        rows = [(incoming, *map(_label, results)) for incoming, results in grid.rows.items()]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for result in grid.results:
            if result.outcome not in (Outcome.WORKS, Outcome.SKIPPED):
                yield f"  {describe_refusal(result)}"
    if matrix.paths and with_paths:
        yield "  migrations"
        yield from (f"    {' -> '.join(path)}" for path in matrix.paths)


def _label(result: CellResult | None) -> str:
    return "-" if result is None else label_of(result)


def describe_refusal(result: CellResult) -> str:
    """Say in a line why a cell does not work, or works against its declaration; axes are left to what stands above."""
    cell = result.cell
    where = (
        f"{result.outcome.value.upper() if result.outcome.is_bad else 'refused'}: {cell.incoming} under {cell.running}"
    )
    if result.outcome is Outcome.REFUSED:
        return f"{where}, as declared: {', '.join(code for code in result.codes if code in cell.expected)}"
    line = " ".join(part.strip() for part in result.message.splitlines()[:2])
    return f"{where}: {shorten_repr(line, limit=160)[1:-1] if line else 'see the report of the test itself'}"


def show_markdown(matrices: Sequence[Matrix]) -> Iterator[str]:
    """Yield the lines of all matrices as Markdown."""
    yield "# Compatibility"
    for matrix in matrices:
        yield from ("", f"## {_escape(matrix.model)}", "", f"{_escape(matrix.name)}: {matrix.headline}.")
        for grid in matrix.find_grids():
            yield ""
            if grid.title:
                yield from (f"With {_escape(grid.title)}:", "")
            yield f"| incoming \\ running | {' | '.join(matrix.running)} |"
            yield f"|---|{'---|' * len(matrix.running)}"
            for incoming, results in grid.rows.items():
                yield f"| **{incoming}** | {' | '.join(map(_mark, results))} |"
            told = [r for r in grid.results if r.outcome not in (Outcome.WORKS, Outcome.SKIPPED)]
            yield from ("", *(f"- {_escape(describe_refusal(result))}" for result in told)) if told else ()
        if matrix.paths:
            yield from ("", "Migrations:", "")
            yield from (f"- {' → '.join(path)}" for path in matrix.paths)


def _mark(result: CellResult | None) -> str:
    text = _label(result)
    return f"**{text}**" if result is not None and result.outcome.is_bad else text


def _escape(text: str) -> str:
    return "".join(_MARKDOWN.get(character, character) for character in _make_printable(text))


def _make_printable(text: str) -> str:
    """Return `text` with everything but printable ASCII escaped."""
    return _NOT_PRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
