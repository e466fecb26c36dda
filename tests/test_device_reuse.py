"""Reuse on devices: what is live there is copied within the device, and never taken for what it is not."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import DigestMismatchError, LiveMismatchError, NonFiniteError, StageFailedError
from hotglm.weights import device_seals, handover, places
from hotglm.weights.budget import Budget
from hotglm.weights.digest import digest_tensor
from hotglm.weights.plan import IOV_MAX
from hotglm.weights.ring import GAP_NBYTES, Window
from support.delta_releases import write_delta, write_full
from support.fake_device import Choices, FakeDevice, FakePlaces

CHUNK = 256
TIGHT = hotglm.MemoryPolicy(small_nbytes=0)


class Net(nn.Module):
    """Two layers on a device, one with other strides, and one on the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 60)
        self.second = nn.Linear(60, 8, bias=False)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.near = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.near(self.second(torch.relu(self.first(x)))) + self.conv.weight.sum()
        return found


X = torch.linspace(-1, 1, 80).view(2, 40)


def make_state(seed: int, **other: int) -> dict[str, torch.Tensor]:
    """Return weights of a seed; those of the parts that `other` names are of another."""
    torch.manual_seed(seed)
    state = {name: tensor.contiguous() for name, tensor in Net().state_dict().items()}
    for part, number in other.items():
        state |= {name: tensor for name, tensor in make_state(number).items() if name.startswith(part)}
    return state


def count(state: dict[str, torch.Tensor], *parts: str) -> int:
    return sum(tensor.nbytes for name, tensor in state.items() if name.startswith(parts or ""))


def is_live(slot: hotglm.ModuleSlot, state: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights and outputs are those of a cold load."""
    cold = Net()
    cold.load_state_dict(state)
    live = slot.live.module.state_dict()
    return torch.equal(slot(X), cold(X)) and all(torch.equal(live[name], tensor) for name, tensor in state.items())


def flip(tensor: torch.Tensor, byte: int = 3) -> None:
    (ctypes.c_uint8 * (byte + 1)).from_address(tensor.data_ptr())[byte] ^= 1


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlaces:
    made = FakePlaces(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)
    monkeypatch.setattr(places, "active", made)
    return made


def make_slot(fakes: FakePlaces, seed: int = 0, **options: Any) -> hotglm.ModuleSlot:
    """Return a slot with three parts on a fresh fake device."""
    fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
    torch.manual_seed(0)
    module, device = Net(), FakeDevice(name="fake:0", choices=Choices(seed))
    fakes.add(device, module.first, module.second, module.conv)
    return hotglm.ModuleSlot(module, name="m", version="1.0.0", **options)


def save(directory: Path, number: int, state: dict[str, torch.Tensor]) -> Path:
    path = directory / f"{number}.safetensors"
    if not path.exists():
        hotglm.save_weights(state, path, version=f"1.0.{number}")
    return path


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the bytes that are submitted to be copied: to the device, from it, and within."""
    found = {"to": 0, "from": 0, "within": 0}
    copy = FakeDevice.copy

    def counted(device: FakeDevice, source: torch.Tensor, target: torch.Tensor) -> None:
        pinned = [
            any(0 <= tensor.data_ptr() - p.tensor.data_ptr() < p.tensor.numel() for p in device.pinned)
            for tensor in (source, target)
        ]
        found["to" if pinned[0] else "from" if pinned[1] else "within"] += source.numel()
        copy(device, source, target)

    monkeypatch.setattr(FakeDevice, "copy", counted)
    return found


# -- what is copied ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["release", "file"])
def test_only_what_differs_goes_to_the_device(
    fakes: FakePlaces, tmp_path: Path, moved: dict[str, int], kind: str
) -> None:
    """Of a source one part of which is new, that part crosses to the device, and the rest is copied within it."""
    slot, states = make_slot(fakes), [make_state(1), make_state(1, second=2), make_state(3, second=2)]
    plain = hotglm.ModuleSlot(Net(), name="m", version="1.0.0")
    on_device = ("first", "second", "conv")
    found = []
    for number, state in enumerate(states, start=1):
        moved.update(dict.fromkeys(moved, 0))
        path = write_full(tmp_path, number, state) if kind == "release" else save(tmp_path, number, state)
        receipt = slot.update(path)
        assert is_live(slot, state)
        expected = plain.update(path)
        assert (receipt.digest, dict(receipt.digests)) == (expected.digest, dict(expected.digests))
        assert (receipt.nbytes, receipt.origins.drifted) == (count(state), ())
        found.append((receipt.origins.read_nbytes, receipt.origins.copied_nbytes, moved["within"], moved["from"]))
    state = states[0]
    second, within = count(state, "second"), count(state, *on_device) - count(state, "second")
    assert found == [
        (count(state), 0, 0, 0),
        (second, count(state) - second, within, 0),
        (count(state) - second, second, second, 0),
    ]


def test_a_quick_proof_fetches_nothing_right_after_a_swap(
    fakes: FakePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the source was, a load with digests leaves fingerprints of all that is on a device."""
    slot, fetched = make_slot(fakes), list[int]()
    fetch = Window.fetch

    def counted(window: Window, source: torch.Tensor) -> torch.Tensor:
        fetched.append(source.numel())
        return fetch(window, source)

    sources: list[Any] = [save(tmp_path, 1, make_state(1)), make_state(2), save(tmp_path, 3, make_state(2))]
    for number, source in enumerate(sources):
        slot.update(source, version=f"1.0.{number + 1}")
        with monkeypatch.context() as patch:
            patch.setattr(Window, "fetch", counted)
            assert slot.verify_live(quick=True).digest == slot.live.digest
        assert fetched == []
        assert slot.verify_live().digest == slot.live.digest


def test_without_digests_no_fingerprint_is_taken(fakes: FakePlaces, tmp_path: Path) -> None:
    """A load that hashes nothing promises nothing."""
    slot = make_slot(fakes, policy=hotglm.StagePolicy(digest=False))
    slot.update(make_state(1), version="1.0.1")
    assert slot.live.seals == {}


def test_reuse_can_be_turned_off_on_devices(fakes: FakePlaces, tmp_path: Path) -> None:
    """With `reuse=False` every byte of a source is read."""
    slot = make_slot(fakes, policy=hotglm.StagePolicy(reuse=False))
    for number in (1, 2):
        origins = slot.update(save(tmp_path, number, make_state(1, second=number))).origins
        assert (origins.read_nbytes, origins.copied_nbytes) == (count(make_state(1)), 0)


def test_what_brings_nothing_new_is_read_whole(fakes: FakePlaces, tmp_path: Path) -> None:
    """Files that promise nothing but what is live are read, as on the processor."""
    slot = make_slot(fakes)
    for number in (1, 2):
        assert slot.update(save(tmp_path, number, make_state(1))).origins.copied_nbytes == 0


def test_a_budget_holds_for_copies_within_the_device(
    fakes: FakePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied within a device takes of its memory's time, and is taken from the budget like all else."""
    slot, taken = make_slot(fakes, policy=hotglm.StagePolicy(max_bytes_per_s=1e9)), list[int]()
    slot.update(save(tmp_path, 1, make_state(1)))
    monkeypatch.setattr(Budget, "take", lambda budget, nbytes, *, cancellation: taken.append(nbytes))
    slot.update(save(tmp_path, 2, make_state(1, second=2)))
    assert sum(taken) >= count(make_state(1), "first", "second", "conv")


class Tied(Net):
    """One whose first weight has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(40, 60, bias=False)
        self.other.weight = self.first.weight


@pytest.mark.parametrize("is_poked", [False, True])
def test_ties_are_copied_once_under_whatever_name(fakes: FakePlaces, tmp_path: Path, *, is_poked: bool) -> None:
    """A tensor that a file has under two names is copied once, or read; its names share what is known of it."""
    torch.manual_seed(0)
    module = Tied()
    fakes.add(FakeDevice(name="fake:0", choices=Choices(2)), module.first, module.second, module.conv)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0")
    origins, state = [], make_state(1)
    for number in (1, 2):
        state = make_state(1, second=number)
        both = {**state, "other.weight": state["first.weight"].clone()}
        if is_poked and number == 2:
            flip(slot.live.module.get_parameter("first.weight"))
        receipt = slot.update(save(tmp_path, number, both))
        origins.append(receipt.origins)
        live = slot.live.module.state_dict()
        assert all(torch.equal(live[name], tensor) for name, tensor in both.items())
        assert receipt.digests["other.weight"] == receipt.digests["first.weight"]
        assert live["other.weight"].data_ptr() == live["first.weight"].data_ptr()
        assert slot.verify_live(quick=True).digest == receipt.digest
    copied = count(state) - count(state, "second") - (state["first.weight"].nbytes if is_poked else 0)
    assert [each.copied_nbytes for each in origins] == [0, copied]
    assert origins[1].drifted == (("first.weight",) if is_poked else ())


# -- what is not what it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first.weight", "conv.weight"])
def test_a_live_tensor_that_was_written_is_read_again(fakes: FakePlaces, tmp_path: Path, name: str) -> None:
    """A flipped bit on the device does not go into the next version: the tensor is read, and the receipt names it."""
    slot = make_slot(fakes)
    slot.update(save(tmp_path, 1, make_state(1)))
    flip(slot.live.module.state_dict()[name])
    receipt = slot.update(save(tmp_path, 2, make_state(1, second=2)))
    assert receipt.origins.drifted == (name,)
    assert receipt.origins.read_nbytes == count(make_state(1), "second") + make_state(1)[name].nbytes
    assert is_live(slot, make_state(1, second=2))


def run_written(fakes: FakePlaces, directory: Path, seed: int) -> bool:
    """Stage while a queued kernel of the service writes what is copied; return whether what went live is exact."""
    slot = make_slot(fakes, seed)
    slot.update(save(directory, 1, make_state(1)))
    weight = slot.live.module.get_parameter("first.weight")
    fakes.devices[0].submit(lambda: weight.data.fill_(7), stream="second")
    slot.update(save(directory, 2, make_state(1, second=2)))
    fakes.devices[0].finish()
    return is_live(slot, make_state(1, second=2))


def test_what_is_written_while_it_is_copied_is_found(fakes: FakePlaces, tmp_path: Path) -> None:
    """C02: whenever the write happens, before, while or after it is copied, the next version has the promised bytes."""
    assert all(run_written(fakes, tmp_path, seed) for seed in range(10))


def test_believing_the_original_is_caught(fakes: FakePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with the fingerprint planted to be believed unseen, lets a write through in some schedule."""
    monkeypatch.setattr(handover, "find_unchanged", lambda views, seals, device, *, pause: set(views))
    assert not all(run_written(fakes, tmp_path, seed) for seed in range(30))


def run_calm(fakes: FakePlaces, directory: Path, seed: int) -> bool:
    """Stage with nobody writing; return whether everything could be copied."""
    slot = make_slot(fakes, seed)
    slot.update(save(directory, 1, make_state(1)))
    return slot.update(save(directory, 2, make_state(1, second=2))).origins.drifted == ()


def test_a_fingerprint_is_taken_after_the_copy(fakes: FakePlaces, tmp_path: Path) -> None:
    """Hazard "proof of a copy": the copies are done when they are looked at, in every schedule."""
    assert all(run_calm(fakes, tmp_path, seed) for seed in range(20))


def test_a_fingerprint_off_the_side_stream_is_caught(
    fakes: FakePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with the look planted to be on another stream than the copies."""
    monkeypatch.setattr(FakeDevice, "submitting", lambda device: contextlib.nullcontext())
    assert not all(run_calm(fakes, tmp_path, seed) for seed in range(20))


def test_a_missing_fingerprint_costs_a_read_and_no_more(
    fakes: FakePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without room for scratch has no fingerprints; the next load reads everything that is there."""
    slot = make_slot(fakes)
    monkeypatch.setattr(device_seals, "take_fingerprints", lambda tensors, device, **_: [None] * len(tensors))
    monkeypatch.setattr(handover, "take_fingerprints", lambda tensors, device, **_: [None] * len(tensors))
    slot.update(save(tmp_path, 1, make_state(1)))
    receipt = slot.update(save(tmp_path, 2, make_state(1, second=2)))
    assert receipt.origins.copied_nbytes == count(make_state(1), "near")
    assert is_live(slot, make_state(1, second=2))
    assert slot.verify_live(quick=True).digest == slot.live.digest


def test_weights_that_are_swapped_in_place_on_a_device_are_proved_and_copied(fakes: FakePlaces, tmp_path: Path) -> None:
    """Addresses that stay make no difference: proofs, copies and what is written are as where versions take turns."""
    slot = make_slot(fakes, swap=hotglm.InPlace())
    for number, second in enumerate((1, 2, 3), start=1):
        receipt = slot.update(save(tmp_path, number, make_state(1, second=second)))
        assert is_live(slot, make_state(1, second=second))
        assert (receipt.origins.drifted, receipt.origins.copied_nbytes > 0) == ((), number > 1)
        for quick in (True, False):
            assert slot.verify_live(quick=quick).digest == receipt.digest
    flip(slot.live.module.state_dict()["first.weight"])
    for quick in (True, False):
        with pytest.raises(LiveMismatchError, match=r"first\.weight"):
            slot.verify_live(quick=quick)
    assert slot.update(save(tmp_path, 4, make_state(1, second=4))).origins.drifted == ("first.weight",)
    assert is_live(slot, make_state(1, second=4))


def test_infinity_that_is_live_is_found_when_it_is_asked_for(fakes: FakePlaces, tmp_path: Path) -> None:
    """What was loaded unsearched is searched when it is copied by a stage that searches; the live version serves on."""
    slot, state = make_slot(fakes, policy=hotglm.StagePolicy(finite=False)), make_state(1)
    state["first.weight"][3, 4] = torch.inf
    slot.update(save(tmp_path, 1, state))
    path = save(tmp_path, 2, {**state, "second.weight": torch.ones(8, 60)})
    with pytest.raises(NonFiniteError, match=r"first\.weight"):
        slot.update(path, policy=hotglm.StagePolicy(finite=True))
    assert slot.verify_live(quick=True).digest == slot.verify_live().digest == slot.live.digest
    slot.update(path)
    assert torch.equal(slot.live.module.get_parameter("second.weight"), torch.ones(8, 60))


# -- deltas ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def releases(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a full release, a delta to it that changes a few values of two tensors, and the full form of that."""
    state = make_state(1)
    full = write_full(tmp_path, 1, state)
    for name in ("first.weight", "conv.weight"):
        state[name] = state[name].clone()
        state[name].view(-1)[::50] += 1
    new = write_full(tmp_path / "full", 2, state)
    return full, write_delta(full, new, tmp_path / "delta"), new


def changed_state() -> dict[str, torch.Tensor]:
    state = make_state(1)
    for name in ("first.weight", "conv.weight"):
        state[name] = state[name].clone()
        state[name].view(-1)[::50] += 1
    return state


@pytest.mark.parametrize("is_known", [True, False])
def test_a_delta_needs_no_file_of_what_is_live_on_the_device(
    fakes: FakePlaces, releases: tuple[Path, Path, Path], moved: dict[str, int], is_known: bool
) -> None:
    """What a delta changes is fetched from the device and made anew on the host; the rest never leaves the device."""
    full, delta, _ = releases
    slot = make_slot(fakes)
    if is_known:
        slot.update(full)
    else:  # the module came with these weights, and nobody has hashed them
        with torch.no_grad():
            slot.live.module.load_state_dict(make_state(1))
    shutil.rmtree(full)
    moved.update(dict.fromkeys(moved, 0))
    receipt = slot.update(delta)
    assert (receipt.origins.drifted, is_live(slot, changed_state())) == ((), True)
    changed = sum(changed_state()[name].nbytes for name in ("first.weight", "conv.weight"))
    on_device = count(make_state(1), "first", "second", "conv")
    assert moved["within"] == on_device - changed
    assert moved["from"] == changed + (0 if is_known else on_device)
    assert slot.verify_live(quick=True).digest == slot.live.digest


@pytest.mark.parametrize("is_planted", [False, True])
def test_weights_that_are_still_computed_are_hashed_when_they_are_done(
    fakes: FakePlaces, releases: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard "proof": a delta on a module that a queued kernel still fills; planted to be hashed early, that fails."""
    if is_planted:
        monkeypatch.setattr(FakeDevice, "record_passes", lambda device: ())
    full, delta, _ = releases
    shutil.rmtree(full)
    found = []
    for seed in range(6):
        slot, state = make_slot(fakes, seed), make_state(1)
        with torch.no_grad():
            slot.live.module.load_state_dict(state)
            weight = slot.live.module.get_parameter("first.weight").data.zero_()
        fill = functools.partial(weight.copy_, state["first.weight"])
        for _ in range(200):
            fakes.devices[0].submit(int, stream="second")
        fakes.devices[0].submit(fill, stream="second")  # behind much else
        try:
            slot.update(delta)
        except hotglm.HotglmError:
            found.append(False)
        else:
            found.append(is_live(slot, changed_state()))
    assert all(found) is not is_planted


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
@pytest.mark.parametrize("has_base", [True, False])
def test_a_delta_onto_drifted_weights_is_made_of_files_or_refused(
    fakes: FakePlaces, releases: tuple[Path, Path, Path], name: str, has_base: bool
) -> None:
    """C02: a flipped bit on the device is found; files replace the tensor, or the stage is refused and names it."""
    full, delta, _ = releases
    slot = make_slot(fakes)
    slot.update(full)
    before = slot(X)
    flip(slot.live.module.state_dict()[name], 0)
    if has_base:
        assert slot.update(delta).origins.drifted == (name,)
        assert is_live(slot, changed_state())
        return
    shutil.rmtree(full)
    with pytest.raises(DigestMismatchError, match=name):
        slot.update(delta)
    flip(slot.live.module.state_dict()[name], 0)
    assert torch.equal(slot(X), before)


# -- refreshes, streams, failures --------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Writes a weight of its state dict in its refresh, past torch's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100))

    @hotglm.refresh("weight")
    def _refresh(self) -> None:
        self.weight.data.div_(self.weight.data.sum())


def test_what_a_refresh_writes_past_torch_is_hashed_again(fakes: FakePlaces) -> None:
    """P12: digests are those of what is live, also of a tensor on a device that was written through `.data`."""
    module = Normed()
    fakes.add(FakeDevice(name="fake:0", choices=Choices(0)), module)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0")
    slot.update({"weight": torch.ones(100)}, version="1.0.1")
    live = slot.live.module.get_parameter("weight")
    assert slot.live.digests["weight"] == digest_tensor(live.detach())
    for quick in (True, False):
        slot.verify_live(quick=quick)


class Later(Normed):
    """The same, by a kernel that the refresh queues."""

    device: FakeDevice

    @hotglm.refresh("weight")
    def _refresh(self) -> None:
        self.device.submit(lambda weight=self.weight.data: weight.fill_(3), stream="default")  # type: ignore[misc]


@pytest.mark.parametrize("is_planted", [False, True])
def test_what_a_refresh_has_queued_is_hashed_when_it_is_done(
    fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard "proof": the look behind a refresh comes after its kernels; planted to come when it will, it does not."""
    if is_planted:
        monkeypatch.setattr(FakeDevice, "record_here", lambda device: ())
    found = []
    for seed in range(20):
        fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
        module = Later()
        Later.device = FakeDevice(name="fake:0", choices=Choices(seed))
        fakes.add(Later.device, module)
        slot = hotglm.ModuleSlot(module, name="m", version="1.0.0")
        slot.update({"weight": torch.ones(100)}, version="1.0.1")
        found.append(slot.live.digests["weight"] == digest_tensor(torch.full((100,), 3.0)))
    assert all(found) is not is_planted


@pytest.fixture
def serving(fakes: FakePlaces, tmp_path: Path) -> Iterator[tuple[hotglm.ModuleSlot, FakeDevice, Path]]:
    """A slot, its device and a file most of which is live; whatever a test does, the live version serves on."""
    slot = make_slot(fakes, 5, policy=hotglm.StagePolicy(num_threads=2, nice=0))
    slot.update(save(tmp_path, 1, make_state(1)))
    path = save(tmp_path, 2, make_state(1, second=2))
    yield slot, fakes.devices[0], path
    fakes.devices[0].fails = lambda call: None
    assert is_live(slot, make_state(1))
    slot.update(path)
    assert is_live(slot, make_state(1, second=2))


@pytest.mark.parametrize("after", range(4))
def test_a_copy_within_the_device_that_fails_changes_nothing(
    serving: tuple[hotglm.ModuleSlot, FakeDevice, Path], after: int
) -> None:
    """Whichever copy fails, the stage does, and the live generation still serves, bit for bit."""
    slot, device, path = serving
    left = after

    def fail(call: str) -> None:
        nonlocal left
        left -= call == "copy"
        if left < 0:
            raise RuntimeError("planted")

    device.fails = fail
    with pytest.raises(StageFailedError, match="planted"):
        slot.update(path)
    device.fails = lambda call: None


def test_a_stage_is_cancelled_between_copies(serving: tuple[hotglm.ModuleSlot, FakeDevice, Path]) -> None:
    """What progress raises ends the stage while copies within the device are queued."""
    slot, _, path = serving

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slot.update(path, progress=stop)


class Queued(nn.Module):
    """Queues kernels that read its two weights by their addresses."""

    device: FakeDevice

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Parameter(torch.full((50,), 5.0))
        self.other = nn.Parameter(torch.zeros(50))

    def forward(self, stream: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.full((50,), torch.nan), torch.full((50,), torch.nan)
        for weight, target in zip((self.same, self.other), found, strict=True):
            self.device.submit(self.device.reading(weight, target), stream=stream)
        return found


def run_queued(fakes: FakePlaces, directory: Path, seed: int) -> bool:
    """Swap files of which one tensor stays; return whether every queued pass read its own version."""
    fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
    Queued.device = FakeDevice(name="fake:0", choices=Choices(seed))
    module = Queued()
    fakes.add(Queued.device, module)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", memory=TIGHT)
    del module
    seen, copied = [], []
    for number in range(1, 5):
        state = {"same": torch.full((50,), 5.0), "other": torch.full((50,), float(number))}
        with slot.acquire() as before:
            copied.append(slot.update(save(directory, number, state)).origins.copied_nbytes)
            if number > 1:
                seen += [(number - 1, before.module("second")) for _ in range(20)]
        del before
        seen.append((number, slot("default")))
    Queued.device.finish()
    assert copied == [0, 200, 200, 200]
    return all(set(found[0].tolist()) == {5.0} and set(found[1].tolist()) == {float(number)} for number, found in seen)


def test_every_pass_reads_its_own_version_where_weights_are_copied(fakes: FakePlaces, tmp_path: Path) -> None:
    """Kernels that read an arena are done before it is copied to, whatever the device does when."""
    assert all(run_queued(fakes, tmp_path, seed) for seed in range(16))


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "reuse": lambda patch: patch.setattr("hotglm.weights.device_arena.begin", lambda device: None),
}


@pytest.mark.parametrize("hazard", PLANTED)
def test_a_missing_wait_is_caught(
    fakes: FakePlaces, tmp_path: Path, hazard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same program finds each wait that copies within the device would forget."""
    PLANTED[hazard](monkeypatch)
    assert not all(run_queued(fakes, tmp_path, seed) for seed in range(16))
