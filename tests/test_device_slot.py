"""Slots whose modules are on devices: the whole way of an update, on fakes that do what the protocol leaves open."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm import seam
from hotglm.errors import (
    ArgumentError,
    DigestMismatchError,
    HotglmError,
    MemoryPlanError,
    NonFiniteError,
    SourceChangedError,
)
from hotglm.seam import Seam
from hotglm.weights import device_arena, places
from hotglm.weights.arena import Arena
from hotglm.weights.budget import Budget
from hotglm.weights.plan import IOV_MAX, Piece
from hotglm.weights.ring import GAP_NBYTES
from hotglm.weights.split_arena import SplitLease
from hotglm.weights.windows import place_pieces
from support.device_models import put_on_devices
from support.fake_device import Choices, FakeDevice, FakePlaces

CHUNK = 256
"""Bytes of one read in these tests, so that small tensors take several windows."""

WIDTH = 100

TIGHT = hotglm.MemoryPolicy(small_nbytes=0)


class Queued(nn.Module):
    """A module whose forward queues a kernel that holds the address of the weight, and no more."""

    device: FakeDevice
    twice: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, stream: str) -> torch.Tensor:
        found = torch.full((self.weight.numel(),), torch.nan)
        self.device.submit(self.device.reading(self.weight, found), stream=stream)
        return found


class Derived(Queued):
    """One that queues the recomputation of a derived buffer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("twice", torch.zeros(WIDTH), persistent=False)

    @hotglm.refresh("twice")
    def _refresh(self) -> None:
        self.device.submit(self.device.reading(self.weight, self.twice, times=2), stream="second")

    def forward(self, stream: str) -> torch.Tensor:
        found = torch.full((WIDTH,), torch.nan)
        self.device.submit(self.device.reading(self.twice, found), stream=stream)
        return found


class Split(nn.Module):
    """Parts on two devices and on the processor, a tie across names, an empty tensor and other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 40)
        self.second = nn.Linear(40, 8, bias=False)
        self.second.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.second.register_buffer("nothing", torch.zeros(0, 3))
        self.last = nn.Linear(8, 8)
        self.last.register_buffer("mask", torch.ones(8, dtype=torch.bool), persistent=False)
        self.tied = nn.Linear(8, 40, bias=False)
        self.tied.weight = self.first.weight
        self.first.bias.data = torch.zeros(80)[::2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.second(torch.relu(self.first(x) + self.tied(x)))) * cast(
            torch.Tensor, self.last.mask
        )
        return found


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlaces:
    made = FakePlaces(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)
    monkeypatch.setattr(places, "active", made)
    return made


def renew(fakes: FakePlaces) -> FakePlaces:
    """Forget the devices and rings of an earlier schedule."""
    fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
    return fakes


def make_split(fakes: FakePlaces, seed: int) -> tuple[Split, list[FakeDevice]]:
    torch.manual_seed(0)
    module = Split()
    return module, put_on_devices(fakes, seed, module.first, module.second)


def make_state(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = Split().state_dict()
    new = {name: torch.rand(tensor.shape).to(dtype) for name, tensor in state.items() if tensor.is_floating_point()}
    new["tied.weight"] = new["first.weight"]
    return {**state, **new, "second.count": torch.tensor(seed)}


def reference(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    module = Split()
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    found: torch.Tensor = module(x)
    return found


@contextlib.contextmanager
def replaced(made: Seam) -> Iterator[None]:
    """Put a seam in the place of the real one."""
    before, seam.active = seam.active, made
    try:
        yield
    finally:
        seam.active = before


X = torch.linspace(-1, 1, 16).view(2, 8)


# -- streams -----------------------------------------------------------------------------------------------------------


def run_queued(fakes: FakePlaces, seed: int, directory: Path, *, kind: type[Queued] = Queued) -> bool:
    """Swap by file and mapping; return whether each pass, in the live generation or a session, read its own version."""
    Queued.device = FakeDevice(name="fake:0", choices=Choices(seed))
    module = kind()
    renew(fakes).add(Queued.device, module)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", memory=TIGHT, policy=hotglm.StagePolicy(finite=False))
    factor, seen = 2 if kind is Derived else 1, []
    for number in range(1, 5):
        state = {"weight": torch.full((WIDTH,), float(number))}
        source: Any = state if number % 2 else directory / f"{number}.safetensors"
        if not number % 2 and not source.exists():
            save_file(state, source)
        with slot.acquire() as before:
            slot.update(source, version=f"1.0.{number}")
            if number > 1:  # the last pass of the old generation, which nothing but the next stage waits for
                seen.append(((number - 1) * factor, before.module("second")))
        del before
        seen += [(number * factor, slot("default"))]
    del slot, module
    Queued.device.finish()
    return all(bool((found == value).all()) for value, found in seen)


@pytest.mark.parametrize("kind", [Queued, pytest.param(Derived, marks=pytest.mark.slow)])
def test_every_pass_reads_its_own_version(fakes: FakePlaces, tmp_path: Path, kind: type[Queued]) -> None:
    """Whatever the device does when, every queued pass reads the weights of its own generation."""
    assert all(run_queued(fakes, seed, tmp_path, kind=kind) for seed in range(16))


def _forget_settling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SplitLease, "settle", lambda lease: None)
    patch.setattr(SplitLease, "settle_passes", lambda lease: None)
    patch.setattr(FakeDevice, "submitting", lambda device: contextlib.nullcontext())  # waits in the fake, for itself


PLANTED: dict[str, tuple[type[Queued], Callable[[pytest.MonkeyPatch], None]]] = {
    "publish before the copy is done": (Queued, _forget_settling),
    "publish before the refresh is done": (
        Derived,
        lambda patch: patch.setattr(SplitLease, "settle_passes", lambda lease: None),
    ),
    "reuse while a kernel reads": (Queued, lambda patch: patch.setattr(device_arena, "begin", lambda device: None)),
}


@pytest.mark.parametrize("hazard", PLANTED)
def test_a_missing_wait_is_caught(
    fakes: FakePlaces, tmp_path: Path, hazard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same program finds each wait that staging would forget."""
    kind, plant = PLANTED[hazard]
    plant(monkeypatch)
    assert not all(run_queued(fakes, seed, tmp_path, kind=kind) for seed in range(16))


# -- what is loaded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_kind", ["file", "mapping", "module", "half"])
@pytest.mark.parametrize("seed", [0, 1])
def test_devices_get_what_the_processor_gets(fakes: FakePlaces, tmp_path: Path, seed: int, source_kind: str) -> None:
    """Files, mappings, modules and conversions: outputs, digests and converted names are those of a slot on the CPU."""
    state = make_state(5, dtype=torch.float16 if source_kind == "half" else torch.float32)
    source: Any = state
    if source_kind in ("file", "half"):
        source = tmp_path / "a.safetensors"
        save_file({name: tensor.clone() for name, tensor in state.items()}, source)
    elif source_kind == "module":
        source = Split()
        source.load_state_dict(state)
    policy = hotglm.StagePolicy(convert_dtypes=True)
    plain = hotglm.ModuleSlot(Split(), name="m", version="1.0.0", policy=policy)
    module, devices = make_split(fakes, seed)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=policy)
    found = slot.update(source, version="1.0.1")
    expected = plain.update(source, version="1.0.1")
    assert (found.digest, dict(found.digests)) == (expected.digest, dict(expected.digests))
    assert sorted(found.converted) == sorted(expected.converted)
    assert (found.nbytes, torch.equal(slot(X), reference(state, X))) == (expected.nbytes, True)
    twin = cast(Split, slot.live.module)
    assert twin.first.weight is twin.tied.weight
    owned = [devices[0].owns(twin.first.weight.data_ptr()), devices[1].owns(twin.second.weight.data_ptr())]
    assert (owned, any(d.owns(twin.last.weight.data_ptr()) for d in devices)) == ([True, True], False)
    del twin
    slot.rollback()
    assert torch.equal(slot(X), module(X))


def test_a_migration_goes_by_way_of_the_host(fakes: FakePlaces, tmp_path: Path) -> None:
    """Weights that a migration must bring to the code's layout arrive on the device as on the CPU."""
    migrations = hotglm.Migrations("m")
    migrations.state("1.0", "2.0", [hotglm.Rename("old", "weight"), hotglm.Scale("weight", 2.0)])
    save_file({"old": torch.ones(100)}, tmp_path / "old.safetensors")
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(WIDTH))
    device = fakes.add(FakeDevice(name="fake:0", choices=Choices(0)), module)
    slot = hotglm.ModuleSlot(module, name="m", version="2.0.0", accept="major", migrations=migrations)
    slot.update(tmp_path / "old.safetensors", version="1.0.0")
    live = cast(torch.Tensor, slot.live.module.weight)
    assert (device.owns(live.data_ptr()), set(live.tolist())) == (True, {2.0})


def test_the_processor_has_no_ring_and_no_regions(fakes: FakePlaces) -> None:
    """A module that is on the CPU alone is staged as ever: one plain arena, no ring, no event."""
    slot = hotglm.ModuleSlot(Split(), name="m", version="1.0.0")
    receipt = slot.update(make_state(1), version="1.0.1")
    assert receipt.plan is not None
    assert (receipt.plan.devices, type(slot.live.arena), fakes._rings) == ((), Arena, {})


def test_tensors_are_aligned_as_torch_aligns_them(fakes: FakePlaces) -> None:
    """Every tensor on a device is as aligned as in a cold load: kernels are chosen by it, and give other bits (P12)."""
    module, devices = make_split(fakes, 0)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", memory=TIGHT)
    slot.update(make_state(1), version="1.0.1")
    starts = [block.memory.data_ptr() for device in devices for block in device.blocks]
    for part in (slot.live.module.get_submodule("first"), slot.live.module.get_submodule("second")):
        for tensor in (*part.parameters(), *part.buffers()):
            base = max((start for start in starts if start <= tensor.data_ptr()), default=0)
            assert not tensor.numel() or (tensor.data_ptr() - base) % 512 == 0


def test_what_is_still_being_computed_is_read_when_it_is_there(fakes: FakePlaces) -> None:
    """Weights that another device, or a device beside a slot on the processor, still computes are waited for."""
    for seed in range(20):
        renew(fakes)
        trainer = FakeDevice(name="fake:9", choices=Choices(seed))
        offered = nn.Linear(4, 4)
        fakes.add(trainer, offered)
        values, weight = torch.full((4, 4), float(seed)), offered.weight.detach()
        trainer.submit(functools.partial(weight.copy_, values), stream="default")
        slot = hotglm.ModuleSlot(nn.Linear(4, 4), name="m", version="1.0.0")
        slot.update({name: tensor.detach() for name, tensor in offered.state_dict().items()}, version="1.0.1")
        assert torch.equal(slot.live.module.get_parameter("weight"), values)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_file_goes_through_the_ring_alone(fakes: FakePlaces, tmp_path: Path, num_threads: int) -> None:
    """Tensors of many windows and many tensors of one window: pinned memory is the ring, and there is no image."""
    state = {"big": torch.rand(700), **{f"small.{index}": torch.rand(index % 7) for index in range(30)}}
    save_file(state, tmp_path / "a.safetensors")
    module = nn.Module()
    for name, tensor in state.items():
        module.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros_like(tensor)))
    save_file({name.replace(".", "_"): tensor for name, tensor in state.items()}, tmp_path / "a.safetensors")
    device = fakes.add(FakeDevice(name="fake:0", choices=Choices(1)), module)
    policy = hotglm.StagePolicy(num_threads=num_threads, nice=0)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=policy)
    mapped: list[int] = []

    class Counting(Seam):
        def map_anonymous(self, nbytes: int) -> Any:
            mapped.append(nbytes)
            return super().map_anonymous(nbytes)

    with replaced(Counting()):
        slot.update(tmp_path / "a.safetensors", version="1.0.1")
    ring = fakes.ring(device)
    assert (mapped, [pinned.tensor.numel() for pinned in device.pinned]) == ([], [ring.nbytes])
    live = slot.live.module.state_dict()
    assert all(torch.equal(live[name.replace(".", "_")], tensor) for name, tensor in state.items())
    assert ring.num_idle == 2


# -- memory ------------------------------------------------------------------------------------------------------------


def test_device_memory_is_planned_and_flat(fakes: FakePlaces, tmp_path: Path) -> None:
    """Each device's part is in the plan; after many swaps, refusals and rollbacks two copies at most are allocated."""
    module, devices = make_split(fakes, 3)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", memory=TIGHT)
    peaks, plan = [0, 0], None
    for number in range(1, 13):
        plan = slot.update(make_state(number), version=f"1.0.{number}").plan
        peaks = [max(peak, device.used_nbytes) for peak, device in zip(peaks, devices, strict=True)]
        if number % 4 == 0:
            with pytest.raises(NonFiniteError):
                slot.update({**make_state(0), "second.weight": torch.full((8, 40), torch.nan)})
            slot.update(make_state(number), version=f"1.0.{number}")
    assert plan is not None
    parts = {part.name: part.nbytes for part in plan.devices}
    assert peaks == [2 * parts["fake:0"], 2 * parts["fake:1"]]
    assert f"{parts['fake:0']} of them on fake:0" in plan.explain()
    assert slot.status().arenas_nbytes == 2 * plan.nbytes


def test_a_device_that_is_full_refuses_before_the_first_byte(fakes: FakePlaces) -> None:
    """What a device cannot hold is refused by the plan, names the device, and leaves everything as it was."""
    module, devices = make_split(fakes, 3)
    devices[1].free_nbytes = 100
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0")
    before = slot(X)
    with pytest.raises(MemoryPlanError, match="of fake:1 for the spare, got 100 available"):
        slot.update(make_state(1), version="1.0.1")
    assert [device.used_nbytes for device in devices] == [0, 0]
    assert torch.equal(slot(X), before)


def test_what_a_plan_gives_up_counts_as_free(fakes: FakePlaces) -> None:
    """A device with room for two copies and no more is updated for ever: the rollback target makes room."""
    module, devices = make_split(fakes, 4)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", memory=TIGHT)
    first = slot.update(make_state(1), version="1.0.1").plan
    assert first is not None
    for device, part in zip(devices, first.devices, strict=True):
        device.free_nbytes = 2 * part.nbytes
    for number in range(2, 6):
        slot.update(make_state(number), version=f"1.0.{number}")
    assert torch.equal(slot(X), reference(make_state(5), X))


def test_a_release_and_its_delta_go_live_on_devices(fakes: FakePlaces, tmp_path: Path) -> None:
    """A full release and a delta on it, whose base is live on a device and read from files, give the exact weights."""
    states = [{name: t.clone() for name, t in make_state(number).items()} for number in (1, 2)]
    states[1] = {**states[0], "second.weight": states[1]["second.weight"]}
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
        source, target = tmp_path / f"{number}.safetensors", tmp_path / f"r{number}"
        hotglm.pack(source, target, name="m", version=f"1.0.{number + 1}", sequence=number + 1)
    hotglm.make_delta(tmp_path / "r0", tmp_path / "r1", tmp_path / "d1")
    module, devices = make_split(fakes, 11)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0")
    slot.update(tmp_path / "r0")
    receipt = slot.update(tmp_path / "d1")
    assert (str(receipt.new_version), torch.equal(slot(X), reference(states[1], X))) == ("1.0.2", True)
    assert devices[1].owns(cast(Split, slot.live.module).second.weight.data_ptr())


@pytest.mark.parametrize("on_devices", [False, True])
def test_a_budget_holds_for_every_way_of_loading(
    fakes: FakePlaces, tmp_path: Path, on_devices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that is read from a file or copied to a device is taken from the budget first."""
    taken: list[int] = []
    monkeypatch.setattr(Budget, "take", lambda budget, nbytes, *, cancellation: taken.append(nbytes))
    module = make_split(fakes, 0)[0] if on_devices else Split()
    policy = hotglm.StagePolicy(max_bytes_per_s=1e6)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=policy)
    save_file({name: tensor.clone() for name, tensor in make_state(1).items()}, tmp_path / "a.safetensors")
    receipt = slot.update(tmp_path / "a.safetensors", version="1.0.1")
    assert sum(taken) >= receipt.nbytes
    with pytest.raises(ArgumentError, match="max_bytes_per_s"):
        hotglm.StagePolicy(max_bytes_per_s=0)


def test_only_streams_can_be_noted() -> None:
    """`note_stream` takes a CUDA stream, and says what it got instead."""
    with pytest.raises(ArgumentError, match=r"Expected a torch\.cuda\.Stream, got 7"):
        hotglm.note_stream(7)  # type: ignore[arg-type]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(fakes: FakePlaces, tmp_path: Path) -> Iterator[tuple[hotglm.ModuleSlot, list[FakeDevice], Path]]:
    """A slot on two devices, and a good file; whatever a test does, the live version serves, and the next goes live."""
    module, devices = make_split(fakes, 7)
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", policy=hotglm.StagePolicy(num_threads=2, nice=0))
    slot.update(make_state(1), version="1.0.1")
    path = tmp_path / "good.safetensors"
    save_file({name: tensor.clone() for name, tensor in make_state(2).items()}, path)
    yield slot, devices, path
    for device in devices:
        device.fails = lambda call: None
    assert torch.equal(slot(X), reference(make_state(1), X))
    slot.update(path, version="1.0.2")
    assert torch.equal(slot(X), reference(make_state(2), X))
    assert [fakes.ring(device).num_idle for device in devices] == [2, 2]


def test_a_bad_digest_is_refused(serving: tuple[hotglm.ModuleSlot, list[FakeDevice], Path]) -> None:
    """Bytes that do not have the digest they must have are refused, after they went through the ring."""
    slot, _, path = serving
    with pytest.raises(DigestMismatchError, match=r"second\.weight"):
        slot.update(path, version="1.0.2", digests={"second.weight": "sha256:" + "0" * 64})


def test_values_that_are_not_finite_are_refused(serving: tuple[hotglm.ModuleSlot, list[FakeDevice], Path]) -> None:
    """NaN in the middle of a tensor on a device is found there."""
    slot, _, path = serving
    state = {name: tensor.clone() for name, tensor in make_state(3).items()}
    state["second.weight"][3, 7] = torch.inf
    bad = path.with_name("bad.safetensors")
    save_file(state, bad)
    with pytest.raises(NonFiniteError, match=r"second\.weight"):
        slot.update(bad, version="1.0.2")


def test_a_file_that_ends_early_is_refused(serving: tuple[hotglm.ModuleSlot, list[FakeDevice], Path]) -> None:
    """A file that is cut while it is read through the ring is a typed error, not a signal."""
    slot, _, path = serving
    bad = path.with_name("cut.safetensors")
    bad.write_bytes(path.read_bytes())

    class Cutting(Seam):
        def preadv(self, fd: int, views: Any, offset: int) -> int:
            bad.write_bytes(b"")
            return super().preadv(fd, views, offset)

    with pytest.raises(SourceChangedError), replaced(Cutting()):
        slot.update(bad, version="1.0.2")


@pytest.mark.parametrize("call", ["copy", "record", "record_passes", "allocate"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_device_that_fails_once(
    serving: tuple[hotglm.ModuleSlot, list[FakeDevice], Path], call: str, after: int
) -> None:
    """A call to the device that fails is a typed failure of the stage, also where it costs a window."""
    slot, devices, path = serving
    left = after

    def fail(name: str) -> None:
        nonlocal left
        if name == call:
            left -= 1
            if left == -1:
                raise RuntimeError("planted")

    devices[1].fails = fail
    try:
        staged = slot.stage(path, version="1.0.2")
    except HotglmError:
        pass
    else:
        assert left >= 0
        staged.discard()
    ring = places.active.ring(devices[1])
    if ring.num_windows < 2:  # lost behind an event that could not be recorded
        del places.active._rings[devices[1].name]


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 300)), min_size=1, max_size=12), st.randoms())
def test_pieces_in_a_window_land_where_they_belong(gaps: list[tuple[int, int]], random: Any) -> None:
    """Runs copy every piece to its place, touch nothing but padding of less than a line, and fit in a window."""
    pieces, at = [], 0
    for gap, nbytes in gaps:
        at += gap
        pieces.append(Piece(arena_offset=at, nbytes=nbytes))
        at += nbytes
    random.shuffle(pieces)
    placed = list(place_pieces(pieces))
    assert [piece for run in placed for _, piece in run.pieces] == pieces
    window: list[tuple[int, int] | None] = [None] * (sum(p.nbytes for p in pieces) + GAP_NBYTES * len(pieces))
    for run in placed:
        for start, piece in run.pieces:
            assert window[start : start + piece.nbytes] == [None] * piece.nbytes  # no two share a byte
            window[start : start + piece.nbytes] = [(piece.arena_offset, index) for index in range(piece.nbytes)]
    arena: dict[int, int] = {}
    for run in placed:
        for index, found in enumerate(window[run.start : run.start + run.nbytes]):
            if found is not None:
                assert found[0] + found[1] == run.arena_offset + index
                arena[run.arena_offset + index] = 1
        padding = run.nbytes - sum(piece.nbytes for _, piece in run.pieces)
        assert padding < GAP_NBYTES * len(run.pieces)
    assert set(arena) == {p.arena_offset + index for p in pieces for index in range(p.nbytes)}
