"""Slots that swap in place on devices: the whole way of an update, on fakes that do what the protocol leaves open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hotglm
from hotglm.errors import DrainTimeoutError, HotglmError, NonFiniteError, NoRollbackError
from hotglm.weights import device_exchange, places
from hotglm.weights.device_exchange import DeviceExchange
from hotglm.weights.exchanges import Exchanges
from support.device_models import Queued, Spread, make_spread, make_spread_state
from support.fake_device import Choices, FakeDevice, FakeEvent, FakeLane, FakePlaces
from support.swaps import same_bits

X = torch.linspace(-1, 1, 16).view(2, 8)
IN_PLACE = hotglm.InPlace()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake goes on when it is asked, and not with time."""
    monkeypatch.setattr(device_exchange, "_MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(device_exchange, "_MAX_PAUSE_S", 0.0)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlaces:
    made = FakePlaces(num_windows=2)
    monkeypatch.setattr(places, "active", made)
    monkeypatch.setattr(device_exchange, "_MIN_ROOM_NBYTES", 64)  # small tensors take several steps
    return made


def reference(state: dict[str, torch.Tensor]) -> torch.Tensor:
    module = Spread()
    module.load_state_dict(state)
    found: torch.Tensor = module(X)
    return found


def make_slot(module: Spread, swap: hotglm.InPlace = IN_PLACE, **options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=swap, constants=["last.mask"], **options)


def addresses(module: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


# -- streams -----------------------------------------------------------------------------------------------------------


def run_queued(fakes: FakePlaces, seed: int, directory: Path) -> bool:
    """Swap by file and mapping, and back; return whether each pass read its own version."""
    device = FakeDevice(name="fake:0", choices=Choices(seed))
    fakes.__init__(num_windows=2)  # type: ignore[misc]
    Queued.device = device
    module = Queued()
    fakes.add(device, module)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=IN_PLACE)
    before, seen = addresses(module), [(0.0, slot("default"))]

    def look(value: float) -> None:
        seen.extend((value, slot(stream)) for stream in ("default", "second"))

    for number in range(1, 4):
        state = {"weight": torch.full((100,), float(number)), "bias": torch.full((3,), float(number))}
        source: Any = state if number % 2 else directory / f"{number}.safetensors"
        if not number % 2 and not source.exists():
            save_file(state, source)
        slot.update(source, version=f"1.0.{number}")
        look(number)
    slot.rollback()
    look(2)
    device.finish()
    is_right = all((part == value * (1 + (at == 2))).all() for value, parts in seen for at, part in enumerate(parts))
    return bool(is_right) and addresses(module) == before


def test_every_pass_reads_its_own_version(fakes: FakePlaces, tmp_path: Path) -> None:
    """Whatever the device does when, passes on several streams read weights and derived state of one version."""
    assert all(run_queued(fakes, seed, tmp_path) for seed in range(8))


def _publish_too_early(patch: pytest.MonkeyPatch) -> None:
    """Wait neither for the exchange nor for the old bytes to come home."""
    submit = DeviceExchange.submit
    patch.setattr(DeviceExchange, "submit", lambda exchange: (submit(exchange), _Done())[1])
    patch.setattr(DeviceExchange, "settle", lambda exchange: None)


class _Done:
    def wait(self) -> None:
        pass


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "passes": lambda patch: patch.setattr(Exchanges, "wait_for_work", lambda exchange, timeout_s: None),
    "passes, one stream": lambda patch: patch.setattr(
        FakeDevice, "record_passes", lambda device, timeout_s=None: (device.record_on("default"),)
    ),
    "publish": _publish_too_early,
}


@pytest.mark.parametrize("hazard", PLANTED)
def test_a_missing_wait_is_caught(
    fakes: FakePlaces, tmp_path: Path, hazard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same program finds each wait that a commit would forget."""
    PLANTED[hazard](monkeypatch)
    assert not all(run_queued(fakes, seed, tmp_path) for seed in range(8))


# -- what is exchanged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_parts_on_several_devices_and_here_swap_together(fakes: FakePlaces, seed: int) -> None:
    """Ties, strides, empty tensors and buffers, forth and back: what a cold load gives, where it was, receipt."""
    module, _ = make_spread(fakes, seed)
    before, first = addresses(module), module(X)
    plain = make_slot(Spread())
    slot = make_slot(module)
    for number in range(1, 4):
        state = make_spread_state(number)
        receipt = slot.update(state, version=f"1.0.{number}")
        expected = plain.update(state, version=f"1.0.{number}")
        assert receipt.in_place is not None
        assert expected.in_place is not None
        assert (receipt.digest, receipt.in_place.nbytes) == (expected.digest, expected.in_place.nbytes)
        assert (receipt.in_place.addresses_stable, receipt.in_place.derived_refreshed) == (True, True)
        assert same_bits(slot(X), reference(state))
        assert slot.live.module is module
        held = slot._admission.live.before
        assert held is not None
        assert same_bits(held.module(X), first if number == 1 else reference(make_spread_state(number - 1)))
        del held
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(2)))
    slot.rollback(to="1.0.3")
    assert same_bits(slot(X), reference(make_spread_state(3)))
    assert addresses(module) == before


def test_memory_stays_at_two_copies_and_the_room(fakes: FakePlaces) -> None:
    """After any number of swaps, refusals and failures each device has the one image and its room."""
    module, devices = make_spread(fakes, 0)
    memory = hotglm.MemoryPolicy(small_nbytes=0)
    slot = make_slot(module, memory=memory)
    used = []
    for number in range(1, 7):
        plan = slot.update(make_spread_state(number), version=f"1.0.{number}").plan
        with pytest.raises(NonFiniteError):
            slot.update({**make_spread_state(0), "second.weight": torch.full((8, 40), torch.nan)})
        slot.update(make_spread_state(number), version=f"1.0.{number}")
        used.append([device.used_nbytes for device in devices])
        assert plan is not None
        assert used[-1] == [part.nbytes for part in plan.devices]
    assert used == used[:1] * 6


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["copy_all", "record", "record_passes"])
@pytest.mark.parametrize("nth", [1, 2, 4, 7])
def test_a_commit_that_fails_on_the_device_is_undone(fakes: FakePlaces, call: str, nth: int) -> None:
    """A typed error or a commit that went through; either way one version serves, bit for bit, and the next commits."""
    module, devices = make_spread(fakes, nth)
    slot = make_slot(module)
    slot.update(make_spread_state(1), version="1.0.1")
    staged = slot.stage(make_spread_state(2), version="1.0.2")
    left = nth

    def fail(name: str) -> None:
        nonlocal left
        left -= name == call
        if name == call and left == 0:
            raise RuntimeError("planted")

    devices[1].fails = fail
    try:
        slot.commit(staged)
    except HotglmError:
        assert same_bits(slot(X), reference(make_spread_state(1)))
        assert str(slot.version) == "1.0.1"
        slot.commit(staged)
    devices[1].fails = lambda name: None
    assert same_bits(slot(X), reference(make_spread_state(2)))
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(1)))


def test_an_image_that_does_not_come_home_is_no_rollback_target(
    fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures after the commit are not raised: the new version serves, and nobody goes back to lost bytes."""
    module, _ = make_spread(fakes, 1)
    slot = make_slot(module)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceExchange, "settle", _raise_planted)
        slot.update(make_spread_state(1), version="1.0.1")
    assert same_bits(slot(X), reference(make_spread_state(1)))
    with pytest.raises(NoRollbackError):
        slot.rollback()
    slot.update(make_spread_state(2), version="1.0.2")
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(1)))


def _raise_planted(exchange: DeviceExchange) -> None:
    raise RuntimeError("planted")


def test_an_image_comes_home_at_the_second_try(fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy home that fails once costs nothing."""
    module, _devices = make_spread(fakes, 1)
    slot = make_slot(module)
    slot.update(make_spread_state(1), version="1.0.1")
    settle, calls = DeviceExchange.settle, iter(range(100))

    def fail_first(exchange: DeviceExchange) -> None:
        if next(calls) == 0:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FakeLane, "copy_all", _refuse)
                settle(exchange)
        settle(exchange)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceExchange, "settle", fail_first)
        slot.update(make_spread_state(2), version="1.0.2")
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(1)))


def _refuse(lane: FakeLane, sources: Any, targets: Any) -> None:
    raise MemoryError("planted")


def _never_end(devices: list[FakeDevice], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeEvent, "is_done", lambda event: event.device is not devices[0])


def _capture(devices: list[FakeDevice], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(devices[0], "is_captured", True)


@pytest.mark.parametrize(
    ("happen", "says"), [(_capture, "Expected a capture to end"), (_never_end, "Expected work on fake:0 to end")]
)
def test_a_device_that_is_busy_holds_nobody_up_for_longer_than_a_pass_may(
    fakes: FakePlaces, happen: Callable[[list[FakeDevice], pytest.MonkeyPatch], None], says: str
) -> None:
    """A capture, or a kernel that does not end, on any stream: the commit gives up, and can be tried."""
    module, devices = make_spread(fakes, 0)
    slot = make_slot(module, swap=hotglm.InPlace(timeout_s=0.5))
    before = slot(X)
    staged = slot.stage(make_spread_state(1), version="1.0.1")
    with pytest.MonkeyPatch.context() as patch:
        happen(devices, patch)
        with pytest.raises(DrainTimeoutError, match=says):
            slot.commit(staged)
        assert same_bits(slot(X), before)
    slot.commit(staged)
    assert same_bits(slot(X), reference(make_spread_state(1)))
