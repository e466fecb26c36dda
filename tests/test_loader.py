"""Loading: what is in the files, or in a mapping, and nothing else, ends in the arena; what is wrong is all named."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotglm.errors import (
    DigestMismatchError,
    HotglmError,
    NonFiniteError,
    SourceChangedError,
    SourceReadError,
    SupersededError,
    TensorValueError,
)
from hotglm.release.files import WeightFiles, open_weights
from hotglm.testing.seams import hooked, read_one_byte
from hotglm.weights import loader
from hotglm.weights.dtypes import LOADABLE_DTYPES
from hotglm.weights.loader import load_files, load_tensors
from hotglm.weights.pace import AtWill
from hotglm.weights.plan import plan_reads
from hotglm.weights.proof import Loaded, LoadOptions
from hotglm.weights.workers import Cancellation
from support.bytes_maker import entry, make_file
from support.spares import Spare, random_tensor

NAN = float("nan")


def _all_dtypes() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype).removeprefix("torch."): random_tensor(dtype, 3, 5) for dtype in LOADABLE_DTYPES}
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "one byte": torch.ones(1, dtype=torch.uint8),
    }


def _load(path: Path, spare: Spare, **options: Any) -> Loaded:
    with open_weights(path) as files:
        return load_files(files, spare.targets, lease=spare.lease, options=LoadOptions(**options))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _codes(error: HotglmError) -> list[tuple[str, str | None]]:
    return [(problem.code, problem.tensor) for problem in error.problems]


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("chunk", [None, 7, 64])
def test_a_file_arrives_bit_for_bit(
    num_threads: int, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of every dtype arrives as it is in the file, and its digest is that of its byte range there."""
    if chunk is not None:
        planned = functools.partial(plan_reads, max_pieces=3)
        monkeypatch.setattr(AtWill, "chunk_nbytes", chunk)
        monkeypatch.setattr(loader, "plan_reads", planned)
    tensors = _all_dtypes()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    spare = Spare(tensors)
    loaded = _load(path, spare, num_threads=num_threads)
    data = path.read_bytes()
    with open_weights(path) as files:
        for name, tensor in tensors.items():
            assert _same_bits(spare[name], tensor), name
            at = files.tensors[name]
            digest = hashlib.sha256(data[at.offset : at.offset + at.nbytes]).hexdigest()
            assert loaded.digests[name] == f"sha256:{digest}"
        assert loaded.nbytes == files.total_nbytes
    assert loaded.converted == []


def test_shards_arrive_like_one_file(tmp_path: Path) -> None:
    """A sharded index loads as the single file does, with the same digests."""
    tensors = _all_dtypes()
    save_file(tensors, tmp_path / "one.safetensors")
    names = list(tensors)
    shards = {f"model-{i}-of-3.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for file, part in shards.items():
        save_file(part, sharded / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    one, many = Spare(tensors), Spare(tensors)
    digests = _load(tmp_path / "one.safetensors", one).digests
    assert _load(sharded, many, num_threads=2).digests == digests
    assert all(_same_bits(one[name], many[name]) for name in tensors)


def test_a_mapping_arrives_like_a_file(tmp_path: Path) -> None:
    """Tensors from memory load with the digests of the file that they would make, and are not aliased after."""
    tensors = _all_dtypes()
    save_file(tensors, tmp_path / "model.safetensors")
    digests = _load(tmp_path / "model.safetensors", Spare(tensors)).digests
    spare = Spare(tensors)
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    loaded = load_tensors(given, spare.targets, options=LoadOptions(num_threads=2))
    for tensor in given.values():
        tensor.zero_()
    assert loaded.digests == digests
    assert all(_same_bits(spare[name], tensor) for name, tensor in tensors.items())


def test_any_strided_tensor_of_a_mapping_is_taken_by_value() -> None:
    """Transposed, expanded, conjugated, negated, inference and gradient-tracking tensors arrive by their values."""
    with torch.inference_mode():
        inferred = torch.arange(4.0)
    given = {
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "expanded": torch.ones(1, 1).expand(2, 3),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "inferred": inferred,
        "tracked": torch.arange(4.0, requires_grad=True),
    }
    like = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in given.items()}
    spare = Spare(like, ties={"conjugated again": "conjugated"})
    load_tensors(given | {"conjugated again": given["conjugated"]}, spare.targets, options=LoadOptions(finite=True))
    for name, tensor in given.items():
        assert torch.equal(spare[name], tensor), name
        assert not spare[name].requires_grad


@pytest.mark.parametrize("source", ["file", "mapping"])
def test_nan_payloads_and_signs_of_zero_are_kept(source: str, tmp_path: Path) -> None:
    """Where NaN is allowed it arrives with its payload, and minus zero stays minus zero."""
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, -0x80000000], dtype=torch.int32)
    tensors = {"w": bits.view(torch.float32)}
    spare = Spare(tensors)
    if source == "file":
        save_file(tensors, tmp_path / "w.safetensors")
        _load(tmp_path / "w.safetensors", spare, finite=False)
    else:
        load_tensors(tensors, spare.targets, options=LoadOptions(finite=False))
    assert torch.equal(spare["w"].view(torch.int32), bits)


@pytest.mark.parametrize("extra", [0, 1, 3, 7])
def test_misaligned_data_arrives_aligned(extra: int, tmp_path: Path) -> None:
    """A header of odd length, or bytes before floats, never make a misaligned tensor (A30)."""
    data = torch.arange(5.0)
    header: dict[str, object] = {
        "b": entry("U8", [3], 0, 3),
        "w": entry("F32", [5], 3, 23),
        "__metadata__": {"x": "y" * extra},
    }
    path = tmp_path / "odd.safetensors"
    path.write_bytes(make_file(header, b"\1\2\3" + data.view(torch.uint8).numpy().tobytes()))
    spare = Spare({"b": torch.empty(3, dtype=torch.uint8), "w": torch.empty(5)})
    _load(path, spare)
    assert torch.equal(spare["w"], data)
    assert spare["w"].data_ptr() % 64 == 0


def test_a_channels_last_parameter_takes_the_files_values_and_keeps_its_strides(tmp_path: Path) -> None:
    """A target with strides of its own is filled by value, and hashed as the file's bytes."""
    dense = torch.randn(2, 3, 4, 5)
    save_file({"w": dense}, tmp_path / "w.safetensors")
    spare = Spare({"w": dense.to(memory_format=torch.channels_last)})
    plain = _load(tmp_path / "w.safetensors", Spare({"w": dense})).digests
    assert _load(tmp_path / "w.safetensors", spare, expected=plain).digests == plain
    assert torch.equal(spare["w"], dense)
    assert spare["w"].is_contiguous(memory_format=torch.channels_last)


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "mapping"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_converted_tensor_is_what_copy_makes_of_it(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A target of another floating dtype gets `tensor.to(dtype)`, and is listed as converted."""
    tensors = {"w": torch.randn(6), "n": torch.arange(3)}
    spare = Spare({"w": torch.empty(6, dtype=dtype), "n": torch.arange(3)})
    if source == "file":
        save_file(tensors, tmp_path / "w.safetensors")
        loaded = _load(tmp_path / "w.safetensors", spare)
    else:
        loaded = load_tensors(tensors, spare.targets, options=LoadOptions())
    assert _same_bits(spare["w"], tensors["w"].to(dtype))
    assert loaded.converted == ["w"]


def test_promised_digests_are_those_of_the_source_not_of_the_converted_tensor(tmp_path: Path) -> None:
    """A file that carries its digests can be converted, and a flipped byte is found all the same."""
    tensors = {"w": torch.randn(6)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    promised = _load(path, Spare(tensors)).digests
    half = {"w": torch.empty(6, dtype=torch.bfloat16)}
    live = _load(path, Spare(half), expected=promised).digests
    assert live == load_tensors({"w": tensors["w"].bfloat16()}, Spare(half).targets, options=LoadOptions()).digests
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # a bit that bfloat16 would drop
    path.write_bytes(data)
    with pytest.raises(DigestMismatchError):
        _load(path, Spare(half), expected=promised)


# -- ties --------------------------------------------------------------------------------------------------------------


def _tied(tmp_path: Path, tensors: Mapping[str, torch.Tensor], source: str) -> tuple[Spare, Callable[[], Loaded]]:
    spare = Spare({"first": torch.empty(4)}, ties={"second": "first"})
    if source == "mapping":
        return spare, lambda: load_tensors(tensors, spare.targets, options=LoadOptions(num_threads=2))
    save_file(dict(tensors), tmp_path / "tied.safetensors")
    return spare, lambda: _load(tmp_path / "tied.safetensors", spare, num_threads=2)


@pytest.mark.parametrize("source", ["file", "mapping"])
@pytest.mark.parametrize("names", [("first",), ("second",), ("first", "second"), ("second", "first")])
def test_any_names_of_a_tied_tensor_fill_it(source: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """One name of a tied tensor is enough, and two equal ones are as good."""
    spare, load = _tied(tmp_path, {name: torch.arange(4.0) for name in names}, source)
    loaded = load()
    assert torch.equal(spare["first"], torch.arange(4.0))
    assert set(loaded.digests) == set(names)
    assert loaded.nbytes == 16


@pytest.mark.parametrize("source", ["file", "mapping"])
def test_names_of_a_tied_tensor_that_differ_are_a_conflict(source: str, tmp_path: Path) -> None:
    """Two names of one tensor with different bits are refused, whichever comes first (G02)."""
    _, load = _tied(tmp_path, {"first": torch.zeros(4), "second": torch.tensor([0.0, 0, 0, -0.0])}, source)
    with pytest.raises(TensorValueError) as caught:
        load()
    assert _codes(caught.value) == [("TIE_CONFLICT", "second")]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bool_bytes_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    """A BOOL tensor with a byte 2 would be true and not equal to true; it is refused by name (A32)."""
    path = tmp_path / "b.safetensors"
    header: dict[str, object] = {"good": entry("BOOL", [2], 0, 2), "bad": entry("BOOL", [2], 2, 4)}
    path.write_bytes(make_file(header, b"\0\1\1\2"))
    with pytest.raises(TensorValueError) as caught:
        _load(path, Spare({name: torch.empty(2, dtype=torch.bool) for name in header}))
    assert _codes(caught.value) == [("BAD_BOOL", "bad")]


@pytest.mark.parametrize("source", ["file", "mapping"])
def test_everything_that_is_wrong_is_named_at_once(source: str, tmp_path: Path) -> None:
    """One error, of the gravest kind, has every tensor that fails, sorted by name."""
    tensors = {"a": torch.tensor([1.0, NAN, NAN]), "b": torch.ones(3), "c": torch.ones(2), "d": torch.tensor(NAN)}
    spare = Spare(tensors, ties={"b2": "b"})
    given = tensors | {"b2": torch.zeros(3)}
    options: dict[str, Any] = {"expected": {"c": "sha256:00"}, "num_threads": 3}
    save_file(given, tmp_path / "bad.safetensors")
    load: dict[str, Callable[[], Loaded]] = {
        "file": lambda: _load(tmp_path / "bad.safetensors", spare, **options),
        "mapping": lambda: load_tensors(given, spare.targets, options=LoadOptions(**options)),
    }
    with pytest.raises(DigestMismatchError) as caught:
        load[source]()
    wanted = [("NONFINITE", "a"), ("TIE_CONFLICT", "b2"), ("DIGEST_MISMATCH", "c"), ("NONFINITE", "d")]
    assert _codes(caught.value) == wanted
    assert (caught.value.problems[0].found, caught.value.problems[3].found) == (2, 1)
    assert "index 1" in caught.value.problems[0].message


def test_nonfinite_alone_is_a_failed_check() -> None:
    """NaN is not a fault of the file's form: the error says that a check failed."""
    with pytest.raises(NonFiniteError):
        load_tensors({"w": torch.tensor([NAN])}, Spare({"w": torch.empty(1)}).targets, options=LoadOptions())


def test_without_digests_only_promised_ones_are_taken() -> None:
    """Turning digests off leaves out those nobody asked for, never those that were promised."""
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    good = load_tensors(tensors, Spare(tensors).targets, options=LoadOptions()).digests["a"]
    options = LoadOptions(digest=False, expected={"a": good})
    assert load_tensors(tensors, Spare(tensors).targets, options=options).digests == {"a": good}
    options = LoadOptions(digest=False, expected={"a": "sha256:00"})
    with pytest.raises(DigestMismatchError):
        load_tensors(tensors, Spare(tensors).targets, options=options)


# -- the operating system ----------------------------------------------------------------------------------------------


def _opened(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> tuple[Path, WeightFiles, Spare]:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path, open_weights(path), Spare(tensors)


def test_short_and_interrupted_reads_go_on(tmp_path: Path) -> None:
    """A system that reads one byte at a time, and interrupts every other call, is only slow (D07)."""
    tensors = _all_dtypes()
    _, files, spare = _opened(tmp_path, tensors)

    def meddle(kind: str, number: int, args: tuple[Any, ...]) -> object:
        if kind == "preadv":
            if number % 2:
                raise InterruptedError
            return read_one_byte(args)
        return None

    with files, hooked(meddle):
        load_files(files, spare.targets, lease=spare.lease, options=LoadOptions(num_threads=2))
    assert all(_same_bits(spare[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failing_read_names_file_and_offset(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO at any chunk is a typed error with the file and the byte offset it happened at (D07)."""
    monkeypatch.setattr(AtWill, "chunk_nbytes", 100)
    path, files, spare = _opened(tmp_path, {"w": torch.arange(64.0)})

    def fail(kind: str, count: int, args: tuple[Any, ...]) -> object:
        if (kind, count) == ("preadv", number):
            raise OSError(5, "Input/output error")
        return None

    with files, hooked(fail), pytest.raises(SourceReadError) as caught:
        load_files(files, spare.targets, lease=spare.lease, options=LoadOptions())
    assert (caught.value.code, caught.value.file) == ("IO_ERROR", str(path))
    assert caught.value.offset == files.tensors["w"].offset + 100 * (number - 1)


def test_a_file_that_was_cut_is_a_typed_error(tmp_path: Path) -> None:
    """Truncation between header and data is found where the bytes end, without a signal (D02)."""
    path, files, spare = _opened(tmp_path, {"w": torch.arange(64.0)})
    offset = files.tensors["w"].offset
    with path.open("r+b") as file:
        file.truncate(offset + 10)
    with files, pytest.raises(SourceChangedError) as caught:
        load_files(files, spare.targets, lease=spare.lease, options=LoadOptions())
    assert caught.value.offset == offset + 10


@pytest.mark.parametrize("how", ["longer", "same size"])
def test_a_file_that_was_written_while_it_was_read_is_refused(how: str, tmp_path: Path) -> None:
    """Bytes that may be from two versions are not believed, even when each call succeeded (D03)."""
    path, files, spare = _opened(tmp_path, {"w": torch.arange(64.0)})

    def overwrite(kind: str, number: int, args: tuple[Any, ...]) -> object:
        if kind == "preadv" and number == 1:
            data = path.read_bytes()
            path.write_bytes(data + b"x" if how == "longer" else data[:-1] + b"x")
        return None

    with files, hooked(overwrite), pytest.raises(SourceChangedError):
        load_files(files, spare.targets, lease=spare.lease, options=LoadOptions())


def test_a_cancelled_load_stops_at_its_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling from a progress report ends the load with the reason, before the next read."""
    monkeypatch.setattr(AtWill, "chunk_nbytes", 64)
    _, files, spare = _opened(tmp_path, {"w": torch.arange(256.0)})
    cancellation = Cancellation()
    options = LoadOptions(
        cancellation=cancellation, report=lambda nbytes: cancellation.cancel(SupersededError("a newer stage"))
    )
    with files, hooked(lambda *_: None) as calls, pytest.raises(SupersededError):
        load_files(files, spare.targets, lease=spare.lease, options=options)
    assert calls.counts["preadv"] == 1


@pytest.mark.parametrize("source", ["file", "mapping"])
def test_progress_adds_up(source: str, tmp_path: Path) -> None:
    """The numbers reported are those of all bytes of the source, aliases included."""
    tensors = _all_dtypes() | {"tied": torch.ones(9), "converted": torch.ones(3)}
    spare = Spare(tensors | {"converted": torch.ones(3).half()}, ties={"alias": "tied"})
    given = tensors | {"alias": torch.ones(9)}
    seen: list[int] = []
    if source == "file":
        save_file(given, tmp_path / "m.safetensors")
        _load(tmp_path / "m.safetensors", spare, report=seen.append)
    else:
        load_tensors(given, spare.targets, options=LoadOptions(report=seen.append))
    assert sum(seen) == sum(tensor.numel() * tensor.element_size() for tensor in given.values())
