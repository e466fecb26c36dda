"""What holds for every swap holds in place: any call that fails is a typed refusal, and a warm swap is a cold start.

The tests of loading, checks and verdicts are not run again: a stage is the same. These go through whole updates,
commit included, with passes running all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError, MemoryPlanError, SourceReadError, StageFailedError, ThreadStartError
from hotglm.testing.seams import fail_with, hooked, only_nth
from support.shards import write_sharded
from support.swaps import build, same_bits, same_state
from support.universal import World, universal
from support.zoo import ZOO

TYPED = (SourceReadError, MemoryPlanError, StageFailedError, ThreadStartError)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    policy = hotglm.StagePolicy(num_threads=2)
    with World(tmp_path_factory.mktemp("in-place"), policy=policy, swap=hotglm.InPlace()) as made:
        yield made


@pytest.mark.parametrize("kind", ["pread", "preadv", "start_thread", "reach"])
def test_the_nth_call_that_fails_is_a_typed_refusal(world: World, kind: str) -> None:
    """K06, U1 to U8: whichever call of an update fails, those of the commit included, the live version serves."""
    for number in range(1, 80):
        version, source = write_sharded(world)
        world.publish(version)
        failure = fail_with(kind, lambda: MemoryError("planted"))
        with universal(world, TYPED, may_pass=True), hooked(only_nth(kind, number, failure)) as seen:
            world.slot.update(source)
        if seen.counts[kind] < number:
            assert number > 1
            world.update()
            return
    pytest.fail("the sweep did not come to its end")


REFUSALS: dict[str, Callable[[World, Path], object]] = {
    "no such file": lambda world, path: world.slot.update(path / "nothing"),
    "wrong shape": lambda world, path: world.slot.update({"layers.0.weight": torch.zeros(3)}),
    "not finite": lambda world, path: world.slot.update(
        {name: tensor * float("nan") for name, tensor in world.state(1).items()}, version="1.1.0"
    ),
    "other code": lambda world, path: world.slot.update(nn.Linear(2, 2), version="1.1.0"),
    "check says no": lambda world, path: world.slot.update(
        world.state(1), version="1.1.0", policy=hotglm.StagePolicy(checks=(lambda staged: False,))
    ),
    "another is live": lambda world, path: world.slot.update(world.state(1), version="1.1.0", expected=10**6),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(world: World, tmp_path: Path, name: str) -> None:
    """P2: refused for whatever reason, nothing has changed, and a good release loads after it."""
    with universal(world, HotglmError):
        REFUSALS[name](world, tmp_path)
    world.update()


def test_a_rollback_under_passes(world: World) -> None:
    """P8: there and back, with passes running, and never a mixture."""
    world.update()
    world.rollback()
    world.wait_for_passes()
    world.update()


@pytest.mark.parametrize("kind", ZOO)
def test_a_warm_swap_is_a_cold_start(kind: str) -> None:
    """P12: every kind of model, to and fro and back: outputs, gradients and state are those of a fresh start."""
    make, make_input = ZOO[kind]
    maker = build(make)
    torch.manual_seed(0)
    x = make_input()
    cold = {seed: maker(seed).eval() for seed in (2, 3)}
    slot = hotglm.ModuleSlot(maker(1).eval(), name="model", version="1.0.0", swap=hotglm.InPlace())
    for turn, seed in enumerate((2, 3, 2)):
        slot.update(cold[seed].state_dict(), version=f"1.0.{turn + 1}")
        assert same_state(slot.live.module, cold[seed])
        assert same_bits(slot(x), cold[seed](x))
    slot.rollback()
    assert same_bits(slot(x), cold[3](x))
    parameters = [parameter for parameter in slot.parameters() if parameter.requires_grad]
    expected = [parameter for parameter in cold[3].parameters() if parameter.requires_grad]
    found = _gradients(slot(x), parameters)
    assert same_bits(found, _gradients(cold[3](x), expected))


def _gradients(output: object, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    first = output
    while not isinstance(first, torch.Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]  # type: ignore[index]
    return list(torch.autograd.grad(first.float().square().sum(), parameters, allow_unused=True))
