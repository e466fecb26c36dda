"""Swaps in place on a device whose image is on the host: every wait of [Note: duplex] in weights/host_exchange.py."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

import hotglm
from hotglm.errors import HotglmError, MemoryPlanError, NonFiniteError, UnswappableError
from hotglm.weights import device_exchange, exchanges, host_exchange, places
from hotglm.weights.device import Event
from hotglm.weights.device_exchange import wait_for_work
from hotglm.weights.host_exchange import HostExchange
from hotglm.weights.pinned_arena import PinnedArena
from support.device_models import Queued, Spread, make_spread, make_spread_state
from support.exchange_program import Failing, HostProgram, start
from support.fake_device import Choices, FakeDevice, FakeLane, FakePinned, FakePlaces
from support.swaps import same_bits

X = torch.linspace(-1, 1, 16).view(2, 8)
ON_HOST = hotglm.InPlace(image="host")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake goes on when it is asked, and not with time."""
    monkeypatch.setattr(device_exchange, "_MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(device_exchange, "_MAX_PAUSE_S", 0.0)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes several windows need not be large."""
    monkeypatch.setattr(host_exchange, "WINDOW_NBYTES", 64)


@pytest.mark.parametrize("sizes", [(3, 0, 40, 7, 1), (1,), (150,), (5, 5, 5, 5, 5, 5, 5)])
def test_every_pass_reads_its_own_version(sizes: tuple[int, ...]) -> None:
    """Whatever the device does when, passes before and after a swap read their version, and the image gets the old."""
    assert all(HostProgram(Choices(seed), sizes=sizes).run(num_swaps=2) for seed in range(6))


def forget_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exchanges, "wait_for_work", lambda devices, timeout_s: None)


def publish_too_early(patch: pytest.MonkeyPatch) -> None:
    submit = HostExchange.submit

    def forget(exchange: HostExchange) -> Event:
        submit(exchange)
        return cast(FakeDevice, exchange.device).record_on("idle")

    patch.setattr(HostExchange, "submit", forget)


def _forget_waits_of(stream: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Have one stream of the exchange wait for nothing but passes."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        wait = FakeLane.wait_for

        def forget(lane: FakeLane, events: Any) -> None:
            found = list(events)
            if lane.stream != stream or len(found) != 1:
                wait(lane, found)

        patch.setattr(FakeLane, "wait_for", forget)

    return plant


HAZARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "passes": forget_passes,
    "publish": publish_too_early,
    "host image": _forget_waits_of("lane 1"),
    "windows": _forget_waits_of("lane 0"),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_missing_wait_is_caught(hazard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait that is planted to be missing makes a pass, or the undo image, wrong in one of a few schedules."""
    HAZARDS[hazard](monkeypatch)
    assert not all(HostProgram(Choices(seed), sizes=(40, 40, 40)).run(num_swaps=2) for seed in range(40))


@pytest.mark.parametrize("is_half", [False, True], ids=["before a copy", "in the middle of it"])
def test_a_failure_at_every_copy_is_undone(monkeypatch: pytest.MonkeyPatch, *, is_half: bool) -> None:
    """Both sides hold what they held, once `undo` has returned, wherever it failed, and later passes read that."""
    num_copies = 4 * len(HostProgram(Choices(0)).exchange()._steps)
    assert num_copies > 12
    for nth in range(1, num_copies + 1):
        program = start(Choices(nth), HostProgram)
        exchange = program.exchange()
        wait_for_work([exchange.device], timeout_s=10.0)
        with monkeypatch.context() as patch:
            Failing(nth, is_half=is_half).plant(patch)
            with pytest.raises(MemoryError, match="planted"):
                exchange.submit()
        exchange.undo()
        assert (program.holds(program.live, 0), program.holds(program.image, 1)) == (True, True), nth


@pytest.mark.parametrize("nth", range(1, 14))
def test_an_undo_that_fails_goes_on_where_it_failed(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """A second `undo` ends what the first has begun, of an exchange that was done and of one that failed."""
    for fails_at in (None, 6, 7, 8):
        program = start(Choices(nth), HostProgram)
        exchange = program.exchange()
        wait_for_work([exchange.device], timeout_s=10.0)
        if fails_at is None:
            exchange.submit()
        else:
            with monkeypatch.context() as patch:
                Failing(fails_at, is_half=True).plant(patch)
                with pytest.raises(MemoryError, match="planted"):
                    exchange.submit()
        with monkeypatch.context() as patch:
            Failing(nth, is_half=True).plant(patch)
            try:
                exchange.undo()
            except MemoryError:
                pass
        exchange.undo()
        assert (program.holds(program.live, 0), program.holds(program.image, 1)) == (True, True), fails_at


def test_an_undo_that_does_not_wait_for_the_way_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second stream still copies over the image comes after what the undo has put there."""
    results = []
    for seed in range(40):
        program = start(Choices(seed), HostProgram)
        exchange = program.exchange()
        wait_for_work([exchange.device], timeout_s=10.0)
        with monkeypatch.context() as patch:
            Failing(9, is_half=False).plant(patch)  # the first copy of a step: 4 of the one before is on its way
            with pytest.raises(MemoryError, match="planted"):
                exchange.submit()
        with monkeypatch.context() as patch:
            patch.setattr(FakeLane, "wait_for", lambda lane, events: None)
            exchange.undo()
        program.device.finish()
        results.append(program.holds(program.live, 0) and program.holds(program.image, 1))
    assert not all(results)


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlaces:
    made = FakePlaces(num_windows=2)
    monkeypatch.setattr(places, "active", made)
    monkeypatch.setattr(host_exchange, "WINDOW_NBYTES", 320)
    return made


def reference(state: dict[str, torch.Tensor]) -> torch.Tensor:
    module = Spread()
    module.load_state_dict(state)
    found: torch.Tensor = module(X)
    return found


def make_slot(module: Spread, swap: Any = ON_HOST, **options: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=swap, constants=["last.mask"], **options)


@pytest.mark.parametrize("kind", ["file", "mapping", "module"])
def test_a_swap_by_way_of_the_host_gives_what_a_cold_load_gives(fakes: FakePlaces, tmp_path: Path, kind: str) -> None:
    """Forth and back, from every source: outputs, digests and addresses; the devices give windows."""
    plain = make_slot(Spread(), hotglm.InPlace())
    digests = [plain.update(make_spread_state(number), version=f"1.0.{number}").digest for number in range(1, 4)]
    module, devices = make_spread(fakes, 1)
    addresses = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
    slot = make_slot(module)
    for number in range(1, 4):
        state: Any = make_spread_state(number)
        source = state
        if kind == "file":
            source = tmp_path / f"{number}.safetensors"
            save_file({name: tensor.clone() for name, tensor in state.items()}, source)
        if kind == "module":
            source = Spread()
            source.load_state_dict(state)
            source = source.state_dict()
        receipt = slot.update(source, version=f"1.0.{number}")
        assert receipt.plan is not None
        assert receipt.in_place is not None
        assert "pinned memory of the host" in receipt.plan.explain()
        assert "because it was asked for" in receipt.plan.explain()
        assert receipt.digest == digests[number - 1]
        assert receipt.in_place.addresses_stable
        assert same_bits(slot(X), reference(state))
        assert [device.used_nbytes for device in devices] == [0, 0]
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(2)))
    assert addresses == [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def test_what_is_live_on_the_device_is_not_looked_for_on_the_host(fakes: FakePlaces, tmp_path: Path) -> None:
    """A file that promises digests is read whole: what is live has another kind of fingerprint, and is far away."""
    module, _ = make_spread(fakes, 1)
    slot = make_slot(module)
    for number in (1, 2):
        donor = Spread()
        donor.load_state_dict({**make_spread_state(1), "second.count": torch.tensor(number)})
        hotglm.save_weights(donor, tmp_path / f"{number}.safetensors", version=f"1.0.{number}")
        receipt = slot.update(tmp_path / f"{number}.safetensors")
        assert receipt.origins is not None
        assert (receipt.origins.copied_nbytes, receipt.origins.drifted) == (0, ())
        assert same_bits(slot(X), donor(X))
        assert slot.verify_live().num_compared == slot.verify_live(quick=True).num_compared > 0
    slot.rollback()
    assert slot.verify_live(quick=True).num_compared > 0


def test_passes_on_streams_read_one_version(fakes: FakePlaces) -> None:
    """Queued passes before and after swaps and a rollback read the weights of their version."""
    for seed in range(3):
        device = Queued.device = FakeDevice(name="fake:0", choices=Choices(seed))
        fakes.__init__(num_windows=2)  # type: ignore[misc]
        module = Plain()
        fakes.add(device, module)
        slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=ON_HOST, constants=["twice"])
        seen = [(0.0, slot("default"))]
        for number in (1.0, 2.0):
            slot.update(
                {"weight": torch.full((100,), number), "bias": torch.full((3,), number)}, version=f"1.0.{number:g}"
            )
            seen += [(number, slot("default")), (number, slot("second"))]
        slot.rollback()
        seen += [(1.0, slot("second"))]
        device.finish()
        assert all((part == value).all() for value, parts in seen for part in parts[:2])


class Plain(Queued):
    """One without derived state."""

    _refresh: Any = None


def test_the_planner_takes_the_host_where_the_device_is_full(fakes: FakePlaces) -> None:
    """With no room for a second copy `auto` swaps in place by way of the host, and says so; with room it does not."""
    module, devices = make_spread(fakes, 0)
    devices[1].free_nbytes = 1290
    slot = make_slot(module, "auto")
    assert slot.status().swap == "in place: two copies do not fit on fake:1, which has 1290 bytes for another 1293"
    receipt = slot.update(make_spread_state(1), version="1.0.1")
    assert receipt.plan is not None
    assert "there is none for it where the live weights are: Expected" in receipt.plan.explain()
    assert same_bits(slot(X), reference(make_spread_state(1)))
    devices[1].free_nbytes = 1 << 40
    assert make_slot(module, "auto").status().swap.startswith("flip: nobody")
    slot.update(make_spread_state(2), version="1.0.2")
    assert same_bits(slot(X), reference(make_spread_state(2)))
    slot.rollback()
    assert same_bits(slot(X), reference(make_spread_state(1)))


def test_what_has_to_run_on_the_device_is_refused_by_name(fakes: FakePlaces) -> None:
    """Warm-up, goldens, checks and derived state need an image on the device; nothing is read, and the old serves."""
    module, _ = make_spread(fakes, 0)
    before = module(X)
    slot = make_slot(module, refresh=lambda module: None)
    policy = hotglm.StagePolicy(warm_up=(X,), checks=(lambda module: True,))
    with pytest.raises(UnswappableError, match="because it is staged on the host") as caught:
        slot.update(make_spread_state(1), version="1.0.1", policy=policy)
    text = str(caught.value)
    assert [name for name in ("warm_up", "goldens", "checks", "refresh") if name in text] == [
        "warm_up",
        "checks",
        "refresh",
    ]
    assert same_bits(slot(X), before)


def test_where_not_even_windows_fit_it_is_refused(fakes: FakePlaces) -> None:
    """The windows are part of the plan."""
    module, devices = make_spread(fakes, 0)
    before = module(X)
    devices[0].free_nbytes = 100
    slot = make_slot(module, hotglm.InPlace())
    with pytest.raises(MemoryPlanError, match="1280 bytes of fake:0 to exchange an image on the host by, got 100"):
        slot.update(make_spread_state(1), version="1.0.1")
    with pytest.raises(MemoryPlanError, match="of fake:0 for the spare"):
        make_slot(module, hotglm.InPlace(image="device")).update(make_spread_state(1), version="1.0.1")
    assert same_bits(slot(X), before)


@pytest.mark.parametrize("call", ["copy_all", "record", "allocate", "pin"])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_a_device_that_fails_once_is_undone(fakes: FakePlaces, call: str, nth: int) -> None:
    """A typed error or a commit that went through; one version serves, bit for bit, and the next one commits."""
    module, devices = make_spread(fakes, nth)
    slot = make_slot(module)
    before, left = slot(X), nth

    def fail(name: str) -> None:
        nonlocal left
        left -= name == call
        if name == call and left == 0:
            raise MemoryPlanError("planted", remedy="none") if name in ("pin", "allocate") else RuntimeError("planted")

    devices[0].fails = fail
    try:
        slot.update(make_spread_state(1), version="1.0.1")
    except HotglmError:
        assert same_bits(slot(X), before)
        slot.update(make_spread_state(1), version="1.0.1")
    devices[0].fails = lambda name: None
    assert same_bits(slot(X), reference(make_spread_state(1)))
    slot.rollback()
    assert same_bits(slot(X), before)


def test_pinned_memory_is_taken_once_and_given_back(fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arenas at most for any number of swaps and refusals; with the slot they are unpinned, by a thread."""
    released = threading.Semaphore(0)
    release = FakePinned.release

    def note(pinned: FakePinned) -> None:
        release(pinned)
        released.release()

    monkeypatch.setattr(FakePinned, "release", note)
    module, devices = make_spread(fakes, 0)
    slot = make_slot(module, memory=hotglm.MemoryPolicy(small_nbytes=0))
    for number in range(1, 5):
        slot.update(make_spread_state(number), version=f"1.0.{number}")
        with pytest.raises(NonFiniteError):
            slot.update({**make_spread_state(0), "second.weight": torch.full((8, 40), torch.nan)})
    assert len(devices[0].pinned) == 1
    del slot
    gc.collect()
    assert released.acquire(timeout=10)
    assert [pinned.is_released for pinned in devices[0].pinned] == [True]


def test_pinned_memory_stays_for_who_holds_a_tensor_of_it() -> None:
    """The lease keeps the memory pinned after the arena is gone."""
    device = FakeDevice(name="fake:0", choices=Choices(0))
    arena = PinnedArena(100, device=device)
    view = arena.lease().view(64, dtype=torch.float32, shape=(4,)).fill_(3)
    assert (arena.is_free, device.pinned[0].tensor.numel()) == (False, 4096)
    del arena
    assert (device.pinned[0].is_released, view.tolist()) == (False, [3.0] * 4)
