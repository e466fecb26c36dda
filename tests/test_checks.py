"""FAULTS I01, I02: what a staged version must prove, and what a refusal says when it does not."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import (
    ArgumentError,
    CallableCheckError,
    GoldenMismatchError,
    HotglmError,
    ReentrantError,
    StageTimeoutError,
    WarmUpError,
)
from hotglm.model.grad_mode import GradMode
from hotglm.slot import stager
from hotglm.slot.checks import run_checks
from support.universal import World, universal

X = torch.arange(8.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("checks")) as made:
        yield made


class Answer(NamedTuple):
    logits: torch.Tensor
    extra: Mapping[str, Any]


class Fixed(nn.Module):
    """A module that answers what it was made with."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer


def prove(answer: Any, expected: Any, **tolerances: Any) -> str:
    """Compare `answer` with a golden `expected`; return what is wrong, empty when nothing is."""
    policy = hotglm.StagePolicy(goldens=(hotglm.Golden(inputs=X, outputs=expected, **tolerances),))
    try:
        run_checks(Fixed(answer), policy=policy, mode=GradMode.current())
    except GoldenMismatchError as refusal:
        return "\n".join(problem.message for problem in refusal.problems)
    return ""


# -- goldens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "tolerances", "passes"),
    [
        (1.0, {}, True),
        (1.0 + 9e-6, {}, True),
        (1.0 + 9e-5, {}, False),
        (1.0 + 9e-5, {"rtol": 1e-4}, True),
        (1.0 + 9e-5, {"atol": 1e-4}, True),
        (1.0 + 1.2e-7, {"rtol": 0, "atol": 0}, False),
        (1.0, {"rtol": 0, "atol": 0}, True),
        (float("nan"), {}, False),
        (float("inf"), {"rtol": 1.0}, False),
    ],
)
def test_a_golden_output_holds_within_its_tolerances(found: float, tolerances: dict[str, float], passes: bool) -> None:
    """I01: `|found - expected| <= atol + rtol * |expected|`, and bit for bit when both are 0."""
    assert (prove(torch.tensor([found]), torch.tensor([1.0]), **tolerances) == "") is passes


def test_nan_equals_nan_and_only_nan() -> None:
    """A golden NaN wants a NaN, and an infinity the same infinity."""
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert prove(nan, nan, rtol=0, atol=0) == ""
    assert prove(inf, inf) == ""
    assert prove(torch.ones(1), nan)
    assert prove(-inf, inf)


@pytest.mark.parametrize(
    ("found", "where"),
    [
        (torch.zeros(3), "[2]"),
        (torch.zeros(2, dtype=torch.float64), "float64"),
        ([0.0, 0.0], "list"),
        (None, "NoneType"),
    ],
)
def test_another_shape_dtype_or_type_is_named(found: object, where: str) -> None:
    """I01: outputs of another shape, dtype or type differ, and the text says what was expected and found."""
    message = prove(found, torch.zeros(2))
    assert "expected" in message
    assert where in message


def test_nested_outputs_are_compared_part_by_part() -> None:
    """Tuples, lists, mappings and named tuples are walked; each difference is named by its place, all at once."""
    one, two = torch.ones(2), torch.full((2,), 2.0)
    expected = Answer(logits=one, extra={"hidden": [one, one], "num": 3})
    assert prove(Answer(logits=one, extra={"hidden": (one, one), "num": 3}), expected) == ""
    message = prove(Answer(logits=two, extra={"hidden": [one, two], "num": 4}), expected)
    assert "golden[0]" in message
    assert "golden[1]['hidden'][1]" in message
    assert "golden[1]['num']" in message
    assert prove((one,), (one, one))
    assert prove({"a": one}, {"a": one, "b": one})
    assert prove({"a": one, "b": one}, {"a": one})
    assert prove(one, {"a": one})


def test_a_dataclass_is_compared_field_by_field() -> None:
    """An output that is a dataclass is walked like a mapping, and one that cannot be compared differs."""

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        loss: object = None

    one = torch.ones(2)
    assert prove(Output(one), Output(one.clone())) == ""
    assert "golden.logits" in prove(Output(one * 2), Output(one))
    assert prove(one, Output(one))
    assert prove(Output(one, loss=one), Output(one, loss=Output))
    assert "golden.loss" in prove(Output(one, loss=Uncomparable()), Output(one, loss=Uncomparable()))


class Uncomparable:
    def __eq__(self, other: object) -> bool:
        raise TypeError("planted")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}])
def test_inputs_are_a_tensor_a_tuple_or_a_mapping(world: World, inputs: Any) -> None:
    """One tensor, positional arguments or keyword arguments, for goldens and warm-up alike."""
    number, path = world.write()
    world.publish(number)
    golden = hotglm.Golden(inputs=inputs, outputs=world.expected(number), rtol=0, atol=0, name="first")
    receipt = world.slot.update(path, policy=hotglm.StagePolicy(goldens=(golden,), warm_up=(inputs, inputs)))
    assert "golden 'first'" in receipt.checks
    assert "2 warm-up passes" in receipt.checks


def test_a_golden_mismatch_changes_nothing(world: World) -> None:
    """I01: outputs that differ are refused with the golden's name and the size of the difference."""
    _, path = world.write()
    goldens = tuple(hotglm.Golden(inputs=X, outputs=torch.zeros(8), name=name) for name in ("first", "second"))
    with universal(world, GoldenMismatchError, code="GOLDEN_MISMATCH") as outcome:
        world.slot.update(path, policy=hotglm.StagePolicy(goldens=goldens))
    texts = [problem.message for problem in outcome.refusal.problems]
    assert [text.partition(":")[0] for text in texts] == ["first", "second"]
    assert "difference" in texts[0]


def test_a_golden_that_cannot_be_run_is_a_mismatch(world: World) -> None:
    """I02: inputs that the new version does not take are a mismatch that says so, not a crash."""
    _, path = world.write()
    golden = hotglm.Golden(inputs=torch.zeros(3), outputs=torch.zeros(3))
    with universal(world, GoldenMismatchError, code="GOLDEN_MISMATCH") as outcome:
        world.slot.update(path, policy=hotglm.StagePolicy(goldens=(golden,)))
    assert "RuntimeError" in str(outcome.refusal)


# -- the user's own checks ---------------------------------------------------------------------------------------------


def raise_key_error(module: nn.Module) -> None:
    raise KeyError("planted")


def exit_now(module: nn.Module) -> None:
    raise SystemExit(3)


CHECKS: dict[str, Callable[[nn.Module], object]] = {
    "raises": raise_key_error,
    "no": lambda module: False,
    "zero": lambda module: 0,
    "one": lambda module: 1,
    "text": lambda module: "ok",
    "tensor": lambda module: torch.tensor(True),
    "not implemented": lambda module: NotImplemented,
    "asserts": lambda module: pytest.fail("planted"),
}


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "asserts"])
def test_a_check_that_does_not_say_yes_has_failed(world: World, name: str) -> None:
    """I02: one that raises, or answers anything but None or True, refuses the version, by its name."""
    _, path = world.write()
    with universal(world, CallableCheckError, code="GATE_FAILED") as outcome:
        world.slot.update(path, policy=hotglm.StagePolicy(checks=(lambda module: None, CHECKS[name], CHECKS["no"])))
    assert len(outcome.refusal.problems) == 2
    assert ("planted" in str(outcome.refusal)) is (name == "raises")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_check_that_wants_to_end_the_program_is_heard_and_changes_nothing(world: World, error: BaseException) -> None:
    """I02: what is no Exception goes on to the caller as it is; the slot is as it was."""

    def end(module: nn.Module) -> None:
        raise error

    _, path = world.write()
    version, answer = world.slot.version, world.answer()
    with pytest.raises(type(error)):
        world.slot.update(path, policy=hotglm.StagePolicy(checks=(end,)))
    assert world.slot.version == version
    assert world.answer().equal(answer)
    world.update()


def test_checks_that_pass_are_on_the_receipt(world: World) -> None:
    """None and True both mean yes; the receipt names each check."""
    number, path = world.write()
    world.publish(number)

    def measures_well(module: nn.Module) -> bool:
        return bool(module(X).equal(world.expected(number)))

    receipt = world.slot.update(path, policy=hotglm.StagePolicy(checks=(measures_well, lambda module: None)))
    assert any("measures_well" in text for text in receipt.checks)


def test_a_check_that_hangs_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """I02, H09: with `timeout_s`, a check that does not come back is LOAD_TIMEOUT; its late answer changes nothing."""
    monkeypatch.setattr(stager, "_STOP_GRACE_S", 0.01)
    wakes = threading.Event()
    _, path = world.write()
    with universal(world, StageTimeoutError, code="LOAD_TIMEOUT"):
        try:
            world.slot.update(
                path, policy=hotglm.StagePolicy(timeout_s=0.05, checks=(lambda module: wakes.wait(30) and None,))
            )
        finally:
            wakes.set()


def test_an_update_while_a_timed_out_check_still_hangs_succeeds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose thread was left behind takes neither the turn nor the memory of those that follow."""
    monkeypatch.setattr(stager, "_STOP_GRACE_S", 0.01)
    wakes = threading.Event()
    _, path = world.write()
    policy = hotglm.StagePolicy(timeout_s=0.05, checks=(lambda module: wakes.wait(30) and None,))
    try:
        for _ in range(3):
            with pytest.raises(StageTimeoutError):
                world.slot.update(path, policy=policy)
            world.update()
    finally:
        wakes.set()


def test_a_check_may_not_update_the_slot_it_is_part_of(world: World) -> None:
    """A check that updates its own slot would wait for itself: it is told so at once, and has failed."""
    _, path = world.write()

    def update(module: nn.Module) -> None:
        world.slot.update(path)

    with universal(world, CallableCheckError, code="GATE_FAILED") as outcome:
        world.slot.update(path, policy=hotglm.StagePolicy(checks=(update,)))
    assert isinstance(outcome.refusal.__cause__, ReentrantError)


# -- warm-up -----------------------------------------------------------------------------------------------------------


class ModeRecorder(nn.Module):
    """Notes the modes that its passes run in."""

    seen: list[tuple[bool, bool, bool]] = []  # noqa: RUF012 - shared by all copies on purpose

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        self.seen.append(modes)
        return x * self.weight


@pytest.mark.parametrize(
    ("context", "modes"),
    [
        (torch.enable_grad, (True, False, False)),
        (torch.no_grad, (False, False, False)),
        (torch.inference_mode, (False, True, False)),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), (True, False, True)),
    ],
)
def test_warm_up_runs_in_the_modes_of_the_caller(context: Callable[[], Any], modes: tuple[bool, bool, bool]) -> None:
    """P10: passes of the stage run in the grad, inference and autocast mode of the thread that staged."""
    slot = hotglm.ModuleSlot(ModeRecorder(), name="modes", version="1.0.0")
    ModeRecorder.seen.clear()
    policy = hotglm.StagePolicy(
        warm_up=(torch.ones(2),), goldens=(hotglm.Golden(inputs=torch.ones(2), outputs=X[1:2] + X[:2] * 0),)
    )
    with context():
        slot.update({"weight": torch.ones(2)}, version="1.0.1", policy=policy)
    assert ModeRecorder.seen == [modes, modes]


def test_a_warm_up_that_raises_changes_nothing(world: World) -> None:
    """H08: a pass that raises refuses the version, with the inputs' index and the cause."""
    _, path = world.write()
    with universal(world, WarmUpError, code="WARM_UP_FAILED") as outcome:
        world.slot.update(path, policy=hotglm.StagePolicy(warm_up=(X, torch.zeros(3))))
    assert "warm-up pass 1" in str(outcome.refusal)
    assert isinstance(outcome.refusal.__cause__, RuntimeError)


def test_a_policy_that_cannot_be_meant_is_refused_with_the_fields() -> None:
    """Threads, times and priorities out of range, a bare tensor as warm-up and uncallable checks are named."""
    bad: dict[str, Any] = {
        "num_threads": 0, "nice": 20, "timeout_s": 0.0, "checks": (3,), "warm_up": X,
    }  # fmt: skip
    with pytest.raises(ArgumentError) as caught:
        hotglm.StagePolicy(**bad)
    assert all(field in str(caught.value) for field in bad)
    assert isinstance(caught.value, HotglmError)


def test_warm_up_leaves_no_trace_in_running_statistics() -> None:
    """What goes live after warm-up and checks is bitwise what was loaded, batch norm in training mode included."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()

    x = torch.randn(8, 4)
    policy = hotglm.StagePolicy(warm_up=(x,), checks=(lambda module: module(x) is not None,))
    slot = hotglm.ModuleSlot(make(), name="m", version="1.0.0", policy=policy)
    state = make().state_dict()
    slot.update(state, version="1.0.1")
    assert all(torch.equal(found, state[name]) for name, found in slot.state_dict().items())


def test_a_check_that_writes_weights_is_refused() -> None:
    """A check that trains what it is given is named with the parameters it wrote, and the old version still serves."""

    def train(module: nn.Module) -> None:
        with torch.no_grad():
            next(module.parameters()).add_(1)

    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="m", version="1.0.0")
    before = slot(torch.ones(2))
    with pytest.raises(hotglm.CallableCheckError) as caught:
        slot.update(nn.Linear(2, 2), version="1.0.1", policy=hotglm.StagePolicy(checks=(train,)))
    assert caught.value.tensor == "weight"
    assert torch.equal(slot(torch.ones(2)), before)
