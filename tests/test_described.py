"""A class is described without memory for its weights, and just as one that is built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.model.described import read_described
from hotglm.model.inspection import contract_of


@hotglm.versioned("described", "1.2.0", capabilities=["embed"])
class Tied(nn.Module):
    """Two layers share a weight, two others have equal shapes, one buffer is in no file, one is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.other = nn.Linear(4, 4)
        self.again = self.other
        self.register_buffer("cache", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.as_tensor(self.head(x) * scale)


class Large(nn.Module):
    """Its weights would fill an address space."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1 << 24, 1 << 24))


def test_a_class_has_the_contract_of_its_module() -> None:
    """What is said of a class is what is said of a module of it: ties, kinds, persistence, call and capabilities."""
    found = read_described(f"{__name__}:Tied")
    assert found.contract == contract_of(Tied())
    assert (found.name, str(found.version)) == ("described", "1.2.0")
    assert found.contract.state["head.weight"].tied == "embed.weight"
    assert found.contract.state["other.weight"].tied == "other.weight"


def test_describing_a_class_takes_no_memory() -> None:
    """A class whose weights no machine could hold is described all the same."""
    assert read_described(f"{__name__}:Large").contract.state["w"].shape == (1 << 24, 1 << 24)


def test_a_module_is_looked_for_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script finds what `python -m` finds: modules beside the caller."""
    (tmp_path / "lonely_model.py").write_text("from torch import nn\n\nModel = nn.Flatten\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert read_described("lonely_model:Model").contract.state == {}
