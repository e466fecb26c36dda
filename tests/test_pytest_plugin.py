"""The pytest plugin: matrices, fixtures, reports, and how it keeps out of the way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from hotglm.testing import make_golden
from hotglm.testing.cells import CellResult, Outcome
from test_docs_examples import find_blocks

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
XDIST = ("-n", "1") if importlib.util.find_spec("xdist") else ()
"""Where pytest-xdist is installed, cells run in a worker, and what it finds has to come to the controller."""

FAMILY = """
import pytest, torch
from torch import nn
import hotglm, hotglm.testing
from hotglm.testing import ModelFamily

def make(version):
    torch.manual_seed(int(version.rpartition(".")[2]))
    return nn.Linear(3, 4 if version == "1.0.2" else 3)

@pytest.fixture
def hotglm_model():
    return ModelFamily(make_model=make, make_inputs=lambda version: torch.ones(2, 3))

def matrix(**more):
    return pytest.mark.hotglm_matrix(**{"model": "m", "running": ["1.0.0"], "incoming": ["1.0.1"], **more})
"""

MATRIX = """
from family import *

@matrix(
    model="<linear>",
    running=["1.0.0", "1.0.1"],
    incoming=["1.0.1", "1.0.2"],
    axes={"dtype": ["float32", "bfloat16"]},
    expected={("*", "1.0.2"): "SHAPE_CHANGED"},
)
def test_hops(hotglm_cell):
    result = hotglm_cell.verify()
    assert (result.cell.incoming == "1.0.2") is (hotglm_cell.slot.live.number == 1)
"""

UNEXPECTED = """
from family import *

@matrix(expected={("*", "*"): "SHAPE_CHANGED"})
def test_works(hotglm_cell):
    hotglm_cell.verify()

@matrix(incoming=["1.0.2"])
def test_refused(hotglm_cell):
    hotglm_cell.verify()

@matrix(incoming=["1.0.2"], expected={("*", "*"): ["TENSOR_MISSING", "X"]})
def test_refused_otherwise(hotglm_cell):
    hotglm_cell.verify()

class TestAnotherColdLoad:
    @pytest.fixture
    def hotglm_model(self):
        calls = []
        def make_other(version):
            calls.append(version)
            model = make(version)
            if len(calls) > 2:  # what the cold load is made of
                with torch.no_grad():
                    model.bias[0] += 1
            return model
        return ModelFamily(make_model=make_other, make_inputs=lambda version: torch.ones(2, 3))

    @matrix()
    def test_differs(self, hotglm_cell):
        hotglm_cell.verify()

@matrix()
def test_forgot(hotglm_cell):
    pass

@matrix()
def test_asserts_more(hotglm_cell):
    hotglm_cell.verify()
    assert hotglm_cell.slot.version == "9"

class TestBroken:
    @pytest.fixture
    def hotglm_model(self):
        raise OSError("planted")

    @matrix()
    def test_setup(self, hotglm_cell):
        hotglm_cell.verify()

@matrix(axes={"device": ["cuda"]})
def test_skipped(hotglm_cell, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hotglm_cell.verify()

@matrix(axes={"capability": ["fp16"]}, expected={("*", "*"): "CAPABILITY_LOST"})
def test_capability(hotglm_cell):
    hotglm_cell.verify()
"""

FIXTURES = """
from family import *

def test_fault(hotglm_faults):
    slot = hotglm.ModuleSlot(make("1.0.0"), name="m", version="1.0.0")
    hotglm_faults.inject("stage.load", 2)
    slot.update(make("1.0.1").state_dict(), version="1.0.1")
    with pytest.raises(hotglm.StageFailedError):
        slot.update(make("1.0.1").state_dict(), version="1.0.3")
    assert str(slot.version) == "1.0.1"

def test_no_fault_is_left():
    assert type(hotglm.seam.active) is hotglm.seam.Seam

def test_fault_that_never_came(hotglm_faults):
    hotglm_faults.inject("read", 3)

class TestGoldens:
    @pytest.fixture
    def hotglm_model(self, hotglm_goldens, hotglm_plan):
        assert len(hotglm_goldens.assert_all_load()) == len(hotglm_goldens.find("golden-linear")) == 2
        return hotglm_goldens.find_family(hotglm_plan.model)

    @pytest.mark.hotglm_matrix(
        model="golden-linear", running=["1.0.0", "1.1.0"], axes={"capability": ["fp16"]}
    )
    def test_pairs(self, hotglm_cell):
        hotglm_cell.verify()
"""


CONFTEST = """
import hotglm
from torch import nn

def declare(version):
    class Linear(nn.Module):
        __qualname__ = f"Linear{version}"
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
        def forward(self, x):
            return self.inner(x)
    return hotglm.versioned("golden-linear", version, capabilities=["fp16"])(Linear)

LINEAR = {version: declare(version) for version in ("1.0.0", "1.1.0")}
"""


def run_pytest(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in `directory` in an interpreter of its own, because torch cannot be imported twice in one."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(directory / "site"), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def read_results(path: Path) -> dict[str, CellResult]:
    """Return the results in a JSON report, by the name of their test."""
    document = json.loads((path / "matrix.json").read_text())
    assert document["schema"] == "hotglm.matrix/1"
    cells = [CellResult.from_dict(cell) for matrix in document["matrices"] for cell in matrix["cells"]]
    return {f"{cell.cell.matrix.rpartition(':')[2]}[{cell.cell.id}]": cell for cell in cells}


# -- one run of everything ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one run of pytest.

    Attributes:
        directory: where it ran.
        output: what it printed.
        results: cells by the name of their test.
        cases: tests, as its JUnit file has them.
    """

    directory: Path
    output: str
    results: dict[str, CellResult]
    cases: list[ET.Element]

    def find(self, name: str) -> list[CellResult]:
        """Return the results of one test function."""
        return [result for key, result in self.results.items() if key.startswith(f"{name}[")]

    def count(self, file: str) -> Counter[str]:
        """Count the outcomes of the tests in a file."""
        found = [case for case in self.cases if (case.get("classname") or "").startswith(file)]
        kinds = ("failure", "error", "skipped")
        return Counter("".join(kind for kind in kinds if case.find(kind) is not None) or "passed" for case in found)


class Linear(torch.nn.Module):
    """What the inner tests register as golden-linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("run")
    (directory / "pytest.ini").write_text("[pytest]\nhotglm_goldens = kept\n")
    for name, text in (
        ("family", FAMILY),
        ("test_matrix", MATRIX),
        ("test_unexpected", UNEXPECTED),
        ("test_fixtures", FIXTURES),
        ("test_docs", "\n".join(code for _, code in find_blocks((ROOT / "docs" / "testing.md").read_text()))),
        ("conftest", CONFTEST),
    ):
        (directory / f"{name}.py").write_text(text)
    for version in ("1.0.0", "1.1.0"):
        make_golden(Linear(), directory / "kept", inputs=torch.ones(2), name="golden-linear", version=version)
    words = ["-p", "hotglm.pytest_plugin", "--hotglm-matrix=out", "--junitxml=junit.xml"]
    done = run_pytest(directory, *words, *XDIST)
    assert done.returncode == 1, done.stdout + done.stderr
    return Run(
        directory=directory,
        output=done.stdout,
        results=read_results(directory / "out"),
        cases=list(ET.parse(directory / "junit.xml").iter("testcase")),  # noqa: S314 - our own file
    )


def test_a_matrix_is_run_and_printed(run: Run) -> None:
    """Each cell is a test that swaps under traffic; the grid is printed, combinations of axes that agree only once."""
    assert run.count("test_matrix") == {"passed": 8}
    results = run.find("test_hops")
    assert Counter(result.outcome for result in results) == {Outcome.WORKS: 4, Outcome.REFUSED: 4}
    assert all(result.num_passes > 4 for result in results if result.outcome is Outcome.WORKS)
    grid = """<linear> (test_matrix.py::test_hops): 8 cells: 4 work, 4 refused as declared
  with dtype=bfloat16; dtype=float32
  incoming \\ running  1.0.0    1.0.1
  1.0.1               ok       ok
  1.0.2               refused  refused
  refused: 1.0.2 under 1.0.0, as declared: SHAPE_CHANGED
  refused: 1.0.2 under 1.0.1, as declared: SHAPE_CHANGED
"""
    assert run.output.count(grid) == 1


def test_a_matrix_is_written(run: Run) -> None:
    """Matrices are written as JSON, Markdown, JUnit properties and one HTML page, which fetches and runs nothing."""
    markdown = (run.directory / "out" / "matrix.md").read_text()
    assert "| **1.0.2** | refused | refused |" in markdown
    assert "&lt;linear&gt;" in markdown
    page = (run.directory / "out" / "matrix.html").read_text()
    assert "&lt;linear&gt;" in page
    assert not re.search(r"<linear>|<script|https?://|url\(|@import|src=", page)
    of_cells = [{p.get("name"): p.get("value") or "" for p in case.iter("property")} for case in run.cases]
    of_cells = [found for found in of_cells if "hotglm.cell" in found]
    assert len(of_cells) == len(run.results)
    assert {"ok", "refused", "FAILED"} <= {found["hotglm.status"] for found in of_cells}
    for found in of_cells:
        json.loads(found["hotglm.cell"])


def test_every_cell_that_is_not_as_declared_fails(run: Run) -> None:
    """A cell that starts to work, is refused for any other reason, differs, is not run or breaks fails by name."""
    assert run.count("test_unexpected") == {"failure": 5, "error": 2, "passed": 1, "skipped": 1}
    declared = {
        "test_works": Outcome.WORKS_UNEXPECTEDLY,
        "test_refused": Outcome.REFUSED_UNEXPECTEDLY,
        "test_refused_otherwise": Outcome.REFUSED_UNEXPECTEDLY,
        "test_differs": Outcome.FAILED,
        "test_forgot": Outcome.FAILED,
        "test_asserts_more": Outcome.FAILED,
        "test_setup": Outcome.FAILED,
        "test_skipped": Outcome.SKIPPED,
        "test_capability": Outcome.REFUSED,
    }
    found = {name: result for name in declared for result in run.find(name)}
    assert {name: result.outcome for name, result in found.items()} == declared
    assert "Remedy: drop the expectation" in found["test_works"].message
    assert found["test_refused_otherwise"].codes == ("SHAPE_CHANGED",)
    assert found["test_setup"].message == "OSError: planted"
    assert "cold load" in found["test_differs"].message
    assert "hotglm_cell.verify()" in found["test_forgot"].message
    assert "WORKS UNEXPECTEDLY: 1.0.1 under 1.0.0: Expected a refusal for SHAPE_CHANGED" in run.output
    num_good = sum(result.outcome.is_good for result in run.results.values())
    assert f"{num_good} of {len(run.results)} cells are as declared" in (run.directory / "out/matrix.html").read_text()


def test_fixtures_for_faults_and_goldens(run: Run) -> None:
    """Faults are active for one test and must come; goldens are found where the settings say, and make a matrix."""
    assert run.count("test_fixtures") == {"passed": 2 + 4, "error": 1}
    assert "Expected every planned fault to come, got none of: read 3" in run.output
    assert {result.outcome for result in run.find("test_pairs")} == {Outcome.WORKS}


def test_the_examples_of_the_page_pass(run: Run) -> None:
    """docs/testing.md is a test file, and the matrix that it shows is the one that comes out."""
    assert run.count("test_docs") == {"passed": 16 + 5}
    (shown,) = re.findall(r"```text\n.*?\n(.*?)```", (ROOT / "docs" / "testing.md").read_text(), re.DOTALL)
    assert shown in run.output


# -- where it is only loaded -------------------------------------------------------------------------------------------

MISTAKES = {
    "many": '@pytest.mark.hotglm_matrix(model="", running=["1.0", "x"], incoming="1.0", axes={"a b": ["1"]},'
    ' expected={("1.0",): "A"})',
    "misspelt": '@pytest.mark.hotglm_matrix(model="m", runing=["1.0"])',
    "useless": '@pytest.mark.hotglm_matrix(model="m", running=["1.0"], expected={("2.0", "*"): "A"})',
    "bare": "",
}


def test_a_matrix_that_cannot_be_meant_is_refused_when_it_is_collected(pytester: pytest.Pytester) -> None:
    """Each mistake in a marker fails collection, with the test's name and all that is wrong, and no traceback."""
    texts = {f"test_{name}": f"import pytest\n{text}\ndef test(hotglm_cell): pass\n" for name, text in MISTAKES.items()}
    texts["test_marker"] = "import pytest\n@pytest.mark.hotglm_matrix(model='m', running=['1.0'])\ndef test(): pass\n"
    pytester.makepyfile(**texts)
    done = pytester.runpytest_inprocess("-p", "hotglm.pytest_plugin", "-p", "no:cacheprovider")
    done.assert_outcomes(errors=5)
    output = done.stdout.str()
    assert "pytest_plugin.py" not in output
    for name in texts:
        assert f"{name}.py::test: " in output
    for text in (
        "the name of a model, got ''",
        "versions as running, got 'x'",
        "texts as incoming",
        "got 'a b'",
        "as a key, got ('1.0',)",
        "got model, runing",
        "keys that fit a cell, got ('2.0', '*')",
        "got no marker",
        "needs the fixture hotglm_cell",
    ):
        assert text in output


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A test, and a distribution that offers the plugin by its entry point, as an installed hotglm does."""
    info = tmp_path / "site" / "hotglm_entry-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hotglm-entry\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\nhotglm = hotglm.pytest_plugin\n")
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light(pytestconfig, hotglm_faults):\n"
        "    assert 'torch' not in sys.modules\n"
        "    names = [getattr(plugin, '__name__', '') for plugin in pytestconfig.pluginmanager.get_plugins()]\n"
        "    assert names.count('hotglm.pytest_plugin') == 1\n"
        "import pytest\n"
        "@pytest.mark.hotglm_matrix(model='m', running=['1.0', '2.0'])\n"
        "def test_plan(hotglm_plan):\n"
        "    assert 'torch' not in sys.modules\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "env"),
    [
        ([], {}),
        (["-p", "hotglm.pytest_plugin"], {}),
        (["-p", "hotglm"], {"PYTEST_PLUGINS": "hotglm.pytest_plugin"}),
    ],
    ids=["entry point", "both", "both by environment"],
)
def test_it_is_registered_once_and_without_torch(installed: Path, words: list[str], env: dict[str, str]) -> None:
    """However often the plugin is named, it is there once; and tests that use no tensor never import torch."""
    (installed / "conftest.py").write_text("pytest_plugins = ['hotglm.pytest_plugin']\n")
    done = run_pytest(installed, "--hotglm-matrix=out", *words, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    assert done.stdout.count("4 cells: 4 NOT RUN") == 1
    assert {result.outcome for result in read_results(installed / "out").values()} == {Outcome.NOT_RUN}


def test_it_can_be_turned_off(installed: Path) -> None:
    """With `-p no:hotglm` neither fixtures nor options are there, and nothing else breaks."""
    (installed / "test_other.py").write_text("def test_other(): pass\n")
    done = run_pytest(installed, "-p", "no:hotglm", "test_other.py", "test_light.py")
    assert "1 passed, 1 warning, 2 errors" in done.stdout  # the warning is of the marker, which is unknown now
    assert "fixture 'hotglm_faults' not found" in done.stdout
