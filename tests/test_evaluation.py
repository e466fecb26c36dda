"""Expressions computed: memory, dtypes and strides of the destination make no difference to the bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hotglm
from hotglm.errors import MigrationStepError
from hotglm.migration.operation import Operation
from hotglm.weights.digest import digest_tensor
from hotglm.weights.evaluation import Evaluation
from hotglm.weights.scratch import Workspace
from support.evaluation import bits
from support.steps import make, plan, run, spec

Tensors = Mapping[str, torch.Tensor]
WANTED = "sha256:4a3ee331f139362ba6cca425541d384fd63eab98561b278458a1a6bc708e477c"


def test_two_outputs_of_one_long_chain_are_each_computed_whole(tmp_path: Path) -> None:
    """What was computed on the way to one output is not read again once its memory has been given to another."""
    migrations = make(
        *(hotglm.Scale("a", 3.0 if number % 2 else -0.5) for number in range(60)),
        hotglm.Untie(("a", "b", "c")),
        hotglm.Pad("b", 0, before=1, value=7.0),
        hotglm.Scale("c", 5.0),
    )
    tensors = {"a": torch.arange(1.0, 300.0)}
    hotglm.save_weights(tensors, tmp_path / "old.safetensors", version="1.0")
    hotglm.migrate_weights(tmp_path / "old.safetensors", tmp_path / "new.safetensors", migrations=migrations, to="2.0")
    wanted = tensors["a"]
    for number in range(60):
        wanted = wanted * (3.0 if number % 2 else -0.5)
    found = load_file(tmp_path / "new.safetensors")
    assert bits(found["a"]) == bits(wanted)
    assert bits(found["b"]) == bits(torch.cat([torch.tensor([7.0]), wanted]))
    assert bits(found["c"]) == bits(wanted * 5)


class _Counted(Workspace):
    """Memory that counts how much is taken of it."""

    nbytes = 0

    def take(self, dtype: torch.dtype, shape: Any) -> torch.Tensor:
        """Count, and take."""
        found = super().take(dtype, shape)
        self.nbytes += found.numel() * found.element_size()
        return found


def test_what_is_put_together_is_converted_where_it_stays() -> None:
    """Tensors that are joined for code of another dtype are converted part by part, and take no memory in between."""
    tensors = {"a": torch.randn(2, 3).bfloat16(), "b": torch.randn(2, 3).bfloat16()}
    migrations = make(hotglm.Concatenate(("a", "b"), "c", dim=1), hotglm.Transpose("c", 0, 1))
    work, view = _Counted(None), torch.empty(6, 2)
    Evaluation(tensors, work=work).write(plan(migrations, tensors).outputs["c"], view)
    assert bits(view) == bits(torch.cat([tensors["a"], tensors["b"]], 1).t().float())
    assert work.nbytes == 0


@pytest.mark.parametrize("operation", [hotglm.Scale("a", 1.1), hotglm.Pad("a", 0, after=1, value=0.1)])
def test_what_is_computed_rounds_before_it_is_converted(operation: Operation) -> None:
    """A value is computed in the dtype that the migration says, also where the code's is a wider one."""
    tensors = {"a": torch.randn(5).bfloat16()}
    output = plan(make(operation), tensors).outputs["a"]
    wide = torch.empty(output.spec.shape)
    Evaluation(tensors, work=Workspace(None)).write(output, wide)
    assert bits(wide) == bits(run({"a": output}, tensors)["a"].float())


def test_random_numbers_do_not_depend_on_where_they_go() -> None:
    """Normal gives the same numbers in memory of any strides, also where they are drawn in several runs."""
    output = plan(make(hotglm.Add("x", (1025, 1030), "float32", hotglm.Normal(1.0))), {}).outputs["x"]
    evaluation = Evaluation({}, work=Workspace(None))
    straight, across = torch.empty(1025, 1030), torch.empty(1030, 1025).t()
    evaluation.write(output, straight)
    evaluation.write(output, across)
    assert bits(straight) == bits(across)
    assert abs(straight.mean().item()) < 0.01
    assert abs(straight[-100:].std().item() - 1) < 0.01
    assert 0.67 < (straight.abs() < 1).float().mean().item() < 0.69
    assert digest_tensor(straight) == WANTED, "on every machine, with every version of torch"


class _Surprising(dict[str, torch.Tensor]):
    """A mapping that has other tensors each time it is asked."""

    def get(self, key: object, default: Any = None) -> Any:
        del key, default
        return torch.ones(2)


def test_a_mapping_that_a_function_returns_is_read_once() -> None:
    """What is checked of a function's result is what is used, whatever kind of mapping it is."""
    migrations = make(hotglm.Apply(lambda _: _Surprising(), ("a",), {"a": spec(2)}))
    tensors = {"a": torch.zeros(2)}
    with pytest.raises(MigrationStepError):
        run(plan(migrations, tensors).outputs, tensors)
