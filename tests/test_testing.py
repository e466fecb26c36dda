"""`hotglm.testing`: each ready-made assertion passes where it must, and fails on a planted bug."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm import testing
from hotglm.errors import MemoryPlanError, SourceReadError, StageFailedError, WarmUpError
from hotglm.testing.traffic import describe_differences
from support.chain_slot import X, answer, make, slot
from support.swaps import Model
from support.universal import make_state

__all__ = ["slot"]


def test_the_face_names_what_the_modules_have() -> None:
    """Every public name of hotglm.testing is listed once, sorted, and is the object its module defines."""
    assert sorted(testing.__all__) == testing.__all__ == list(testing._EXPORTS)
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="Trafic"):
        getattr(testing, "Trafic")  # noqa: B009  # a type checker refuses the plain form


# -- a swap equals a cold load ----------------------------------------------------------------------------------------


def test_a_swap_equals_a_cold_load(slot: hotglm.ModuleSlot) -> None:
    """What is live after an update equals the same version started cold, in state and answer."""
    slot.update(make_state(3), version="1.0.3")
    testing.assert_swap_equals_cold(slot, make(3), X)


def test_every_difference_to_a_cold_load_is_named(slot: hotglm.ModuleSlot) -> None:
    """Another weight and a buffer that only one of the two has are both in the text, with their names."""
    cold = make(0)
    with torch.no_grad():
        cold.layers[1].bias[2] += 1  # type: ignore[index, operator]  # a linear layer
    cold.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(AssertionError) as caught:
        testing.assert_swap_equals_cold(slot, cold, X)
    assert "layers.1.bias" in str(caught.value)
    assert "'scale'" in str(caught.value)


def test_another_answer_of_the_same_state_is_noticed() -> None:
    """Two models with equal weights that compute something else are told apart by their answers."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="linear", version="1.0.0")
    cold = Doubled(2, 2)
    cold.load_state_dict(slot.state_dict())
    testing.assert_swap_equals_cold(slot, cold)
    with pytest.raises(AssertionError, match="output: "):
        testing.assert_swap_equals_cold(slot, cold, torch.ones(2))


def test_bits_are_compared_and_tolerances_are_honoured() -> None:
    """Zeros of two signs differ exactly, and any two close numbers do not within a tolerance; NaN equals NaN."""
    one, other = torch.tensor([0.0, 1.0, float("nan")]), torch.tensor([-0.0, 1.0, float("nan")])
    assert describe_differences(one, one) == []
    assert "zero of the other sign" in "".join(describe_differences({"y": one}, {"y": other}))
    assert describe_differences(one, other + 1e-7, tolerance=testing.Tolerance(atol=1e-6)) == []


# -- passes ------------------------------------------------------------------------------------------------------------


def test_passes_under_an_update_are_of_one_version(slot: hotglm.ModuleSlot) -> None:
    """Under traffic every answer is that of one whole version, and once a change has returned that of the newest."""
    passes = testing.assert_no_torn_pass(
        slot, lambda: slot.update(make_state(1), version="1.0.1"), inputs=X, after=answer(1)
    )
    passes += testing.assert_no_torn_pass(slot, slot.rollback, inputs=X, after=answer(0))
    assert passes >= 8


class HalfWay:
    """A model that is overwritten in place, and stops half way so that passes see both versions."""

    def __init__(self) -> None:
        self.module = make(0)

    def update(self, traffic: testing.Traffic) -> None:
        traffic.announce(answer(1))
        state = make_state(1)
        with torch.no_grad():
            for name, tensor in list(self.module.state_dict().items())[:2]:
                tensor.copy_(state[name])
        traffic.wait_for_passes()


def test_a_torn_pass_is_caught() -> None:
    """A model that is written in place under traffic is caught, with the wrong answer in the text."""
    planted = HalfWay()
    with (
        pytest.raises(AssertionError, match="one version that was live"),
        testing.Traffic(planted.module, X) as traffic,
    ):
        planted.update(traffic)
    assert traffic.failures


def test_a_pass_is_judged_before_it_is_counted(slot: hotglm.ModuleSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a pass to be counted learns whether it was wrong: no pass counts that is still looked at."""
    seen: list[tuple[int, int]] = []
    compare = testing.Traffic._compare

    def compare_noting(traffic: testing.Traffic, wanted: object, found: object) -> list[str]:
        if len(seen) < 100:
            seen.append((len(seen), traffic.num_passes))
        return compare(traffic, wanted, found)

    monkeypatch.setattr(testing.Traffic, "_compare", compare_noting)
    with testing.Traffic(slot, X, num_threads=1) as traffic:
        traffic.wait_for_passes(3)
    assert len(seen) >= 4
    assert all(judged == counted for judged, counted in seen)


def test_a_pass_that_comes_too_late_is_caught(slot: hotglm.ModuleSlot) -> None:
    """A change that returns before passes see it is caught, though each pass is whole."""
    with pytest.raises(AssertionError, match="one version that was live"):
        testing.assert_no_torn_pass(slot, lambda: None, inputs=X, after=answer(1))


def test_a_pass_that_raises_or_never_ends_is_caught() -> None:
    """Under traffic a pass that raises is named with its error, and one that hangs ends the wait."""
    stuck, calls = threading.Event(), [0]

    class Moody(nn.Module):
        def __init__(self, effect: Callable[[], object]) -> None:
            super().__init__()
            self.effect = effect

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > 5:
                self.effect()
            return x

    def fail() -> None:
        raise KeyError("planted")

    with pytest.raises(AssertionError, match="KeyError"), testing.Traffic(Moody(fail), X) as traffic:
        traffic.wait_for_passes(5)
    calls[0] = 0
    waiting = testing.Traffic(Moody(lambda: stuck.wait(5)), X, timeout_s=0.1)
    with pytest.raises(AssertionError, match="got none that ended"), waiting as traffic:
        traffic.wait_for_passes(5)
    stuck.set()


def test_an_update_that_is_refused_under_traffic_raises_its_error(slot: hotglm.ModuleSlot) -> None:
    """The error of a refused update comes out of the assertion, after passes were seen to go on in the old version."""
    with pytest.raises(hotglm.IncompatibleError):
        testing.assert_no_torn_pass(slot, lambda: slot.update({}, version="1.0.1"), inputs=X, after=answer(1))
    assert slot(X).equal(answer(0))


def test_an_update_that_raises_and_was_made_all_the_same_is_caught(slot: hotglm.ModuleSlot) -> None:
    """A change that raises after it took effect is caught: passes give the new answer, where the old one is due."""

    def half() -> None:
        slot.update(make_state(1), version="1.0.1")
        raise KeyError("planted")

    with pytest.raises(AssertionError, match="one version that was live"):
        testing.assert_no_torn_pass(slot, half, inputs=X, after=answer(1))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_refusal_is_expected_by_its_codes(slot: hotglm.ModuleSlot) -> None:
    """Every code among the reasons may be asked for, several at once, and the error can be looked at afterwards."""
    state = {name: tensor for name, tensor in make_state(1).items() if name != "layers.0.bias"}
    state["layers.1.bias"] = torch.ones(9)
    with testing.assert_refused("TENSOR_MISSING", "SHAPE_CHANGED", slot=slot, inputs=X) as refusal:
        slot.update(state, version="1.0.1")
    assert isinstance(refusal.error, hotglm.IncompatibleError)


def test_a_refusal_for_another_reason_or_none_at_all_is_caught(slot: hotglm.ModuleSlot) -> None:
    """An update that works is reported, and so is one that is refused with another code."""
    with pytest.raises(AssertionError, match="got none"), testing.assert_refused("SHAPE_CHANGED"):
        slot.update(make_state(1), version="1.0.1")
    with (
        pytest.raises(AssertionError, match="SHAPE_CHANGED, got one for TENSOR_MISSING") as caught,
        testing.assert_refused("SHAPE_CHANGED", slot=slot),
    ):
        slot.update({}, version="1.0.2")
    assert isinstance(caught.value.__cause__, hotglm.IncompatibleError)


def test_a_refusal_that_changes_something_is_caught(slot: hotglm.ModuleSlot) -> None:
    """A body that is refused and yet leaves another weight or version behind is caught."""

    def write_in_place() -> None:
        with torch.no_grad():
            slot.live.module.layers[0].bias.add_(1)  # type: ignore[union-attr, index]
        slot.update({}, version="1.0.1")

    def update_twice() -> None:
        slot.update(make_state(1), version="1.0.1")
        slot.update({}, version="1.0.2")

    for change, named in ((write_in_place, r"layers\.0\.bias"), (update_twice, "'version'")):
        with pytest.raises(AssertionError, match=named), testing.assert_refused(slot=slot, inputs=X):
            change()


# -- compilation and leaks ---------------------------------------------------------------------------------------------


def test_a_recompilation_is_caught_and_a_swap_is_none() -> None:
    """Swaps of a compiled model compile nothing; a pass of another shape does and is caught."""
    slot = hotglm.ModuleSlot(Model(), name="model", version="1.0.0")
    slot.compile(backend="eager")
    x = torch.ones(1, 2)
    slot(x)
    with testing.assert_no_recompile():
        slot.update(Model().state_dict(), version="1.0.1")
        slot(x)
        slot.rollback()
        slot(x)
    with pytest.raises(AssertionError, match="frames compiled"), testing.assert_no_recompile():
        slot(x[0])


def test_updates_leave_nothing_and_a_leak_is_caught(slot: hotglm.ModuleSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated updates leave nothing behind; descriptors, threads and generations that stay are each named."""
    testing.assert_no_leak(lambda i: slot.update(make_state(i), version=f"1.0.{i + 1}"), num=20)
    monkeypatch.setattr("hotglm.testing.usage._VANISHING_S", 0.1)
    kept: list[object] = []
    stop = threading.Event()

    def leak(index: int) -> None:
        kept.append(Path("/dev/null").open())  # noqa: SIM115 - it is to be left open
        thread = threading.Thread(target=stop.wait)
        thread.start()
        kept.append(thread)
        kept.append(slot.stage(make_state(index), version=f"1.1.{index}").generation)

    try:
        with pytest.raises(AssertionError) as caught:
            testing.assert_no_leak(leak, num=4)
    finally:
        stop.set()
        for item in kept:
            getattr(item, "join", getattr(item, "close", lambda: None))()
    for name in ("descriptors", "threads", "generations", "arenas"):
        assert f"{name} " in str(caught.value)


# -- faults ------------------------------------------------------------------------------------------------------------

_ERRORS = {"open": SourceReadError, "read": SourceReadError, "map": MemoryPlanError, "warm_up": WarmUpError}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    path = tmp_path / "release.safetensors"
    hotglm.save_weights(make_state(1), path, version="1.0.1", name="chain")
    return path


def test_the_nth_of_a_kind_fails_and_only_that(slot: hotglm.ModuleSlot, release: Path) -> None:
    """A planted fault comes at its number, is refused with the error of its kind, and the next update comes through."""
    policy = hotglm.StagePolicy(warm_up=(X,))
    for kind, error in _ERRORS.items():
        with testing.FaultPlan().inject(kind) as faults, pytest.raises(error):
            slot.update(release, policy=policy)
        assert faults.fired == (f"{kind} 1",)
        assert faults.counts[kind] == 1
        assert slot(X).equal(answer(0))
    with testing.FaultPlan().inject("stage.copy"), pytest.raises(StageFailedError) as caught:
        slot.update(release)
    assert isinstance(caught.value.__cause__, testing.InjectedFaultError)
    with testing.FaultPlan().inject("stage.load", 2):
        slot.update(release)
        with pytest.raises(StageFailedError):
            slot.update(release)
    assert slot(X).equal(answer(1))


def test_a_fault_may_be_any_error(slot: hotglm.ModuleSlot, release: Path) -> None:
    """The error that is raised can be chosen."""
    with testing.FaultPlan().inject("read", error=lambda: MemoryError("planted")), pytest.raises(MemoryPlanError):
        slot.update(release)


def test_a_fault_that_never_came_fails_the_test() -> None:
    """A plan whose fault never came says so, with the counts; one that cannot be meant is refused."""
    with (
        pytest.raises(AssertionError, match=r"none of: open 1\. Counted: open 0 times"),
        testing.FaultPlan().inject("open"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), testing.FaultPlan().inject("open"):
        1 / 0  # noqa: B018 - the body's own error comes out, not the plan's
    with pytest.raises(ValueError, match=r"Expected one of .*migration_step.*, got 'reed'"):
        testing.FaultPlan().inject("reed")
    with pytest.raises(ValueError, match="from 1, got 0"):
        testing.FaultPlan().inject("read", 0)


def test_each_fault_in_turn_changes_nothing(slot: hotglm.ModuleSlot, release: Path) -> None:
    """Every call and place of an update fails once and leaves the slot as it was; each kind that came is counted."""
    counts = testing.assert_faults_change_nothing(
        slot, lambda: slot.update(release, policy=hotglm.StagePolicy(warm_up=(X, X))), inputs=X
    )
    assert counts["warm_up"] == 2
    assert {"open", "read", "fstat", "close", "start_thread", "map", "stage.open", "stage.check"} <= set(counts)


def test_an_update_that_is_not_safe_under_faults_is_caught(slot: hotglm.ModuleSlot, release: Path) -> None:
    """An update that leaves something behind when it is refused, or lets a foreign error out, is caught."""

    def careless() -> None:
        slot.rollback() if slot.status().epoch % 2 else slot.update(
            make_state(2), version=f"1.0.{slot.live.number + 1}"
        )
        slot.update(release)

    with pytest.raises(AssertionError, match="when open 1 fails, got a refusal after which the slot has changed"):
        testing.assert_faults_change_nothing(slot, careless, kinds=["open"])
    with pytest.raises(AssertionError, match="when open 1 fails, got OSError"):
        testing.assert_faults_change_nothing(slot, lambda: hotglm.seam.active.open(str(release), 0), kinds=["open"])
