"""A cell that passes has proved something: bugs planted in the swap and in the release are caught, each by a cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.slot.slot import ModuleSlot
from hotglm.testing import ModelFamily
from hotglm.testing.cell_run import CellRun
from hotglm.testing.cells import plan_cells


class Model(nn.Module):
    """Two layers; what the second one has for its first output is cut off, so that no answer shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.count = nn.Buffer(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))[:, 1:] + self.count[1:]


def make(version: str) -> Model:
    torch.manual_seed(int(version[0]))
    model = Model()
    model.eval()
    model.count.fill_(float(version))
    return model


def make_alike(version: str) -> nn.Module:
    return make("1.0")


def run(directory: Path, make_model: Callable[[str], nn.Module] = make, **settings: Any) -> None:
    (cell,) = plan_cells(matrix="m", model="planted", running=["1.0"], incoming=["2.0"])
    family = ModelFamily(make_model=make_model, make_inputs=lambda version: torch.ones(2, 3), **settings)
    CellRun(cell, family, directory=directory, record=lambda result: None, skip=pytest.skip).verify()


def change(module: Any, what: str) -> None:
    with torch.no_grad():
        match what:
            case "a layer of before":
                module.a.weight.copy_(make("1.0").a.weight)
            case "what no answer shows":
                module.b.bias[0] += 1
            case "a buffer":
                module.count.fill_(3.0)
            case "code":
                module.forward = lambda x: x


def test_nothing_planted_passes(tmp_path: Path) -> None:
    """The model of this file swaps."""
    run(tmp_path)


@pytest.mark.parametrize("what", ["a layer of before", "what no answer shows", "a buffer", "code"])
def test_a_wrong_version_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Staging that leaves one thing wrong does not pass."""
    stage = ModuleSlot.stage

    def stage_wrongly(self: ModuleSlot, *args: Any, **options: Any) -> Any:
        staged = stage(self, *args, **options)
        change(staged.module, what)
        return staged

    monkeypatch.setattr(ModuleSlot, "stage", stage_wrongly)
    with pytest.raises(AssertionError, match="cold load"):
        run(tmp_path)


@pytest.mark.parametrize("make_model", [make, make_alike])
def test_a_commit_that_does_nothing_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[[str], nn.Module]
) -> None:
    """Also where both versions are alike to the last bit."""
    monkeypatch.setattr(ModuleSlot, "commit", lambda self, staged: None)
    with pytest.raises(AssertionError):
        run(tmp_path, make_model)


@pytest.mark.parametrize("what", ["what no answer shows", "a buffer"])
def test_a_way_back_to_other_weights_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Going back is going back to the weights, and not only to an answer that looks alike."""
    rollback = ModuleSlot.rollback

    def roll_back_wrongly(self: ModuleSlot, **options: Any) -> Any:
        receipt = rollback(self, **options)
        if self.live.number == 1:
            change(self.live.module, what)
        return receipt

    monkeypatch.setattr(ModuleSlot, "rollback", roll_back_wrongly)
    with pytest.raises(AssertionError):
        run(tmp_path)


def test_a_release_of_another_version_is_caught(tmp_path: Path) -> None:
    """A cell is about the incoming version that it names; one that got another one has shown nothing."""

    def write(version: str, directory: Path) -> Path:
        hotglm.save_weights(make(version), directory / "x.safetensors", version="1.5", name="planted")
        return directory / "x.safetensors"

    with pytest.raises(AssertionError, match=r"Expected a release of 2\.0, got one of 1\.5"):
        run(tmp_path, make_release=write)


def test_a_release_without_a_version_still_counts(tmp_path: Path) -> None:
    """A plain mapping of tensors, which says no version, is compared by its tensors alone."""
    run(tmp_path, make_release=lambda version, directory: make(version).state_dict())
