"""FAULTS group G: autograd, grad modes, copies, global state and random numbers across a swap."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError, IncompatibleError, NonFiniteError, TensorValueError
from hotglm.weights.digest import digest_tensor
from support.swaps import Model, build, make_class, refused, same_bits

X = torch.arange(4.0).reshape(2, 2)
MAKER = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))


def _slot(**options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(MAKER(1), name="model", version="1.0.0", **options)


def _update(slot: hotglm.ModuleSlot, seed: int) -> None:
    slot.update(MAKER(seed).state_dict())


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


# -- G01, G02, G17: what is offered ------------------------------------------------------------------------------------


def test_every_way_in_which_tensors_do_not_fit_is_named_at_once() -> None:
    """Missing, unexpected, misshapen and mistyped tensors are one refusal, before anything is read (G01)."""
    slot = _slot()
    before = slot(X)
    state: dict[str, torch.Tensor] = dict(MAKER(2).state_dict())
    del state["0.bias"]
    state |= {"1.weight": torch.ones(1), "2.bias": torch.ones(3), "2.weight": torch.ones(2, 3, dtype=torch.int32)}
    with pytest.raises(IncompatibleError) as caught:
        slot.update(state, version="1.0.1")
    found = {(problem.code, problem.tensor) for problem in caught.value.problems}
    assert found == {
        ("TENSOR_MISSING", "0.bias"),
        ("TENSOR_UNEXPECTED", "1.weight"),
        ("SHAPE_CHANGED", "2.bias"),
        ("DTYPE_CHANGED", "2.weight"),
    }
    assert same_bits(slot(X), before)


@pytest.mark.parametrize("thing", [None, 1.0, [1.0], torch.eye(2).to_sparse(), torch.empty(2, 2, device="meta")])
def test_what_is_no_dense_tensor_with_memory_is_refused_by_name(thing: Any) -> None:
    """A mapping's values are tensors; anything else is named."""
    slot = _slot()
    before = slot(X)
    with pytest.raises(TensorValueError) as caught:
        slot.update({**MAKER(2).state_dict(), "0.bias": thing})
    assert caught.value.tensor == "0.bias"
    assert same_bits(slot(X), before)


def _tie(model: Any) -> None:
    model.again = nn.Linear(2, 2, bias=False)
    model.again.weight = model.linear.weight


@pytest.mark.parametrize("names", [("linear.weight",), ("again.weight",), ("linear.weight", "again.weight")])
def test_a_tied_weight_comes_under_any_of_its_names(names: tuple[str, ...]) -> None:
    """One name or both fill a tied weight, and it stays tied (G02)."""
    slot = hotglm.ModuleSlot(make_class(_tie)(), name="model")
    slot.update({name: torch.eye(2) for name in names} | {"linear.bias": torch.zeros(2)})
    assert slot.linear.weight is slot.again.weight
    assert torch.equal(slot(X), X)


def test_conflicting_values_of_a_tied_weight_are_refused() -> None:
    """Two values for one weight are a TIE_CONFLICT, never the last one (G02)."""
    slot = hotglm.ModuleSlot(make_class(_tie)(), name="model")
    before = slot(X)
    with pytest.raises(TensorValueError) as caught:
        slot.update({"linear.weight": torch.eye(2), "again.weight": torch.ones(2, 2), "linear.bias": torch.zeros(2)})
    assert (caught.value.code, caught.value.tensor) == ("TIE_CONFLICT", "again.weight")
    assert same_bits(slot(X), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_with_count_and_place(value: float) -> None:
    """NaN and infinity are refused by default, and taken where the policy says so (G17)."""
    slot = _slot()
    before = slot(X)
    state = MAKER(2).state_dict()
    state["0.weight"][1, 0] = value
    with pytest.raises(NonFiniteError) as caught:
        slot.update(state)
    assert (caught.value.tensor, caught.value.problems[0].found) == ("0.weight", 1)
    assert "index 2" in str(caught.value)
    assert same_bits(slot(X), before)
    slot.update(state, policy=hotglm.StagePolicy(finite=False))
    assert same_bits(slot.state_dict()["0.weight"], state["0.weight"])


def test_zeros_denormals_and_outliers_are_weights_like_any_other() -> None:
    """Unlikely values are finite, and arrive bit for bit (G17)."""
    slot = _slot()
    for value in (0.0, -0.0, 1e-45, 1e30):
        state = {name: torch.full_like(tensor, value) for name, tensor in MAKER(2).state_dict().items()}
        slot.update(state)
        assert same_bits(dict(slot.state_dict()), state)


# -- G07: modes --------------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("staged_in", MODES)
def test_passes_run_in_the_callers_mode_whatever_mode_staged_them(mode: str, staged_in: str) -> None:
    """Outputs, their dtype and what autograd knows of them are those of a plain module in the same mode (G07)."""
    slot = _slot()
    with MODES[staged_in]():
        _update(slot, 2)
    plain = MAKER(2)
    with MODES[mode]():
        found, wanted = slot(X), plain(X)
    assert same_bits(found, wanted)
    assert found.requires_grad == wanted.requires_grad
    assert found.is_inference() == wanted.is_inference()
    assert not any(p.is_inference() for p in slot.parameters())
    assert same_bits(_gradients(slot), _gradients(plain))


@pytest.mark.parametrize("mode", MODES)
def test_warm_up_runs_in_the_mode_of_whoever_stages(mode: str) -> None:
    """Warm-up passes see the grad, inference and autocast mode of the caller of `stage` (G07)."""
    seen: list[tuple[bool, bool, bool]] = []

    def look(*_: object) -> None:
        now = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        seen.append(now)

    def prepare(model: Any) -> None:
        model.register_forward_hook(look)

    slot = hotglm.ModuleSlot(make_class(prepare)(), name="model", policy=hotglm.StagePolicy(warm_up=(X,)))
    with MODES[mode]():
        look()
        slot.update(make_class(prepare)().state_dict())
    assert seen[0] == seen[1]


def test_train_and_eval_hold_for_later_versions_and_for_rollbacks() -> None:
    """A slot in evaluation mode stays in it through swaps and back (G07)."""
    slot = hotglm.ModuleSlot(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), name="model")
    slot.eval()
    for _ in range(3):
        slot.update(slot.state_dict())
        assert not any(module.training for module in slot.modules())
    slot.train()
    slot.rollback()
    assert all(module.training for module in slot.modules())


# -- G08: copies -------------------------------------------------------------------------------------------------------


def _state_by_parameters(slot: hotglm.ModuleSlot) -> Mapping[str, torch.Tensor]:
    return {str(index): p.detach().clone() for index, p in enumerate(slot.parameters())}


READS: dict[str, Callable[[hotglm.ModuleSlot], Mapping[str, torch.Tensor]]] = {
    "state_dict": lambda slot: slot.state_dict(),
    "parameters": _state_by_parameters,
    "deepcopy": lambda slot: copy.deepcopy(slot).state_dict(),
    "pickle": lambda slot: pickle.loads(pickle.dumps(slot)).state_dict(),
}


@pytest.mark.parametrize("read", READS)
def test_a_copy_taken_during_swaps_is_of_one_version(read: str) -> None:
    """state_dict, parameters, deepcopy and pickle of a slot see one generation, however often it swaps (G08)."""
    slot = _slot()
    template = {name: torch.zeros_like(tensor) for name, tensor in slot.state_dict().items()}
    slot.update(template)
    started, stop = threading.Event(), threading.Event()

    def swap() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            slot.update({name: torch.full_like(tensor, float(number)) for name, tensor in template.items()})
            if number == 2:
                started.set()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        assert started.wait(10)
        for _ in range(25):
            values = {value for tensor in READS[read](slot).values() for value in tensor.reshape(-1).tolist()}
            assert len(values) == 1
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda slot: pickle.loads(pickle.dumps(slot))])
def test_a_copied_slot_is_a_slot_of_its_own(make_copy: Callable[[hotglm.ModuleSlot], hotglm.ModuleSlot]) -> None:
    """A copy has the version and the settings, and lives its own life; the weights are not shared (G08)."""
    slot = _slot(accept="major", constants=["x"])
    _update(slot, 2)
    twin = make_copy(slot)
    assert (twin.name, twin.version) == (slot.name, slot.version)
    assert same_bits(twin(X), slot(X))
    _update(twin, 3)
    assert same_bits(slot(X), MAKER(2)(X))
    assert same_bits(twin(X), MAKER(3)(X))
    assert len(slot.history) == 2


# -- G10, G11, G12: global state ---------------------------------------------------------------------------------------


def test_a_device_context_of_the_caller_does_not_reach_the_stage() -> None:
    """`with torch.device("meta")`, here or in another thread, gives neither meta weights nor failures (G10)."""
    slot = _slot()
    state = MAKER(2).state_dict()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with torch.device("meta"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    try:
        with torch.device("meta"):
            slot.update(state)
    finally:
        leave.set()
        thread.join()
    assert same_bits(slot(X), MAKER(2)(X))


def _global_state() -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "torch generator": torch.get_rng_state().tolist(),
        "python generator": random.getstate(),
        "denormals": torch.tensor(1e-45).mul(1.0).item() != 0,
    }


def test_staging_leaves_global_state_alone() -> None:
    """Default dtype, threads, flags, grad mode and generators are as before, after success and failure (G11)."""
    slot = _slot(policy=hotglm.StagePolicy(warm_up=(X,)))
    before = _global_state()
    _update(slot, 2)
    assert _global_state() == before | {"torch generator": _global_state()["torch generator"]}
    before = _global_state()
    slot.update(dict(slot.state_dict()))
    assert _global_state() == before
    with pytest.raises(HotglmError):
        slot.update({})
    assert _global_state() == before


def test_random_numbers_of_the_service_do_not_depend_on_updates() -> None:
    """Dropout in the serving thread draws the same numbers with and without updates between its passes (G12)."""

    def serve(*, updates: bool) -> list[torch.Tensor]:
        slot = hotglm.ModuleSlot(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5)), name="model")
        state = {"0.weight": torch.ones(8, 2), "0.bias": torch.ones(8)}
        slot.update(state)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = []
            for _ in range(4):
                outputs.append(slot(X).detach())
                if updates:
                    slot.update(state)
            return outputs

    assert same_bits(serve(updates=True), serve(updates=False))


# -- G15, G16, G18 -----------------------------------------------------------------------------------------------------


def test_a_module_in_shared_memory_can_be_given_and_staged() -> None:
    """Shared memory is read like any other; the next generations lie in memory of the slot's own (G15)."""
    slot = hotglm.ModuleSlot(MAKER(1).share_memory(), name="model")
    slot.update(MAKER(2).share_memory(), version="0.0.1")
    assert same_bits(slot(X), MAKER(2)(X))
    assert not any(p.untyped_storage().is_shared() for p in slot.parameters())


def test_live_weights_are_aligned_and_their_digests_can_be_recomputed() -> None:
    """Every tensor starts at a cache line, and a flipped bit shows against the receipt's digests (G16, G18)."""
    slot = _slot()
    receipt = slot.update(MAKER(2).state_dict())
    state = slot.state_dict()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())
    assert {name: digest_tensor(tensor) for name, tensor in state.items()} == dict(receipt.digests)
    state["0.bias"].view(torch.int32)[0] ^= 1
    assert digest_tensor(state["0.bias"]) != receipt.digests["0.bias"]


def test_a_pass_that_writes_its_weights_fails_no_later_version() -> None:
    """What a pass does to the weights of its own generation is in no other, and not in the source."""

    class Counting(Model):
        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                self.linear.bias.add_(1)
            return self.linear(x)

    slot = hotglm.ModuleSlot(Counting(), name="model")
    state = {"linear.weight": torch.eye(2), "linear.bias": torch.zeros(2)}
    for _ in range(3):
        slot.update(state)
        assert torch.equal(slot(X), X + 1)
    assert torch.equal(state["linear.bias"], torch.zeros(2))


def test_refused_models_still_serve() -> None:
    """The helper that the other tests use sees the live version through (a control)."""
    error = refused(make_class(lambda m: setattr(m, "cache", torch.randn(2))), hotglm.StaleStateError)
    assert error.serving == "1.0.0"
