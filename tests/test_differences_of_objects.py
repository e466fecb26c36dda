"""Outputs that are neither tensors nor containers of them: compared by what they hold, not by who they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hotglm.testing import ModelFamily
from hotglm.testing.cell_run import CellRun
from hotglm.testing.cells import plan_cells
from hotglm.testing.traffic import Tolerance, describe_differences


class Cache:
    """An output without an equality of its own, as the caches of transformers are."""

    def __init__(self, value: Any) -> None:
        self.layers = [{"keys": value}]
        self.owner: Any = None


def ring(value: float) -> Cache:
    made = Cache(torch.tensor(value))
    made.owner = made
    return made


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (Cache(ONE), Cache(ONE.clone())),
        (Cache(Cache(np.ones(2))), Cache(Cache(np.ones(2)))),
        (np.ones(2), np.ones(2)),
        (np.float32(1), np.float32(1)),
        (np.array(["a", "b"]), np.array(["a", "b"])),
        (float("nan"), float("nan")),
        (np.array([float("nan")]), np.array([float("nan")])),
    ],
)
def test_what_holds_the_same_is_the_same(expected: object, found: object) -> None:
    """A pass that answers the same answers the same, whatever it wraps its answer in."""
    assert describe_differences(expected, found) == []


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (Cache(ONE), Cache(ONE * 2)),
        (Cache(ONE), Cache(ONE.double())),
        (Cache(ONE), object()),
        (ring(1.0), ring(2.0)),
        (ring(1.0), ring(1.0)),  # undecided is different
        (np.ones(2), np.ones(3)),
        (np.ones(2), np.ones(2) * 2),
        (np.ones(2), np.ones(2, dtype=np.float32)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array(["a"]), np.array(["a", "a"])),
        (1.0, float("nan")),
        (1.0, 1.5),
    ],
)
def test_what_holds_something_else_differs(expected: object, found: object) -> None:
    """Every part counts, its dtype and shape included; a circle comes to an end."""
    assert describe_differences(expected, found)


def test_a_number_has_the_tolerance_of_a_tensor() -> None:
    """A loss that is a Python number may be as far off as a tensor may."""
    assert describe_differences(1.0, 1.0 + 1e-6, tolerance=Tolerance(rtol=1e-4)) == []
    assert describe_differences(1.0, 1.1, tolerance=Tolerance(rtol=1e-4))


class Caching(nn.Module):
    """A model that gives back a fresh cache with each answer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        return {"logits": hidden, "cache": Cache(hidden)}


def make(version: str) -> nn.Module:
    torch.manual_seed(int(version[0]))
    return Caching().eval()


def test_a_model_that_gives_back_a_cache_can_stand_in_a_matrix(tmp_path: Path) -> None:
    """Its passes are not taken for torn ones."""
    (cell,) = plan_cells(matrix="m", model="caching", running=["1.0"], incoming=["2.0"])
    family = ModelFamily(make_model=make, make_inputs=lambda version: torch.ones(1, 2))
    CellRun(cell, family, directory=tmp_path, record=lambda result: None, skip=pytest.skip).verify()
