"""FAULTS group A through a whole slot: bytes that the header parser refuses leave the service as it was (U1 to U8)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from hotglm.errors import HeaderError, IncompatibleError, NonFiniteError, SourceError
from support.bytes_maker import entry, layout, make_file, make_header, split_file
from support.universal import World, universal

WIDTH, DEPTH = 8, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("headers"), width=WIDTH, depth=DEPTH) as made:
        yield made


def good_header() -> tuple[dict[str, object], int]:
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index in range(DEPTH):
        names[f"layers.{index}.weight"] = ("F32", (WIDTH, WIDTH))
        names[f"layers.{index}.bias"] = ("F32", (WIDTH,))
    return layout(names)


HEADER, NBYTES = good_header()
DATA = bytes(NBYTES)
GOOD = make_file(HEADER, DATA)
TEXT = make_header(HEADER)
FIRST = "layers.0.weight"


def with_field(name: str, value: object) -> bytes:
    """Return a file whose first tensor has one field changed, or left out if None."""
    fields = {**HEADER[FIRST], name: value}  # type: ignore[dict-item]
    return make_file({**HEADER, FIRST: {key: item for key, item in fields.items() if item is not None}}, DATA)


def with_text(old: bytes, new: bytes) -> bytes:
    """Return a file with a piece of its header's text replaced."""
    assert old in TEXT
    return make_file(TEXT.replace(old, new, 1), DATA)


def shifted() -> bytes:
    """Return a file whose last tensor overlaps the one before it."""
    last = entry("F32", [WIDTH], NBYTES - 4 * WIDTH - 4, NBYTES - 4)
    return make_file({**HEADER, f"layers.{DEPTH - 1}.bias": last}, DATA[:-4])


ROWS: dict[str, tuple[bytes, str]] = {
    "A01 empty": (b"", "HEADER_TOO_SMALL"),
    "A01 seven bytes": (b"\0" * 7, "HEADER_TOO_SMALL"),
    "A02 no header": (struct.pack("<Q", 0) + DATA, "HEADER_EMPTY"),
    "A03 2^63": (struct.pack("<Q", 1 << 63) + TEXT, "HEADER_TOO_LARGE"),
    "A04 over the cap": (make_file(HEADER, DATA, length=100_000_001), "HEADER_TOO_LARGE"),
    "A05 past the end": (make_file(HEADER, b"", length=len(TEXT) + 1), "HEADER_PAST_EOF"),
    "A06 list": (make_file(b"[]"), "HEADER_NOT_OBJECT"),
    "A07 byte order mark": (make_file(b"\xef\xbb\xbf" + TEXT, DATA), "HEADER_NOT_UTF8"),
    "A07 broken UTF-8": (with_text(b'"F32"', b'"F3\xff"'), "HEADER_NOT_UTF8"),
    "A08 cut JSON": (make_file(TEXT[:-1], DATA), "HEADER_BAD_JSON"),
    "A08 two objects": (make_file(TEXT + b"{}", DATA), "HEADER_BAD_JSON"),
    "A09 leading space": (make_file(b"  " + TEXT, DATA), "HEADER_LEADING_SPACE"),
    "A10 trailing tab": (make_file(TEXT + b"\t", DATA), "HEADER_BAD_PADDING"),
    "A11 NaN": (with_text(b"[0,", b"[NaN,"), "HEADER_BAD_JSON"),
    "A12 twice": (make_file(TEXT[:-1] + b"," + make_header({FIRST: HEADER[FIRST]})[1:], DATA), "DUPLICATE_TENSOR"),
    "A14 metadata twice": (make_file(b'{"__metadata__":{},"__metadata__":{},' + TEXT[1:], DATA), "DUPLICATE_KEY"),
    "A15 metadata number": (make_file({"__metadata__": {"a": 1}, **HEADER}, DATA), "METADATA_TYPE"),
    "A16 unknown field": (with_field("more", 1), "UNKNOWN_FIELD"),
    "A17 no dtype": (with_field("dtype", None), "MISSING_FIELD"),
    "A18 dtype F33": (with_field("dtype", "F33"), "BAD_DTYPE"),
    "A19 dtype F6_E2M3": (with_field("dtype", "F6_E2M3"), "UNSUPPORTED_DTYPE"),
    "A20 negative": (with_field("shape", [-8, 8]), "BAD_SHAPE"),
    "A20 text": (with_field("shape", "8"), "BAD_SHAPE"),
    "A21 rank 65": (with_field("shape", [1] * 65), "RANK_TOO_LARGE"),
    "A22 overflow": (with_field("shape", [2, 2**47, 2**47]), "SIZE_OVERFLOW"),
    "A23 zero and huge": (with_field("shape", [0, 2**62]), "DIM_TOO_LARGE"),
    "A24 reversed": (with_field("data_offsets", [256, 0]), "BAD_OFFSETS"),
    "A25 overlap": (shifted(), "OVERLAP"),
    "A25 hole": (make_file({**HEADER, "z": entry("U8", [1], NBYTES + 1, NBYTES + 2)}, DATA + b"\0\0"), "OFFSET_GAP"),
    "A27 too many": (make_file(layout({f"t{i}": ("U8", (0,)) for i in range(100_001)})[0]), "HEADER_TOO_MANY_TENSORS"),
    "A28 one byte short": (GOOD[:-1], "SIZE_MISMATCH"),
    "A28 appended pickle": (GOOD + b"\x80\x04N.", "SIZE_MISMATCH"),
    "A29 size and shape": (with_field("shape", [WIDTH, WIDTH - 1]), "SIZE_SHAPE_MISMATCH"),
    "A31 newline in a name": (with_text(b"layers.0.weight", b"layers\\n\\u001b[31m"), "BAD_NAME"),
    "A33 deep": (with_text(b'"F32"', b"[" * 200 + b"]" * 200), "HEADER_TOO_DEEP"),
    "A34 digits": (with_text(b"[0,", b"[" + b"9" * 5000 + b","), "*"),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_header_that_is_refused_changes_nothing(world: World, row: str) -> None:
    """Each kind of bad header is refused with its code and file, and the live generation serves, bit for bit."""
    data, code = ROWS[row]
    path = world.directory / "bad.safetensors"
    path.write_bytes(data)
    with universal(world, HeaderError, code=None if code == "*" else code, file=path):
        world.slot.update(path)


def test_a_printed_name_is_escaped(world: World) -> None:
    """A31: a name with escape sequences reaches a log line only in escaped form."""
    path = world.directory / "bad.safetensors"
    path.write_bytes(ROWS["A31 newline in a name"][0])
    with universal(world, HeaderError, file=path) as outcome:
        world.slot.update(path)
    assert "\x1b" not in str(outcome.refusal)


def test_misaligned_data_is_copied_to_aligned_memory(world: World) -> None:
    """A30: data at an odd offset of the file lands aligned in memory that is ours."""
    number, path = world.write()
    text, data = split_file(path.read_bytes())
    odd = text + b" " * (1 + (len(text) + 8) % 2)
    assert (8 + len(odd)) % 2 == 1
    path.write_bytes(make_file(odd, data))
    world.publish(number)
    world.slot.update(path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in world.slot.live.module.parameters())
    assert world.answer().equal(world.expected(number))


def test_every_truncation_is_refused(world: World) -> None:
    """A35: a valid file cut at any length is refused, and nothing is left of the attempt."""
    _, path = world.write()
    data, bad = path.read_bytes(), world.directory / "bad.safetensors"
    bad.touch()
    lengths = range(len(data))
    with universal(world, SourceError, file=bad, num_refused=len(lengths)) as outcome:
        for length in lengths:
            bad.write_bytes(data[:length])
            with pytest.raises(SourceError) as caught:
                world.slot.update(bad)
            outcome.error = caught.value


def test_every_flipped_bit_is_refused(world: World) -> None:
    """A36: one flipped bit in any byte of the payload is found by the digests that the file carries."""
    _, path = world.write()
    data, bad = bytearray(path.read_bytes()), world.directory / "bad.safetensors"
    bad.touch()
    start = 8 + len(split_file(bytes(data))[0])
    places = range(start, len(data))
    with universal(world, SourceError, code="DIGEST_MISMATCH", num_refused=len(places)) as outcome:
        for place in places:
            data[place] ^= 1 << place % 8
            bad.write_bytes(data)
            with pytest.raises(SourceError) as caught:
                world.slot.update(bad)
            outcome.error = caught.value
            data[place] ^= 1 << place % 8


def test_values_that_are_refused_change_nothing(world: World) -> None:
    """A32, G17: NaN is refused with the tensor and the first index; a tensor that does not fit, by the verdict."""
    path = world.directory / "bad.safetensors"
    path.write_bytes(make_file(HEADER, struct.pack("<f", float("nan")) * (NBYTES // 4)))
    with universal(world, NonFiniteError, code="NONFINITE", tensor="layers.0.bias"):
        world.slot.update(path)
    path.write_bytes(make_file(layout({FIRST: ("F32", (2, 2)), "other": ("F32", (1,))})[0], bytes(20)))
    with universal(world, IncompatibleError):
        world.slot.update(path, version="9.0.0")


@pytest.mark.parametrize(
    ("key", "value"), [("hotglm.digests", "[]"), ("hotglm.requires", "{"), ("hotglm.digests", '{"other": "sha256:0"}')]
)
def test_unusable_metadata_changes_nothing(world: World, key: str, value: str) -> None:
    """Metadata that hotglm reads is refused by file when it cannot be meant."""
    path = world.directory / "bad.safetensors"
    path.write_bytes(make_file({"__metadata__": {key: value}, **HEADER}, DATA))
    with universal(world, SourceError, file=path):
        world.slot.update(path)
