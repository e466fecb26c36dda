"""P12: a model that was swapped to B is, bit for bit, the one that was started with B, by whatever way it got there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import hotglm
from support.swaps import build, same_bits, same_state
from support.zoo import ZOO

KINDS = pytest.mark.parametrize("kind", ZOO)


class World:
    """A slot that holds A, another version B, and what a cold start with each of them would be."""

    def __init__(self, kind: str) -> None:
        make, inputs = ZOO[kind]
        self.maker = build(lambda: make().eval())
        self.x = inputs()
        self.a, self.b = self.maker(1), self.maker(2)
        self.slot = hotglm.ModuleSlot(self.maker(1), name="model", version="1.0.0")

    def start_cold(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """Construct a model with other weights, and load `state` into it."""
        cold = self.maker(3)
        missing, unexpected = cold.load_state_dict(dict(state), strict=False)
        assert unexpected == []
        assert all(name in ("embed.weight", "head.weight") for name in missing)  # one name of a tied tensor
        return cold

    def expect(self, cold: nn.Module) -> None:
        """See that the slot holds what `cold` is: outputs, state and buffers, also after the statistics moved on."""
        with torch.no_grad():
            assert same_bits(self.slot(self.x), cold(self.x))
        assert same_state(self.slot, cold)
        assert list(self.slot.state_dict()) == list(cold.state_dict())

    def expect_same_training_step(self, cold: nn.Module) -> None:
        """See that gradients are the same too, so that nothing on the way to them is left over."""
        for module in (self.slot, cold):
            output = module(self.x)
            parts = output.values() if isinstance(output, Mapping) else output
            sum(part.float().square().sum() for part in parts).backward()
        for one, other in zip(self.slot.parameters(), cold.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert same_bits(one.grad, other.grad)


def _file(world: World, path: Path) -> object:
    save_model(world.b, str(path / "b.safetensors"))
    return path / "b.safetensors"


def _own_file(world: World, path: Path) -> object:
    hotglm.save_weights(world.b, path / "b.safetensors")
    return str(path / "b.safetensors")


def _shards(world: World, path: Path) -> object:
    save_model(world.b, str(path / "whole"))
    state = load_file(path / "whole")
    (path / "whole").unlink()
    names = sorted(state)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


SOURCES: dict[str, Callable[[World, Path], object]] = {
    "file": _file,
    "file of our own": _own_file,
    "sharded directory": _shards,
    "state dict": lambda world, path: world.b.state_dict(),
    "parameters alone": lambda world, path: {**dict(world.b.named_parameters()), **world.b.state_dict()},
    "module": lambda world, path: world.b,
}


@KINDS
@pytest.mark.parametrize("source", SOURCES)
def test_a_warm_swap_is_a_cold_start(kind: str, source: str, tmp_path: Path) -> None:
    """Outputs, state, buffers and gradients after A -> B equal those of a model constructed and loaded with B (P12)."""
    world = World(kind)
    offered = SOURCES[source](world, tmp_path)
    receipt = world.slot.update(offered, version="1.0.1")  # type: ignore[arg-type]
    cold = world.start_cold(world.b.state_dict())
    world.expect(cold)
    world.expect_same_training_step(cold)
    assert receipt.digest is not None


@KINDS
def test_all_sources_of_the_same_weights_have_the_same_digest(kind: str, tmp_path: Path) -> None:
    """What is live does not depend on how it came: each tensor's digest is the same from every kind of source."""
    seen: dict[str, str] = {}
    for source, make in SOURCES.items():
        world = World(kind)
        directory = tmp_path / source
        directory.mkdir()
        digests = world.slot.update(make(world, directory), version="1.0.1").digests  # type: ignore[arg-type]
        for name, digest in digests.items():
            assert seen.setdefault(name, digest) == digest


@KINDS
def test_back_and_forth_is_a_cold_start_each_time(kind: str) -> None:
    """A -> B -> A -> B, through every arena in turn, is each time the model started with that version."""
    world = World(kind)
    for turn in range(6):
        target = (world.b, world.a)[turn % 2]
        world.slot.update(target.state_dict(), version=f"1.0.{turn + 1}")
        world.expect(world.start_cold(target.state_dict()))


@KINDS
def test_a_rollback_is_a_cold_start(kind: str) -> None:
    """Rolling back gives what was live before, whether it came with the slot or was swapped in."""
    world = World(kind)
    a, b = world.start_cold(world.a.state_dict()), world.start_cold(world.b.state_dict())
    world.slot.update(world.b.state_dict(), version="1.0.1")
    world.slot.rollback()
    world.expect(a)
    world.slot.rollback(to="1.0.1")
    world.expect(b)
    world.slot.update(world.a.state_dict(), version="1.0.2")
    world.slot.rollback()
    world.expect(b)


@KINDS
def test_running_statistics_do_not_leak_into_the_next_version(kind: str) -> None:
    """What passes in training mode wrote into A's buffers is not in B, and is in A again after a rollback."""
    world = World(kind)
    world.slot.train()
    with torch.random.fork_rng():
        world.slot(world.x)
    world.slot.eval()
    written = {name: tensor.clone() for name, tensor in world.slot.state_dict().items()}
    world.slot.update(world.b.state_dict(), version="1.0.1")
    world.expect(world.start_cold(world.b.state_dict()))
    world.slot.rollback()
    world.expect(world.start_cold(written))


@KINDS
def test_no_kind_of_model_needs_a_declaration(kind: str) -> None:
    """Plain torch models are swapped with the default rules; only masks and the like are carried over."""
    world = World(kind)
    receipt = world.slot.update(world.b.state_dict(), version="1.0.1")
    assert set(receipt.carried) <= {"mask"}
    assert receipt.refreshed == receipt.converted == ()


def test_a_swap_to_another_dtype_is_a_cold_start_in_that_dtype() -> None:
    """With `convert_dtypes`, float32 weights in a bfloat16 slot are those of `module.bfloat16()`."""
    maker = build(ZOO["mlp"][0])
    policy = hotglm.StagePolicy(convert_dtypes=True)
    slot = hotglm.ModuleSlot(maker(1).bfloat16(), name="model", version="1.0.0", policy=policy)
    receipt = slot.update(maker(2).state_dict(), version="1.0.1")
    assert same_state(slot, maker(2).bfloat16())
    assert set(receipt.converted) == set(slot.state_dict())
