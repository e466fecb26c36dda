"""What staging owes its users where a simpler way would give wrong answers without an error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.weights.digest import digest_tensor

X = torch.ones(1, 2)


class Overlapping(nn.Module):
    """Two registered tensors over the same memory that are not the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.wt = nn.Parameter(self.w.data.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


@dataclasses.dataclass
class Config:
    heads: int = 2


@hotglm.versioned("staging-rules", "1.0.0", config=Config)
class Scaled(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * self.config.heads
        return result


def test_tensors_that_overlap_are_filled_once_and_compared() -> None:
    """A transposed parameter over another one's memory takes agreeing values, and refuses others by name."""
    slot = hotglm.ModuleSlot(Overlapping(), name="m", version="1.0.0")
    before = slot(X)
    for order in (("w", "wt"), ("wt", "w")):
        values = {"w": torch.ones(2, 3), "wt": torch.full((3, 2), 7.0)}
        with pytest.raises(hotglm.TensorValueError) as caught:
            slot.update({name: values[name] for name in order}, version="1.0.1")
        assert caught.value.code == "TIE_CONFLICT"
        assert torch.equal(slot(X), before)
    w = torch.arange(6.0).view(2, 3)
    receipt = slot.update({"wt": w.t().contiguous(), "w": w}, version="1.0.1")
    assert all(digest_tensor(tensor) == receipt.digests[name] for name, tensor in slot.state_dict().items())
    assert torch.equal(slot(X), X @ w)


def test_tensors_that_overlap_in_part_are_refused_by_name() -> None:
    """Where no tensor covers the others there is no order to fill them in; all of them are named."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.zeros(6)
            self.a, self.b = nn.Parameter(base[:4]), nn.Parameter(base[2:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.a.sum()

    slot = hotglm.ModuleSlot(Partial(), name="m", version="1.0.0")
    with pytest.raises(hotglm.UncopyableError) as caught:
        slot.update({"a": torch.ones(4), "b": torch.ones(4)}, version="1.0.1")
    assert [problem.tensor for problem in caught.value.problems] == ["a", "b"]
    assert torch.equal(slot(X), X)


def test_a_config_that_changes_no_shape_takes_effect(tmp_path: Path) -> None:
    """The config of a release is that of the version that serves it, also where the layout would fit without."""
    slot, cold = hotglm.ModuleSlot(Scaled(Config(2))), Scaled(Config(4))
    hotglm.save_weights(cold, tmp_path / "c.safetensors", version="1.0.1")
    slot.update(tmp_path / "c.safetensors")
    assert slot.live.module.config == Config(4)
    assert torch.equal(slot(X), cold(X))


def test_a_config_that_nobody_takes_is_refused() -> None:
    """Fields that the config class does not have, and a config for a class without one, are errors, not ignored."""
    slot = hotglm.ModuleSlot(Scaled(Config(2)))
    before = slot(X)
    state = slot.state_dict()
    with pytest.raises(hotglm.DefinitionError, match="bogus"):
        slot.update(state, version="1.0.1", config={"bogus": 8})
    plain = hotglm.ModuleSlot(nn.Linear(2, 2), name="m", version="1.0.0")
    with pytest.raises(hotglm.ArgumentError, match="no config"):
        plain.update(plain.state_dict(), version="1.0.1", config={"heads": 8})
    assert torch.equal(slot(X), before)


def test_the_mode_of_the_service_is_kept() -> None:
    """A module fresh from its constructor is in training mode; in a slot that serves in eval mode it is not."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))

    slot = hotglm.ModuleSlot(make().eval(), name="m", version="1.0.0")
    slot.update(make(), version="1.0.1")
    assert not any(part.training for part in slot.modules())
    assert torch.equal(slot(X), slot(X))


def test_a_subclass_that_serves_is_not_replaced_by_the_class_it_extends() -> None:
    """Weights of the release that is live stay in the code that is live."""

    @hotglm.versioned("staging-rules-sub", "1.0.0")
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(x)
            return result

    class Negated(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    slot = hotglm.ModuleSlot(Negated(), name="staging-rules-sub", version="1.0.0")
    slot.update(Negated().state_dict(), version="1.0.0")
    assert type(slot.live.module) is Negated


def test_a_class_is_built_in_the_precision_the_service_runs_in() -> None:
    """A registered class that is built anew follows a service in half precision, and keeps frozen parameters frozen."""

    @hotglm.versioned("staging-rules-half", "1.1.0")
    class Newer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            result: torch.Tensor = self.linear(x) * scale
            return result

    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(x)
            return result

    older = Older().half()
    older.linear.bias.requires_grad = False
    slot = hotglm.ModuleSlot(older, name="staging-rules-half", version="1.0.0")
    slot.update(Older().half().state_dict(), version="1.1.0")
    live = slot.live.module
    assert type(live) is Newer
    assert live.linear.weight.dtype is torch.float16
    assert (live.linear.weight.requires_grad, live.linear.bias.requires_grad) == (True, False)
