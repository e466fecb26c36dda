"""The pytest plugin: compatibility matrices, faults on demand and golden releases as markers and fixtures.

Rules this module keeps:

- torch is not imported before a fixture that needs it is used: a suite that uses none pays nothing.
- Public pytest only. Under pytest-xdist results travel in the reports' own `user_properties`, and the controller alone
  prints and writes; the same properties end up in JUnit files.
- It may be named twice, as the entry point `hotglm` and by `-p hotglm.pytest_plugin`, and still is registered once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from hotglm.errors import ArgumentError
from hotglm.testing.cells import Cell, CellResult, Outcome, plan_cells
from hotglm.testing.faults import FaultPlan
from hotglm.testing.matrix import describe, gather, label_of, show_markdown, show_text
from hotglm.testing.matrix_page import make_page

if TYPE_CHECKING:
    from hotglm.testing.cell_run import CellRun
    from hotglm.testing.family import ModelFamily
    from hotglm.testing.golden_shelf import GoldenShelf

__all__ = ["hotglm_cell", "hotglm_faults", "hotglm_goldens", "hotglm_model", "hotglm_plan"]

_NAMES = ("hotglm", "hotglm.pytest_plugin")
_CELL, _STATUS = "hotglm.cell", "hotglm.status"
_HAS_PASSED = pytest.StashKey[bool]()
"""Whether the body of a test came to its end."""

_SETTINGS = ("model", "running", "incoming", "axes", "expected")
_MARKER = (
    "hotglm_matrix(model, running, incoming=None, axes={}, expected={}): run the test once for each running version, "
    "incoming version and value of every axis; see docs/testing.md of hotglm"
)


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Block the other name of this module once it is registered under one; pytest would refuse it as a duplicate."""
    name = manager.get_name(plugin)
    if getattr(plugin, "__name__", None) == __name__ and name in _NAMES:
        for other in _NAMES:
            if other != name and not manager.has_plugin(other):
                manager.set_blocked(other)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--hotglm-matrix` and the setting `hotglm_goldens`."""
    group = parser.getgroup("hotglm", "compatibility of model versions (hotglm)")
    group.addoption(
        "--hotglm-matrix",
        metavar="DIR",
        help="write the compatibility matrices to DIR as matrix.json, matrix.md and matrix.html",
    )
    parser.addini("hotglm_goldens", "directory of golden releases, from the root of the tests", default="tests/goldens")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and in the process that reports, gather results."""
    config.addinivalue_line("markers", _MARKER)
    if not hasattr(config, "workerinput"):  # what pytest-xdist gives its workers
        directory = config.getoption("--hotglm-matrix", default=None)  # no such option where a conftest came too late
        config.pluginmanager.register(_Reporter(_make_directory(directory)), "hotglm-matrix-reporter")


def _make_directory(text: str | None) -> Path | None:
    if text is None:
        return None
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--hotglm-matrix: expected a directory that can be made, got {error}") from error
    return Path(text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a cell once for each cell of its matrix."""
    marker = metafunc.definition.get_closest_marker("hotglm_matrix")
    if "hotglm_plan" not in metafunc.fixturenames:
        if marker is not None:
            pytest.fail(f"{metafunc.definition.nodeid}: hotglm_matrix needs the fixture hotglm_cell", pytrace=False)
        return
    cells, mistake = _plan(metafunc.definition.nodeid, marker)
    if mistake:
        pytest.fail(f"{metafunc.definition.nodeid}: {mistake}", pytrace=False)
    metafunc.parametrize("hotglm_plan", [pytest.param(cell, id=cell.id) for cell in cells], indirect=True)


def _plan(nodeid: str, marker: pytest.Mark | None) -> tuple[tuple[Cell, ...], str]:
    """Return the cells that a marker asks for, or what is wrong with it."""
    if marker is None or marker.args or not {"model", "running"} <= set(marker.kwargs) <= set(_SETTINGS):
        given = "no marker" if marker is None else ", ".join([*map(repr, marker.args), *marker.kwargs])
        return (), (
            f"Expected @pytest.mark.hotglm_matrix with model and running, and no more than {_SETTINGS}, got {given}. "
            "Remedy: name each of them: hotglm_matrix(model='ranker', running=['1.0', '2.0'])."
        )
    try:
        return plan_cells(matrix=nodeid, **marker.kwargs), ""
    except ArgumentError as error:
        return (), str(error)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the cell before anything of the test can fail or skip it, so that no cell is lost."""
    cell = getattr(getattr(item, "callspec", None), "params", {}).get("hotglm_plan")
    if isinstance(cell, Cell):
        _record(item, CellResult(cell=cell, outcome=Outcome.NOT_RUN))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note whether the body of a test came to its end; the report is pytest's own."""
    if call.when == "call":
        item.stash[_HAS_PASSED] = call.excinfo is None


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hotglm_plan(request: pytest.FixtureRequest) -> Cell:
    """Return the cell that this test is run for: `.running`, `.incoming`, `.axis(name)`."""
    cell: Cell = request.param
    return cell


@pytest.fixture
def hotglm_goldens(pytestconfig: pytest.Config) -> GoldenShelf:
    """Return the golden releases of the project: `make`, `verify_all`; the setting `hotglm_goldens` says where."""
    from hotglm.testing.golden_shelf import GoldenShelf

    return GoldenShelf(pytestconfig.rootpath / str(pytestconfig.getini("hotglm_goldens")))


@pytest.fixture
def hotglm_model(hotglm_plan: Cell, hotglm_goldens: GoldenShelf) -> ModelFamily:
    """Return code, weights and arguments of every version: by default registered classes and goldens. Override it."""
    return hotglm_goldens.find_family(hotglm_plan.model)


@pytest.fixture
def hotglm_cell(
    request: pytest.FixtureRequest, hotglm_plan: Cell, hotglm_model: ModelFamily, tmp_path: Path
) -> Iterator[CellRun]:
    """Yield one cell of the matrix; the test calls its `verify()`."""
    from hotglm.testing.cell_run import CellRun

    run = CellRun(
        hotglm_plan,
        hotglm_model,
        directory=tmp_path,
        record=lambda result: _record(request.node, result),
        skip=_skip,
    )
    yield run
    if not run.was_asked and request.node.stash.get(_HAS_PASSED, False):  # one that failed or skipped said why
        pytest.fail("Expected the test to call hotglm_cell.verify(), got no call.", pytrace=False)


@pytest.fixture
def hotglm_faults() -> Iterator[FaultPlan]:
    """Yield a plan of faults that is active until the test ends; a planned fault that never came fails the test."""
    with FaultPlan() as faults:
        yield faults


def _skip(reason: str) -> NoReturn:
    pytest.skip(reason)


def _record(item: pytest.Item, result: CellResult) -> None:
    """Note the result in the item's own properties, in place of what was noted before."""
    kept = [(name, value) for name, value in item.user_properties if name not in (_CELL, _STATUS)]
    status = label_of(result)
    item.user_properties[:] = [*kept, (_STATUS, status), (_CELL, json.dumps(result.to_dict()))]


# -- reports -----------------------------------------------------------------------------------------------------------


class _Reporter:
    """Gathers results from the reports of tests, wherever these ran, and tells them at the end."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._results: dict[str, CellResult] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties).get(_CELL)
        if found is None or (report.when == "teardown" and report.passed):
            return
        result = CellResult.from_dict(json.loads(str(found)))
        if report.skipped and result.outcome is Outcome.NOT_RUN:
            result = replace(result, outcome=Outcome.SKIPPED)
        elif (report.failed and not result.outcome.is_bad) or (result.outcome is Outcome.NOT_RUN and report.failed):
            result = replace(result, outcome=Outcome.FAILED, message=_find_error(report.longreprtext))
        self._results[report.nodeid] = result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self._directory is None or not self._results:
            return
        matrices = gather(self._results.values())
        document = describe(matrices)
        self._write("matrix.json", json.dumps(document, indent=1, ensure_ascii=True) + "\n")
        self._write("matrix.md", "\n".join(show_markdown(matrices)) + "\n")
        self._write("matrix.html", make_page(matrices, made_on=_of_text(document["made_on"])))

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        matrices = gather(self._results.values())
        if not matrices:
            return
        terminalreporter.section("hotglm compatibility")
        for matrix in matrices:
            for line in show_text(matrix, with_paths=config.get_verbosity() >= 0):
                terminalreporter.write_line(line)
        if self._directory is not None:
            terminalreporter.write_line(f"written to {self._directory}: matrix.json, matrix.md, matrix.html")

    def _write(self, name: str, text: str) -> None:
        if self._directory is not None:
            (self._directory / name).write_text(text, encoding="utf-8")


def _find_error(text: str) -> str:
    """Return the lines of a failure report that pytest marks as the error; all of it where there are none."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return "\n".join(lines) or text


def _of_text(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value}
