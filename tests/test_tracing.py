"""What tensor code does to shapes, written down as expressions: evaluated, they are what the code does to values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hotglm.integrations.tracing import Tracer
from hotglm.migration import expression as ir
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.weights.dtypes import TORCH_DTYPES, dtype_name
from hotglm.weights.lowering import find_byte_runs
from support.swaps import same_bits


def evaluate(expression: ir.Expression, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: PLR0911 - kinds
    """Return the value of an expression, one node at a time: the reference for what is written down."""
    parts = [evaluate(operand, tensors) for operand in expression.operands]
    match expression:
        case ir.Source(name=name):
            return tensors[name]
        case ir.Narrow(dim=dim, start=start, length=length):
            return parts[0].narrow(dim, start, length)
        case ir.Select(dim=dim, index=index):
            return parts[0].select(dim, index)
        case ir.Join(dim=dim):
            return torch.cat(parts, dim)
        case ir.StackOf(dim=dim):
            return torch.stack(parts, dim)
        case ir.Permuted(dims=dims):
            return parts[0].permute(dims)
        case ir.Reshaped(shape=shape):
            return parts[0].reshape(shape)
        case ir.Converted(dtype=dtype):
            return parts[0].to(TORCH_DTYPES[dtype])
    raise AssertionError(expression)


def trace(code: Callable[..., Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Tracer, Any]:
    """Run `code` on tensors without memory that stand for `tensors`; return the tracer and what came out."""
    tracer = Tracer()
    meta = {
        name: tracer.make_tensor(ir.Source(name, TensorSpec(dtype=dtype_name(t.dtype), shape=tuple(t.shape))))
        for name, t in tensors.items()
    }
    return tracer, code(**meta)


def expect_same(code: Callable[..., Any], **tensors: torch.Tensor) -> list[ir.Expression]:
    """Expect what was written down, evaluated, to be what the code gives, bit for bit, in dtype and shape."""
    tracer, made = trace(code, tensors)
    wanted = code(**tensors)
    made, wanted = [list(out) if isinstance(out, (tuple, list)) else [out] for out in (made, wanted)]
    expressions = []
    for out, value in zip(made, wanted, strict=True):
        expression = tracer.find(out)
        assert expression is not None, tracer.why_unknown
        assert expression.spec == TensorSpec(dtype=dtype_name(value.dtype), shape=tuple(value.shape))
        assert same_bits(dense(evaluate(expression, tensors)), dense(value))
        expressions.append(expression)
    return expressions


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def filled(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "chunk": lambda x: torch.chunk(x, 3, dim=1),
    "split": lambda x: torch.split(x, [1, 2, 3], dim=-2),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "slice": lambda x: x[1:-1, -4:, :100],
    "select": lambda x: x[:, -2],
    "unbind": lambda x: torch.unbind(x, 2),
    "stack": lambda x: torch.stack([x[0], x[1]], dim=-1),
    "cat": lambda x: torch.cat([x, x[:, :2]], dim=-2),
    "transpose": lambda x: x.transpose(0, -1).contiguous(),
    "mT": lambda x: x.mT.clone(),
    "t": lambda x: x[0].t(),
    "permute": lambda x: x.permute(2, 0, -2),
    "swap": lambda x: torch.movedim(x, 0, 2),
    "reshape": lambda x: x.transpose(0, 1).reshape(2, -1),
    "view": lambda x: x.view(3, 4, 10),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: torch.unflatten(x, 1, (2, 3)),
    "squeeze": lambda x: x[:, 1:2].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "to": lambda x: x.to(torch.float64).to(torch.bfloat16).half(),
    "detach": lambda x: x.detach(),
    "nothing": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("case", MOVES)
def test_what_moves_elements_is_written_down(case: str) -> None:
    """Each operation that only moves or converts elements is an expression that does the same."""
    expect_same(MOVES[case], x=filled(4, 6, 5))


@example(["view", "slice", "twice", "slice"], 0)  # a range of nothing
@given(st.lists(st.sampled_from([*MOVES, "twice"]), min_size=1, max_size=6), st.integers(0, 5))
def test_whatever_follows_whatever_is_written_down(cases: list[str], which: int) -> None:
    """A sequence of such operations, as far as torch takes it, is written down as a whole."""
    passed_over: list[list[str]] = []

    def code(x: torch.Tensor) -> torch.Tensor:
        passed_over.append([])
        for case in cases:
            try:
                out = torch.cat([x, x]) if case == "twice" else MOVES[case](x)
            except (RuntimeError, IndexError):
                passed_over[-1].append(case)  # not for this shape, or a fault of the tracer: then not on both sides
                continue
            out = out[which % len(out)] if isinstance(out, (tuple, list)) else out
            if out.dim() == 0:
                break  # torch warns of what it does to these
            x = out
        return x

    expect_same(code, x=filled(4, 6, 5))
    assert passed_over[0] == passed_over[1]


def test_stacks_joined_beside_are_whole_sources_in_a_row() -> None:
    """Gate and up projections, stacked and then joined, are said so that they are read from file to memory."""
    tensors = {name: filled(3, 2) + ord(name) for name in "abcd"}

    def fuse(a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
        return torch.cat([torch.stack([a, b]), torch.stack([c, d])], dim=1)

    (expression,) = expect_same(fuse, **tensors)
    runs = find_byte_runs(expression)
    assert runs is not None
    assert [run.source for run in runs] == ["a", "c", "b", "d"]

    def uneven(a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
        return torch.cat([torch.stack([a, b], dim=2), torch.stack([c, d], dim=2)], dim=2)

    expect_same(uneven, **tensors)
    expect_same(lambda a, b, c, d: torch.cat([torch.stack([a, b, c]), torch.stack([d])]), **tensors)


COMPUTES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a product": lambda x: x * 2,
    "a product that is moved": lambda x: (x + 1).t(),
    "a step": lambda x: x[::2],
    "a flip": lambda x: x.flip(0),
    "an index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "other bytes": lambda x: x.view(torch.int32),
    "in place": lambda x: x.mul_(2),
    "in place, of a part": lambda x: [x.mul_(2), x][1],
    "partly made up": lambda x: torch.cat([x, torch.zeros(1, 6, device=x.device)]),
}


@pytest.mark.parametrize("case", COMPUTES)
def test_what_computes_is_not_written_down(case: str) -> None:
    """What comes of an operation that computes is unknown, and so is everything that is made of it; it is named."""
    tracer, made = trace(COMPUTES[case], {"x": filled(4, 6)})
    assert tracer.find(made) is None
    assert str(tracer.why_unknown).startswith("aten::")


def test_a_part_that_is_written_to_makes_the_whole_unknown() -> None:
    """Writing into a view of a tensor is writing into the tensor."""

    def code(x: torch.Tensor) -> torch.Tensor:
        x[0].zero_()
        return x.t()

    tracer, made = trace(code, {"x": filled(4, 6)})
    assert tracer.find(made) is None


def test_nothing_else_in_the_process_notices_that_code_is_traced() -> None:
    """No mode of torch is on while code is traced, so passes that run or compile beside it do what they always do."""
    seen: list[object] = []

    def code(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_in_torch_dispatch_mode())
        seen.append(torch.ones(2).mul_(3).tolist())
        return x.t()

    expect_same(code, x=filled(4, 6))
    assert seen[:2] == [False, [3.0, 3.0]]


# --- the operations of transformers -----------------------------------------------------------------------------------


class _Config:
    num_attention_heads = 2
    parts = 3

    def get_text_config(self) -> _Config:
        return self


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(filled(8, 4))
        self.short = torch.nn.Parameter(filled(2, 4))
        self.long = torch.nn.Parameter(filled(6, 4))


def _operations() -> dict[str, tuple[Any, dict[str, list[tuple[int, ...]]], list[str]]]:
    loading = pytest.importorskip("transformers.core_model_loading")
    experts: dict[str, list[tuple[int, ...]]] = {"a": [(8, 4)] * 4, "b": [(8, 4)] * 4}
    return {
        "Chunk": (loading.Chunk(0), {"a": [(6, 4)]}, ["x", "y", "z"]),
        "Chunk, counted": (loading.Chunk(1, "parts"), {"a": [(4, 6)]}, ["x.*"]),
        "Split": (loading.Split(0), {"a": [(8, 4)]}, ["short", "long"]),
        "Concatenate": (loading.Concatenate(1), {"a": [(6, 4)], "b": [(6, 2)]}, ["x"]),
        "MergeModulelist": (loading.MergeModulelist(0), {"a": [(6, 4)] * 3}, ["x"]),
        "SplitModulelist": (loading.SplitModulelist(0), {"a": [(3, 6, 4)]}, ["x.*"]),
        "Transpose": (loading.Transpose(0, 1), {"a": [(6, 4)]}, ["x"]),
        "Transpose, needed": (loading.Transpose(0, 1, check_dims=True), {"a": [(4, 8)]}, ["x"]),
        "Transpose, not needed": (loading.Transpose(0, 1, check_dims=True), {"a": [(8, 4)]}, ["x"]),
        "PermuteForRope": (loading.PermuteForRope(), {"a": [(8, 4)]}, ["x"]),
        "PermuteForRope, vector": (loading.PermuteForRope(inverse=True), {"a": [(8,)]}, ["x"]),
        "Interleave": (loading.Interleave(1), {"a": [(2, 8, 4)]}, ["x"]),
        "Interleave, inverse": (loading.Interleave(0, inverse=True), {"a": [(8, 4)]}, ["x"]),
        "Conv3dToLinear": (loading.Conv3dToLinear(3, (1, 2, 2)), {"a": [(8, 3, 1, 2, 2)]}, ["x"]),
        "LinearToConv3d": (loading.LinearToConv3d(3, (1, 2, 2)), {"a": [(8, 12)]}, ["x"]),
        "Ernie, fuse": (loading.ErnieFuseAndSplitTextVisionExperts(), experts, ["x", "y"]),
        "Ernie, split": (
            loading.ErnieSplitAndDecoupleTextVisionExperts(),
            {"a": [(2, 16, 4)], "b": [(2, 16, 4)]},
            ["x.*", "y.*"],
        ),
    }


def test_every_operation_of_transformers_is_written_down() -> None:
    """Each operation of the registry that is not about quantisation is a rearrangement, and gives the same bits."""
    for case, (operation, shapes, targets) in _operations().items():
        names = [f"{pattern}{number}" for pattern in shapes for number in range(len(shapes[pattern]))]
        sizes = [shape for group in shapes.values() for shape in group]
        outputs: list[list[str]] = []

        def convert(
            operation: Any = operation,
            shapes: Any = shapes,
            targets: Any = targets,
            outputs: Any = outputs,
            **given: torch.Tensor,
        ) -> list[torch.Tensor]:
            made = operation.convert(
                {pattern: [given[f"{pattern}{i}"] for i in range(len(shapes[pattern]))] for pattern in shapes},
                source_patterns=list(shapes),
                target_patterns=targets,
                full_layer_name="weight" if targets == ["x"] else targets[0],
                model=_Model(),
                config=_Config(),
            )
            outputs.append(list(made))
            return [value[0] if isinstance(value, list) else value for value in made.values()]

        tensors = {name: filled(*size) + 1000 * n for n, (name, size) in enumerate(zip(names, sizes, strict=True))}
        assert expect_same(convert, **tensors), case
        assert outputs[0] == outputs[1]


def test_no_operation_of_transformers_is_left_out() -> None:
    """The list above has every operation that its module defines, but for those that only say nothing or are gone."""
    loading = pytest.importorskip("transformers.core_model_loading")
    defined = {
        name
        for name, value in vars(loading).items()
        if isinstance(value, type) and issubclass(value, loading.ConversionOps) and value is not loading.ConversionOps
    }
    tested = {type(operation).__name__ for operation, _, _ in _operations().values()}
    assert defined - tested <= {"_IdentityOp", "VisionFuseAndPermuteForRope", "VisionUnfuseAndPermuteForRope"}
