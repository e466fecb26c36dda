"""Quantised weights: tensor subclasses that wrap others are swapped by what is inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import (
    ArgumentError,
    CallableCheckError,
    HotglmError,
    IncompatibleError,
    NonFiniteError,
    UncopyableError,
    UnswappableError,
)
from hotglm.model.wrappers import describe_wrapper, explain_difference, find_memory
from support.swaps import same_bits
from support.wrapped import WIDTH, Blocked, Copying, Outer, X, make, make_plain, quantise, quantise_layers

POLICIES: dict[str, Callable[[], Any]] = {"flip": hotglm.Flip, "in place": hotglm.InPlace}
KINDS: dict[str, dict[str, Any]] = {"blocks": {}, "nested": {"kind": Outer}, "tied": {"is_tied": True}}


def live_of(slot: hotglm.ModuleSlot) -> Any:
    return slot.live.module


def make_slot(model: Any = None, **options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(make(1) if model is None else model, name="model", version="1.0.0", **options)


def refuse(slot: hotglm.ModuleSlot, source: Any, error: type[HotglmError], **options: Any) -> HotglmError:
    """Return the error of an update, having seen that what was live still serves, bit for bit."""
    before = slot(X)
    with pytest.raises(error) as caught:
        slot.update(source, version="1.0.1", **options)
    assert same_bits(slot(X), before)
    assert (str(slot.version), slot.live.number) == ("1.0.0", 1)
    slot.verify_live()
    return caught.value


# -- swaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_of_wrappers_is_swapped_in_by_what_is_inside(policy: str, kind: str) -> None:
    """Answers after a swap by state dict, and after a rollback, are those of the module that was quantised."""
    old, new, options = make(1, **KINDS[kind]), make(2, **KINDS[kind]), KINDS[kind]
    slot = make_slot(make(1, **options), swap=POLICIES[policy]())
    receipt = slot.update(new.state_dict(), version="1.0.1")
    assert same_bits(slot(X), new(X))
    assert not same_bits(slot(X), old(X))
    live, theirs = live_of(slot)[0].weight, new[0].weight
    assert (type(live), isinstance(live, nn.Parameter)) == (type(theirs), True)
    assert explain_difference(describe_wrapper(live), describe_wrapper(theirs)) is None
    assert same_bits(find_memory(live), find_memory(theirs))
    assert not {t.data_ptr() for t in find_memory(live)} & {t.data_ptr() for t in find_memory(theirs)}
    assert receipt.digest == slot.verify_live().digest
    assert (live_of(slot)[0].weight is live_of(slot)[2].weight) == (kind == "tied")
    slot.rollback()
    assert same_bits(slot(X), old(X))
    slot.verify_live()


@pytest.mark.parametrize("kind", KINDS)
def test_a_requantised_module_is_swapped_in(kind: str) -> None:
    """So is a module of the same structure, and it is copied: whoever writes the offered one changes nothing."""
    new, slot = make(2, **KINDS[kind]), make_slot(make(1, **KINDS[kind]))
    slot.update(new, version="1.0.1")
    expected = new(X)
    for tensor in find_memory(new[0].weight):
        tensor.zero_()
    assert same_bits(slot(X), expected)
    slot.update(make(3, **KINDS[kind]).state_dict(), version="1.0.2")
    assert same_bits(slot(X), make(3, **KINDS[kind])(X))


def test_what_is_inside_has_the_memory_digests_and_names() -> None:
    """Digests are of inner bytes under inner names, all inner tensors lie in the arena, and memory is two copies."""
    slot = make_slot()
    nbytes = set()
    for seed in range(2, 12):
        slot.update(make(seed).state_dict(), version=f"1.0.{seed}")
        generation = slot._core.admission.live.generation
        assert set(generation.digests) == {
            f"{at}.{name}" for at in (0, 2) for name in ("weight.qdata", "weight.scale", "bias")
        }
        arena = generation.arena
        assert arena is not None
        for tensor in (*find_memory(live_of(slot)[0].weight), *find_memory(live_of(slot)[2].weight)):
            assert arena.address <= tensor.data_ptr() < arena.address + arena.nbytes
        nbytes.add(slot._core.spares.pool.nbytes // arena.nbytes)
    assert max(nbytes) <= 3  # small models may keep a third (MemoryPolicy)


def test_memory_under_a_wrapper_that_is_held_is_not_written() -> None:
    """Whoever keeps a parameter of an old version keeps its bytes."""
    slot = make_slot()
    slot.update(make(2).state_dict(), version="1.0.1")
    held = live_of(slot)[0].weight
    expected = [tensor.clone() for tensor in find_memory(held)]
    for seed in range(3, 8):
        slot.update(make(seed).state_dict(), version=f"1.0.{seed}")
    assert same_bits(list(find_memory(held)), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_swaps_of_compiled_quantised_models_compile_nothing(policy: str, backend: str) -> None:
    """20 swaps under fail_on_recompile: what guards look at is alike."""
    torch._dynamo.reset()
    slot = make_slot(torch.compile(make(1), backend=backend, fullgraph=True), swap=POLICIES[policy]())
    with torch.no_grad():
        slot(X)
        before = int(torch._dynamo.utils.counters["frames"]["total"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(2, 22):
                receipt = slot.update(make(seed).state_dict(), version=f"1.0.{seed}")
                assert torch.allclose(slot(X), make(seed)(X), atol=1e-6)
                assert receipt.recompiles == 0
    assert int(torch._dynamo.utils.counters["frames"]["total"]) == before


def test_conversions_that_change_nothing_pass() -> None:
    """`slot.cpu()` and `slot.float()` of a live quantised module leave it as it is."""
    slot = make_slot(make(1))
    before = slot(X)
    slot._apply(lambda tensor: tensor.detach())
    assert same_bits(slot(X), before)


# -- refusals ----------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another block size": (lambda: make(2, block=2), "Blocked with 'block' 4, got 2"),
    "another block size in a mapping": (lambda: make(2, block=2).state_dict(), "Blocked with 'block' 4, got 2"),
    "another class": (lambda: make(2, kind=Copying).state_dict(), "the subclass Blocked, got the subclass Copying"),
    "another structure": (lambda: make(2, kind=Outer).state_dict(), "the subclass Blocked, got the subclass Outer"),
    "full precision": (lambda: make_plain(2).state_dict(), r"Blocked of qdata, scale, got float32 of shape \[8, 8\]"),
    "inner tensors": (
        lambda: {
            f"{name}{inner}": tensor
            for name, whole in make(2).state_dict().items()
            for inner, tensor in zip(
                (".qdata", ".scale") if "weight" in name else ("",), find_memory(whole), strict=True
            )
        },
        "got inner tensors without their context",
    ),
    "nothing": (lambda: {"0.bias": torch.ones(WIDTH)}, "Blocked of qdata, scale, got none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_alike_is_refused_by_name(what: str) -> None:
    """Bytes of another kind of wrapper, or of none, are never put into one; every parameter is named with a remedy."""
    source, text = REFUSED[what]
    error = refuse(make_slot(), source(), UnswappableError)
    assert error.code == "CANNOT_SWAP_WRAPPED"
    assert [problem.tensor for problem in error.problems] == ["0.weight", "2.weight"]
    with pytest.raises(HotglmError, match=text):
        raise error
    assert "slot.update(module)" in error.remedy


def test_a_file_of_full_precision_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """A file has neither the kind nor the settings; the remedy works."""
    path, slot, loaded = tmp_path / "plain.safetensors", make_slot(), make_plain(3)
    hotglm.save_weights(make_plain(2), path)
    assert "quantise it with the same settings" in refuse(slot, path, UnswappableError).remedy
    hotglm.ModuleSlot(loaded, name="loading", version="1.0.0", swap=hotglm.InPlace()).update(path)
    quantise_layers(loaded)
    slot.update(loaded, version="1.0.1")
    assert same_bits(slot(X), make(2)(X))


@pytest.mark.parametrize("as_module", [False, True])
def test_inner_tensors_that_do_not_fit_are_named(as_module: bool) -> None:
    """Another dtype inside is a difference of the contract, under the inner name."""
    other = make(2)
    other[0].weight = nn.Parameter(
        Blocked(other[0].weight.qdata, other[0].weight.scale.double(), block=4), requires_grad=False
    )
    error = refuse(make_slot(), other if as_module else other.state_dict(), IncompatibleError)
    assert "'0.weight.scale'" in error.problems[0].message
    assert "float64" in error.problems[0].message


def test_a_value_that_is_not_finite_is_named_by_its_inner_name() -> None:
    """A scale that is NaN fails the stage."""
    other = make(2)
    other[2].weight.scale[0, 0] = float("nan")
    error = refuse(make_slot(), other.state_dict(), NonFiniteError, policy=hotglm.StagePolicy(finite=True))
    assert [problem.tensor for problem in error.problems] == ["2.weight.scale"]


def test_a_wrapper_that_copies_what_it_is_given_is_refused() -> None:
    """Its memory would not be the arena's; it is found when the first version is staged."""
    error = refuse(make_slot(make(1, kind=Copying)), make(2, kind=Copying).state_dict(), UncopyableError)
    assert "Copying cannot be made again" in str(error)
    assert "over a copy" in str(error)


def test_a_wrapper_that_is_not_registered_is_refused() -> None:
    """One in a plain attribute would keep its old value."""
    model = make(1)
    model.cache = quantise(torch.ones(WIDTH, WIDTH))
    assert "'cache': it is a tensor subclass" in str(refuse(make_slot(model), make(2).state_dict(), UncopyableError))


def test_a_check_that_writes_inside_a_parameter_is_found() -> None:
    """What is inside counts its writes."""

    def write(module: Any) -> None:
        module[0].weight.qdata.zero_()

    error = refuse(make_slot(), make(2).state_dict(), CallableCheckError, policy=hotglm.StagePolicy(checks=(write,)))
    assert [problem.tensor for problem in error.problems] == ["0.weight"]


def test_buffers_that_wrap_are_carried_or_restored() -> None:
    """A persistent buffer is swapped like a parameter; what a warm-up pass did to it is undone."""

    class Counting(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.register_buffer("table", quantise(make_plain(seed)[0].weight))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table: Any = self.table
            y = nn.functional.linear(x, table)
            table.scale.mul_(0.5)
            return y

    slot = make_slot(Counting(1), policy=hotglm.StagePolicy(warm_up=(X,)))
    slot.update(Counting(2).state_dict(), version="1.0.1")
    assert type(slot.live.module.table) is Blocked
    assert same_bits(slot(X), Counting(2)(X))


def test_files_of_wrappers_are_refused(tmp_path: Path) -> None:
    """No file is written that would lose what the bytes mean."""
    with pytest.raises(ArgumentError, match="the subclass Blocked") as caught:
        hotglm.save_weights(make(1), tmp_path / "quantised.safetensors")
    assert [problem.tensor for problem in caught.value.problems] == ["0.weight", "2.weight"]
    assert not list(tmp_path.iterdir())


# -- torchao -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("policy", POLICIES)
def test_models_quantised_by_torchao_are_swapped(config: str, policy: str) -> None:
    """By state dict, by module, rolled back and refused as the subclasses here."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def make_quantised(seed: int) -> Any:
        model = make_plain(seed)
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    slot = make_slot(make_quantised(1), swap=POLICIES[policy]())
    before = slot(X)
    slot.update(make_quantised(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), make_quantised(2)(X))
    slot.verify_live()
    slot.rollback()
    assert same_bits(slot(X), before)
    with pytest.raises(UnswappableError, match="Int8Tensor"):
        slot.update(make_plain(3).state_dict(), version="1.0.2")
    assert same_bits(slot(X), before)
    if policy == "flip":
        slot.update(make_quantised(3), version="1.0.3")
        assert same_bits(slot(X), make_quantised(3)(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("policy", POLICIES)
def test_swaps_of_compiled_torchao_models_compile_nothing(backend: str, policy: str) -> None:
    """Its guards hold too, with generated code as well."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def make_quantised(seed: int) -> Any:
        model = make_plain(seed)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    torch._dynamo.reset()
    slot = make_slot(torch.compile(make_quantised(1), backend=backend), swap=POLICIES[policy]())
    with torch.no_grad():
        slot(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(2, 22):
                receipt = slot.update(make_quantised(seed).state_dict(), version=f"1.0.{seed}")
                assert torch.allclose(slot(X), make_quantised(seed)(X), atol=1e-5)
                assert receipt.recompiles == 0
