"""Laws of migrations on the evaluator that loads use: it agrees with plain torch; down after up gives the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import given
from hypothesis import strategies as st

from hotglm.migration.expression import Expression, Filled, Source, TensorSpec, find_nodes
from hotglm.migration.initialisers import Normal
from hotglm.migration.operation import Operation
from hotglm.weights.evaluation import Evaluation, count_room
from hotglm.weights.lowering import find_byte_runs
from hotglm.weights.scratch import Scratch
from support.evaluation import bits, evaluate
from support.operations import draw_operation, make_sources, make_tensors, specs

SCRATCH = Scratch()

Journey = tuple[dict[str, TensorSpec], list[Operation]]


@st.composite
def journeys(draw: st.DrawFn) -> Journey:
    """Draw a state and up to eight invertible operations that fit one after the other."""
    state = draw(specs())
    current, operations = make_sources(state), list[Operation]()
    for _ in range(draw(st.integers(1, 8))):
        operations.append(draw_operation(draw, {name: e.spec for name, e in current.items()}))
        current = operations[-1].apply(current)
    return state, operations


def run(operations: list[Operation], state: Mapping[str, TensorSpec]) -> dict[str, Expression]:
    """Return the expressions after all operations."""
    current = make_sources(state)
    for operation in operations:
        current = operation.apply(current)
    return current


def write(outputs: Mapping[str, Expression], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Evaluate as a load does: each output written into memory that is there already."""
    work = SCRATCH.open(count_room(outputs.values(), has_calls=False))
    evaluation = Evaluation(tensors, work=work)
    made = {}
    for name, expression in outputs.items():
        view = torch.empty(expression.spec.shape, dtype=getattr(torch, expression.spec.dtype))
        view.view(torch.uint8).fill_(0xA5) if view.dim() else view.fill_(1)
        evaluation.write(expression, view)
        made[name] = view
    return made


def show(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Return what is equal for two states exactly if they are bitwise the same."""
    return {name: bits(tensor) for name, tensor in tensors.items()}


def is_random(expression: Expression) -> bool:
    """Tell whether an initialiser draws it; the reference draws other numbers."""
    return any(isinstance(node, Filled) and isinstance(node.initialiser, Normal) for node in find_nodes([expression]))


@given(journeys(), st.integers(0, 99))
def test_loads_compute_what_plain_torch_does(journey: Journey, seed: int) -> None:
    """Every output of any composition has the bits that the torch calls of its nodes give, and no source is written."""
    state, operations = journey
    tensors = make_tensors(state, seed)
    before = show(tensors)
    outputs = {name: e for name, e in run(operations, state).items() if not is_random(e)}
    assert show(write(outputs, tensors)) == show(evaluate(outputs, tensors))
    assert show(tensors) == before


@given(journeys(), st.integers(0, 99))
def test_down_after_up_gives_the_same_bits(journey: Journey, seed: int) -> None:
    """down(up(x)) == x bitwise for any composition of invertible operations, written out in between."""
    state, operations = journey
    tensors = make_tensors(state, seed)
    up = run(operations, state)
    inverses = [inverse for operation in reversed(operations) if (inverse := operation.inverse()) is not None]
    assert len(inverses) == len(operations)
    down = run(inverses, {name: e.spec for name, e in up.items()})
    assert show(write(down, write(up, tensors))) == show(tensors)


@given(journeys(), st.integers(0, 99))
def test_what_is_read_without_computing_is_the_same_bytes(journey: Journey, seed: int) -> None:
    """Where an output is made of runs of source bytes, those bytes are the tensor; a whole source always is."""
    state, operations = journey
    tensors = make_tensors(state, seed)
    for expression in run(operations, state).values():
        runs = find_byte_runs(expression)
        if runs is None:
            assert not isinstance(expression, Source)
            continue
        whole = evaluate({"x": expression}, tensors)["x"]
        read = b"".join(bits(tensors[r.source])[2][r.start : r.stop] for r in runs)
        assert read == bits(whole)[2]
