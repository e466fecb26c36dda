"""Numbers that a quantiser computes from weights and that may be the constructor's: never those of another version."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import UnswappableError
from support.swaps import same_bits

WIDTH = 4
X = torch.ones(1, WIDTH)


class Base(nn.Module):
    """One matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)


class Shifted(Base):
    """One whose zero point is 0 until it is quantised, and for some weights after that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_point = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        return x @ self.weight + self.zero_point


def shift(model: Any) -> None:
    model.zero_point = int(model.weight.sum())


class Clipped(Base):
    """One that is clipped where a quantiser has found large weights."""

    clip: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found = x @ self.weight
        return found.clamp(max=self.clip) if hasattr(self, "clip") else found


def clip(model: Any) -> None:
    if model.weight.max() > 2:
        model.clip = 1.5


class Scaled(Base):
    """One whose scale is an attribute of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        scale: float = getattr(self.weight, "scale", 1.0)
        return x @ self.weight.float() * scale


def scale(model: Any) -> None:
    weight = model.weight.detach()
    largest = float(weight.abs().amax()) / 127 or 1.0
    model.weight = nn.Parameter((weight / largest).round().to(torch.int8), requires_grad=False)
    model.weight.scale = largest


class Settings(dict[str, float]):
    """What a mapping knows beside its items, it does not compare."""

    scale = 1.0


@dataclass(slots=True)
class Setting:
    """Equal to others of another scale."""

    scale: float = field(default=1.0, compare=False)


class Told(Base):
    """One whose scale is in objects."""

    def __init__(self) -> None:
        super().__init__()
        self.setting: Any = Setting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = x @ self.weight * self.setting.scale
        return found


def tell(model: Any) -> None:
    model.setting.scale = float(model.weight.max())


def tell_mapping(model: Any) -> None:
    model.setting = Settings()
    model.setting.scale = float(model.weight.max())


CASES = [
    (Told, tell, "setting"),
    (Told, tell_mapping, "setting"),
    (Shifted, shift, "zero_point"),
    (Clipped, clip, "clip"),
    (Scaled, scale, "weight.scale"),
]


def make(kind: type[nn.Module], quantize: Callable[[Any], None], value: float) -> Any:
    """Return what a cold start has."""
    model: Any = kind()
    model.weight.data.fill_(value)
    quantize(model)
    return model


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize(("kind", "quantize", "name"), CASES)
def test_a_number_is_never_that_of_other_weights(
    kind: type[nn.Module], quantize: Callable[[Any], None], name: str, is_copied: bool
) -> None:
    """Also where it is what the constructor gave, is absent, or hangs on a tensor; in copies of the slot, too."""
    del name
    slot = hotglm.ModuleSlot(
        make(kind, quantize, 3.0),
        name="m",
        version="1.0.0",
        requantize=hotglm.Requantize(build=kind, quantize=quantize),
    )
    for number, value in enumerate((0.0, 5.0, 0.0, 3.0, 0.0), start=1):
        if is_copied:
            slot = copy.deepcopy(slot)
        slot.update({"weight": torch.full((WIDTH, WIDTH), value)}, version=f"1.0.{number}")
        assert same_bits(slot(X), make(kind, quantize, value)(X)), value


@pytest.mark.parametrize(("kind", "quantize", "name"), CASES)
def test_in_place_a_number_that_would_stay_is_refused(
    kind: type[nn.Module], quantize: Callable[[Any], None], name: str
) -> None:
    """By name, and the live version serves on, bit for bit."""
    slot = hotglm.ModuleSlot(
        make(kind, quantize, 3.0),
        name="m",
        version="1.0.0",
        swap=hotglm.InPlace(),
        requantize=hotglm.Requantize(build=kind, quantize=quantize),
    )
    before = slot(X)
    with pytest.raises(UnswappableError, match=name):
        slot.update({"weight": torch.zeros(WIDTH, WIDTH)}, version="1.0.1")
    assert same_bits(slot(X), before)
    slot.verify_live()


def test_what_leads_back_to_itself_is_not_taken_for_the_same() -> None:
    """It cannot be compared; then what was quantised is the new code, as a cold start has it."""

    def quantize(model: Any) -> None:
        model.circle = []
        model.circle += [model.circle, float(model.weight.max())]

    slot = hotglm.ModuleSlot(
        make(Shifted, quantize, 1.0),
        name="m",
        version="1.0.0",
        requantize=hotglm.Requantize(build=Shifted, quantize=quantize),
    )
    slot.update({"weight": torch.full((WIDTH, WIDTH), 2.0)}, version="1.0.1")
    live: Any = slot.live.module
    assert live.circle[1] == 2.0
    assert same_bits(slot(X), make(Shifted, quantize, 2.0)(X))


def test_weights_that_were_not_hashed_are_told_so() -> None:
    """A receipt names no digest where none was taken."""
    policy = hotglm.StagePolicy(digest=False)
    requantize = hotglm.Requantize(build=Shifted, quantize=shift)
    slot = hotglm.ModuleSlot(make(Shifted, shift, 1.0), name="m", version="1.0.0", policy=policy, requantize=requantize)
    receipt = slot.update({"weight": torch.zeros(WIDTH, WIDTH)}, version="1.0.1")
    assert "quantised from weights that were not hashed" in receipt.explain()
