"""A slot runs weights of any version that a path leads from; the classic family of five versions, in all 25 hops."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.testing.seams import fail_with, hooked, only_nth
from support import family

HOPS = list(itertools.product(family.VERSIONS, repeat=2))


@pytest.mark.parametrize(("running", "incoming"), HOPS)
def test_every_version_serves_weights_of_every_other(running: str, incoming: str, tmp_path: Path) -> None:
    """Staged in code of any version, weights of any other are bit for bit what plain torch makes of them."""
    slot = family.make_slot(running)
    path = tmp_path / "w.safetensors"
    state, config = family.make_checkpoint(incoming, seed=1), family.make_config(incoming)
    hotglm.save_weights(state, path, version=incoming, name=family.NAME, config=config)
    receipt = slot.update(path)
    _verify_serves(slot, running, family.convert(state, incoming, running))
    assert str(slot.version) == incoming
    assert bool(receipt.migration) == (running != incoming)


def _verify_serves(slot: hotglm.ModuleSlot, running: str, state: family.State) -> None:
    cold = family.make_model(running, state)
    expected, found = cold.state_dict(), slot.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(slot(family.make_input()), cold(family.make_input()))


@pytest.mark.parametrize(("running", "incoming"), [("1.0", "3.0"), ("3.0", "1.0"), ("2.1", "2.0"), ("3.0", "2.1")])
def test_a_state_dict_is_migrated_like_a_file(running: str, incoming: str) -> None:
    """A mapping of tensors goes the same way, also where it lists a tied tensor under both of its names."""
    slot = family.make_slot(running)
    state = family.make_checkpoint(incoming, seed=2)
    expected = family.convert(state, incoming, running)
    for source in (state, family.make_model(incoming, state).state_dict()):
        slot.update(source, version=incoming)
        _verify_serves(slot, running, expected)
    slot.update(family.make_model(incoming, state).state_dict())  # without a version: by its layout
    _verify_serves(slot, running, expected)


@contextlib.contextmanager
def _untouched(slot: hotglm.ModuleSlot, *args: Any) -> Iterator[None]:
    """What fails inside leaves the slot as it was: outputs, version, history and weights, bit for bit."""
    before = {name: tensor.clone() for name, tensor in slot.state_dict().items()}
    answer, version, history = slot(*args), slot.version, slot.history
    yield
    assert torch.equal(slot(*args), answer)
    assert (slot.version, slot.history) == (version, history)
    assert all(torch.equal(tensor, before[name]) for name, tensor in slot.state_dict().items())


def _codes(error: hotglm.HotglmError) -> list[str]:
    return [problem.code for problem in error.problems]


# -- one class, whose older versions only its migrations know ----------------------------------------------------------


@dataclass
class SoloConfig:
    """Config of the newest version; it was `size` until 2.0."""

    width: int = 4


def _double(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"gain": given["gain"] * 2 + 1}


@hotglm.versioned("solo", "2.1", reads=">=1", config=SoloConfig)
class Solo(nn.Module):
    """What is left of a model of three versions."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.width, config.width, bias=False)
        self.gain = nn.Parameter(torch.ones(config.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.project(x) * self.gain
        return projected


STEPS = hotglm.migrations_of(Solo)
STEPS.config("1.0", "2.0", [hotglm.RenameField("size", "width")])
STEPS.state("1.0", "2.0", [hotglm.Rename(r"linear\.(.*)", r"project.\1")])
STEPS.state("2.0", "2.1", [hotglm.Apply(_double, ["gain"], {"gain": hotglm.TensorSpec(dtype="float32", shape=(4,))})])
X = torch.arange(4.0)


def _make_old(version: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prefix = "linear" if version < "2.0" else "project"
    return {
        f"{prefix}.weight": torch.randn(4, 4, generator=generator),
        "gain": torch.randn(4, generator=generator),
    }


def _make_slot(**options: Any) -> hotglm.ModuleSlot:
    torch.manual_seed(3)
    return hotglm.ModuleSlot(Solo(SoloConfig()), accept="major", **options)


def test_a_class_is_given_weights_of_versions_that_only_its_migrations_know(tmp_path: Path) -> None:
    """An old file is migrated to the class that runs: config first, then tensors; the receipt says by which steps."""
    old = _make_old("1.0")
    path = tmp_path / "old.safetensors"
    hotglm.save_weights(old, path, version="1.2", name="solo", config={"size": 4})
    slot = _make_slot()
    with slot.stage(path) as staged:
        assert any("1.0 -> 2.0" in line or "1.2" in line for line in staged.migration)
        receipt = slot.commit(staged)
    expected = Solo(SoloConfig())
    expected.load_state_dict({"project.weight": old["linear.weight"], "gain": old["gain"] * 2 + 1})
    assert torch.equal(slot(X), expected(X))
    assert (str(slot.version), str(receipt.new_version)) == ("1.2", "1.2")
    assert receipt.migration == staged.migration
    assert all(line.strip() in receipt.explain() for line in receipt.migration)
    assert json.loads(json.dumps(receipt.to_dict()["migration"])) == list(receipt.migration)
    assert slot.live.code_version == "2.1"
    slot.update(_make_old("1.0", seed=1), version="1.3")  # the code is still that of 2.1
    slot.update(_make_old("2.1", seed=2), version="2.1")
    assert torch.equal(slot.state_dict()["gain"], _make_old("2.1", seed=2)["gain"])


def test_a_step_that_changes_no_name_or_shape_is_done_all_the_same() -> None:
    """Weights that fit as they are go through the steps that lie between; those of the code's version do not."""
    weights = _make_old("2.0")
    slot = _make_slot()
    receipt = slot.update(weights, version="2.0.5")
    assert torch.equal(slot.state_dict()["gain"], weights["gain"] * 2 + 1)
    assert receipt.migration
    receipt = slot.update(weights, version="2.1.7")
    assert torch.equal(slot.state_dict()["gain"], weights["gain"])
    assert receipt.migration == ()


def test_a_config_of_another_shape_builds_the_class_anew(tmp_path: Path) -> None:
    """The class is built from the migrated config, and `config=` is taken for that of the code, not of the file."""
    old = {"linear.weight": torch.randn(6, 6), "gain": torch.randn(6)}
    slot = hotglm.ModuleSlot(family_free(), accept="major")
    path = tmp_path / "old.safetensors"
    hotglm.save_weights(old, path, version="1.0", name="free", config={"size": 6})
    slot.update(path)
    assert slot.live.module.config == SoloConfig(width=6)
    assert torch.equal(slot.state_dict()["project.weight"], old["linear.weight"])
    slot.update(old, version="1.0", config={"width": 6})
    assert torch.equal(slot(torch.ones(6)), old["linear.weight"] @ torch.ones(6) * old["gain"])


def family_free() -> nn.Module:
    """Return a model of a name of its own, whose one step renames."""
    steps = hotglm.migrations_of(Free)
    steps.config("1.0", "2.0", [hotglm.RenameField("size", "width")])
    steps.state("1.0", "2.0", [hotglm.Rename(r"linear\.(.*)", r"project.\1")])
    return Free(SoloConfig())


@hotglm.versioned("free", "2.0", config=SoloConfig)
class Free(Solo):
    """As Solo, under another name."""


def test_somebody_elses_model_is_given_migrations() -> None:
    """A slot around a class without any declaration migrates by what it was given, and keeps its layout for ever."""
    steps = hotglm.Migrations("theirs")
    steps.state("1", "2", [hotglm.Split("weight", ("0.weight", "1.weight"))])
    slot = hotglm.ModuleSlot(
        nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)),
        version="2.0",
        accept="major",
        migrations=steps,
    )
    fused = torch.randn(6, 3)
    for _ in range(3):
        receipt = slot.update({"weight": fused}, version="1.5")
        assert torch.equal(slot.state_dict()["1.weight"], fused[3:])
        assert receipt.migration
    slot.update({"0.weight": fused[:3], "1.weight": fused[:3]}, version="2.2")
    assert torch.equal(slot.state_dict()["1.weight"], fused[:3])
    with pytest.raises(hotglm.ArgumentError, match="migrations"):
        hotglm.ModuleSlot(nn.Linear(1, 1), migrations="theirs")  # type: ignore[arg-type]  # the mistake


def test_a_copied_slot_migrates_like_the_first() -> None:
    """A deep copy and a pickle of a slot keep its migrations, and know the layout of the code that they hold."""
    steps = hotglm.Migrations("theirs")
    steps.state("1", "2", [hotglm.Rename("w", "weight")])
    slot = hotglm.ModuleSlot(nn.Linear(2, 2, bias=False), version="2", accept="major", migrations=steps)
    slot.update({"w": torch.eye(2)}, version="1.5")
    for other in (copy.deepcopy(slot), pickle.loads(pickle.dumps(slot))):
        receipt = other.update({"w": 2 * torch.eye(2)}, version="1.5")
        assert receipt.migration
        assert torch.equal(other(torch.ones(2)), 2 * torch.ones(2))


def test_new_code_is_preferred_to_a_migration() -> None:
    """Where the class of the very version is registered, it is that class that runs, as ever."""
    slot = hotglm.ModuleSlot(family.make_model("2.0"), accept="major")
    receipt = slot.update(family.make_checkpoint("1.4"), version="1.4", config=family.make_config("1.4"))
    assert isinstance(slot.live.module, family.Family14)
    assert receipt.migration == ()


def test_the_config_that_serves_is_migrated_for_new_code() -> None:
    """New code, whose weights bring no config, is built from the config that serves, brought to its version."""
    slot = hotglm.ModuleSlot(family.make_model("1.4"), accept="major")
    slot.update(family.make_checkpoint("2.0"), version="2.0")
    assert slot.live.module.config == family.NewConfig()


# -- weights that carry no version -------------------------------------------------------------------------------------


def test_plain_files_are_stamped_by_their_layout(tmp_path: Path) -> None:
    """A plain file and a directory of Hugging Face are stamped where one known layout leads to the code; it is said."""
    old = _make_old("1.0")
    plain = tmp_path / "plain.safetensors"
    save_file(old, plain)
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(old, hub / "model.safetensors")
    (hub / "config.json").write_text('{"size": 4}')
    for source in (plain, hub, old):
        slot = _make_slot()
        receipt = slot.update(source)
        assert torch.equal(slot.state_dict()["gain"], old["gain"] * 2 + 1)
        assert "version 1.0 concluded" in receipt.migration[0]
        assert str(slot.version).startswith("1.0+")


def test_what_fits_as_it_is_is_not_stamped() -> None:
    """Weights without a version that fit are used as they are, under the running version and a label, as ever."""
    slot = _make_slot()
    receipt = slot.update(_make_old("2.1"))
    assert receipt.migration == ()
    assert str(slot.version).startswith("2.1+")
    assert torch.equal(slot.state_dict()["gain"], _make_old("2.1")["gain"])


def test_what_fits_where_older_weights_were_migrated_is_of_the_codes_version() -> None:
    """Weights without a version are named after the layout they have, not after the migrated ones that serve."""
    slot = _make_slot()
    slot.update(_make_old("1.0"), version="1.0")
    assert (slot.live.is_migrated, str(slot.live.code_version)) == (True, "2.1")
    slot.update(_make_old("2.1"))
    assert str(slot.version).startswith("2.1+")
    assert not slot.live.is_migrated


def test_an_unknown_layout_is_refused() -> None:
    """Weights without a version that no known layout, or more than one, explains are refused; none is guessed."""
    slot = _make_slot()
    with _untouched(slot, X), pytest.raises(hotglm.UnknownVersionError):
        slot.stage({"other.weight": torch.ones(4, 4), "gain": torch.ones(4)})
    steps = hotglm.Migrations("twice")
    steps.state("1", "2", [hotglm.Rename("w", "weight")])
    steps.state("2", "3", [hotglm.Scale("weight", 2.0)])
    steps.state("0.5", "1", [hotglm.Scale("w", 2.0)])
    twice = hotglm.ModuleSlot(nn.Linear(2, 2, bias=False), version="3", migrations=steps, accept="major")
    with _untouched(twice, torch.ones(2)), pytest.raises(hotglm.UnknownVersionError) as caught:
        twice.stage({"w": torch.eye(2)})
    assert len(caught.value.problems) >= 2


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_version_without_a_path_is_refused_with_the_gap() -> None:
    """A version that no path leads from is refused by the verdict, which names tensors, gap and remedy."""
    slot = hotglm.ModuleSlot(
        nn.Linear(2, 2, bias=False), version="3", accept="major", migrations=hotglm.Migrations("gap")
    )
    slot._core.settings.migrations.state("2", "3", [hotglm.Rename("w", "weight")])  # type: ignore[union-attr]
    with _untouched(slot, torch.ones(2)), pytest.raises(hotglm.IncompatibleError) as caught:
        slot.stage({"x": torch.eye(2)}, version="1.0")
    assert {"NO_PATH", "TENSOR_MISSING", "TENSOR_UNEXPECTED"} <= set(_codes(caught.value))
    assert "2" in str(caught.value)
    slot.update({"weight": torch.eye(2)}, version="1.0")  # what fits as it is needs no path
    assert torch.equal(slot(torch.ones(2)), torch.ones(2))


def test_a_version_that_the_code_does_not_read_is_refused() -> None:
    """`reads` is asked for the version of the weights, whatever path there is."""
    slot = _make_slot()
    with _untouched(slot, X), pytest.raises(hotglm.IncompatibleError) as caught:
        slot.stage(_make_old("1.0"), version="0.9")
    assert "UNREADABLE_VERSION" in _codes(caught.value)


def test_a_step_that_does_not_fit_is_named_before_anything_is_read() -> None:
    """A config or a state that a step does not fit is a typed error that names the step; nothing is read."""
    slot = _make_slot()
    with _untouched(slot, X), pytest.raises(hotglm.MigrationStepError) as caught:
        slot.stage({"layer.weight": torch.ones(4, 4), "gain": torch.ones(4)}, version="1.0")
    assert caught.value.step == "1.0 -> 2.0"
    assert [timing.part for timing in caught.value.receipt.timings] == ["open", "decide"]  # type: ignore[union-attr]
    assert caught.value.serving == "2.1"


def _break(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise RuntimeError("the third layer is missing")


def test_a_free_function_that_fails_leaves_the_slot_as_it_was(tmp_path: Path) -> None:
    """A free function that raises while tensors are read is named with its step and tensor; the slot is as it was."""
    steps = hotglm.Migrations("breaking")
    spec = hotglm.TensorSpec(dtype="float32", shape=(2, 2))
    steps.state("1", "2", [hotglm.Apply(_break, ["w"], {"weight": spec})])
    slot = hotglm.ModuleSlot(nn.Linear(2, 2, bias=False), version="2", accept="major", migrations=steps)
    path = tmp_path / "w.safetensors"
    hotglm.save_weights({"w": torch.eye(2)}, path, version="1")
    for source in (path, {"w": torch.eye(2)}):
        with _untouched(slot, torch.ones(2)), pytest.raises(hotglm.MigrationStepError) as caught:
            slot.update(source, version="1")
        assert (caught.value.step, caught.value.tensor) == ("1 -> 2", "w")
        assert "_break" in str(caught.value)
        assert "the third layer is missing" in str(caught.value)
    slot.update({"weight": torch.eye(2)}, version="2.0.1")


def test_a_head_that_was_trained_apart_cannot_be_tied_again() -> None:
    """Going down over an untying is refused where the tensors differ by now, and both are named."""
    state = family.make_checkpoint("3.0")
    state["head.weight"][0, 0] += 1
    slot = family.make_slot("2.1")
    with _untouched(slot, family.make_input()), pytest.raises(hotglm.TensorValueError) as caught:
        slot.stage(state, version="3.0")
    assert _codes(caught.value) == ["TIE_CONFLICT"]
    assert {caught.value.problems[0].tensor, caught.value.problems[0].expected} == {"embed.weight", "head.weight"}


def test_two_shortest_paths_are_refused() -> None:
    """A version that two paths of one length lead from is refused with both; the slot is as it was."""
    steps = hotglm.Migrations("fork")
    for middle in ("2", "3"):
        steps.state("1", middle, [hotglm.Rename("w", "weight")])
        steps.state(f"=={middle}", "4", [hotglm.Rename("weight", "weight")])
    slot = hotglm.ModuleSlot(nn.Linear(2, 2, bias=False), version="4", accept="major", migrations=steps)
    with _untouched(slot, torch.ones(2)), pytest.raises(hotglm.MigrationError) as caught:
        slot.stage({"w": torch.eye(2)}, version="1")
    assert isinstance(caught.value, (hotglm.AmbiguousPathError, hotglm.MigrationStepError))


def test_promised_digests_are_verified_on_the_source(tmp_path: Path) -> None:
    """A file whose tensor was altered is refused by its own digest, although the tensor is split on its way in."""
    state = family.make_checkpoint("1.4")
    path = tmp_path / "w.safetensors"
    hotglm.save_weights(state, path, version="1.4", name=family.NAME, config=family.make_config("1.4"))
    name = "backbone.layers.1.qkv.weight"
    slot = family.make_slot("1.0")
    slot.update(path)
    data = bytearray(path.read_bytes())
    at = bytes(data).find(state[name].numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with _untouched(slot, family.make_input()), pytest.raises(hotglm.DigestMismatchError) as caught:
        slot.stage(path)
    assert [problem.tensor for problem in caught.value.problems] == [name]
    wrong = f"sha256:{'0' * 64}"
    with _untouched(slot, family.make_input()), pytest.raises(hotglm.DigestMismatchError) as caught:
        slot.stage(state, version="1.4", digests={name: wrong})
    assert [problem.tensor for problem in caught.value.problems] == [name]


@pytest.mark.parametrize("kind", ["map_anonymous", "preadv"])
def test_the_system_may_fail_at_any_call_of_a_migrated_stage(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever read or allocation fails, the error is typed and the slot is as it was; the next stage works."""
    monkeypatch.setattr("hotglm.weights.proof._SMALL_NBYTES", 0)
    path = tmp_path / "w.safetensors"
    hotglm.save_weights(family.make_checkpoint("2.0", seed=5), path, version="2.0")
    slot = family.make_slot("2.1")
    slot.update(path)
    with hooked(lambda *_: None) as counted:
        slot.update(path)
    num_calls = counted.counts[kind]
    assert num_calls >= 1
    errors = {"map_anonymous": OSError(12, "no memory"), "preadv": OSError(5, "bad disk")}
    for number in range(1, num_calls + 1):
        failing = only_nth(kind, number, fail_with(kind, lambda: errors[kind]))
        with _untouched(slot, family.make_input()), hooked(failing), pytest.raises(hotglm.HotglmError):
            slot.stage(path)
    slot.update(path)
