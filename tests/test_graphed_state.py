"""What a capture of a pass may not change, and what it must see, beside what tests/test_graphed.py has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import UnswappableError
from hotglm.integrations.cuda_graphs import count_graphs
from support.compiled_fixtures import fresh_dynamo
from support.swaps import same_bits
from test_graphed import WIDTH, Bench, Model, Scaled, X, bench, state

__all__ = ["bench", "fresh_dynamo"]  # fixtures


class Gained(Model):
    """One with a number that hangs on a weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain: float = getattr(self.first.weight, "gain", 1.0)
        return super().forward(x) * gain


def test_a_number_on_a_tensor_is_seen(bench: Bench) -> None:
    """Attributes of parameters are used up by a capture as those of modules are."""
    slot = bench.slot(Gained().eval())
    for seed in range(6):
        module = Gained().eval()
        module.first.weight.gain = float(seed)  # type: ignore[attr-defined]
        bench.places.add(bench.device, module)
        with torch.no_grad():
            wanted = module(X)
        slot.update(module, version=f"1.0.{seed + 1}")
        assert same_bits(bench.run(slot), wanted), seed


class Remembering(Model):
    """One that writes a tensor in a plain attribute in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [torch.zeros(WIDTH)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen[0].add_(1)
        return super().forward(x) + self.seen[0]


def test_tensors_in_attributes_are_as_they_were_after_a_capture(bench: Bench) -> None:
    """As buffers are: the first replay is the first pass."""
    model, holder = Remembering().eval(), nn.Module()
    holder.register_buffer("seen", model.seen[0])
    bench.places.add(bench.device, holder)
    wanted = [copy.deepcopy(model)(X).detach() + more for more in (0.0, 1.0)]
    graphed_model = bench.graph(model, [X])
    assert torch.equal(model.seen[0], torch.zeros(WIDTH))
    assert all(torch.allclose(bench.run(graphed_model), one) for one in wanted)


class Learning(Model):
    """One that writes a weight in each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.weight.add_(1)
        return super().forward(x)


def test_a_pass_that_writes_weights_is_refused(bench: Bench) -> None:
    """By the name of the weight."""
    with pytest.raises(UnswappableError, match=r"first\.weight"):
        bench.graph(Learning().eval())


@pytest.mark.parametrize("where", ["a buffer", "later"])
def test_gradients_of_whatever_tensor_are_not_lost(where: str, bench: Bench) -> None:
    """Those of a buffer, or of weights that came to want them after the capture, are what the module gives."""
    model = Model().eval().requires_grad_(False)
    model.register_buffer("factor", torch.ones(WIDTH, requires_grad=where == "a buffer"))
    model.scale = model.factor  # type: ignore[assignment]
    module = bench.graph(model, [X])
    if where == "later":
        module.requires_grad_(True)
    assert module(X).requires_grad
    assert count_graphs(module).missed == {"gradients wanted": 1}


def test_in_place_a_number_that_only_a_refresh_sets_is_refused(bench: Bench) -> None:
    """What the live module has of its class would stay; the refusal names it, and the live version serves."""
    slot = bench.slot(Scaled().eval(), swap=hotglm.InPlace())
    before = bench.run(slot)
    with pytest.raises(UnswappableError, match="scale"):
        slot.update(state(1, Scaled), version="1.0.1")
    assert same_bits(bench.run(slot), before)


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_another_class_are_of_another_kind(bench: Bench) -> None:
    """What a subclass makes of a pass is not what was captured: it runs without a graph, and is counted."""
    module = bench.graph(Model().eval(), [X])
    with torch.no_grad():
        found = module(X.as_subclass(Marked))
    assert type(found) is Marked
    assert count_graphs(module).missed == {"inputs of another kind": 1}
