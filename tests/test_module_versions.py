"""The versions that torch's modules give their state travel in the file, and are given back to the modules on load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.model.module_versions import KEY

State = dict[str, torch.Tensor]


def _read(path: Path) -> dict[str, int] | None:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
    return None if text is None else json.loads(text)


def _save_old(state: State, path: Path, versions: dict[str, int] | None, **metadata: str) -> Path:
    """Write what an older version of some module would have written."""
    told = {} if versions is None else {KEY: json.dumps(versions)}
    save_file(state, path, metadata={**told, **metadata})
    return path


class Renaming(nn.Module):
    """A module whose weight was called `w` until its version 2."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2 and prefix + "w" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "w")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Computing(Renaming):
    """A module whose weight was half as large until its version 2."""

    def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *rest)


class Raising(Renaming):
    """A module that looks at values of older state."""

    def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if float(state_dict[prefix + "weight"].sum()) > 0:
            raise AssertionError
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *rest)


class Plain(nn.Module):
    """A module that gave its state a version, and does nothing about it."""

    _version = 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


# -- what is written ---------------------------------------------------------------------------------------------------


def test_versions_of_modules_are_written(tmp_path: Path) -> None:
    """A file of a module tells every version that is not 1, by path; a state dict tells its own; a mapping, nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ModuleDict({"inner": Plain()}))
    for source in (model, model.state_dict()):
        hotglm.save_weights(source, tmp_path / "w.safetensors")
        assert _read(tmp_path / "w.safetensors") == {"1": 2, "2.inner": 5}
    hotglm.save_weights(dict(model.state_dict()), tmp_path / "w.safetensors")
    assert _read(tmp_path / "w.safetensors") is None
    hotglm.save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert _read(tmp_path / "w.safetensors") == {}


# -- what is given back ------------------------------------------------------------------------------------------------


def test_batch_norm_before_its_version_2_gets_its_counter(tmp_path: Path) -> None:
    """Older state of BatchNorm, which had no counter, is loaded as torch loads it, and the receipt says so."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model.get_buffer("1.num_batches_tracked").fill_(9)
    old = {name: tensor for name, tensor in model.state_dict().items() if "tracked" not in name}
    old = {name: torch.rand_like(tensor) for name, tensor in old.items()}
    path = _save_old(old, tmp_path / "w.safetensors", {})
    slot = hotglm.ModuleSlot(model)
    receipt = slot.update(path)
    assert slot.state_dict()["1.num_batches_tracked"].tolist() == 0
    assert all(torch.equal(slot.state_dict()[name], tensor) for name, tensor in old.items())
    assert ["1 (BatchNorm1d)" in line for line in receipt.migration] == [True]


def test_a_file_that_tells_nothing_is_taken_at_its_word(tmp_path: Path) -> None:
    """A plain file, which tells no versions, is not brought up to date: what is missing is missing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    old = {name: tensor for name, tensor in model.state_dict().items() if "tracked" not in name}
    slot = hotglm.ModuleSlot(model)
    with pytest.raises(hotglm.IncompatibleError) as caught:
        slot.update(_save_old(old, tmp_path / "w.safetensors", None))
    assert [problem.tensor for problem in caught.value.problems] == ["1.num_batches_tracked"]


def test_state_of_the_current_version_is_left_alone(tmp_path: Path) -> None:
    """What `save_weights` wrote of the same code goes no other way than before."""
    model = nn.Sequential(nn.BatchNorm1d(2), Renaming(), Computing(), Plain()).eval()
    hotglm.save_weights(model, tmp_path / "w.safetensors")
    slot = hotglm.ModuleSlot(model)
    assert slot.update(tmp_path / "w.safetensors").migration == ()
    assert slot.update(model.state_dict()).migration == ()


def test_a_module_that_renames_its_state_is_honoured(tmp_path: Path) -> None:
    """A module's own `_load_from_state_dict` that renames, anywhere in the model, is followed, bit for bit."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"deep": Renaming()})["deep"])
    old = {"0.weight": torch.randn(3, 3), "0.bias": torch.randn(3), "1.w": torch.randn(3)}
    slot = hotglm.ModuleSlot(model)
    receipt = slot.update(_save_old(old, tmp_path / "w.safetensors", {}))
    assert torch.equal(slot.state_dict()["1.weight"], old["1.w"])
    assert torch.equal(slot.state_dict()["0.weight"], old["0.weight"])
    assert receipt.migration
    # A mapping that is a state dict of torch's tells the versions too.
    mapping: Any = model.state_dict()
    mapping.clear()
    mapping.update({name: tensor + 1 for name, tensor in old.items()})
    mapping._metadata = {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 1}}
    slot.update(mapping)
    assert torch.equal(slot.state_dict()["1.weight"], old["1.w"] + 1)


@pytest.mark.parametrize("kind", [Computing, Raising])
def test_a_module_that_computes_with_older_state_is_refused_by_name(kind: type[nn.Module], tmp_path: Path) -> None:
    """What a module would do with the values of older state cannot be done on headers: it is refused, with a remedy."""
    slot = hotglm.ModuleSlot(nn.Sequential(nn.Identity(), kind()))
    before = slot(torch.ones(3))
    path = _save_old({"1.weight": torch.ones(3)}, tmp_path / "w.safetensors", {})
    with pytest.raises(hotglm.IncompatibleError) as caught:
        slot.update(path)
    assert [problem.code for problem in caught.value.problems] == ["MODULE_VERSION"]
    assert f"{kind.__name__} '1'" in str(caught.value)
    assert "load_state_dict" in caught.value.remedy
    assert torch.equal(slot(torch.ones(3)), before)


def test_hooks_before_loading_cannot_be_followed(tmp_path: Path) -> None:
    """A module of an older version with hooks that run before it is loaded is refused by name; of the same one, not."""
    module: Any = Plain()
    module.register_load_state_dict_pre_hook(lambda *_: None)
    slot = hotglm.ModuleSlot(module)
    with pytest.raises(hotglm.IncompatibleError, match="hooks"):
        slot.update(_save_old({"weight": torch.ones(3)}, tmp_path / "w.safetensors", {"": 4}))
    slot.update(_save_old({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", {"": 5}))
    assert slot(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_asking_a_module_changes_nothing_of_it(tmp_path: Path) -> None:
    """The live module is not written, whatever its `_load_from_state_dict` does to its own tensors."""

    class Writing(Renaming):
        def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Any, *rest: Any) -> None:
            with torch.no_grad():
                self.weight.fill_(-1)
            self.seen = True
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    module = Writing()
    slot = hotglm.ModuleSlot(module)
    with slot.stage(_save_old({"w": torch.zeros(3)}, tmp_path / "w.safetensors", {})) as staged:
        assert slot(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
        assert not hasattr(slot.live.module, "seen")
        assert staged.module(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_versions_follow_a_migration(tmp_path: Path) -> None:
    """Where a migration renames, the versions of modules are those of the modules that the tensors come from."""
    steps = hotglm.Migrations("norms")
    steps.state("1", "2", [hotglm.Rename(r"old\.(.*)", r"norm.\1")])
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
    slot = hotglm.ModuleSlot(model, version="2", accept="major", migrations=steps)
    state = {f"old.{name}": tensor for name, tensor in nn.BatchNorm1d(2).state_dict().items()}
    slot.update(_save_old(state, tmp_path / "w.safetensors", {"old": 2}), version="1")
    del state["old.num_batches_tracked"]
    receipt = slot.update(_save_old(state, tmp_path / "w.safetensors", {}), version="1")
    assert any("BatchNorm1d" in line for line in receipt.migration)
    with pytest.raises(hotglm.IncompatibleError):
        slot.update(_save_old(state, tmp_path / "w.safetensors", {"old": 2}), version="1")


@pytest.mark.parametrize("text", ["[]", '{"a": "2"}', '{"a": true}', "{", '{"a": 1.5}'])
def test_bad_versions_of_modules_are_refused(text: str, tmp_path: Path) -> None:
    """Metadata that are not paths with whole numbers are refused."""
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(3)}, path, metadata={KEY: text})
    with pytest.raises(hotglm.TensorValueError):
        hotglm.ModuleSlot(Plain()).update(path)
