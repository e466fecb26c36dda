"""Deltas staged straight into the spare: equal to a cold full load bit for bit, and refused without a trace."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hotglm
from hotglm import Progress
from hotglm.delta_fields import TensorDelta
from hotglm.errors import (
    DeltaChainError,
    DeltaError,
    DigestMismatchError,
    HotglmError,
    MissingExtraError,
    SourceReadError,
    SupersededError,
    TensorValueError,
    WrongBaseError,
)
from hotglm.testing.seams import hooked
from hotglm.testing.waiting import wait_until
from hotglm.weights import loader, zstd
from hotglm.weights.delta_codec import SPARSE, XOR
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.dtypes import LOADABLE_DTYPES
from hotglm.weights.seals import Seal, seal_tensor
from support.delta_releases import write_delta, write_full
from support.swaps import same_bits
from support.universal import World, make_state, universal

CODECS = ("whole", XOR, SPARSE)


class Bag(nn.Module):
    """Tensors of any name, dtype and shape, as buffers."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())

    def forward(self) -> torch.Tensor:
        """Return something."""
        return next(self.buffers())


def draw_tensors(seed: int = 0, *, numel: int = 4000) -> dict[str, torch.Tensor]:
    """Return some weights."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(numel, generator=generator) for name in "abc"}


def change(tensors: Mapping[str, torch.Tensor], *names: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return the tensors, of which those named differ in every hundredth element."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in names:
        where = torch.rand(found[name].shape, generator=generator) < 0.01
        found[name] = torch.where(where, torch.randn(found[name].shape, generator=generator), found[name])
        found[name].view(-1)[0] += 1
    return found


def make_slot(tensors: Mapping[str, torch.Tensor], **options: Any) -> hotglm.ModuleSlot:
    """Return a slot around these tensors."""
    return hotglm.ModuleSlot(Bag(tensors), name="m", version="1.0.0", accept="major", **options)


def state_of(slot: hotglm.ModuleSlot) -> dict[str, torch.Tensor]:
    """Return what is live."""
    return dict(slot.live.module.state_dict())


class Pair:
    """Two full releases and the delta between them; the live slot has the first."""

    def __init__(self, root: Path, *, codec: str | None = None, spoil: Any = None, respell: Any = None) -> None:
        self.old, self.new = draw_tensors(), change(draw_tensors(), "b")
        self.base, self.full = write_full(root / "s", 1, self.old), write_full(root / "f", 2, self.new)
        codecs = None if codec is None else {"b": codec}
        self.delta = write_delta(
            self.base, self.full, root / "s" / "000000002-1.0.2", codecs=codecs, spoil=spoil, respell=respell
        )
        self.slot = make_slot(self.old)
        self.slot.update(self.base)

    def hide_base(self) -> None:
        """Leave the delta alone in its directory."""
        shutil.rmtree(self.base)


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_delta_gives_what_the_full_release_gives(codec: str, tmp_path: Path) -> None:
    """A warm stage of a delta equals a cold load of the full release in bits and digests, whatever the codec (P12)."""
    pair = Pair(tmp_path, codec=codec)
    pair.hide_base()
    warm, cold_slot = pair.slot.update(pair.delta), make_slot(pair.old)
    cold = cold_slot.update(pair.full)
    assert same_bits(state_of(pair.slot), state_of(cold_slot))
    assert same_bits(state_of(pair.slot), pair.new)
    assert (warm.digest, warm.digests, str(warm.new_version)) == (cold.digest, cold.digests, "1.0.2")
    nbytes = 4000 * 4
    copied = {"whole": 2 * nbytes}.get(codec, 3 * nbytes)
    assert (warm.origins.copied_nbytes, warm.origins.decoded_nbytes) == (copied, 0 if codec == "whole" else nbytes)
    assert warm.origins.read_nbytes == (nbytes if codec == "whole" else pytest.approx(nbytes / 25, rel=0.9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(sorted(LOADABLE_DTYPES, key=str)),
            st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (33, 17)]),
            st.sampled_from(["same", "few", "all", "drift", "shape", "new"]),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
    num_threads=st.sampled_from([1, 3]),
    is_known=st.booleans(),
)
def test_any_delta_gives_the_new_bytes(
    specs: list[tuple[torch.dtype, tuple[int, ...], str]],
    seed: int,
    num_threads: int,
    is_known: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Releases of all dtypes and odd shapes, some tensors the same, changed, reshaped, new or gone (C16)."""
    generator = torch.Generator().manual_seed(seed)
    old: dict[str, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {"always": torch.ones(2)}
    for index, (dtype, shape, kind) in enumerate(specs):
        count = torch.Size(shape).numel() * dtype.itemsize
        top = 2 if dtype is torch.bool else 256
        before, other = (torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator) for _ in "ab")
        share = {"same": 0.0, "few": 0.02, "drift": 0.3}.get(kind, 1.0)
        after = torch.where(torch.rand(count, generator=generator) < share, other, before)
        new[f"t{index}"] = after.view(dtype).view(shape)
        if kind == "shape":
            old[f"t{index}"] = before.view(dtype)
        elif kind != "new":
            old[f"t{index}"] = before.view(dtype).view(shape)
        if kind == "drift":
            old[f"gone{index}"] = torch.zeros(3)
    root = tmp_path_factory.mktemp("any")
    base, full = write_full(root / "s", 1, old | {"always": torch.zeros(2)}), write_full(root / "f", 2, new)
    delta = write_delta(base, full, root / "s" / "000000002-1.0.2")
    # Random bytes are infinite or NaN now and then, which is not the point here.
    slot = make_slot(new, policy=hotglm.StagePolicy(finite=False, num_threads=num_threads))
    if is_known and set(old) | {"always"} == set(new) and all(old[n].shape == new[n].shape for n in old):
        slot.update(base)
    slot.update(delta)
    live = state_of(slot)
    assert live.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor_bytes(live[name]), tensor_bytes(tensor)), name


def test_a_chain_is_folded_and_each_tensor_read_once(tmp_path: Path) -> None:
    """Catching up by three deltas reads each payload that is needed once, and none that a later one replaces."""
    states = [draw_tensors()]
    for number, name in enumerate("aba"):
        states.append(change(states[-1], name, seed=number))
    fulls = [write_full(tmp_path / "f", number, tensors) for number, tensors in enumerate(states, start=1)]
    base = write_full(tmp_path / "s", 1, states[0])
    codecs = [{}, {}, {"a": "whole"}]
    deltas = [
        write_delta(old, new, tmp_path / "s" / new.name, codecs=codec)
        for old, new, codec in zip(fulls, fulls[1:], codecs, strict=False)
    ]
    for has_base in (True, False):
        for start in (1, 0):
            slot = make_slot(states[0])
            if start:
                slot.update(base if has_base else fulls[0])
            elif not has_base:
                continue
            receipt = slot.update(deltas[-1])
            assert same_bits(state_of(slot), states[-1])
            assert receipt.origins.decoded_nbytes == 4000 * 4
            assert receipt.origins.copied_nbytes == 2 * 4000 * 4
        if has_base:
            shutil.rmtree(base)


def test_a_module_that_came_by_itself_can_be_the_base(tmp_path: Path) -> None:
    """The module that a slot was given is hashed, once, when a delta to it arrives; no arena, no file is needed."""
    pair = Pair(tmp_path)
    pair.hide_base()
    slot = make_slot(pair.old)
    assert slot.live.arena is None
    receipt = slot.update(pair.delta)
    assert receipt.origins.copied_nbytes == 3 * 4000 * 4
    assert same_bits(state_of(slot), pair.new)


def test_without_what_is_live_the_base_is_read_from_its_files(tmp_path: Path) -> None:
    """A slot that has something else live, or is told not to reuse, makes the result from the releases on disk."""
    pair = Pair(tmp_path)
    for slot in (make_slot(draw_tensors(7)), make_slot(pair.old, policy=hotglm.StagePolicy(reuse=False))):
        receipt = slot.update(pair.delta)
        assert receipt.origins.copied_nbytes == 0
        assert receipt.origins.decoded_nbytes == 4000 * 4
        assert same_bits(state_of(slot), pair.new)


def test_a_delta_that_is_staged_again_copies_its_result(tmp_path: Path) -> None:
    """A second time nothing is applied: a tensor with the digest of the result is the result (C08)."""
    pair = Pair(tmp_path)
    pair.hide_base()
    pair.slot.update(pair.delta)
    receipt = pair.slot.update(pair.delta)
    assert (receipt.origins.read_nbytes, receipt.origins.decoded_nbytes) == (0, 0)
    assert same_bits(state_of(pair.slot), pair.new)


def test_digests_are_optional_where_the_manifest_has_them(tmp_path: Path) -> None:
    """With digests turned off a delta is verified all the same, because its manifest promises them."""
    pair = Pair(tmp_path)
    pair.slot.update(pair.delta, policy=hotglm.StagePolicy(digest=False))
    assert same_bits(state_of(pair.slot), pair.new)


def test_weights_are_converted_on_their_way(tmp_path: Path) -> None:
    """A delta of another dtype than the code's is made in its own dtype, and then converted."""
    half = {name: tensor.half() for name, tensor in draw_tensors().items()}
    new = change(half, "a")
    new = {name: tensor.half() for name, tensor in new.items()}
    base, full = write_full(tmp_path / "s", 1, half), write_full(tmp_path / "f", 2, new)
    delta = write_delta(base, full, tmp_path / "s" / "000000002-1.0.2", codecs={"a": SPARSE})
    slot = make_slot(draw_tensors(), policy=hotglm.StagePolicy(convert_dtypes=True))
    slot.update(base)
    receipt = slot.update(delta)
    assert set(receipt.converted) == set("abc")
    assert same_bits(state_of(slot), {name: tensor.float() for name, tensor in new.items()})


def test_a_delta_is_migrated_like_any_release(tmp_path: Path) -> None:
    """Where a migration stands between, the result is made from files, tensor by tensor, and then migrated."""
    migrations = hotglm.Migrations("m")
    migrations.state("1.0", "2.0", [hotglm.Rename("b", "renamed"), hotglm.Scale("a", 2.0)])
    pair = Pair(tmp_path)
    module = Bag({"a": torch.zeros(4000), "renamed": torch.zeros(4000), "c": torch.zeros(4000)})
    slot = hotglm.ModuleSlot(module, name="m", version="2.0.0", accept="major", migrations=migrations)
    receipt = slot.update(pair.delta)
    expected = {"a": pair.new["a"] * 2, "renamed": pair.new["b"], "c": pair.new["c"]}
    assert same_bits(state_of(slot), expected)
    assert receipt.origins.decoded_nbytes == 4000 * 4


def test_a_file_that_was_saved_with_metadata_keeps_it(tmp_path: Path) -> None:
    """What the headers of the result say about torch's own modules counts as if the full release had been opened."""
    old, new = draw_tensors(), change(draw_tensors(), "a")
    paths = []
    for number, tensors in ((1, old), (2, new)):
        directory = tmp_path / f"{number:09d}-1.0.{number}"
        directory.mkdir()
        hotglm.save_weights(tensors, directory / "model.safetensors", version=f"1.0.{number}", name="m")
        hotglm.pack(directory, sequence=number).close()
        paths.append(directory)
    delta = write_delta(paths[0], paths[1], tmp_path / "delta")
    slot = make_slot(old)
    slot.update(delta)
    assert same_bits(state_of(slot), new)


def test_progress_and_timings_cover_the_result(tmp_path: Path) -> None:
    """`load` counts the bytes of the result, however they come about."""
    pair, seen = Pair(tmp_path), list[Progress]()
    receipt = pair.slot.update(pair.delta, progress=seen.append)
    load = [one for one in seen if one.part == "load"]
    assert (load[-1].done_nbytes, load[-1].total_nbytes) == (3 * 4000 * 4,) * 2
    assert receipt.nbytes == 3 * 4000 * 4
    assert "made by deltas" in receipt.explain()


def test_no_third_copy_is_made(tmp_path: Path) -> None:
    """A delta takes the memory of the spare, as its plan says, and leaves no further copy behind (P9)."""
    pair = Pair(tmp_path, codec=XOR)
    before = pair.slot.status().arenas_nbytes
    with pair.slot.stage(pair.delta) as staged:
        assert staged.plan.nbytes == 3 * 16000
    pair.slot.update(pair.delta)
    assert pair.slot.status().arenas_nbytes <= max(before, 3 * 3 * 16000)


# -- refused -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(40, 40, bias=False)
        self.other = nn.Linear(40, 40, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use both."""
        output: torch.Tensor = self.other(self.one(x))
        return output


@pytest.mark.parametrize("codec", CODECS)
def test_a_tie_stays_one_or_is_a_conflict(codec: str, tmp_path: Path) -> None:
    """A delta to both names of a tied tensor keeps the tie; one to a single name is refused (C13)."""
    weight = torch.randn(40, 40)
    new = weight.clone()
    new[3, 3] += 1
    both = write_full(tmp_path / "s", 1, {"one.weight": weight, "other.weight": weight.clone()})
    good = write_full(tmp_path / "f", 2, {"one.weight": new, "other.weight": new.clone()})
    bad = write_full(tmp_path / "f", 3, {"one.weight": new, "other.weight": weight})
    codecs = {"one.weight": codec, "other.weight": codec}
    slot = hotglm.ModuleSlot(Tied(), name="m", version="1.0.0")
    slot.update(both)
    with pytest.raises(TensorValueError) as caught:
        slot.update(write_delta(both, bad, tmp_path / "s" / "000000003-1.0.3", codecs=codecs))
    assert caught.value.code == "TIE_CONFLICT"
    assert same_bits(slot.live.module.state_dict()["one.weight"], weight)
    slot.update(write_delta(both, good, tmp_path / "s" / "000000002-1.0.2", codecs=codecs))
    module: Any = slot.live.module
    assert module.one.weight is module.other.weight
    assert same_bits(module.one.weight.detach(), new)


def _flip(parts: dict[str, torch.Tensor]) -> None:
    parts["b:0"].view(torch.uint8).view(-1)[-1] ^= 1


def _flip_value(parts: dict[str, torch.Tensor]) -> None:
    parts["b:1"].view(torch.int32)[0] ^= 1


def _swap_gaps(parts: dict[str, torch.Tensor]) -> None:
    parts["b:0"][1] = 0


def _leave(parts: dict[str, torch.Tensor]) -> None:
    parts["b:0"][-1] = 255


def _bomb(parts: dict[str, torch.Tensor]) -> None:
    frame = zstd.compress(bytes(1 << 26))
    data = len(frame).to_bytes(4, "little") + frame
    parts["b:0"] = torch.tensor(list(data), dtype=torch.uint8)


def _truncate(parts: dict[str, torch.Tensor]) -> None:
    parts["b:0"] = parts["b:0"][:-2].clone()


def _widen(parts: dict[str, torch.Tensor]) -> None:
    parts["b:0"] = parts["b:0"].to(torch.int64)


SPOILED: dict[str, tuple[str, Any, str]] = {
    "flipped whole": ("whole", _flip, "DIGEST_MISMATCH"),
    "flipped xor": (XOR, _flip, "DELTA_*"),
    "flipped sparse value": (
        SPARSE,
        lambda parts: parts["b:1"].view(torch.int32)[0:1].bitwise_xor_(1),
        "DELTA_RESULT_MISMATCH",
    ),
    "duplicate index": (SPARSE, _swap_gaps, "DELTA_BAD_INDEX"),
    "index outside": (SPARSE, _leave, "DELTA_*"),
    "wide index": (SPARSE, _widen, "DELTA_BAD_INDEX"),
    "bomb": (XOR, _bomb, "DELTA_*"),
    "truncated stream": (XOR, _truncate, "DELTA_BAD_PAYLOAD"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_payload_is_refused_and_nothing_changes(case: str, tmp_path: Path) -> None:
    """What a payload makes is not what was promised, or it makes nothing: the tensor is named (C03, C06, C10)."""
    codec, spoil, code = SPOILED[case]
    pair = Pair(tmp_path, codec=codec, spoil=spoil)
    before, number = state_of(pair.slot), pair.slot.live.number
    with pytest.raises((DeltaError, DigestMismatchError)) as caught:
        pair.slot.update(pair.delta)
    assert caught.value.code == code or (code == "DELTA_*" and caught.value.code.startswith("DELTA_"))
    assert caught.value.tensor == "b"
    assert caught.value.receipt is not None
    assert pair.slot.live.number == number
    assert same_bits(state_of(pair.slot), before)
    pair.slot.update(pair.full)
    assert same_bits(state_of(pair.slot), pair.new)


def test_a_corrupt_payload_leaves_a_busy_service_alone(tmp_path: Path) -> None:
    """All of the universal post-conditions hold when a payload is broken, and when its base is missing."""
    with World(tmp_path) as world:
        old, new = make_state(12), {**make_state(12), "layers.1.weight": torch.full((8, 8), 0.5)}
        base = write_full(tmp_path / "s", 90, old, name="chain")
        full = write_full(tmp_path / "f", 91, new, name="chain")

        def spoil(parts: dict[str, torch.Tensor]) -> None:
            parts["layers.1.weight:0"][-1] ^= 1

        broken = write_delta(base, full, tmp_path / "s" / "91-b", codecs={"layers.1.weight": XOR}, spoil=spoil)
        good = write_delta(base, full, tmp_path / "s" / "000000091-1.0.91", codecs={"layers.1.weight": XOR})
        world.publish(12)
        world.slot.update(base)
        with universal(world, DeltaError, version="1.0.91", tensor="layers.1.weight"):
            world.slot.update(broken)
        world.update()
        os.rename(base, tmp_path / "elsewhere")
        with universal(world, DeltaChainError, code="CHAIN_BASE_MISSING", version="1.0.91"):
            world.slot.update(good)


def poke(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of a tensor behind everybody's back."""
    at = (ctypes.c_uint8 * 1).from_address(tensor.data_ptr())
    at[0] ^= 1


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_live_memory_that_flipped_is_caught(name: str, is_sealed: bool, tmp_path: Path) -> None:
    """With a bit of the live version flipped, a delta is refused by the tensor's name, or made from files (C02)."""
    pair = Pair(tmp_path)
    if is_sealed:
        pair.slot.update(pair.base)
    live = state_of(pair.slot)[name]
    poke(live)
    moved = tmp_path / "moved"
    os.rename(pair.base, moved)
    with pytest.raises(DigestMismatchError) as caught:
        pair.slot.update(pair.delta)
    assert [problem.tensor for problem in caught.value.problems if problem.code == "LIVE_CHANGED"] == [name]
    assert "full release" in caught.value.remedy
    assert str(pair.slot.version) == "1.0.1"
    os.rename(moved, pair.base)
    receipt = pair.slot.update(pair.delta)
    assert receipt.origins.drifted == (name,)
    assert same_bits(state_of(pair.slot), pair.new)


def test_a_planted_copy_that_is_not_proved_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that trusts live memory would put the flipped bit into the next version: the test above sees that."""
    pair = Pair(tmp_path)
    monkeypatch.setattr(loader, "copy_sealed", lambda view, tensor, seal, **_: (view.copy_(tensor), seal)[1])
    poke(state_of(pair.slot)["a"])
    pair.slot.update(pair.delta)
    assert not same_bits(state_of(pair.slot), pair.new)


def test_a_base_that_is_not_there_is_refused_before_the_rollback_target_goes(tmp_path: Path) -> None:
    """Chains are followed before memory is given up: what cannot be applied costs nothing (P2, C01, C09)."""
    pair = Pair(tmp_path)
    pair.hide_base()
    slot = make_slot(draw_tensors(5), memory=hotglm.MemoryPolicy(small_nbytes=0))
    slot.update(draw_tensors(6), version="1.0.1")
    with pytest.raises(DeltaChainError) as caught:
        slot.update(pair.delta)
    assert caught.value.code == "CHAIN_BASE_MISSING"
    assert caught.value.receipt is not None
    assert [generation.state for generation in slot.status().generations] == ["live", "held"]
    shutil.copytree(pair.full, tmp_path / "s" / "000000001-1.0.1")
    with pytest.raises(WrongBaseError):
        slot.update(pair.delta)


def test_a_delta_for_another_tensor_is_refused(tmp_path: Path) -> None:
    """A base digest that no base has is a wrong base, named by the tensor (C01)."""

    def respell(deltas: dict[str, TensorDelta]) -> None:
        one = deltas["b"]
        deltas["b"] = TensorDelta(codec=one.codec, base=f"sha256:{'0' * 64}", parts=one.parts)

    pair = Pair(tmp_path, codec=SPARSE, respell=respell)
    with pytest.raises(WrongBaseError) as caught:
        pair.slot.update(pair.delta)
    assert caught.value.tensor == "b"
    assert same_bits(state_of(pair.slot), pair.old)


def test_without_the_extra_a_delta_that_needs_it_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where zstd is not installed a sparse delta works, and a compressed one says what to install."""
    compressed, sparse = Pair(tmp_path / "x", codec=XOR), Pair(tmp_path / "y", codec=SPARSE)
    monkeypatch.setattr(zstd, "_find_zstd", lambda: None)
    with pytest.raises(MissingExtraError, match=r"hotglm\[delta\]"):
        compressed.slot.update(compressed.delta)
    assert same_bits(state_of(compressed.slot), compressed.old)
    sparse.slot.update(sparse.delta)
    assert same_bits(state_of(sparse.slot), sparse.new)


def test_every_failing_call_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Each read, open and thread of a stage of a delta fails once: typed, nothing leaked, the next one works."""
    pair = Pair(tmp_path, codec=XOR)
    slot = make_slot(draw_tensors(5))
    before = set(os.listdir("/proc/self/fd"))
    for kind in ("preadv", "pread", "open"):
        number, failed = 0, True
        while failed:
            number += 1
            failed = _fails_at(slot, pair.delta, kind, number)
        assert number > 1
    assert set(os.listdir("/proc/self/fd")) == before
    assert same_bits(state_of(slot), pair.new)


def _fails_at(slot: hotglm.ModuleSlot, path: Path, kind: str, number: int) -> bool:
    before = state_of(slot)
    hit: list[int] = []

    def fail(found: str, count: int, *_: object) -> None:
        if (found, count) == (kind, number):
            hit.append(count)
            raise OSError(5, "Input/output error")

    with hooked(fail):
        try:
            slot.stage(path).discard() if hit else slot.update(path, policy=hotglm.StagePolicy(reuse=False))
        except HotglmError as error:
            assert isinstance(error, SourceReadError)  # noqa: PT017
            assert same_bits(state_of(slot), before)
    return bool(hit)


def test_a_stage_that_is_superseded_stops_while_it_decodes(tmp_path: Path) -> None:
    """A newer stage ends one that is reading its payload; the newer one has its turn, and nothing is torn (C14)."""
    pair = Pair(tmp_path, codec=XOR)
    reached, go = threading.Event(), threading.Event()

    def hold(kind: str, *_: object) -> None:
        if kind == "preadv" and not reached.is_set():
            reached.set()
            assert go.wait(10)

    outcomes: list[str] = []

    def stage() -> None:
        try:
            pair.slot.stage(pair.delta)
        except SupersededError as error:
            outcomes.append(error.code)

    with hooked(hold):
        thread = threading.Thread(target=stage)
        thread.start()
        assert reached.wait(10)
        newer = threading.Thread(target=pair.slot.update, args=(pair.full,))
        newer.start()
        assert wait_until(lambda: not pair.slot._core.stager._supersedable)  # the newer one has cancelled the older
        go.set()
        thread.join(10)
        newer.join(10)
    assert outcomes == ["SUPERSEDED"]
    assert same_bits(state_of(pair.slot), pair.new)


def test_the_delta_and_the_full_release_of_one_version_are_the_same(tmp_path: Path) -> None:
    """Both forms of a version arrive at once from two threads: both leave the same digest live (C14)."""
    pair = Pair(tmp_path)
    receipts: list[hotglm.Receipt] = []
    threads = [
        threading.Thread(target=lambda path=path: receipts.append(pair.slot.update(path)))
        for path in (pair.delta, pair.full)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({receipt.digest for receipt in receipts}) == 1
    assert min(receipt.origins.decoded_nbytes for receipt in receipts) == 0
    assert same_bits(state_of(pair.slot), pair.new)


def test_a_rollback_during_the_load_tears_nothing(tmp_path: Path) -> None:
    """A stage holds the generation it copies from, also when that stops being live meanwhile."""
    pair = Pair(tmp_path)
    pair.slot.update(draw_tensors(9), version="1.0.1.post1")
    pair.slot.rollback()
    started = threading.Event()

    def roll(kind: str, *_: object) -> None:
        if kind == "preadv" and not started.is_set():
            started.set()
            pair.slot.rollback(1)

    with hooked(roll):
        staged = pair.slot.stage(pair.delta)
    assert started.is_set()
    assert same_bits(dict(staged.module.state_dict()), pair.new)
    with pytest.raises(HotglmError):
        pair.slot.commit(staged)


def test_what_is_hashed_while_a_commit_in_place_writes_it_is_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: a digest of one version and a fingerprint of another are not kept together, whatever was written between."""
    pair = Pair(tmp_path, codec="whole")
    slot = make_slot(draw_tensors(9), swap=hotglm.InPlace())
    slot.update(pair.old, version="1.0.1")
    slot.rollback(1)

    def seal_between(tensor: torch.Tensor, **options: Any) -> Seal:
        slot.rollback(2)
        digest = seal_tensor(tensor, **options).digest
        slot.rollback(1)
        return replace(seal_tensor(tensor, **options), digest=digest)

    monkeypatch.setattr("hotglm.slot.live.seal_tensor", seal_between)
    slot.update(pair.delta, policy=hotglm.StagePolicy(num_threads=1))
    assert same_bits(state_of(slot), pair.new)
