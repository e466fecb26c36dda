"""Full sources with digests: what is live already is copied and not read, and never taken for what it is not."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm import Progress
from hotglm.errors import DigestMismatchError, TensorValueError
from hotglm.slot import live as live_module
from hotglm.slot.generation import Generation
from hotglm.testing.seams import hooked
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.seals import Seal
from support.delta_releases import write_full
from support.swaps import same_bits, same_state
from support.universal import Chain, World, make_state, universal

NBYTES = 3 * (8 * 8 + 8) * 4
LAYER = (8 * 8 + 8) * 4


def poke(tensor: torch.Tensor, *, byte: int = 0) -> None:
    """Flip a bit of a tensor behind everybody's back."""
    at = (ctypes.c_uint8 * 1).from_address(tensor.data_ptr() + byte)
    at[0] ^= 1


def state(*numbers: int) -> dict[str, torch.Tensor]:
    """Return weights of a `Chain` whose layers are those of the given versions."""
    found: dict[str, torch.Tensor] = {}
    for layer, number in enumerate(numbers):
        made = make_state(number)
        found |= {name: tensor for name, tensor in made.items() if name.startswith(f"layers.{layer}.")}
    return found


def make_slot(**options: Any) -> hotglm.ModuleSlot:
    """Return a slot around a `Chain` of version 0."""
    return hotglm.ModuleSlot(Chain(), name="m", version="1.0.0", **options)


def cold(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return what a process that never swapped has."""
    module = Chain()
    module.load_state_dict(dict(tensors))
    return module


@pytest.mark.parametrize("kind", ["release", "file"])
def test_only_what_differs_is_read(kind: str, tmp_path: Path) -> None:
    """Of a release, or a file with digests, one layer of which is new, that layer is read and the rest copied (P12)."""
    slot = make_slot()
    versions = [state(1, 1, 1), state(1, 2, 1), state(3, 2, 1)]
    receipts = []
    for number, tensors in enumerate(versions, start=1):
        path = write_full(tmp_path, number, tensors)
        if kind == "file":
            path = tmp_path / f"{number}.safetensors"
            hotglm.save_weights(tensors, path, version=f"1.0.{number}")
        receipts.append(slot.update(path))
        assert same_state(slot.live.module, cold(tensors))
    found = [(one.origins.read_nbytes, one.origins.copied_nbytes) for one in receipts]
    assert found == [(NBYTES, 0), (LAYER, NBYTES - LAYER), (LAYER, NBYTES - LAYER)]
    assert [one.nbytes for one in receipts] == [NBYTES] * 3
    assert "copied from the live version" in receipts[1].explain()
    assert receipts[1].to_dict()["origins"]["copied_nbytes"] == NBYTES - LAYER


def test_a_copied_version_is_the_cold_one(tmp_path: Path) -> None:
    """Digests, of tensors and of the whole, are those of a load that read everything."""
    slot, path = make_slot(), write_full(tmp_path, 1, state(1, 1, 1))
    slot.update(path)
    warm = slot.update(write_full(tmp_path, 2, state(1, 2, 1)))
    read = make_slot().update(tmp_path / "000000002-1.0.2")
    assert warm.origins != read.origins
    assert (warm.digest, warm.digests) == (read.digest, read.digests)


def test_reuse_can_be_turned_off(tmp_path: Path) -> None:
    """With `reuse=False` every byte of a source is read."""
    slot = make_slot(policy=hotglm.StagePolicy(reuse=False))
    for number in (1, 2):
        receipt = slot.update(write_full(tmp_path, number, state(1, 1, 1)))
        assert (receipt.origins.read_nbytes, receipt.origins.copied_nbytes) == (NBYTES, 0)


@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_a_live_tensor_that_was_written_is_read_again(has_fingerprint: bool, tmp_path: Path) -> None:
    """A flipped bit in the live version does not go into the next one: the tensor is read, and the receipt names it."""
    slot = make_slot()
    slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    if has_fingerprint:
        slot.update(write_full(tmp_path, 2, state(1, 1, 1)))
    poke(slot.live.module.state_dict()["layers.1.weight"], byte=5)
    receipt = slot.update(write_full(tmp_path, 3, state(1, 1, 2)))
    assert receipt.origins.drifted == ("layers.1.weight",)
    assert receipt.origins.read_nbytes == LAYER + 8 * 8 * 4
    assert "'layers.1.weight'" in receipt.explain()
    assert same_state(slot.live.module, cold(state(1, 1, 2)))


def test_fingerprints_are_kept_by_what_was_copied(tmp_path: Path) -> None:
    """The first reuse of a tensor hashes it; from then on, and after a rollback, a fingerprint is enough."""
    slot = make_slot()
    slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    assert slot.live.seals == {}
    first = slot.live
    slot.stage(write_full(tmp_path, 2, state(1, 2, 1))).discard()
    assert {name for name, seal in first.seals.items() if seal.fingerprint is not None} == set(state(1)) | {
        "layers.2.weight",
        "layers.2.bias",
    }
    slot.update(write_full(tmp_path, 3, state(1, 2, 3)))
    assert {name for name, seal in slot.live.seals.items() if seal.fingerprint is not None} == set(state(1, 2, 3))
    assert all(seal.digest == slot.live.digests[name] for name, seal in slot.live.seals.items())


@pytest.mark.parametrize("is_poked", [False, True])
def test_what_the_spare_still_has_is_left_there(is_poked: bool, tmp_path: Path) -> None:
    """Tensors that an earlier version left in the spare are proved there, and brought again if they flipped."""
    slot = make_slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    versions, receipts = [state(1, 1, 1), state(2, 1, 1), state(3, 1, 1), state(4, 1, 2)], []
    for number, tensors in enumerate(versions, start=1):
        if number == 4 and is_poked:
            poke(slot._core.admission.live.held[0].module.state_dict()["layers.1.weight"])
        receipts.append(slot.update(write_full(tmp_path, number, tensors)))
        assert same_state(slot.live.module, cold(tensors))
    origins, poked = receipts[-1].origins, 8 * 8 * 4 if is_poked else 0
    assert (origins.read_nbytes, origins.copied_nbytes, origins.found_nbytes) == (2 * LAYER, poked, LAYER - poked)
    assert origins.drifted == ()
    assert "found in the spare" in receipts[-1].explain()


def test_nothing_that_is_known_is_hashed_or_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a release of which one tensor is new, that one is read and hashed, and no other."""
    slot = make_slot()
    for number in (1, 2):
        slot.update(write_full(tmp_path, number, state(1, 1, number)))
    new = {**state(1, 1, 2), "layers.2.bias": torch.ones(8)}
    write_full(tmp_path, 3, new)
    monkeypatch.setattr("hotglm.weights.seals.digest_tensor", None)
    num_reads = 0

    def count(kind: str, *_: object) -> None:
        nonlocal num_reads
        num_reads += kind == "preadv"

    with hooked(count):
        receipt = slot.update(tmp_path / "000000003-1.0.3")
    assert num_reads == 1
    assert (receipt.origins.read_nbytes, receipt.origins.copied_nbytes) == (32, NBYTES - 32)


@pytest.mark.parametrize("where", ["live", "spare"])
@pytest.mark.parametrize("kind", ["release", "file"])
def test_what_brings_nothing_new_is_read_whole(kind: str, where: str, tmp_path: Path) -> None:
    """A source that promises what is in memory already is read and hashed, so that damage in it is found."""
    slot = make_slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    paths = []
    for number in (1, 2):
        release = write_full(tmp_path, number, state(number, number, number))
        file = tmp_path / f"{number}.safetensors"
        hotglm.save_weights(state(number, number, number), file, version=f"1.0.{number}")
        paths.append((release, next(release.glob("*.safetensors"))) if kind == "release" else (file, file))
        slot.update(release)
    if where == "spare":
        slot.rollback()
    path, file = paths[1]
    receipt = slot.update(path)
    assert receipt.origins.read_nbytes == NBYTES
    if where == "spare":
        slot.rollback()
    content = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DigestMismatchError):
        slot.update(path)
    number = 2 if where == "live" else 1
    assert same_state(slot.live.module, cold(state(number, number, number)))


def test_digests_of_the_caller_are_held_against_the_source(tmp_path: Path) -> None:
    """Digests that are passed, and that the live version has, do not make it stand for a file that has others."""
    slot = make_slot()
    slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    live = dict(slot.live.digests)
    hotglm.save_weights(state(2, 2, 2), tmp_path / "w.safetensors")
    with pytest.raises(DigestMismatchError):
        slot.update(tmp_path / "w.safetensors", version="1.0.2", digests=live)
    with pytest.raises(DigestMismatchError):
        slot.update(write_full(tmp_path, 3, state(2, 2, 2)), digests=live)
    assert same_state(slot.live.module, cold(state(1, 1, 1)))


def test_digests_of_the_caller_do_not_bring_back_what_the_spare_has(tmp_path: Path) -> None:
    """A file without digests of its own is read, whatever the caller's digests say and the spare still has."""
    slot = make_slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    for number, tensors in enumerate([state(1, 1, 1), state(2, 1, 1), state(3, 1, 1)], start=1):
        slot.update(write_full(tmp_path, number, tensors))
    spare = dict(slot._core.admission.live.held[0].digests)  # and nothing that would keep its arena
    save_file(state(9, 9, 9), tmp_path / "plain.safetensors")
    with pytest.raises(DigestMismatchError):
        slot.update(tmp_path / "plain.safetensors", version="1.0.4", digests=spare)
    assert same_state(slot.live.module, cold(state(3, 1, 1)))


def test_progress_counts_what_is_copied_too(tmp_path: Path) -> None:
    """`load` ends at the size of all tensors, wherever they came from."""
    slot, seen = make_slot(), list[Progress]()
    slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    slot.update(write_full(tmp_path, 2, state(1, 2, 1)), progress=seen.append)
    load = [one for one in seen if one.part == "load"]
    assert (load[-1].done_nbytes, load[-1].total_nbytes) == (NBYTES, NBYTES)
    assert [one.done_nbytes for one in load] == sorted(one.done_nbytes for one in load)


class Tied(nn.Module):
    """Two names of one weight, a buffer that a refresh derives, and one that passes write."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("total", torch.zeros(4))

    @hotglm.refresh("scale")
    def derive(self) -> None:
        """Make `scale` out of the weights."""
        self.get_buffer("scale").copy_(self.embed.weight.detach().sum(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed and come back."""
        output: torch.Tensor = self.head(self.embed(ids) * self.scale)
        return output


def test_ties_are_copied_once_under_whatever_name(tmp_path: Path) -> None:
    """What was loaded under one name of a tie is known under the others, and a tie stays one (C13)."""
    torch.manual_seed(0)
    slot = hotglm.ModuleSlot(Tied(), name="m", version="1.0.0")
    weight, total = torch.randn(6, 4), torch.arange(4.0)
    rest = {"scale": weight.sum(0), "total": total}
    slot.update(write_full(tmp_path, 1, {"embed.weight": weight, **rest}))
    both = {"embed.weight": weight, "head.weight": weight.clone()}
    second = slot.update(write_full(tmp_path, 2, {"head.weight": weight, **rest, "total": total + 1}))
    third = slot.update(write_full(tmp_path, 3, {**both, **rest}))
    for receipt in (second, third):
        assert receipt.origins.read_nbytes == 4 * 4
        assert receipt.origins.copied_nbytes == (6 * 4 + 4) * 4
    assert set(third.digests) == {*both, *rest}
    module: Any = slot.live.module
    assert module.head.weight is module.embed.weight
    with pytest.raises(TensorValueError) as caught:
        slot.update(write_full(tmp_path, 4, {**both, **rest, "head.weight": weight + 1}))
    assert caught.value.code == "TIE_CONFLICT"
    assert same_bits(slot.live.module.state_dict()["embed.weight"], weight)


def test_state_that_was_derived_is_derived_again(tmp_path: Path) -> None:
    """A buffer that a refresh wrote has another digest than its source promised: it is read and derived anew."""
    slot = hotglm.ModuleSlot(Tied(), name="m", version="1.0.0")
    weight = torch.randn(6, 4)
    stale = {"embed.weight": weight, "scale": torch.zeros(4), "total": torch.zeros(4)}
    slot.update(write_full(tmp_path, 1, stale))
    receipt = slot.update(write_full(tmp_path, 2, stale))
    assert receipt.origins.read_nbytes == 16  # only `scale`
    assert same_bits(slot.live.module.state_dict()["scale"], weight.sum(0))
    assert "scale" not in slot.live.seals


def test_a_buffer_that_passes_write_is_read(tmp_path: Path) -> None:
    """State that the service itself has changed since it was loaded is that of the source again after an update."""
    slot = hotglm.ModuleSlot(Tied(), name="m", version="1.0.0")
    weight = torch.randn(6, 4)
    tensors = {"embed.weight": weight, "scale": weight.sum(0), "total": torch.zeros(4)}
    slot.update(write_full(tmp_path, 1, tensors))
    with torch.no_grad():
        slot.live.module.get_buffer("total").add_(3)
    tensors |= {"embed.weight": weight + 1, "scale": (weight + 1).sum(0)}
    receipt = slot.update(write_full(tmp_path, 2, tensors))
    assert receipt.origins.drifted == ("total",)
    assert same_bits(slot.live.module.state_dict()["total"], torch.zeros(4))


def test_another_dtype_is_not_reused(tmp_path: Path) -> None:
    """Weights that are converted on their way are read: what is live has other bytes than the source."""
    slot = hotglm.ModuleSlot(Chain(), name="m", version="1.0.0", policy=hotglm.StagePolicy(convert_dtypes=True))
    half = {name: tensor.half() for name, tensor in state(1, 1, 1).items()}
    for number in (1, 2):
        receipt = slot.update(write_full(tmp_path, number, half))
        assert (receipt.origins.read_nbytes, receipt.origins.copied_nbytes) == (NBYTES // 2, 0)
    assert same_state(slot.live.module, cold(state(1, 1, 1)))


def test_channels_last_weights_are_reused(tmp_path: Path) -> None:
    """Tensors whose memory is not in row-major order are copied as they lie."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    slot, source = hotglm.ModuleSlot(make(), name="m", version="1.0.0"), make().state_dict()
    receipts = []
    for number in (1, 2, 3):
        source["0.bias"] = torch.full((4,), float(number))
        receipts.append(slot.update(write_full(tmp_path, number, source)))
    assert [one.origins.read_nbytes for one in receipts] == [sum(t.nbytes for t in source.values()), 16, 16]
    assert same_bits(dict(slot.live.module.state_dict()), dict(source))


def test_a_module_that_came_by_itself_is_not_hashed_for_a_full_source(tmp_path: Path) -> None:
    """Nobody has proved what the slot was given, so that a full source is read."""
    slot = hotglm.ModuleSlot(cold(state(1, 1, 1)), name="m", version="1.0.0")
    receipt = slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    assert (receipt.origins.read_nbytes, receipt.origins.copied_nbytes) == (NBYTES, 0)


def test_infinity_that_is_live_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    """Tensors that were staged without a search for NaN are searched when they are reused with one."""
    slot, bad = make_slot(), state(1, 1, 1)
    bad["layers.0.bias"] = torch.full((8,), float("inf"))
    for number in (1, 2):
        slot.update(write_full(tmp_path, number, bad), policy=hotglm.StagePolicy(finite=False))
    with pytest.raises(hotglm.NonFiniteError):
        slot.update(write_full(tmp_path, 3, bad))


def test_a_copy_into_a_spare_that_was_refused_leaves_the_live_version(tmp_path: Path) -> None:
    """A release half of which is live and half of which is broken is refused, and everything is as it was."""
    with World(tmp_path) as world:
        good = write_full(tmp_path / "r", 90, make_state(6), name="chain")
        world.publish(6)
        world.slot.update(good)
        torn = write_full(tmp_path / "r", 91, {**make_state(6), "layers.1.weight": torch.ones(8, 8)}, name="chain")
        file = torn / "model.safetensors"
        data = bytearray(file.read_bytes())
        at = data.index(bytes(tensor_bytes(torch.ones(8)).tolist()))
        data[at + 3] ^= 1
        file.write_bytes(bytes(data))
        with universal(world, DigestMismatchError, code="DIGEST_MISMATCH", version="1.0.91", tensor="layers.1.weight"):
            world.slot.update(torn)


def test_what_is_known_of_what_is_live_may_grow_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that adds fingerprints beside a stage disturbs neither."""
    slot = make_slot()
    slot.update(write_full(tmp_path, 1, state(1, 1, 1)))
    slot.update(write_full(tmp_path, 2, state(1, 1, 2)))
    live, first = slot.live, live_module._first

    def add(generation: Generation, name: str) -> str:
        generation.seals[f"{name}{len(generation.seals)}"] = Seal(digest="")
        return first(generation, name)

    assert live.seals
    monkeypatch.setattr(live_module, "_first", add)
    assert live_module.find_kept(live, live.contract).keys() == state(1, 1, 2).keys()
