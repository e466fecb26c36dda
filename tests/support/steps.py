"""Migrations of one step for tests, planned and computed on tensors as a load does it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import hotglm
from hotglm.migration.expression import Expression, TensorSpec
from hotglm.migration.operation import Operation
from hotglm.weights.evaluation import Evaluation
from hotglm.weights.scratch import Workspace

__all__ = ["Tensors", "make", "plan", "run", "spec"]

Tensors = Mapping[str, torch.Tensor]


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    """Return the spec of a float32 tensor."""
    return TensorSpec(dtype=dtype, shape=shape)


def make(*operations: Operation) -> hotglm.Migrations:
    """Return migrations with one step from 1.0 to 2.0."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.0", "2.0", operations)
    return migrations


def plan(migrations: hotglm.Migrations, tensors: Tensors, source: str = "1.0", target: str = "2.0") -> hotglm.StatePlan:
    """Plan the way between two versions for real tensors."""
    specs = {name: spec(*t.shape, dtype=str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    return migrations.plan(source, target).plan_state(specs)


def run(outputs: Mapping[str, Expression], tensors: Tensors) -> dict[str, torch.Tensor]:
    """Compute expressions as a load does."""
    evaluation = Evaluation(tensors, work=Workspace(None))
    made = {name: torch.empty(e.spec.shape, dtype=getattr(torch, e.spec.dtype)) for name, e in outputs.items()}
    for name, view in made.items():
        evaluation.write(outputs[name], view)
    return made
