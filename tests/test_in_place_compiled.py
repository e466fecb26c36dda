"""Compiled modules that are swapped in place: nothing is compiled again, and what passes compile is counted anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hotglm
from support.compiled_fixtures import fresh_dynamo
from support.compiled_models import KINDS, WIDTH, draw, make, make_cold
from support.swaps import same_bits

__all__ = ["fresh_dynamo"]  # a fixture for every test here

X = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


def make_slot(kind: str, *, backend: str = "eager") -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(
        make(kind, backend=backend),
        version="1.0.0",
        policy=hotglm.StagePolicy(warm_up=(X,)),
        memory=hotglm.MemoryPolicy(small_nbytes=0),
        swap=hotglm.InPlace(),
    )


def count_frames() -> int:
    return int(torch._dynamo.utils.counters["frames"]["total"])


def swap_often(kind: str, *, backend: str, num: int) -> None:
    slot = make_slot(kind, backend=backend)
    with torch.inference_mode():
        slot(X)
        before = count_frames()
        assert before >= 1
        addresses = [tensor.data_ptr() for tensor in slot.state_dict().values()]
        outputs = {}
        for number in range(1, num + 1):
            state = draw(slot, number)
            receipt = slot.update(state, version=f"1.0.{number}")
            assert receipt.recompiles == slot.status().recompiles == 0
            outputs[number] = slot(X), {name: tensor.clone() for name, tensor in state.items()}
        back = slot.rollback()
        assert back.in_place is not None
        assert back.in_place.addresses_stable
        assert same_bits(slot(X), outputs[num - 1][0])
        assert (count_frames() - before, slot.status().recompiles) == (0, 0)
        assert [tensor.data_ptr() for tensor in slot.state_dict().values()] == addresses
        for output, state in outputs.values():
            assert same_bits(output, make_cold(kind, state, backend=backend)(X))


@pytest.mark.parametrize(
    ("kind", "num"),
    [("nested", 2), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_swaps_in_place_compile_nothing(kind: str, num: int) -> None:
    """P10: swaps and a rollback compile nothing in staging and in passes; each version answers as a cold load."""
    swap_often(kind, backend="eager", num=num)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_swaps_in_place_under_inductor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with generated code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    swap_often(kind, backend="inductor", num=20)


def test_what_passes_compile_is_counted_anew_after_each_swap() -> None:
    """P10: inputs of another kind have something compiled; the count is that of the version which is live."""
    slot = make_slot("in place")
    slot(X)
    slot.update(draw(slot, 1), version="1.0.1")
    assert slot.status().recompiles == 0
    slot(X.clone().requires_grad_())
    assert slot.status().recompiles == 1
    slot.update(draw(slot, 2), version="1.0.2")
    slot(X.clone().requires_grad_())
    assert slot.status().recompiles == 0
    slot(X[:3])
    assert slot.status().recompiles >= 1
    slot.rollback()
    assert slot.status().recompiles == 0


def test_compiling_in_place_between_two_swaps() -> None:
    """A slot that is compiled while it serves goes on through the gate, and its later versions compile nothing."""
    slot = hotglm.ModuleSlot(make("regional", backend="eager"), version="1.0.0", swap=hotglm.InPlace(), policy=_warm())
    with torch.inference_mode():
        slot.update(draw(slot, 1), version="1.0.1")
        slot.compile(backend="eager")
        slot(X)
        before = count_frames()
        state = draw(slot, 2)
        slot.update(state, version="1.0.2")
        assert same_bits(slot(X), make_cold("nested", state, backend="eager")(X))
        slot.rollback()
        slot(X)
    assert slot.status().recompiles == 0
    assert count_frames() - before <= 1  # the cold one


def _warm() -> hotglm.StagePolicy:
    return hotglm.StagePolicy(warm_up=(X,))
