"""New code in a service that runs in another dtype than the class is written in: the dtype stays the service's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.model import registry
from hotglm.testing import ModelFamily
from hotglm.testing.cell_run import CellRun
from hotglm.testing.cells import Cell, plan_cells

NAME = "dtype-of-new-code"
X = torch.ones(2, 3)


class One(nn.Module):
    """Version 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.one(x)
        return hidden


class Two(nn.Module):
    """Version 2, with a layer of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.two(x)
        return hidden


class Mixed(Two):
    """Version 3, which wants one layer in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = nn.Linear(3, 3, dtype=torch.float64)


CLASSES: dict[str, type[nn.Module]] = {"1.0": One, "2.0": Two}


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class is registered for the length of a test."""
    monkeypatch.setattr(registry, "_definitions", {})
    monkeypatch.setattr(registry, "_migrations", {})
    classes: dict[str, type[nn.Module]] = {**CLASSES, "3.0": Mixed}
    for version, model in classes.items():
        monkeypatch.setattr(model, "__hotglm_definition__", None, raising=False)
        monkeypatch.setattr(model, "migrations", None, raising=False)
        hotglm.versioned(NAME, version)(model)


def make(version: str) -> nn.Module:
    torch.manual_seed(int(version[0]))
    return CLASSES[version]().eval()


def find_dtypes(slot: hotglm.ModuleSlot) -> set[torch.dtype]:
    return {tensor.dtype for tensor in slot.state_dict().values()}


@pytest.mark.parametrize("incoming", ["1.0", "2.0"])
def test_new_code_takes_the_dtype_that_serves(tmp_path: Path, incoming: str) -> None:
    """A bfloat16 service that converts stays one when a float32 file brings its own code."""
    hotglm.save_weights(make(incoming), tmp_path / "x.safetensors", version=incoming, name=NAME)
    policy = hotglm.StagePolicy(convert_dtypes=True)
    slot = hotglm.ModuleSlot(make("1.0").bfloat16(), version="1.0", accept="major", policy=policy)
    slot.update(tmp_path / "x.safetensors")
    assert type(slot.live.module) is CLASSES[incoming]
    assert find_dtypes(slot) == {torch.bfloat16}
    assert slot(X.bfloat16()).equal(make(incoming).bfloat16()(X.bfloat16()))


def test_code_that_mixes_dtypes_keeps_them(tmp_path: Path) -> None:
    """What a class is written in on purpose is not converted away."""
    hotglm.save_weights(Mixed(), tmp_path / "x.safetensors", version="3.0", name=NAME)
    policy = hotglm.StagePolicy(convert_dtypes=True)
    slot = hotglm.ModuleSlot(make("1.0").bfloat16(), version="1.0", accept="major", policy=policy)
    slot.update(tmp_path / "x.safetensors")
    assert find_dtypes(slot) == {torch.float32, torch.float64}


@pytest.mark.parametrize(
    "cell",
    plan_cells(matrix="m", model=NAME, running=["1.0", "2.0"], axes={"dtype": ["bfloat16"]}),
    ids=lambda cell: cell.id,
)
def test_the_dtype_axis_of_a_matrix_holds_for_registered_classes(tmp_path: Path, cell: Cell) -> None:
    """Every hop in another dtype works where versions bring their own code, as it does where they do not."""
    family = ModelFamily(make_model=make, make_inputs=lambda version: X)
    run = CellRun(cell, family, directory=tmp_path, record=lambda result: None, skip=pytest.skip)
    run.verify()
