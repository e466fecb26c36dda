"""A reference evaluator of migration expressions: each node is the torch call that its docstring names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from hotglm.migration.expression import (
    Called,
    Converted,
    Expression,
    Filled,
    Join,
    Narrow,
    Padded,
    Permuted,
    Reshaped,
    Same,
    Scaled,
    Select,
    Source,
    StackOf,
)
from hotglm.migration.initialisers import Constant, Normal, Ones, Zeros

State = Mapping[str, torch.Tensor]


def evaluate(outputs: Mapping[str, Expression], sources: State) -> dict[str, torch.Tensor]:
    """Return the tensor of every output."""

    @cache
    def value(node: Expression) -> torch.Tensor:
        return _apply(node, [value(operand) for operand in node.operands], sources)

    return {name: value(node).contiguous() for name, node in outputs.items()}


def _apply(node: Expression, operands: list[torch.Tensor], sources: State) -> torch.Tensor:  # noqa: PLR0911, PLR0912, C901  # one line per kind of node
    match node:
        case Source():
            return sources[node.name]
        case Narrow():
            return operands[0].narrow(node.dim, node.start, node.length)
        case Select():
            return operands[0].select(node.dim, node.index)
        case Join():
            return torch.cat(operands, node.dim)
        case StackOf():
            return torch.stack(operands, node.dim)
        case Permuted():
            return operands[0].permute(node.dims)
        case Reshaped():
            return operands[0].reshape(node.shape)
        case Padded():
            return _pad(operands[0], node)
        case Converted():
            return operands[0].to(getattr(torch, node.dtype))
        case Scaled():
            return operands[0] * node.factor
        case Filled():
            return _fill(node)
        case Same():
            assert all(bits(operand) == bits(operands[0]) for operand in operands)
            return operands[0]
        case Called():
            made: Mapping[str, torch.Tensor] = node.function(dict(zip(node.reads, operands, strict=True)))
            return made[node.writes[node.index][0]]
        case _:
            raise AssertionError(node)


def _pad(operand: torch.Tensor, node: Padded) -> torch.Tensor:
    def make(size: int) -> torch.Tensor:
        shape = [*operand.shape]
        shape[node.dim] = size
        return torch.full(shape, node.value, dtype=operand.dtype)

    return torch.cat([make(node.before), operand, make(node.after)], node.dim)


def _fill(node: Filled) -> torch.Tensor:
    dtype = getattr(torch, node.spec.dtype)
    match node.initialiser:
        case Zeros():
            return torch.zeros(node.spec.shape, dtype=dtype)
        case Ones():
            return torch.ones(node.spec.shape, dtype=dtype)
        case Constant(value):
            return torch.full(node.spec.shape, value, dtype=dtype)
        case Normal(std, seed):
            generator = torch.Generator().manual_seed(seed)
            return (torch.randn(node.spec.shape, generator=generator) * std).to(dtype)
        case _:
            raise AssertionError(node.initialiser)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return what is equal for two tensors exactly if they are bitwise the same."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)  # a view of one element may keep an odd stride
    plain.copy_(tensor.reshape(-1))
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()
