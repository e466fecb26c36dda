"""Migrations run on tensors in memory, without a slot: up, down, and up and down again.

Rules this module keeps: nothing that is passed in is written or kept, and what comes out shares no memory with it; the
expressions are evaluated by the very code that stages versions, one output after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hotglm.migration.registry import Migrations
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.testing.traffic import describe_differences
from hotglm.version import Version
from hotglm.weights.dtypes import TORCH_DTYPES, dtype_name
from hotglm.weights.evaluation import Evaluation
from hotglm.weights.scratch import Workspace

__all__ = ["assert_round_trip", "migrate_state"]


def migrate_state(
    migrations: Migrations,
    state: Mapping[str, torch.Tensor],
    *,
    source: str | Version,
    target: str | Version,
) -> dict[str, torch.Tensor]:
    """Return the tensors of `state` in the layout of another version.

    Args:
        migrations: the steps that are known.
        state: tensors of version `source`, by name; on the CPU, only read. As a file has them, tied ones once.
        source: their version.
        target: the version that is wanted.

    Raises:
        MigrationError: there is no path, or a step of it does not fit.
        TensorValueError: tensors that are to be tied are not equal.
    """
    path = migrations.plan(source, target)
    operands = {name: tensor.detach() for name, tensor in state.items()}
    specs = {name: TensorSpec(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for name, t in operands.items()}
    plan = path.plan_state(specs)
    evaluation = Evaluation(operands, work=Workspace(None))
    found: dict[str, torch.Tensor] = {}
    for name, expression in plan.outputs.items():
        found[name] = torch.empty(expression.spec.shape, dtype=TORCH_DTYPES[expression.spec.dtype])
        evaluation.write(expression, found[name])
    return found


def assert_round_trip(
    migrations: Migrations,
    state: Mapping[str, torch.Tensor],
    *,
    source: str | Version,
    target: str | Version,
    config: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """See that going to another version and back gives the same bits; return the state of that version.

    `down(up(x)) == x` for a `target` above `source`, `up(down(x)) == x` for one below. Names, dtypes, shapes, every
    tensor to the last bit, and the config where one is given.

    Args:
        migrations: the steps that are known.
        state: tensors of version `source`, by name; only read.
        source: their version.
        target: the version to go to and come back from.
        config: fields of the config of version `source`.

    Raises:
        AssertionError: naming everything that came back different.
        MigrationError: there is no path, or a step of it does not fit.
    """
    there = migrate_state(migrations, state, source=source, target=target)
    back = migrate_state(migrations, there, source=target, target=source)
    wrong = describe_differences(dict(state), back, name="state")
    if config is not None:
        fields = migrations.plan(source, target).migrate_config(config)
        fields = migrations.plan(target, source).migrate_config(fields)
        wrong += describe_differences(dict(config), fields, name="config")
    if wrong:
        path = " -> ".join([str(source), *(str(hop.arrives) for hop in migrations.plan(source, target).hops)])
        lines = "".join(f"\n  - {text}" for text in wrong)
        raise AssertionError(f"Expected {path} and back to change nothing, got:{lines}")
    return there
