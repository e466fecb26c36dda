"""Versions that bring new code: registered classes, configs, ranges they read, and steps that callers can notice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import DefinitionError, IncompatibleError
from hotglm.model import registry
from support.swaps import build, same_bits, same_state

X = torch.arange(4.0).reshape(2, 2)


@dataclass(frozen=True)
class Config:
    """Fields of both versions; 2.x has one more, with a default."""

    width: int = 2
    depth: int = 1


class RankerOne(nn.Module):
    """Version 1: one layer."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()
        self.layer = nn.Linear(2, self.config.width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


class RankerTwo(nn.Module):
    """Version 2: as many layers as the config says, and a call of another form."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()
        width = self.config.width
        self.layers = nn.ModuleList(nn.Linear(2 if i == 0 else width, width) for i in range(self.config.depth))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, scale: float) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x) * scale


class RankerGentle(RankerTwo):
    """The same with a call that version 1's callers do not notice."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        return super().forward(x, scale=scale)


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test registers what it needs."""
    monkeypatch.setattr(registry, "_definitions", {})
    for model in (RankerOne, RankerTwo, RankerGentle):
        monkeypatch.setattr(model, "__hotglm_definition__", None, raising=False)


def _register(model: type[nn.Module], version: str, **options: Any) -> None:
    hotglm.versioned("ranker", version, config=Config, **options)(model)


def _class_of(slot: hotglm.ModuleSlot) -> type[nn.Module]:
    return type(slot.live.module)


def _slot(**options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(build(RankerOne)(1).eval(), **options)


def _save(path: Path, model: nn.Module, *, version: str, config: dict[str, Any] | None = None) -> Path:
    hotglm.save_weights(model, path, version=version, name="ranker", config=config)
    return path


def _two(seed: int, *, width: int = 2, depth: int = 3, model: type[nn.Module] = RankerTwo) -> nn.Module:
    return build(model, Config(width=width, depth=depth))(seed).eval()


# -- new code --


def test_a_major_update_brings_new_code_and_its_config(tmp_path: Path) -> None:
    """1.x and 2.0 are registered side by side: 2.0's file is held by 2.0's class, built from the config it carries."""
    _register(RankerOne, "1.0.0")
    _register(RankerTwo, "2.0.0")
    slot = _slot(accept="major")
    assert (slot.name, str(slot.version)) == ("ranker", "1.0.0")
    path = _save(tmp_path / "two.safetensors", _two(2), version="2.0.0", config={"width": 2, "depth": 3})
    slot.update(path)
    assert _class_of(slot) is RankerTwo
    assert slot.config == Config(width=2, depth=3)
    assert same_state(slot, _two(2))
    assert same_bits(slot(X, scale=2.0), _two(2)(X, scale=2.0))
    assert not slot.training
    slot.rollback()
    assert _class_of(slot) is RankerOne
    assert same_bits(slot(X), build(RankerOne)(1)(X))


def test_a_step_that_callers_notice_needs_accept_major(tmp_path: Path) -> None:
    """A required argument is a major change: refused by default with every reason, and the old version serves."""
    _register(RankerOne, "1.0.0")
    _register(RankerTwo, "2.0.0")
    slot = _slot()
    before = slot(X)
    path = _save(tmp_path / "two.safetensors", _two(2), version="2.0.0", config={"depth": 3})
    with pytest.raises(IncompatibleError) as caught:
        slot.update(path)
    codes = {problem.code for problem in caught.value.problems}
    assert "MAJOR_REFUSED" in codes
    assert "scale" in str(caught.value)
    assert same_bits(slot(X), before)


def test_new_code_with_the_same_call_is_a_minor_step(tmp_path: Path) -> None:
    """An optional argument more harms no caller: new layers and new code come under the default `accept`."""
    _register(RankerOne, "1.0.0")
    _register(RankerGentle, "1.1.0")
    slot = _slot()
    path = _save(
        tmp_path / "m.safetensors", _two(2, model=RankerGentle), version="1.1.0", config={"width": 2, "depth": 3}
    )
    receipt = slot.update(path)
    assert receipt.verdict is not None
    assert receipt.verdict.needed is hotglm.Bump.MINOR
    assert same_bits(slot(X), _two(2, model=RankerGentle)(X))


def test_a_version_that_claims_too_little_is_refused(tmp_path: Path) -> None:
    """1.0.1 with another call is refused with the version that it needs, also where major steps are accepted."""
    _register(RankerOne, "1.0.0")
    _register(RankerTwo, "1.0.1")
    slot = _slot(accept="major")
    before = slot(X)
    path = _save(tmp_path / "m.safetensors", _two(2), version="1.0.1", config={"depth": 3})
    with pytest.raises(IncompatibleError) as caught:
        slot.update(path)
    assert [problem.code for problem in caught.value.problems] == ["UNDERCLAIMED"]
    assert "2.0.0" in str(caught.value)
    assert same_bits(slot(X), before)


# -- where the config comes from --


def test_a_config_beside_the_weights_is_used(tmp_path: Path) -> None:
    """A directory with config.json, as Hugging Face lays it out, builds the class from it."""
    _register(RankerOne, "1.0.0")
    _register(RankerGentle, "1.1.0")
    model = _two(2, model=RankerGentle)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"width": 2, "depth": 3}))
    slot = _slot()
    slot.update(tmp_path, version="1.1.0")
    assert same_bits(slot(X), model(X))


def test_a_config_of_the_caller_comes_before_that_of_the_file(tmp_path: Path) -> None:
    """`update(..., config=...)` is used in place of what the source carries."""
    _register(RankerOne, "1.0.0")
    _register(RankerGentle, "1.1.0")
    model = _two(2, model=RankerGentle)
    path = _save(tmp_path / "m.safetensors", model, version="1.1.0", config={"width": 2, "depth": 1})
    slot = _slot()
    with pytest.raises(IncompatibleError):
        slot.update(path)
    slot.update(path, config={"width": 2, "depth": 3})
    assert same_bits(slot(X), model(X))


def test_without_a_config_the_live_ones_is_used(tmp_path: Path) -> None:
    """A source that carries no config is built with the config that the live module keeps."""
    _register(RankerOne, "1.0.0")
    _register(RankerGentle, "1.1.0")
    model = _two(2, depth=1, model=RankerGentle)
    slot = _slot()
    slot.update(_save(tmp_path / "m.safetensors", model, version="1.1.0"))
    assert _class_of(slot) is RankerGentle
    assert same_bits(slot(X), model(X))


@pytest.mark.parametrize("config", [{"width": "wide"}, {"height": 3}])
def test_a_config_that_builds_nothing_is_refused_with_the_cause(config: dict[str, Any], tmp_path: Path) -> None:
    """A class that cannot be built from the config is a DefinitionError; the old version serves."""
    _register(RankerOne, "1.0.0")
    _register(RankerTwo, "2.0.0")
    slot = _slot(accept="major")
    before = slot(X)
    with pytest.raises(DefinitionError, match=r"2\.0\.0"):
        slot.update(_save(tmp_path / "m.safetensors", _two(2), version="2.0.0", config=config))
    assert same_bits(slot(X), before)


# -- what code reads --


def test_code_that_reads_a_version_holds_it(tmp_path: Path) -> None:
    """Weights of a version without a class of its own go to the live code, or to a class that says it reads them."""
    _register(RankerOne, "1.0.0", reads=">=1,<1.5")
    _register(RankerGentle, "1.4.0", reads=">=1.5,<2")
    slot = _slot()
    slot.update(_save(tmp_path / "a.safetensors", build(RankerOne)(2), version="1.2.0"))
    assert _class_of(slot) is RankerOne
    model = _two(3, model=RankerGentle)
    slot.update(_save(tmp_path / "b.safetensors", model, version="1.7.0", config={"width": 2, "depth": 3}))
    assert _class_of(slot) is RankerGentle
    assert same_bits(slot(X), model(X))


def test_a_version_that_no_code_reads_is_refused(tmp_path: Path) -> None:
    """A layout that fits is not enough where the code says that it does not read the version."""
    _register(RankerOne, "1.0.0", reads=">=1,<1.5")
    slot = _slot()
    before = slot(X)
    with pytest.raises(IncompatibleError) as caught:
        slot.update(_save(tmp_path / "m.safetensors", build(RankerOne)(2), version="1.7.0"))
    assert [problem.code for problem in caught.value.problems] == ["UNREADABLE_VERSION"]
    assert same_bits(slot(X), before)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """A file that names another model does not become live because its tensors happen to fit."""
    _register(RankerOne, "1.0.0")
    slot = _slot()
    path = tmp_path / "m.safetensors"
    hotglm.save_weights(build(RankerOne)(2), path, version="1.0.1", name="embedder")
    with pytest.raises(IncompatibleError) as caught:
        slot.update(path)
    assert [problem.code for problem in caught.value.problems] == ["NAME_MISMATCH"]


# -- building is quiet --


class Noisy(nn.Module):
    """Draws random numbers in every way that constructors do."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(2, 2)
        self.lstm = nn.LSTM(2, 2)
        self.embed = nn.Embedding(3, 2)
        self.conv = nn.Conv1d(2, 2, 1)
        self.attention = nn.MultiheadAttention(2, 1)
        for init in (
            nn.init.orthogonal_,
            nn.init.trunc_normal_,
            nn.init.xavier_normal_,
            nn.init.kaiming_uniform_,
            lambda weight: nn.init.sparse_(weight, 0.5),
        ):
            init(self.layer.weight)
        self.table = nn.Parameter(
            torch.randn(2) + torch.rand(2) + torch.randn_like(torch.ones(2)) + torch.rand_like(torch.ones(2))
        )
        self.register_buffer("noise", torch.empty(2).normal_() + torch.randint(3, (2,)) + torch.randperm(2))
        self.register_buffer("mask", torch.bernoulli(torch.full((2,), 0.5)) + torch.randint_like(torch.ones(2), 3))
        torch.nn.utils.parametrizations.spectral_norm(self.conv)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def test_building_a_class_draws_no_random_numbers(tmp_path: Path) -> None:
    """Whatever a constructor draws, the process's generators stay where they were (G11)."""
    hotglm.versioned("noisy", "1.0.0")(Noisy)
    slot = hotglm.ModuleSlot(build(RankerOne)(1), name="noisy", version="0.9.0", accept="major")
    path = tmp_path / "m.safetensors"
    hotglm.save_weights(build(Noisy)(2), path, version="1.0.0")
    before = (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads())
    slot.update(path)
    after = (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads())
    assert _class_of(slot) is Noisy
    assert after == before
    assert same_bits(slot(X), build(Noisy)(2)(X))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_a_class_is_built_the_same_in_any_context(context: Callable[[], Any], tmp_path: Path) -> None:
    """Grad modes and device contexts of the caller do not reach the constructor (G10, G11)."""
    _register(RankerOne, "1.0.0")
    _register(RankerGentle, "1.1.0")
    model = _two(2, model=RankerGentle)
    path = _save(tmp_path / "m.safetensors", model, version="1.1.0", config={"width": 2, "depth": 3})
    slot = _slot()
    with context():
        slot.update(path)
    assert all(p.requires_grad and p.is_leaf and not p.is_inference() for p in slot.parameters())
    assert same_bits(slot(X), model(X))
