"""Expressions: what cancels when one is built, what must not, and that what is left has the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hotglm.migration.expression import (
    Converted,
    Expression,
    Join,
    Narrow,
    Padded,
    Permuted,
    Reshaped,
    Scaled,
    Select,
    Source,
    StackOf,
    TensorSpec,
    convert,
    find_nodes,
    find_sources,
    join,
    narrow,
    pad,
    permute,
    reshape,
    same,
    scale,
    select,
    stack,
)
from hotglm.migration.plan import StatePlan
from support.evaluation import bits, evaluate

A, B = (Source(name, TensorSpec(dtype="float32", shape=(4, 3, 2))) for name in "ab")
H = Source("h", TensorSpec(dtype="bfloat16", shape=(4, 3, 2)))
TENSORS = {
    "a": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)),
    "b": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2)),
    "h": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(3)).bfloat16(),
}

CANCELLED: list[tuple[str, Expression, Expression]] = [
    ("the whole range", narrow(A, 1, 0, 3), A),
    ("a range of a range", narrow(narrow(A, 0, 1, 3), 0, 1, 2), narrow(A, 0, 2, 2)),
    ("an operand of a join", narrow(join([A, B], 1), 1, 3, 3), B),
    ("parts of two operands", narrow(join([A, B], 0), 0, 3, 2), join([narrow(A, 0, 3, 1), narrow(B, 0, 0, 1)], 0)),
    ("neighbouring ranges", join([narrow(A, 0, 0, 1), narrow(A, 0, 1, 2)], 0), narrow(A, 0, 0, 3)),
    ("all ranges", join([narrow(A, 2, 0, 1), narrow(A, 2, 1, 1)], 2), A),
    ("a join of a join", join([join([A, B], 0), A], 0), join([A, B, A], 0)),
    ("a slice of a stack", select(stack([A, B], 1), 1, 1), B),
    ("all slices", stack([select(A, 1, n) for n in range(3)], 1), A),
    ("three turns", permute(permute(permute(A, (1, 2, 0)), (1, 2, 0)), (1, 2, 0)), A),
    ("two turns", permute(permute(A, (1, 2, 0)), (0, 2, 1)), permute(A, (1, 0, 2))),
    ("a shape and back", reshape(reshape(A, (24,)), (4, 3, 2)), A),
    ("what was padded", narrow(pad(A, 0, 2, 1, 0.0), 0, 2, 4), A),
    ("part of what was padded", narrow(pad(A, 0, 2, 1, 0.0), 0, 3, 2), narrow(A, 0, 1, 2)),
    ("padded twice", pad(pad(A, 0, 1, 2, 7.0), 0, 3, 4, 7.0), pad(A, 0, 4, 6, 7.0)),
    ("widened and back", convert(convert(H, "float32"), "bfloat16"), H),
    ("widened twice", convert(convert(H, "float32"), "float64"), convert(H, "float64")),
    ("doubled and halved", scale(scale(A, 2.0), 0.5), A),
    ("tensors that are one", same([A, A]), A),
]


@pytest.mark.parametrize(("built", "left"), [case[1:] for case in CANCELLED], ids=[case[0] for case in CANCELLED])
def test_what_cancels_is_left_out(built: Expression, left: Expression) -> None:
    """Building leaves out what changes no bit, and what is left is what was meant."""
    assert built == left
    assert hash(built) == hash(left)


KEPT: list[tuple[str, Expression, type[Expression], Callable[[], torch.Tensor]]] = [
    (
        "narrowed and back",
        convert(convert(A, "bfloat16"), "float32"),
        Converted,
        lambda: TENSORS["a"].bfloat16().float(),
    ),
    ("sideways", convert(convert(H, "float16"), "bfloat16"), Converted, lambda: TENSORS["h"].half().bfloat16()),
    ("thirds", scale(scale(A, 3.0), 1 / 3), Scaled, lambda: TENSORS["a"] * 3.0 * (1 / 3)),
    ("another dimension", narrow(join([A, B], 0), 1, 0, 2), Narrow, lambda: torch.cat([*_both()]).narrow(1, 0, 2)),
    ("ranges apart", join([narrow(A, 0, 2, 1), narrow(A, 0, 0, 2)], 0), Join, lambda: TENSORS["a"][[2, 0, 1]]),
    ("the padding", narrow(pad(A, 0, 2, 1, 7.0), 0, 1, 2), Narrow, lambda: _padded()[1:3]),
    ("other paddings", pad(pad(A, 0, 1, 0, 7.0), 0, 1, 0, 8.0), Padded, lambda: _padded(8.0, 7.0)),
    ("some slices", stack([select(A, 1, n) for n in (0, 1)], 1), StackOf, lambda: TENSORS["a"][:, :2]),
    (
        "slices in another order",
        stack([select(A, 0, n) for n in (1, 0, 2, 3)], 0),
        StackOf,
        lambda: TENSORS["a"][[1, 0, 2, 3]],
    ),
    ("along another dimension", select(stack([A, B], 0), 1, 1), Select, lambda: torch.stack([*_both()])[:, 1]),
    ("a turn", permute(permute(A, (1, 2, 0)), (1, 2, 0)), Permuted, lambda: TENSORS["a"].permute(2, 0, 1)),
    (
        "turned and shaped",
        reshape(permute(A, (1, 0, 2)), (4, 6)),
        Reshaped,
        lambda: TENSORS["a"].transpose(0, 1).reshape(4, 6),
    ),
]


def _both() -> tuple[torch.Tensor, torch.Tensor]:
    return TENSORS["a"], TENSORS["b"]


def _padded(*values: float) -> torch.Tensor:
    rows = [torch.full((1, 3, 2), value) for value in values or (7.0, 7.0)]
    return torch.cat([*rows, TENSORS["a"], *([] if values else rows[:1])])


@pytest.mark.parametrize(("built", "kind", "wanted"), [case[1:] for case in KEPT], ids=[case[0] for case in KEPT])
def test_what_changes_bits_is_kept(
    built: Expression, kind: type[Expression], wanted: Callable[[], torch.Tensor]
) -> None:
    """What rounding or order can notice stays, and gives the bits of the torch calls."""
    assert isinstance(built, kind)
    assert bits(evaluate({"x": built}, TENSORS)["x"]) == bits(wanted())
    assert built.spec == TensorSpec(dtype=str(wanted().dtype).removeprefix("torch."), shape=tuple(wanted().shape))


def test_nodes_come_after_their_operands_and_once() -> None:
    """A node that two others share is yielded once, after what it is made of and before what is made of it."""
    shared = scale(A, 3.0)
    root = join([shared, narrow(shared, 0, 0, 1), B], 0)
    nodes = list(find_nodes([root, shared]))
    assert nodes == [A, shared, narrow(shared, 0, 0, 1), B, root]
    assert find_sources(root, shared) == ("a", "b")


def test_units_are_joined_through_others() -> None:
    """Outputs without a common source are one unit where others connect them, however they come."""
    sources = {name: Source(name, TensorSpec(dtype="int8", shape=(1,))) for name in "stuvw"}
    s, t, u, v, w = sources.values()
    outputs = {"one": s, "two": join([t, u], 0), "three": join([s, t], 0), "four": u, "five": w, "six": join([v, w], 0)}
    plan = StatePlan(sources={name: source.spec for name, source in sources.items()}, outputs=outputs)
    assert [(set(unit.sources), unit.outputs) for unit in plan.units] == [
        ({"s", "t", "u"}, ("one", "two", "three", "four")),
        ({"v", "w"}, ("five", "six")),
    ]
