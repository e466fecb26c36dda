"""Proof of what is live on devices: fingerprints that are taken there, and digests of what is fetched."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hotglm
from hotglm.errors import LiveMismatchError
from hotglm.weights import device_seals, places
from hotglm.weights.device_seals import seal_on_device, take_fingerprints
from hotglm.weights.digest import digest_tensor
from hotglm.weights.download import digest_on_device, fetch_into
from hotglm.weights.plan import IOV_MAX
from hotglm.weights.ring import GAP_NBYTES, Window
from hotglm.weights.workers import Cancellation
from support.fake_device import Choices, FakeDevice, FakePlaces
from support.gpu import forget_to_wait

CHUNK = 256
CALM = Cancellation()
BLOCK = device_seals._NUM_ROWS * device_seals._NUM_COLUMNS
"""Words of a block."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakePlaces:
    made = FakePlaces(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)
    monkeypatch.setattr(places, "active", made)
    return made


def make_device(seed: int = 0) -> FakeDevice:
    return FakeDevice(name="fake:0", choices=Choices(seed))


def look(tensor: torch.Tensor) -> int | None:
    return take_fingerprints([tensor], make_device())[0]


# -- fingerprints ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 40_000), place=st.integers(0, 10**9))
def test_every_flipped_bit_is_found(numel: int, place: int) -> None:
    """One bit of any byte of a tensor that is some rows and a tail changes its fingerprint."""
    flat = torch.randint(0, 256, (numel,), dtype=torch.uint8)
    before = look(flat)
    flat[place % numel] ^= 1 << (place // numel % 8)
    assert look(flat) != before


def test_a_bit_that_flips_in_a_large_tensor_is_found() -> None:
    """The first and last bit of halves of words, in blocks, in the rows after them, and in the tail."""
    words = torch.arange(2 * BLOCK + 3 * device_seals._NUM_COLUMNS + 77)
    before = look(words)
    for word in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 5000, -1):
        for flip_bit in (1, 1 << 31, 1 << 32, -(2**63)):
            words[word] ^= flip_bit
            assert look(words) != before
            words[word] ^= flip_bit
    assert look(words) == before


def test_no_change_of_one_column_can_leave_a_section_as_it_was() -> None:
    """Adding a power of two, with or without a carry into the other half of the word, changes the products' sum."""
    low, high = device_seals._draw_multipliers(torch.device("cpu")).view(-1, 2).unbind(1)
    assert bool(((low & high) & 1).all())
    for bit in range(32):
        for change in (1 << bit, (1 << bit) - (1 << 32)):
            for carry in (0, 1, -1, 1 - (1 << 32), (1 << 32) - 1):
                assert not bool((low * change + high * carry == 0).any())


def _swap_rows(weight: torch.Tensor) -> None:
    weight[[0, 3]] = weight[[3, 0]]


CHANGES: list[Callable[[torch.Tensor], object]] = [
    _swap_rows,
    lambda weight: weight.copy_(weight.flip(0)),
    lambda weight: weight.copy_(weight.roll(1, 0)),
    lambda weight: weight[:, 3].neg_(),
    lambda weight: weight[::2, 3].mul_(2),
    lambda weight: weight[:2, 3].neg_(),
    lambda weight: weight[:, 1::2].neg_(),
    lambda weight: weight.neg_(),
]


@pytest.mark.parametrize("width", [4, 509, *(pytest.param(width, marks=pytest.mark.slow) for width in (32, 1024))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_what_programs_do_to_weights_in_place_is_found(width: int, dtype: torch.dtype) -> None:
    """Rows that trade places and columns that change their signs, at the strides that weights have, are found."""
    weight = torch.randn(512, width).to(dtype)
    before = look(weight)
    for change in CHANGES:
        changed = weight.clone()
        change(changed)
        assert look(changed) != before
    assert look(weight.clone()) == before


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 64, 127, 128, 1024, 4093, 8186])
def test_highest_bits_that_flip_at_a_stride_are_found(stride: int) -> None:
    """Signs of a whole column of weights, at any stride in words, do not cancel in pairs."""
    words = torch.randint(-(2**62), 2**62, (2 * BLOCK + 1,))
    before = look(words)
    words[::stride] ^= -(2**63)
    assert look(words) != before


def test_blocks_sections_and_pieces_that_trade_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is summed up by itself may stand elsewhere, at whatever level."""
    monkeypatch.setattr(device_seals, "_PIECE_NBYTES", 8 * 2 * BLOCK)
    words = torch.randint(-(2**62), 2**62, (5 * BLOCK,))
    before = look(words)
    for length in (1, 4096, BLOCK, 2 * BLOCK):
        changed = words.clone()
        changed[:length], changed[-length:] = words[-length:], words[:length]
        assert look(changed) != before


def test_scratch_is_bounded_and_does_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tensors at once, through scratch that is emptied often, have the fingerprints that each has alone."""
    sizes = [0, 1, 7, 8, 9, 4093 * 8, 4093 * 8 + 3, 8 * BLOCK, 8 * BLOCK + 40_000, 33_000, 5]
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    alone = [look(tensor) for tensor in tensors]
    made, zeros = [], torch.zeros

    def count(numel: int, **options: Any) -> torch.Tensor:
        made.append(numel)
        return zeros(numel, **options)

    monkeypatch.setattr(torch, "zeros", count)
    monkeypatch.setattr(device_seals, "_MAX_SECTIONS", 4)
    assert take_fingerprints(tensors, make_device()) == alone
    assert made == [4 * device_seals._SECTION]
    assert len(set(alone)) == len(alone)


def test_what_has_no_fingerprint_says_so() -> None:
    """Gaps, odd addresses and expanded elements have none; neither has anything where there is no room for scratch."""
    plain = torch.randn(8, 8)
    odd = torch.randn(65).to(torch.bfloat16)[1:].view(8, 8)
    assert take_fingerprints([plain[:, ::2], plain, odd, plain[:1].expand(8, 8)], make_device())[1:2] != [None]
    assert take_fingerprints([plain[:, ::2], odd, plain[:1].expand(8, 8)], make_device()) == [None] * 3


def test_a_device_without_room_for_scratch_has_no_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of device memory is no error: whoever asked proves it another way."""

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    plain, device = torch.randn(8, 8), make_device()
    device.free_nbytes = device_seals._SPARE * device_seals._SECTION_NBYTES - 1
    assert take_fingerprints([plain], device) == [None]  # which is asked first: torch would empty its cache
    device.free_nbytes += 1
    assert take_fingerprints([plain], device) != [None]
    monkeypatch.setattr(torch, "zeros", fail)
    assert take_fingerprints([plain], device) == [None]


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(1000),
        torch.randn(64, 30).t(),
        torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 400)[:, ::2],
        torch.tensor(5),
        torch.zeros(0, 4),
        torch.randn(7).to(torch.bfloat16),
        torch.randn(1, 300).expand(5, 300),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_a_fetched_tensor_has_its_digest_and_its_bytes(fakes: FakePlaces, tensor: torch.Tensor) -> None:
    """Whatever the strides, a window at a time: the digest is that of the row-major bytes, which arrive."""
    device = make_device(1)
    assert digest_on_device(tensor, device, cancellation=CALM) == digest_tensor(tensor)
    view = torch.empty(tensor.shape, dtype=tensor.dtype)
    assert fetch_into(view, tensor, device, cancellation=CALM) == digest_tensor(tensor)
    assert torch.equal(view, tensor)
    assert all(pinned.tensor.numel() == fakes.ring(device).nbytes for pinned in device.pinned)


def test_a_seal_whose_tensor_is_written_meanwhile_has_no_fingerprint(
    fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fingerprint that may not be of the bytes that were hashed is not kept."""
    device, tensor = make_device(), torch.randn(500)
    assert seal_on_device(tensor, device, cancellation=CALM).fingerprint == look(tensor)
    fetch = Window.fetch

    def fetch_and_write(window: Window, source: torch.Tensor) -> torch.Tensor:
        found = fetch(window, source)
        tensor[0] += 1
        return found

    monkeypatch.setattr(Window, "fetch", fetch_and_write)
    assert seal_on_device(tensor, device, cancellation=CALM).fingerprint is None


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_window_that_is_read_before_its_event_is_caught(
    fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch, *, is_planted: bool
) -> None:
    """Hazard "fetch": without the wait, some schedule hashes what the window had before; with it, none does."""
    if is_planted:
        monkeypatch.setattr(Window, "fetch", forget_to_wait)
    tensor = torch.randn(300)
    found = []
    for seed in range(40):
        fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
        found.append(digest_on_device(tensor, make_device(seed), cancellation=CALM) == digest_tensor(tensor))
    assert all(found) is not is_planted


# -- verify_live -------------------------------------------------------------------------------------------------------


class Split(nn.Module):
    """Parts on a device and on the processor, one of them tied, one with other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Linear(40, 60)
        self.tied = nn.Linear(40, 60, bias=False)
        self.tied.weight = self.far.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.near = nn.Linear(8, 8)


def make_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.contiguous() for name, tensor in Split().state_dict().items()}


@pytest.fixture
def slot(fakes: FakePlaces) -> Iterator[hotglm.ModuleSlot]:
    module, device = Split(), make_device(3)
    fakes.add(device, module.far, module.conv)
    made = hotglm.ModuleSlot(module, name="m", version="1.0.0")
    made.update(make_state(1), version="1.0.1")
    yield made
    assert fakes.ring(device).num_idle == 2


def flip(tensor: torch.Tensor, byte: int) -> None:
    (ctypes.c_uint8 * (byte + 1)).from_address(tensor.data_ptr())[byte] ^= 1


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_live_on_a_device_is_what_was_committed(slot: hotglm.ModuleSlot, quick: bool) -> None:
    """P12: digests, compared counts and bytes are those of a slot on the processor, again and after a rollback."""
    plain = hotglm.ModuleSlot(Split(), name="m", version="1.0.0")
    plain.update(make_state(1), version="1.0.1")
    expected = plain.verify_live()
    for _ in range(2):
        found = slot.verify_live(quick=quick)
        assert (found.digest, dict(found.digests)) == (expected.digest, dict(expected.digests))
        assert (found.num_compared, found.nbytes) == (expected.num_compared, expected.nbytes) == (6 + 1, found.nbytes)
    slot.update(make_state(2), version="1.0.2")
    slot.verify_live(quick=quick)
    slot.rollback()
    assert slot.verify_live(quick=quick).digest == expected.digest


@pytest.mark.parametrize("quick", [False, True])
def test_one_flipped_bit_on_a_device_is_found(slot: hotglm.ModuleSlot, quick: bool) -> None:
    """G18: in any tensor, at either end; the tensor is named, and nothing is changed by looking."""
    slot.verify_live()
    for name, tensor in slot.live.module.state_dict().items():
        for byte in (0, tensor.nbytes - 1):
            flip(tensor, byte)
            with pytest.raises(LiveMismatchError) as caught:
                slot.verify_live(quick=quick)
            names = {"far.weight", "tied.weight"} if name in ("far.weight", "tied.weight") else {name}
            assert {problem.tensor for problem in caught.value.problems} == names
            flip(tensor, byte)
    assert slot.verify_live(quick=quick).digest == slot.live.digest


def test_a_quick_look_at_a_device_fetches_nothing(slot: hotglm.ModuleSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are fingerprints, no window is filled, and the host learns the same digests."""
    first = slot.verify_live()
    fetched: list[int] = []
    monkeypatch.setattr(Window, "fetch", lambda window, source: fetched.append(source.numel()))
    assert slot.verify_live(quick=True).digests == first.digests
    assert fetched == []


class Written(nn.Module):
    """A weight that a queued kernel of the service writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100))


def test_what_was_queued_before_is_seen(fakes: FakePlaces) -> None:
    """Hazard "proof": a write that the calling thread's stream was given before the proof is part of what is proved."""
    for seed in range(20):
        fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
        device, module = make_device(seed), Written()
        fakes.add(device, module)
        made = hotglm.ModuleSlot(module, name="m", version="1.0.0")
        made.update({"weight": torch.ones(100)}, version="1.0.1")
        made.verify_live()
        device.submit(_write(made.live.module.get_parameter("weight")), stream="default")
        with pytest.raises(LiveMismatchError):
            made.verify_live(quick=True)


def _write(weight: torch.Tensor) -> Callable[[], object]:
    return lambda: flip(weight, 3)


def test_a_missing_order_behind_the_caller_is_caught(fakes: FakePlaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with the order planted to be missing, misses the write in some schedule."""
    monkeypatch.setattr(FakeDevice, "record_here", lambda device: ())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_what_was_queued_before_is_seen(fakes)


def test_weights_that_came_with_the_module_are_read_after_whoever_made_them(fakes: FakePlaces) -> None:
    """The first generation was published by nobody: what any stream still computes of it is waited for."""
    for seed in range(20):
        fakes.__init__(num_windows=2, window_nbytes=CHUNK + IOV_MAX * GAP_NBYTES)  # type: ignore[misc]
        device, module = make_device(seed), Written()
        fakes.add(device, module)
        made = hotglm.ModuleSlot(module, name="m", version="1.0.0")
        device.submit(_write(module.weight), stream="second")
        changed = torch.zeros(100)
        flip(changed, 3)
        assert made.verify_live().digests["weight"] == digest_tensor(changed)


def test_a_proof_can_be_cancelled(slot: hotglm.ModuleSlot) -> None:
    """What `progress` raises ends it, the ring is whole, and the slot serves and is updated on."""

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        slot.verify_live(progress=stop)
    slot.update(make_state(2), version="1.0.2")
    assert slot.verify_live().digest == slot.live.digest


def test_a_device_that_fails_ends_the_proof(slot: hotglm.ModuleSlot, fakes: FakePlaces) -> None:
    """A call to the device that fails is raised, and costs neither a window nor what is live."""

    def fail(call: str) -> None:
        if call == "copy":
            raise RuntimeError("planted")

    fakes.devices[0].fails = fail
    with pytest.raises(RuntimeError, match="planted"):
        slot.verify_live()
    fakes.devices[0].fails = lambda call: None
    assert slot.verify_live().digest == slot.live.digest
