"""The writer of safetensors files: what any reader sees in them, what it refuses to write, and where it writes."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hotglm
from hotglm.errors import ArgumentError, HeaderError
from hotglm.header import TensorEntry, format_header, parse_header
from hotglm.weights.dtypes import LOADABLE_DTYPES
from support.bytes_maker import split_file
from support.swaps import same_bits


@pytest.fixture
def umask() -> Iterator[int]:
    """A umask that shows, put back afterwards."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


# -- what is in the file -----------------------------------------------------------------------------------------------


def make_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of any dtype whose bytes are 0 and 1, which every dtype can hold."""
    nbytes = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    return torch.randint(2, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def test_every_dtype_is_read_back_by_the_reference_reader(tmp_path: Path) -> None:
    """Tensors of every dtype and shape come back from safetensors' own reader bit for bit, each aligned to its size."""
    tensors = {f"{dtype}.{n}": make_tensor(dtype, n, 3) for dtype in LOADABLE_DTYPES for n in (0, 1, 5)}
    tensors |= {f"{dtype}.scalar": make_tensor(dtype) for dtype in LOADABLE_DTYPES}
    path = tmp_path / "w.safetensors"
    hotglm.save_weights(tensors, path)
    assert same_bits(load_file(path), tensors)
    text, data = split_file(path.read_bytes())
    header = parse_header(text, file_size=path.stat().st_size)
    assert header.data_start % 8 == 0
    for name, entry in header.tensors.items():
        tensor = tensors[name]
        assert entry.start % tensor.element_size() == 0
        assert data[entry.start : entry.stop] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_the_bytes_are_those_of_the_reference_writer(tmp_path: Path) -> None:
    """The data section is the one that safetensors writes of the same tensors, in the same order."""
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(5), "i": torch.arange(3), "h": torch.randn(3).half()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    hotglm.save_weights(tensors, ours)
    save_file(tensors, theirs)
    assert split_file(ours.read_bytes())[1] == split_file(theirs.read_bytes())[1]


def test_a_mapping_keeps_every_name_of_a_tied_tensor(tmp_path: Path) -> None:
    """Two names of one tensor in a mapping are two tensors in the file, and load into a module that ties them."""
    weight = torch.randn(2, 2)
    path = tmp_path / "w.safetensors"
    assert set(hotglm.save_weights({"a.weight": weight, "b.weight": weight}, path)) == {"a.weight", "b.weight"}
    assert same_bits(load_file(path), {"a.weight": weight, "b.weight": weight})
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    slot = hotglm.ModuleSlot(module, name="tied", version="1.0.0")
    slot.update(path, version="1.0.1")
    assert same_bits(dict(slot.state_dict()), {"a.weight": weight, "b.weight": weight})


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    """An empty mapping is a file that any reader opens."""
    path = tmp_path / "w.safetensors"
    assert hotglm.save_weights({}, path) == {}
    assert load_file(path) == {}


def test_a_header_is_what_was_asked_for() -> None:
    """`parse_header` gives back what `format_header` was given, whatever the names and metadata say."""
    entries = [
        TensorEntry(name='quo"te\\', dtype="F32", shape=(2, 3), start=0, stop=24),
        TensorEntry(name="gewicht-\u00e9\u4e2d\U0001f600", dtype="U8", shape=(), start=24, stop=25),
    ]
    metadata = {"k\n": "v\x1b", "": "\u4e2d"}
    text = format_header(entries, metadata)
    header = parse_header(text, file_size=8 + len(text) + 25)
    assert (list(header.tensors.values()), dict(header.metadata), (8 + len(text)) % 64) == (entries, metadata, 0)


# -- what is not written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["__metadata__", "", "a\nb", "\x1b[31m", "\u202e", "../w", "x" * 1025, "\ud800"], ids=ascii
)
def test_a_name_that_reading_refuses_is_not_written(name: str, tmp_path: Path) -> None:
    """What a stage would refuse is refused before a file is made, and never printed raw."""
    with pytest.raises(HeaderError) as caught:
        hotglm.save_weights({"w": torch.ones(1), name: torch.ones(2)}, tmp_path / "w.safetensors")
    assert str(caught.value).replace("\n", "").isprintable()
    assert os.listdir(tmp_path) == []


def test_all_that_is_no_saveable_tensor_is_named(tmp_path: Path) -> None:
    """Values that are no dense CPU tensors, their dtypes and their names are refused together."""
    source: dict[Any, Any] = {
        "good": torch.ones(1),
        "number": 1.0,
        "sparse": torch.ones(2, 2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex128),
        "lazy": nn.UninitializedParameter(),
        3: torch.ones(1),
    }
    with pytest.raises(ArgumentError) as caught:
        hotglm.save_weights(source, tmp_path / "w.safetensors")
    assert {problem.tensor for problem in caught.value.problems} == {*source, None} - {"good", 3}
    assert len(caught.value.problems) == 6
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("source", [None, [torch.ones(1)], "w.safetensors"])
def test_what_is_no_source_is_an_argument_error(source: Any, tmp_path: Path) -> None:
    """Only modules and mappings are saved."""
    with pytest.raises(ArgumentError):
        hotglm.save_weights(source, tmp_path / "w.safetensors")


def _deep() -> object:
    value: list[object] = []
    for _ in range(2000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), torch.float32, {1, 2}, object(), b"x", {1: "a", "1": "b"}, _deep()],
    ids=["nan", "infinity", "dtype", "set", "object", "bytes", "key twice", "deep"],
)
def test_a_config_that_json_cannot_hold_is_refused_by_field(value: object, tmp_path: Path) -> None:
    """A field that staging could not read back is named, with every other such field, and no file is made."""
    with pytest.raises(ArgumentError) as caught:
        hotglm.save_weights(
            {"w": torch.ones(1)}, tmp_path / "w.safetensors", config={"width": 3, "odd": value, "other": float("nan")}
        )
    assert ["'odd'" in p.message or "'other'" in p.message for p in caught.value.problems] == [True, True]
    assert "width" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_modules_own_config_is_judged_too(tmp_path: Path) -> None:
    """The dataclass that a module keeps as `config` is refused by field where JSON cannot hold it."""

    @dataclass
    class Config:
        width: int = 1
        dtype: torch.dtype = field(default=torch.float32)

    module = nn.Linear(1, 1)
    module.config = Config()  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="'dtype'"):
        hotglm.save_weights(module, tmp_path / "w.safetensors")
    hotglm.save_weights(module, tmp_path / "w.safetensors", config={"width": 1})


@pytest.mark.parametrize("requires", ["torch>=2", ["torch>="], [3], [f"p{n}" for n in range(257)]])
def test_requirements_that_cannot_be_judged_are_refused(requires: Any, tmp_path: Path) -> None:
    """A requirement that would refuse the file everywhere is not written into it."""
    with pytest.raises(ArgumentError):
        hotglm.save_weights({"w": torch.ones(1)}, tmp_path / "w.safetensors", requires=requires)
    assert os.listdir(tmp_path) == []


def test_a_config_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """A config above the cap of reading is not written."""
    with pytest.raises(ArgumentError) as caught:
        hotglm.save_weights({"w": torch.ones(1)}, tmp_path / "w.safetensors", config={"text": "x" * (4 << 20)})
    assert caught.value.code == "CONFIG_TOO_LARGE"


# -- where it is written -----------------------------------------------------------------------------------------------


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    """A file that was not there is made like any other."""
    path = tmp_path / "w.safetensors"
    hotglm.save_weights({"w": torch.ones(1)}, path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_the_mode_of_a_file_that_is_there_is_kept(
    mode: int, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may read the old file may read the new one, and nobody else at any moment."""
    path = tmp_path / "w.safetensors"
    hotglm.save_weights({"w": torch.zeros(1)}, path)
    path.chmod(mode)
    seen: list[int] = []
    write: Callable[[int, memoryview], int] = os.write

    def spy(fd: int, data: memoryview) -> int:
        seen.append(os.fstat(fd).st_mode & 0o777)
        return write(fd, data)

    monkeypatch.setattr(os, "write", spy)
    hotglm.save_weights({"w": torch.ones(1)}, path)
    assert {*seen, path.stat().st_mode & 0o777} == {mode}


def test_a_link_is_followed(tmp_path: Path) -> None:
    """Saving to a link replaces the file it leads to, beside that file, and leaves the link."""
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "w.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    for value in (1.0, 2.0):  # dangling at first
        hotglm.save_weights({"w": torch.full((1,), value)}, link)
        assert link.is_symlink()
        assert load_file(target)["w"].item() == value
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("kind", ["directory", "fifo", "circle", "no directory"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """A directory, a FIFO and a circle of links are an OSError and stay what they are."""
    path = tmp_path / "w.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path = path / "w"
    before = os.listdir(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)):
        hotglm.save_weights({"w": torch.ones(1)}, path)
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("path", [3, "", "a\0b", "\ud800"], ids=ascii)
def test_what_is_no_path_is_an_argument_error(path: Any) -> None:
    """A path that no file system can hold is refused as what it is."""
    with pytest.raises(ArgumentError):
        hotglm.save_weights({"w": torch.ones(1)}, path)


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    """The temporary name does not grow with the target's."""
    path = tmp_path / ("w" * 255)
    hotglm.save_weights({"w": torch.ones(1)}, path)
    with safe_open(str(path), framework="pt") as file:
        assert list(file.keys()) == ["w"]


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes a few bytes at a time gets all of them; one that takes none is an error."""
    write: Callable[[int, memoryview], int] = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    path = tmp_path / "w.safetensors"
    tensor = torch.randn(100)
    hotglm.save_weights({"w": tensor}, path)
    assert same_bits(load_file(path)["w"], tensor)
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="Nothing was written") as caught:
        hotglm.save_weights({"w": torch.ones(1)}, path)
    assert caught.value.errno == errno.EIO
    assert same_bits(load_file(path)["w"], tensor)


def test_tensors_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the system is the tensor's own memory."""
    tensor = torch.ones(1000)
    addresses: list[int] = []
    write: Callable[[int, memoryview], int] = os.write

    def spy(fd: int, data: memoryview) -> int:
        if len(data) == 4000:
            tensor.fill_(2.0)  # seen through the view
            addresses.append(struct.unpack_from("<f", data)[0])
        return write(fd, data)

    monkeypatch.setattr(os, "write", spy)
    hotglm.save_weights({"w": tensor}, tmp_path / "w.safetensors")
    assert addresses == [2.0]


# -- shards written one by one -----------------------------------------------------------------------------------------


def test_shards_saved_one_by_one_are_one_release(tmp_path: Path) -> None:
    """Shards that `save_weights` wrote need only an index; the digests of all are verified."""
    state = {name: tensor.clone() for name, tensor in nn.Linear(3, 2).state_dict().items()}
    digests: dict[str, str] = {}
    for name, tensor in state.items():
        path = tmp_path / f"{name}.safetensors"
        digests |= hotglm.save_weights({name: tensor}, path, version="1.0.1", name="m", config={"width": 2})
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    slot = hotglm.ModuleSlot(nn.Linear(3, 2), name="m", version="1.0.0")
    receipt = slot.update(tmp_path)
    assert (str(receipt.new_version), dict(receipt.digests)) == ("1.0.1", digests)
    assert same_bits(dict(slot.state_dict()), state)

    path = tmp_path / "bias.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(hotglm.DigestMismatchError):
        slot.update(tmp_path)
    hotglm.save_weights({"bias": state["bias"]}, path, version="1.0.2", name="m", config={"width": 2})
    with pytest.raises(hotglm.ShardIndexError) as caught:
        slot.update(tmp_path)
    assert caught.value.code == "METADATA_CONFLICT"
    assert same_bits(dict(slot.state_dict()), state)
