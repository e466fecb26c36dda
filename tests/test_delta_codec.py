"""Deltas of one tensor: exact to the bit for every dtype and shape, small where little changed, and never believed."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hotglm.errors import DeltaError, HotglmError, MissingExtraError, SupersededError
from hotglm.release.files import open_weights
from hotglm.weights import delta_sparse, delta_xor, zstd
from hotglm.weights.delta_codec import SPARSE, XOR, Encoded, decode_into, encode
from hotglm.weights.delta_parts import FilePart, Part, TensorPart, view_words
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.dtypes import LOADABLE_DTYPES

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (0, 3), (1,), (7,), (3, 5), (64, 33), (2, 1, 9))
MIB = 1 << 20


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor).tolist())


def _raw(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of exactly these bytes, whatever they mean."""
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype).reshape(tuple(shape))


def _apply(old: torch.Tensor, encoded: Encoded, *, name: str = "w") -> torch.Tensor:
    if encoded.codec == "whole":
        return encoded.parts[0].clone()
    view = old.clone().contiguous()
    decode_into(view, codec=encoded.codec, parts=[TensorPart(tensor=part) for part in encoded.parts], name=name)
    return view


def _refuse(old: torch.Tensor, codec: str, *parts: torch.Tensor) -> DeltaError:
    view = old.clone()
    with pytest.raises(DeltaError) as caught:
        decode_into(view, codec=codec, parts=[TensorPart(tensor=part) for part in parts], name="layer.w")
    assert caught.value.tensor == "layer.w"
    assert "full release" in caught.value.remedy
    return caught.value


def _flat(numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


# -- exact -------------------------------------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from(sorted(LOADABLE_DTYPES, key=str)),
    shape=st.sampled_from(SHAPES),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
    codec=st.sampled_from(["smallest", SPARSE, XOR]),
)
def test_applying_what_was_encoded_gives_the_new_bytes(
    dtype: torch.dtype, shape: tuple[int, ...], share: float, seed: int, codec: str
) -> None:
    """For random bytes of every loadable dtype and odd shapes, what was encoded leads back to the new bits (C16)."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    old = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    other = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        old, other = old & 1, other & 1
    new = torch.where(torch.rand(count, generator=generator) < share, other, old)
    encoded = encode(old.view(dtype).view(shape), new.view(dtype).view(shape))
    if codec == XOR and count:
        payload = delta_xor.encode_xor(old, new, itemsize=dtype.itemsize, limit=10**9)
        assert payload is not None
        encoded = Encoded(codec=XOR, parts=(payload,))
    if codec == SPARSE and count and (parts := delta_sparse.encode_sparse(old, new, dtype=dtype)) is not None:
        encoded = Encoded(codec=SPARSE, parts=parts)
    result = _apply(old.view(dtype).view(shape), encoded)
    assert (result.dtype, tuple(result.shape)) == (dtype, shape)
    assert torch.equal(tensor_bytes(result), new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_that_numbers_hide_are_kept(dtype: torch.dtype) -> None:
    """Payloads of NaN, signs of zero and infinities arrive as they were sent (C12)."""
    size = dtype.itemsize
    patterns = [b"\x00" * size, b"\x00" * (size - 1) + b"\x80", b"\xff" * size, b"\x01" + b"\xff" * (size - 1)]
    patterns.append(b"\x01" + b"\x00" * (size - 3) + b"\xf0\x7f" if size > 2 else b"\x01\x7f")
    old = torch.zeros(4000, dtype=dtype)
    new = _raw(b"".join(patterns) + _bits(old)[5 * size :], dtype, [4000])
    for encoded in (encode(old, new), Encoded(codec=XOR, parts=(_payload(old, new),))):
        assert encoded.codec != "whole"
        assert _bits(_apply(old, encoded)) == _bits(new)


def test_a_tensor_of_many_chunks_with_gaps_of_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and pieces join without a seam, and gaps too large for their width are walked in steps."""
    monkeypatch.setattr(delta_sparse, "_PIECE_NUMEL", 1009)
    old = torch.arange(3 * MIB // 4 + 11, dtype=torch.int32)
    for step in (60, 300, 70_000, 10**9):
        new = old.clone()
        new[13::step] += 1
        new[-1] = -1
        parts = delta_sparse.encode_sparse(tensor_bytes(old), tensor_bytes(new), dtype=torch.int32)
        assert parts is not None
        assert torch.equal(_apply(old, Encoded(codec=SPARSE, parts=parts)), new)
        assert torch.equal(_apply(old, Encoded(codec=XOR, parts=(_payload(old, new),))), new)


def test_a_part_may_stand_in_a_file(tmp_path: Path) -> None:
    """Parts are read from an open file piece by piece; what comes out is the same."""
    old = torch.randn(5000)
    new = torch.where(torch.rand(5000) < 0.01, torch.randn(5000), old)
    sparse, payload = encode(old, new), _payload(old, new)
    assert sparse.codec == SPARSE
    save_file({"a": sparse.parts[0], "b": sparse.parts[1], "c": payload}, tmp_path / "p.safetensors")
    with open_weights(tmp_path / "p.safetensors") as files:
        part = {name: FilePart(location=location) for name, location in files.tensors.items()}
        for codec, names in ((SPARSE, "ab"), (XOR, "c")):
            view = old.clone()
            decode_into(view, codec=codec, parts=[part[name] for name in names], name="w")
            assert torch.equal(view, new)


def test_a_base_of_another_kind_is_no_base() -> None:
    """Without a tensor of the same dtype and shape to start from, the new one goes whole."""
    new = torch.zeros(100)
    for old in (None, torch.zeros(99), torch.zeros(10, 10), torch.zeros(100, dtype=torch.int32)):
        assert encode(old, new).codec == "whole"


# -- small -------------------------------------------------------------------------------------------------------------


def test_an_rl_step_costs_four_percent_at_most() -> None:
    """One bfloat16 element in a hundred replaced, anywhere, by anything: at most 4 % of the full size."""
    torch.manual_seed(0)
    old = torch.randn(MIB).mul(0.02).bfloat16()
    new = torch.where(torch.rand(MIB) < 0.01, torch.randn(MIB).bfloat16(), old)
    encoded = encode(old, new)
    assert encoded.nbytes <= 0.02 * old.nbytes


def test_an_rl_step_is_as_small_without_the_extra(no_zstd: None) -> None:
    """The same holds where zstd is not installed, since no codec that needs it is used."""
    old = torch.randn(MIB).mul(0.02).bfloat16()
    new = torch.where(torch.rand(MIB) < 0.01, torch.randn(MIB).bfloat16(), old)
    encoded = encode(old, new)
    assert encoded.codec == SPARSE
    assert encoded.nbytes <= 0.02 * old.nbytes


def test_a_fine_tune_drift_costs_three_tenths_at_most() -> None:
    """bfloat16 weights whose float32 masters were moved by ten steps of 1e-5: at most 0.3 of the full size."""
    torch.manual_seed(0)
    master = torch.randn(MIB) * 0.02
    moved = master + 1e-5 * 10**0.5 * torch.randn(MIB)
    encoded = encode(master.bfloat16(), moved.bfloat16())
    assert encoded.codec == XOR
    assert encoded.nbytes <= 0.25 * 2 * MIB


def test_the_smallest_codec_wins() -> None:
    """Everything new goes whole, much of it a little goes as xor, little goes sparse, and no codec enlarges."""
    torch.manual_seed(0)
    old = torch.randn(100_000)
    few = torch.where(torch.rand(100_000) < 0.001, torch.randn(100_000), old)
    noise = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    for new, codec in ((noise, "whole"), (old * (1 + 2**-20), XOR), (few, SPARSE)):
        encoded = encode(old, new)
        assert encoded.codec == codec
        assert encoded.nbytes <= new.nbytes


# -- never believed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra `delta` were not installed."""
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    zstd._find_zstd.cache_clear()
    monkeypatch.setattr(zstd, "_find_zstd", zstd._find_zstd.__wrapped__)


def test_a_payload_that_needs_the_extra_names_it(no_zstd: None) -> None:
    """Without zstd, what was encoded with it raises an error that names the extra."""
    with pytest.raises(MissingExtraError, match=r"hotglm\[delta\]"):
        decode_into(torch.zeros(4), codec=XOR, parts=[TensorPart(tensor=_framed(b"1234"))], name="w")


def _payload(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    payload = delta_xor.encode_xor(tensor_bytes(old), tensor_bytes(new), itemsize=old.element_size(), limit=10**9)
    assert payload is not None
    return payload


def _framed(*frames: bytes, announced: int | None = None) -> torch.Tensor:
    lengths = [len(frame) if announced is None else announced for frame in frames]
    data = struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(frames)
    return torch.tensor(list(data), dtype=torch.uint8)


OLD = torch.zeros(64, dtype=torch.int32)
GOOD = zstd.compress(bytes(256))

BROKEN_FRAMES: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "truncated frame": (lambda: _framed(zstd.compress(bytes(range(256)))[:-3]), "DELTA_BAD_PAYLOAD"),
    "cut table": (lambda: torch.zeros(3, dtype=torch.uint8), "DELTA_BAD_PAYLOAD"),
    "no bytes": (lambda: torch.zeros(0, dtype=torch.uint8), "DELTA_BAD_PAYLOAD"),
    "bytes behind the frame": (lambda: _framed(GOOD + b"xyz"), "DELTA_BAD_PAYLOAD"),
    "a second frame": (lambda: _framed(GOOD + GOOD), "DELTA_BAD_PAYLOAD"),
    "bytes behind the last frame": (lambda: torch.cat([_framed(GOOD), torch.zeros(5)]).byte(), "DELTA_BAD_PAYLOAD"),
    "table that says less": (lambda: _framed(GOOD, announced=len(GOOD) - 1), "DELTA_BAD_PAYLOAD"),
    "table that says 4 GiB": (lambda: _framed(GOOD, announced=2**32 - 1), "DELTA_BAD_PAYLOAD"),
    "frame of too few bytes": (lambda: _framed(zstd.compress(bytes(255))), "DELTA_BAD_PAYLOAD"),
    "bomb": (lambda: _framed(zstd.compress(bytes(64 * MIB))[:300]), "DELTA_BAD_PAYLOAD"),
    "not zstd": (lambda: _framed(b"plainly something else"), "DELTA_BAD_PAYLOAD"),
    "skippable frame": (lambda: _framed(struct.pack("<II", 0x184D2A50, 4) + b"abcd"), "DELTA_BAD_PAYLOAD"),
    "enormous part": (lambda: torch.zeros(5000, dtype=torch.uint8), "DELTA_TOO_LARGE"),
    "part of two dimensions": (lambda: _framed(GOOD).view(1, -1), "DELTA_BAD_PAYLOAD"),
    "part of another dtype": (lambda: _framed(GOOD).float(), "DELTA_BAD_PAYLOAD"),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_broken_frame_is_refused_by_name(case: str) -> None:
    """Cut, lengthened, lying and exploding payloads are typed errors that name the tensor (C06)."""
    make, code = BROKEN_FRAMES[case]
    assert _refuse(OLD, XOR, make()).code == code


def test_a_bomb_is_refused_before_memory_is_taken() -> None:
    """A frame of a few kilobytes that would become a gigabyte is refused by what it announces, or by what comes out."""
    honest = zstd.compress(bytes(MIB))
    lying = bytearray(honest)
    at = honest.index(struct.pack("<I", MIB))
    lying[at : at + 4] = struct.pack("<I", 256)
    for frame in (zstd.compress(bytes(100 * MIB))[:260], bytes(lying)):
        assert _refuse(OLD, XOR, _framed(frame)).code == "DELTA_BAD_PAYLOAD"


BAD_INDICES: dict[str, tuple[torch.Tensor, torch.Tensor, str]] = {
    "duplicate": (_flat([3, 0], torch.uint8), _flat([1, 1], torch.int32), "DELTA_BAD_INDEX"),
    "past the end": (_flat([64], torch.uint8), _flat([1], torch.int32), "DELTA_BAD_INDEX"),
    "past the end in steps": (_flat([60, 4], torch.uint8), _flat([1, 1], torch.int32), "DELTA_BAD_INDEX"),
    "far past the end": (_flat([2**32 - 1], torch.uint32), _flat([1], torch.int32), "DELTA_BAD_INDEX"),
    "too wide": (_flat([1], torch.int64), _flat([1], torch.int32), "DELTA_BAD_INDEX"),
    "signed": (_flat([-1], torch.int8), _flat([1], torch.int32), "DELTA_BAD_INDEX"),
    "more than there are": (_flat([1] * 65, torch.uint8), _flat([1] * 65, torch.int32), "DELTA_BAD_INDEX"),
    "of two dimensions": (_flat([[1]], torch.uint8), _flat([[1]], torch.int32), "DELTA_BAD_INDEX"),  # type: ignore[list-item]
    "fewer values": (_flat([1, 1], torch.uint8), _flat([1], torch.int32), "DELTA_BAD_PAYLOAD"),
    "values of another dtype": (_flat([1], torch.uint8), _flat([1], torch.int64), "DELTA_BAD_PAYLOAD"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_a_bad_index_is_refused_by_name(case: str) -> None:
    """Duplicate, unsorted, outside and too wide indices are typed errors that name the tensor (C10)."""
    gaps, values, code = BAD_INDICES[case]
    assert _refuse(OLD, SPARSE, gaps, values).code == code


def test_a_duplicate_across_two_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gap of every piece but the first one must lead on, too."""
    monkeypatch.setattr(delta_sparse, "_PIECE_NUMEL", 2)
    error = _refuse(OLD, SPARSE, _flat([0, 1, 0], torch.uint8), _flat([1, 2, 3], torch.int32))
    assert error.code == "DELTA_BAD_INDEX"
    assert "change 2" in str(error)


@pytest.mark.parametrize("codec", ["whole", "zip", SPARSE, XOR])
def test_another_codec_or_number_of_parts_is_refused(codec: str) -> None:
    """A codec that this is not, and parts that are too many, are refused before anything is read."""
    parts = [torch.zeros(4, dtype=torch.uint8)] * 3
    assert _refuse(OLD, codec, *parts).code == "DELTA_BAD_CODEC"


@given(data=st.binary(max_size=200), codec=st.sampled_from([SPARSE, XOR]), flip=st.integers(0, 10**6))
def test_whatever_a_payload_holds_the_error_is_ours(data: bytes, codec: str, flip: int) -> None:
    """Arbitrary bytes, and good payloads with one bit flipped, are applied or refused, and never anything else."""
    new = OLD.clone()
    new[::5] = 77
    good = _payload(OLD, new)
    good[flip // 8 % good.numel()] ^= 1 << flip % 8
    for payload in (good, torch.tensor(list(data), dtype=torch.uint8)):
        count = min(len(data), 64)
        parts = [payload] if codec == XOR else [payload[:count], torch.zeros(len(payload[:count]), dtype=torch.int32)]
        view = OLD.clone()
        try:
            decode_into(view, codec=codec, parts=[TensorPart(tensor=part) for part in parts], name="w")
        except HotglmError as error:
            assert isinstance(error, DeltaError)  # noqa: PT017


def test_decoding_stops_when_it_is_told_to() -> None:
    """What `pause` raises ends the work at the next piece."""
    old = torch.zeros(3 * MIB, dtype=torch.uint8)
    payload = TensorPart(tensor=_payload(old, old + 1))
    calls: list[int] = []

    def pause() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise SupersededError("Expected to go on, got told to stop.")

    with pytest.raises(SupersededError):
        decode_into(old, codec=XOR, parts=[payload], name="w", pause=pause)
    assert len(calls) == 2
    assert int(old.sum()) == MIB


def test_a_large_tensor_is_applied_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece that is read or decompressed is larger than a chunk may be, whatever the tensor's size."""
    sizes: list[int] = []

    class Measured(TensorPart):
        def read(self, start: int, stop: int) -> torch.Tensor:
            sizes.append(stop - start)
            return super().read(start, stop)

    old = torch.zeros(4 * MIB, dtype=torch.bfloat16)
    new = torch.randn(4 * MIB).bfloat16()
    part: Part = Measured(tensor=_payload(old, new))
    decode_into(old, codec=XOR, parts=[part], name="w")
    assert torch.equal(old, new)
    assert max(sizes) <= zstd.limit_frame(delta_xor.CHUNK_NBYTES)
    assert len(sizes) == 9


def test_words_are_the_same_memory() -> None:
    """Bytes seen as integers are the same bytes."""
    flat = torch.zeros(16, dtype=torch.uint8)
    for itemsize in (1, 2, 4, 8):
        view_words(flat, itemsize)[0] = itemsize
    assert flat[0] == 8
