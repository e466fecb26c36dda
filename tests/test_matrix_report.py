"""Cells and matrices as data, text and pages: planned, gathered and shown the same way wherever they were run."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.errors import ArgumentError
from hotglm.testing.cells import Cell, CellResult, Outcome, plan_cells
from hotglm.testing.matrix import Matrix, describe, gather, label_of, show_markdown, show_text
from hotglm.testing.matrix_page import make_page

VERSIONS = ["1.0", "1.4", "2.0"]
HOSTILE = '<img src=x onerror="alert(1)">|`*\n# </td>'


def plan(**more: Any) -> tuple[Cell, ...]:
    return plan_cells(**{"matrix": "test.py::test", "model": "ranker", "running": VERSIONS, **more})


def make(cell: Cell, outcome: Outcome = Outcome.WORKS, **more: Any) -> CellResult:
    return CellResult(cell=cell, outcome=outcome, **more)


def gather_one(results: list[CellResult]) -> Matrix:
    (matrix,) = gather(results)
    return matrix


# -- planning ----------------------------------------------------------------------------------------------------------


def test_every_combination_is_planned_once() -> None:
    """Running versions by incoming versions by every axis, each combination once, under a name of its own."""
    cells = plan(incoming=["1.0", "2.0"], axes={"dtype": ["float32", "bfloat16"], "region": ["eu", "us", "asia"]})
    assert len(cells) == len({cell.id for cell in cells}) == 3 * 2 * 2 * 3
    assert cells[0].id == "running=1.0,incoming=1.0,dtype=float32,region=eu"
    assert (cells[0].axis("region"), cells[0].axis("planet", "earth")) == ("eu", "earth")


@pytest.mark.parametrize(
    ("expected", "refused"),
    [
        ({("1.0", "2.0"): "A"}, ["1.0<2.0/x=1", "1.0<2.0/x=2"]),
        ({("1.0", "2.0", "x=2"): "A"}, ["1.0<2.0/x=2"]),
        ({("<2", "2.0", "x=2"): "A"}, ["1.0<2.0/x=2", "1.4<2.0/x=2"]),
        ({("*", ">=1.4,<2", "x=1"): ["A", "B"]}, ["1.0<1.4/x=1", "1.4<1.4/x=1", "2.0<1.4/x=1"]),
        ({("1.0", "*", "x=1"): "A", ("1.0", "1.0"): ""}, ["1.0<1.4/x=1", "1.0<2.0/x=1"]),
    ],
)
def test_expectations_fit_versions_ranges_and_axes(expected: dict[Any, Any], refused: list[str]) -> None:
    """A key names versions, ranges or all of them, may be narrowed by axes, and the last that fits counts."""
    cells = plan(axes={"x": ["1", "2"]}, expected=expected)
    assert [f"{c.running}<{c.incoming}/x={c.axis('x')}" for c in cells if c.expected] == refused
    assert {c.expected for c in cells} - {()} <= {("A",), ("A", "B")}


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ({"model": ""}, "name of a model"),
        ({"running": []}, "texts as running"),
        ({"running": ["1.0", "1.0"]}, "each of running once"),
        ({"running": "1.0"}, "texts as running"),
        ({"incoming": ["one"]}, "versions as incoming, got 'one'"),
        ({"axes": {"running": ["1"]}}, "an axis with a plain name"),
        ({"axes": {"x": []}}, "texts as axis x"),
        ({"axes": ["x"]}, "a mapping of axes"),
        ({"expected": ["x"]}, "a mapping of expectations"),
        ({"expected": {"1.0": "A"}}, "as a key"),
        ({"expected": {("1.0", ">x"): "A"}}, "a range of versions"),
        ({"expected": {("1.0", "1.0", "x"): "A"}}, "'axis=value' after"),
        ({"expected": {("1.0", "1.0"): 3}}, "a code or a list"),
        ({"expected": {("9.0", "1.0"): "A"}}, "keys that fit a cell"),
    ],
)
def test_mistakes_are_named(mistake: dict[str, Any], text: str) -> None:
    """Whatever cannot be meant is refused by name when the matrix is planned."""
    with pytest.raises(ArgumentError, match=re.escape(text)):
        plan(**mistake)


# -- results -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_results_travel_as_json(data: st.DataObject) -> None:
    """from_dict(json(to_dict(r))) == r, whatever stands in the texts."""
    text = st.text(max_size=8)
    cell = Cell(
        matrix=data.draw(text),
        model=data.draw(text),
        running="1.0",
        incoming="2.0",
        axes=tuple(data.draw(st.dictionaries(text, text, max_size=3)).items()),
        expected=tuple(data.draw(st.lists(text, max_size=2))),
    )
    result = make(
        cell,
        data.draw(st.sampled_from(Outcome)),
        code_version=data.draw(text),
        path=tuple(data.draw(st.lists(text, max_size=3))),
        codes=tuple(data.draw(st.lists(text, max_size=3))),
        message=data.draw(text),
        num_passes=data.draw(st.integers(0, 10**6)),
        duration_s=data.draw(st.integers(0, 10**6)) / 10**6,
    )
    assert CellResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_labels_say_what_a_cell_needs() -> None:
    """A cell that works names its migrations up and down, or that new code came; any other its outcome."""
    cell = plan()[1]
    assert label_of(make(cell, code_version="1.0")) == "ok"
    assert label_of(make(cell, code_version="1.4")) == "ok, new code"
    assert label_of(make(cell, path=("2.0", "1.4", "1.0"))) == "ok, 2 down"
    assert label_of(make(cell, path=("2.0", "1.0", "1.4", "3.0"))) == "ok, 2 up, 1 down"
    labels = [label_of(make(cell, outcome)) for outcome in Outcome]
    assert len(set(labels)) == len(Outcome)


def test_results_come_together_in_any_order() -> None:
    """Whatever the order in which workers report, the same matrices come out; the worse of two results counts."""
    results = [make(cell, path=(cell.incoming, cell.running)) for cell in plan(axes={"x": ["1", "2"]})]
    shuffled = results.copy()
    random.Random(1).shuffle(shuffled)
    other = [make(cell, Outcome.REFUSED) for cell in plan(matrix="test.py::other", model="other")]
    assert gather([*shuffled, *other]) == gather([*other, *results])
    again = make(results[3].cell, Outcome.FAILED)
    for both in ([*shuffled, again], [again, *shuffled]):
        counted = Counter(result.outcome for result in gather_one(both).results)
        assert counted == {Outcome.WORKS: len(results) - 1, Outcome.FAILED: 1}


def test_axes_that_agree_are_shown_once() -> None:
    """Grids that are alike are one, under all their names; one cell that differs makes it another."""
    results = [make(cell) for cell in plan(axes={"x": ["1", "2", "3"]})]
    assert [grid.title for grid in gather_one(results).find_grids()] == ["x=1; x=2; x=3"]
    results[0] = make(results[0].cell, Outcome.SKIPPED)
    assert [grid.title for grid in gather_one(results).find_grids()] == ["x=1", "x=2; x=3"]


def test_a_matrix_with_holes_is_shown() -> None:
    """Where a cell was never run, because only some tests were selected, the grid has a gap and no more."""
    cells = plan()
    text = "\n".join(show_text(gather_one([make(cells[0]), make(cells[5])])))
    assert re.search(r"^  1\.0 +ok +-$", text, re.MULTILINE)
    assert re.search(r"^  2\.0 +- +ok$", text, re.MULTILINE)


def test_the_document_says_what_it_is() -> None:
    """The JSON document carries its schema, the versions it was made on, counts and whether all is as declared."""
    results = [make(cell) for cell in plan()]
    document = describe(gather(results))
    assert (document["schema"], document["is_good"]) == ("hotglm.matrix/1", True)
    assert document["matrices"][0]["counts"] == {"works": 9}
    assert document["made_on"]["torch"]
    assert not describe(gather([*results[1:], make(results[0].cell, Outcome.FAILED)]))["is_good"]
    json.dumps(document)


@pytest.mark.parametrize("outcome", Outcome)
def test_nothing_from_outside_gets_into_a_report_raw(outcome: Outcome) -> None:
    """Names, reasons and messages with markup and control characters are escaped in page, Markdown and terminal."""
    cell = Cell(
        matrix=HOSTILE, model=HOSTILE, running="1.0", incoming="1.0", axes=(("x", HOSTILE),), expected=(HOSTILE,)
    )
    matrices = gather([make(cell, outcome, codes=(HOSTILE,), message=f"{HOSTILE}\x1b[31m")])
    page = make_page(matrices, made_on={"torch": HOSTILE})
    assert "<img" not in page
    assert not re.search(r"<script|https?://|url\(|@import", page)
    assert "default-src 'none'" in page
    markdown = list(show_markdown(matrices))
    assert not any("<img" in line or "\n" in line or "\x1b" in line for line in markdown)
    lines = list(show_text(matrices[0]))
    assert all(line.isascii() and line.isprintable() for line in lines)
