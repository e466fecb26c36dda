"""Saving weights: the file appears whole, says what it is, and any change to it is found when it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hotglm
from hotglm.errors import ArgumentError, DigestMismatchError, HotglmError, VersionSyntaxError
from hotglm.weights.digest import digest_tensor
from support.swaps import build, same_bits

X = torch.ones(1, 2)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


class Tied(nn.Module):
    """Two names of one weight, a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("left", torch.ones(1, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)) * self.kept


def test_the_file_is_an_ordinary_one_and_says_what_it_is(tmp_path: Path) -> None:
    """Any safetensors reader gets the tensors; name, version, config, requirements and digests are in the metadata."""
    module = nn.Linear(2, 3)
    path = tmp_path / "model.safetensors"
    digests = hotglm.save_weights(
        module, path, version="1.2.0", name="ranker", config={"width": 3}, requires=["torch>=2"]
    )
    assert same_bits(load_file(path), dict(module.state_dict()))
    metadata = _metadata(path)
    assert (metadata["hotglm.name"], metadata["hotglm.version"]) == ("ranker", "1.2.0")
    assert json.loads(metadata["hotglm.config"]) == {"width": 3}
    assert json.loads(metadata["hotglm.requires"]) == ["torch>=2"]
    assert json.loads(metadata["hotglm.digests"]) == digests
    assert digests == {name: digest_tensor(tensor) for name, tensor in module.state_dict().items()}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """Without name, version or config none of them is in the file."""
    path = tmp_path / "model.safetensors"
    hotglm.save_weights({"w": torch.ones(2)}, path)
    assert set(_metadata(path)) == {"hotglm.digests", "hotglm.environment"}


def test_a_saved_file_updates_a_slot(tmp_path: Path) -> None:
    """Save, then update: that gives the module that was saved, its version and its digests."""
    maker = build(Tied)
    path = tmp_path / "model.safetensors"
    digests = hotglm.save_weights(maker(2), path, version="1.0.1", name="tied")
    slot = hotglm.ModuleSlot(maker(1), name="tied", version="1.0.0")
    receipt = slot.update(path)
    assert str(receipt.new_version) == "1.0.1"
    assert dict(receipt.digests) == digests
    assert same_bits(slot(X), maker(2)(X))


def test_a_tied_tensor_is_written_once_under_its_first_name(tmp_path: Path) -> None:
    """Aliases are left out, buffers that are not persistent too."""
    path = tmp_path / "model.safetensors"
    hotglm.save_weights(Tied(), path)
    assert set(load_file(path)) == {"first.weight", "kept"}


def test_a_slots_live_module_is_saved_like_any_other(tmp_path: Path) -> None:
    """Tensors in an arena, and a slot itself, are saved by value."""
    maker = build(lambda: nn.Linear(2, 2))
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    slot.update(maker(2).state_dict(), version="1.0.1")
    sources: list[nn.Module | dict[str, torch.Tensor]] = [slot, slot.live.module, dict(slot.state_dict())]
    for number, source in enumerate(sources):
        path = tmp_path / f"{number}.safetensors"
        hotglm.save_weights(source, path)
        assert same_bits(load_file(path), dict(maker(2).state_dict()))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1, 1).expand(2, 3),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(2, requires_grad=True),
        torch.empty(0, 3),
        torch.tensor(3.0),
    ],
    ids=["transposed", "expanded", "channels last", "conjugated", "negated", "tracked", "empty", "0-d"],
)
def test_any_dense_tensor_is_saved_by_value(tensor: torch.Tensor, tmp_path: Path) -> None:
    """Strides, lazy conjugation and gradients do not matter, and the digest is that of the values."""
    path = tmp_path / "model.safetensors"
    digests = hotglm.save_weights({"t": tensor}, path)
    again = load_file(path)["t"]
    assert torch.equal(again, tensor)
    assert digests["t"] == digest_tensor(again)


def test_overlapping_views_are_saved_each_by_value(tmp_path: Path) -> None:
    """Windows into one block are tensors of their own in the file."""
    block = torch.arange(6.0)
    path = tmp_path / "model.safetensors"
    hotglm.save_weights({"a": block[:4], "b": block[2:], "c": block[:4].reshape(2, 2)}, path)
    found = load_file(path)
    assert torch.equal(found["a"], block[:4])
    assert torch.equal(found["b"], block[2:])
    assert torch.equal(found["c"], block[:4].reshape(2, 2))


def test_a_dtype_that_the_format_lacks_is_a_typed_error(tmp_path: Path) -> None:
    """complex128 cannot be written; the tensor is named and no file appears."""
    with pytest.raises(ArgumentError) as caught:
        hotglm.save_weights(
            {"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m.safetensors"
        )
    assert caught.value.tensor == "z"
    assert os.listdir(tmp_path) == []


# -- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at any step of writing leaves `path` as it was, and no partial file beside it (P11)."""
    path = tmp_path / "model.safetensors"
    hotglm.save_weights({"w": torch.zeros(2)}, path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(OSError, match="No space"):
            hotglm.save_weights({"w": torch.ones(2)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is on the disk before the rename, and the rename before `save_weights` returns (P11)."""
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        steps.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        real_fsync(fd)

    def replace(source: str, target: str) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replace)
    hotglm.save_weights({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert steps == ["file", "rename", "directory"]


def test_a_bad_version_writes_nothing(tmp_path: Path) -> None:
    """A version that does not parse is refused before a file is made."""
    with pytest.raises(VersionSyntaxError):
        hotglm.save_weights({"w": torch.ones(2)}, tmp_path / "m.safetensors", version="next")
    assert os.listdir(tmp_path) == []


# -- any change is found -----------------------------------------------------------------------------------------------


def _small(seed: int) -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval())(seed)


def test_flipping_any_byte_of_the_payload_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    """Every byte flip of every tensor is a DIGEST_MISMATCH that names it, and the live version serves (A36)."""
    path = tmp_path / "model.safetensors"
    hotglm.save_weights(_small(2), path, version="1.0.1", name="model")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    slot = hotglm.ModuleSlot(_small(1), name="model", version="1.0.0")
    before = slot(X)
    for name, info in header.items():
        for offset in range(*info["data_offsets"]) if name != "__metadata__" else ():
            damaged = bytearray(whole)
            damaged[start + offset] ^= 1 << offset % 8
            path.write_bytes(damaged)
            with pytest.raises(DigestMismatchError) as caught:
                slot.update(path)
            assert (caught.value.code, caught.value.tensor) == ("DIGEST_MISMATCH", name)
    assert same_bits(slot(X), before)
    assert slot.live.number == 1
    path.write_bytes(whole)
    assert str(slot.update(path).new_version) == "1.0.1"


def test_flipping_bits_of_the_header_never_loads_anything_else(tmp_path: Path) -> None:
    """A flipped bit in the header is refused, or harms nothing: what is loaded has the digests of the saved file."""
    path = tmp_path / "model.safetensors"
    digests = hotglm.save_weights(_small(2), path, version="1.0.1", name="model")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    slot = hotglm.ModuleSlot(_small(1), name="model", version="1.0.0")
    num_loaded = 0
    made_in = range(whole.index(b"hotglm.environment"), whole.index(b"}}", whole.index(b"hotglm.environment")))
    for offset in range(0, start, 3):  # tests/test_header.py flips every bit of a header
        if offset in made_in:
            continue  # what nobody decides upon may say anything
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 7
        path.write_bytes(damaged)
        try:
            receipt = slot.update(path)
        except HotglmError:
            continue
        num_loaded += 1
        assert dict(receipt.digests) == digests, offset
    assert num_loaded < start // 20


def test_digests_from_elsewhere_are_verified_too(tmp_path: Path) -> None:
    """Digests passed to `update` (from a signed manifest, say) bind tensors of any source."""
    maker = build(lambda: nn.Linear(2, 2))
    digests = hotglm.save_weights(maker(2), tmp_path / "m.safetensors")
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    slot.update(maker(2).state_dict(), digests=digests)
    before = slot(X)
    with pytest.raises(DigestMismatchError):
        slot.update(maker(3).state_dict(), digests=digests)
    with pytest.raises(DigestMismatchError):
        slot.update(maker(2).state_dict(), digests={**digests, "other": "sha256:00"})
    assert same_bits(slot(X), before)
