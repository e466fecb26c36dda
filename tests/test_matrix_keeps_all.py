"""Nothing that became of a cell is lost or hidden: failures before the cell, skips, and tests with more parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest, torch
from torch import nn
from hotglm.testing import ModelFamily

def make(version):
    torch.manual_seed(int(version[0]))
    return nn.Linear(2, 2)

@pytest.fixture
def hotglm_model():
    return ModelFamily(make_model=make, make_inputs=lambda version: torch.ones(1, 2))

matrix = pytest.mark.hotglm_matrix(model="m", running=["1.0"], incoming=["2.0"])

@pytest.mark.parametrize("number", [1, 2])
@matrix
def test_number(hotglm_cell, number):
    hotglm_cell.verify()
    assert number == 2

@matrix
def test_skips(hotglm_cell):
    pytest.skip("not here")

@matrix
@pytest.mark.skipif(True, reason="nor here")
def test_marked(hotglm_cell):
    hotglm_cell.verify()

@matrix
def test_raises(hotglm_cell):
    raise OSError("planted")

@pytest.fixture
def broken():
    raise OSError("planted before")

@matrix
def test_setup(broken, hotglm_cell):
    hotglm_cell.verify()

@matrix
class TestGroup:
    def test_one(self, hotglm_cell):
        hotglm_cell.verify()

    def test_two(self, hotglm_cell):
        hotglm_cell.verify()
"""


def test_no_cell_is_lost_or_hidden(pytester: pytest.Pytester) -> None:
    """A cell has the worst result of its tests; one that fails or is skipped early is told, and told once."""
    pytester.makepyfile(TESTS)
    done = pytester.runpytest_inprocess("-p", "hotglm.pytest_plugin", "-p", "no:cacheprovider", "--hotglm-matrix=out")
    done.assert_outcomes(passed=3, failed=2, errors=1, skipped=2)
    document: dict[str, Any] = json.loads((pytester.path / "out" / "matrix.json").read_text())
    assert document["is_good"] is False
    found = {one["name"].rpartition("::")[2]: one["counts"] for one in document["matrices"]}
    assert found == {
        "test_number": {"failed": 1},
        "test_skips": {"skipped": 1},
        "test_marked": {"skipped": 1},
        "test_raises": {"failed": 1},
        "test_setup": {"failed": 1},
        "test_one": {"works": 1},
        "test_two": {"works": 1},
    }
