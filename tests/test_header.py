"""The safetensors header parser: every row of FAULTS.md group A that concerns a header, and what must be accepted."""

from __future__ import annotations

import json
import re
import resource
import struct
import time
from collections.abc import Callable

import pytest
import safetensors
import safetensors.torch
import torch

from hotglm.document import MAX_PROBLEMS
from hotglm.errors import HeaderError
from hotglm.header import DTYPES, Header, Limits, parse_header, parse_header_length
from support.bytes_maker import NBITS, entry, layout, make_file, make_header, split_file
from support.reference import seen_by_reference, seen_by_us

F32 = entry("F32", [1], 0, 4)
GOOD, GOOD_NBYTES = layout({"a": ("F32", (2, 3)), "b": ("I64", ()), "c": ("U8", (0,)), "d": ("BF16", (5,))})
GOOD_FILE = make_file({"__metadata__": {"format": "pt"}, **GOOD}, bytes(GOOD_NBYTES))


def parse_file(file: bytes, limits: Limits | None = None) -> Header:
    """Parse a whole file the way its reader does."""
    limits = limits or Limits()
    nbytes = parse_header_length(file[:8], file_size=len(file), file="x.safetensors", limits=limits)
    return parse_header(file[8 : 8 + nbytes], file_size=len(file), file="x.safetensors", limits=limits)


def refusal_of(file: bytes, limits: Limits | None = None) -> HeaderError:
    """Return the error that `file` is refused with."""
    with pytest.raises(HeaderError) as caught:
        parse_file(file, limits)
    return caught.value


def codes_of(error: HeaderError) -> list[str]:
    return [problem.code for problem in error.problems]


def one(value: bytes, name: bytes = b'"a"', data: bytes = b"\0" * 4) -> bytes:
    """Return a file with one member, spelled as given."""
    return make_file(b"{" + name + b":" + value + b"}", data)


def fields(**changes: object) -> bytes:
    """Return a file with one F32 tensor, some fields replaced (None: left out)."""
    merged = {**F32, **changes}
    return make_file({"a": {key: value for key, value in merged.items() if value is not None}}, bytes(4))


def shaped(shape: bytes) -> bytes:
    return one(b'{"dtype":"F32","shape":' + shape + b',"data_offsets":[0,4]}')


def offset_by(offsets: bytes) -> bytes:
    return one(b'{"dtype":"F32","shape":[1],"data_offsets":' + offsets + b"}")


def test_good_file_is_read_whole() -> None:
    """A good header gives names in data order, dtypes, shapes, ranges and metadata."""
    header = parse_file(GOOD_FILE)
    assert list(header.tensors) == ["a", "b", "c", "d"]
    assert header.metadata == {"format": "pt"}
    assert header.data_start == len(GOOD_FILE) - GOOD_NBYTES
    assert header.file_size == len(GOOD_FILE)
    first, last = header.tensors["a"], header.tensors["d"]
    assert (first.dtype, first.torch_dtype, first.shape, first.nbytes) == ("F32", "float32", (2, 3), 24)
    assert (last.start, last.stop, last.torch_dtype) == (32, 42, "bfloat16")
    with pytest.raises(TypeError):
        header.tensors["a"] = first  # type: ignore[index]


def test_data_order_not_text_order() -> None:
    """Tensors come in the order of their data, whatever the order in the text."""
    header = parse_file(make_file({"z": entry("U8", [2], 2, 4), "y": entry("U8", [2], 0, 2)}, bytes(4)))
    assert list(header.tensors) == ["y", "z"]


@pytest.mark.parametrize("dtype", sorted(NBITS))
def test_dtype_agrees_with_reference_reader(dtype: str) -> None:
    """A19: every dtype of safetensors is known with its size; those that a torch tensor cannot hold are refused."""
    header, nbytes = layout({"a": (dtype, (8,))})
    file = make_file(header, bytes(nbytes))
    assert seen_by_reference(file)["a"][0] == dtype
    assert DTYPES[dtype].nbits == NBITS[dtype]
    if not DTYPES[dtype].torch_name:
        error = refusal_of(file)
        assert (error.code, error.tensor, len(error.problems)) == ("UNSUPPORTED_DTYPE", "a", 1)
        return
    assert parse_file(file).tensors["a"].torch_dtype == DTYPES[dtype].torch_name
    known = safetensors.torch._TYPES.get(dtype)
    if (mine := getattr(torch, DTYPES[dtype].torch_name, None)) is not None:
        assert known in (None, mine)
        assert mine.itemsize * 8 == NBITS[dtype]
        saved = safetensors.torch.save({"a": torch.zeros(8, dtype=torch.uint8).to(mine)})
        assert parse_file(saved).tensors["a"].dtype == dtype


def test_no_dtype_is_missing() -> None:
    """The table has every dtype that the reference reader names, and no other."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        seen_by_reference(make_file({"a": entry("F33", [1], 0, 4)}, bytes(4)))
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", str(caught.value))) - {"F33"}
    assert named == set(DTYPES) == set(NBITS)


AT_DTYPE, AT_SHAPE, AT_OFFSETS = (
    8 + len(text)
    for text in ('{"a":{"dtype":', '{"a":{"dtype":"F32","shape":', '{"a":{"dtype":"F32","shape":[1],"data_offsets":')
)
BAD_OFFSETS = (
    b"[-1,4]", b"[4,0]", b"[4]", b"[0,2,4]", b"[]", b"[0,18446744073709551616]", b"[0,99999999999999999999]",
    b"[0,4.0]", b"[0,-0]", b'["0","4"]', b"null", b"4", b"[0,[4]]", b"{}", b"[0,99999999999999999999999]",
)  # fmt: skip
BAD_NAMES = (
    "", "\0", "a\0b", "a\nb", "a\rb", "\x1b[31mred", "\x7f", "\x9b31m", "x" * 1025, "x" * 2**20, "../../etc/passwd",
    "..", "a/../b", "a\\..\\b", "\u202egnp.exe", "a\u2066b", "\u200f", "a\u2028b", "\u061c",
)  # fmt: skip

# (row, file, code, tensor, byte offset in the file; None: not pinned)
ROWS: list[tuple[str, bytes, str, str | None, int | None]] = [
    *[("A01", b"{" * size, "HEADER_TOO_SMALL", None, 0) for size in range(8)],
    ("A02", make_file(b""), "HEADER_EMPTY", None, 0),
    ("A02", make_file(b"", b"data"), "HEADER_EMPTY", None, 0),
    *[
        ("A03", make_file(b"{}", length=n), "HEADER_TOO_LARGE", None, 0)
        for n in (2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8)
    ],
    ("A04", make_file(b"{}", length=100_000_001), "HEADER_TOO_LARGE", None, 0),
    ("A04", make_file(b"{}", length=Limits().header_nbytes + 1), "HEADER_TOO_LARGE", None, 0),
    ("A05", make_file(b"{}", length=3), "HEADER_PAST_EOF", None, 0),
    ("A05", make_file(b"{}" + b" " * 100, length=103), "HEADER_PAST_EOF", None, 0),
    *[("A06", make_file(text), "HEADER_NOT_OBJECT", None, 8) for text in (b"[]", b"12", b"null", b'"x"', b"[{}]")],
    ("A07", make_file(b"\xef\xbb\xbf{}"), "HEADER_NOT_UTF8", None, 8),
    ("A07", make_file(b'{"a\xff":1}'), "HEADER_NOT_UTF8", None, 11),
    ("A07", make_file(b'{"a\xed\xa0\x80":1}'), "HEADER_NOT_UTF8", None, 11),
    ("A07", make_file(b'{"\xc0\x80":1}'), "HEADER_NOT_UTF8", None, 10),
    ("A07", one(json.dumps(F32).encode(), name=b'"\\ud800"'), "HEADER_NOT_UTF8", None, 9),
    ("A07", make_file(b'{"__metadata__":{"k":"\\udc00\\ud800"}}'), "HEADER_NOT_UTF8", None, 29),
    ("A08", make_file(b"{"), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b'{"a":'), "HEADER_BAD_JSON", None, 13),
    ("A08", make_file(b'{"a":{"dtype":"F32"'), "HEADER_BAD_JSON", None, 27),
    ("A08", make_file(b'{"a":{"shape":[1'), "HEADER_BAD_JSON", None, None),
    ("A08", make_file(b"{}{}"), "HEADER_BAD_JSON", None, 10),
    ("A08", make_file(b"{} x"), "HEADER_BAD_JSON", None, 11),
    ("A08", make_file(b"{}\0"), "HEADER_BAD_JSON", None, 10),
    ("A08", make_file(b"{/* */}"), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b"{}//"), "HEADER_BAD_JSON", None, 10),
    ("A08", make_file(b"{,}"), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b'{"a":{},}'), "HEADER_BAD_JSON", None, 16),
    ("A08", make_file(b"{'a':1}"), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b'{"a" 1}'), "HEADER_BAD_JSON", None, None),
    ("A08", make_file(b'{"a":{"x":[1 2]}}'), "HEADER_BAD_JSON", None, 18),
    ("A08", make_file(b'{"a":{"x":[1,]}}'), "HEADER_BAD_JSON", None, 18),
    ("A08", make_file(b'{"a":{"x":[[1,]]}}'), "HEADER_BAD_JSON", None, None),
    ("A08", make_file(b'{"a":tru}'), "HEADER_BAD_JSON", None, 13),
    ("A08", make_file(b'{"\\x":1}'), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b'{"a\nb":1}'), "HEADER_BAD_JSON", None, 9),
    ("A08", make_file(b"hello"), "HEADER_BAD_JSON", None, 8),
    *[
        ("A09", make_file(space + b"{}"), "HEADER_LEADING_SPACE", None, 8)
        for space in (b" ", b"\n", b"\t", b"\r", b"  ")
    ],
    *[("A10", make_file(b"{} " + space), "HEADER_BAD_PADDING", None, 11) for space in (b"\n", b"\t", b"\r", b"\n  ")],
    *[
        ("A11", shaped(text), "HEADER_BAD_JSON", None, None)
        for text in (b"[NaN]", b"[Infinity]", b"[-Infinity]", b"[01]", b"[+1]", b"[.5]", b"[1.]", b"[0x1]", b"[1_0]")
    ],
    ("A11", shaped(b"[1e400]"), "BAD_SHAPE", "a", AT_SHAPE),
    ("A11", make_file(b'{"__metadata__":{"k":NaN}}'), "HEADER_BAD_JSON", None, 29),
    ("A11", make_file(b'{"__metadata__":{"k":[[NaN]]}}'), "HEADER_BAD_JSON", None, None),
    ("A12", make_file(b'{"a":%b,"a":%b}' % ((make_header(F32),) * 2), bytes(4)), "DUPLICATE_TENSOR", "a", None),
    (
        "A12",
        make_file(b'{"a":%b,"a":%b}' % (make_header(F32), make_header(entry("I32", [1], 0, 4))), bytes(4)),
        "DUPLICATE_TENSOR",
        "a",
        None,
    ),
    ("A13", make_file(b'{"a":%b,"\\u0061":%b}' % ((make_header(F32),) * 2), bytes(4)), "DUPLICATE_TENSOR", "a", None),
    ("A14", make_file(b'{"__metadata__":{},"__metadata__":{}}'), "DUPLICATE_KEY", None, 27),
    ("A14", make_file(b'{"__metadata__":{"k":"1","k":"2"}}'), "DUPLICATE_KEY", None, 33),
    ("A14", make_file(b'{"__metadata__":{"k":"1","\\u006b":"1"}}'), "DUPLICATE_KEY", None, 33),
    ("A14", one(b'{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'), "DUPLICATE_KEY", "a", 28),
    *[
        ("A15", make_file(b'{"__metadata__":' + text + b"}"), "METADATA_TYPE", None, None)
        for text in (
            b"null",
            b"[]",
            b'"x"',
            b"1",
            b'{"k":1}',
            b'{"k":null}',
            b'{"k":{}}',
            b'{"k":["x"]}',
            b'{"k":[{}]}',
        )
    ],
    ("A15", make_file({"__metadata__": F32}, bytes(4)), "METADATA_TYPE", None, None),
    ("A16", fields(extra=1), "UNKNOWN_FIELD", "a", None),
    ("A16", fields(Dtype="F32"), "UNKNOWN_FIELD", "a", None),
    *[("A17", fields(**{field: None}), "MISSING_FIELD", "a", 9) for field in F32],
    *[
        ("A18", fields(dtype=dtype), "BAD_DTYPE", "a", None)
        for dtype in ("F33", "f32", "", "F32 ", 32, 1.5, True, ["F32"], {"x": 1}, "F32\0", "C128", "F8_E4M3FN")
    ],
    ("A18", one(b'{"dtype":null,"shape":[1],"data_offsets":[0,4]}'), "BAD_DTYPE", "a", AT_DTYPE),
    ("A19", make_file({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)), "UNSUPPORTED_DTYPE", "a", AT_DTYPE),
    ("A19", make_file({"a": entry("F4", [2], 0, 1)}, bytes(1)), "UNSUPPORTED_DTYPE", "a", AT_DTYPE),
    *[
        ("A20", shaped(text), "BAD_SHAPE", "a", AT_SHAPE)
        for text in (
            b"[-1]",
            b"[-0]",
            b"[1.0]",
            b"[2e0]",
            b'["1"]',
            b"[true]",
            b"1",
            b"null",
            b'"1"',
            b"[null]",
            b"[[1]]",
        )
    ],
    *[
        ("A20", shaped(text), "BAD_SHAPE", "a", AT_SHAPE)
        for text in (b"{}", b'{"0":1}', b"[1,[]]", b"[9" + b"9" * 5000 + b"]")
    ],
    *[
        ("A21", shaped(b"[" + b",".join([b"1"] * rank) + b"]"), "RANK_TOO_LARGE", "a", AT_SHAPE)
        for rank in (33, 65, 1000, 100_000)
    ],
    ("A22", shaped(b"[2, 18446744073709551614]"), "SIZE_OVERFLOW", "a", AT_SHAPE),
    ("A22", shaped(b"[2, 9223372036854775807]"), "SIZE_OVERFLOW", "a", AT_SHAPE),
    ("A22", shaped(b"[1099511627776,1099511627776,0]"), "SIZE_OVERFLOW", "a", AT_SHAPE),
    ("A23", make_file({"a": entry("F32", [0, 2**62], 0, 0)}), "DIM_TOO_LARGE", "a", AT_SHAPE),
    ("A23", make_file({"a": entry("F32", [0, 2**48 + 1], 0, 0)}), "DIM_TOO_LARGE", "a", AT_SHAPE),
    ("A23", make_file({"a": entry("F32", [0, 2**63, 4], 0, 0)}), "DIM_TOO_LARGE", "a", AT_SHAPE),
    *[("A24", offset_by(text), "BAD_OFFSETS", "a", AT_OFFSETS) for text in BAD_OFFSETS],
    ("A25", make_file({"a": entry("U8", [2], 2, 4)}, bytes(4)), "OFFSET_GAP", "a", 61),
    ("A25", make_file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3)), "OFFSET_GAP", "b", None),
    ("A25", make_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)), "OVERLAP", "b", None),
    ("A25", make_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, bytes(2)), "OVERLAP", "b", None),
    ("A25", make_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)), "OVERLAP", "b", None),
    ("A28", make_file({"a": F32}, bytes(3)), "SIZE_MISMATCH", None, None),
    ("A28", make_file({"a": F32}, bytes(5)), "SIZE_MISMATCH", None, None),
    ("A28", make_file({"a": F32}, bytes(4) + b"PK\x03\x04" + bytes(100)), "SIZE_MISMATCH", None, None),
    ("A28", make_file({"a": F32}, bytes(4) + b"\x80\x04."), "SIZE_MISMATCH", None, None),
    ("A28", make_file({}, b"\0"), "SIZE_MISMATCH", None, 10),
    ("A29", fields(shape=[2]), "SIZE_SHAPE_MISMATCH", "a", 9),
    ("A29", fields(shape=[0]), "SIZE_SHAPE_MISMATCH", "a", 9),
    ("A29", fields(dtype="F64"), "SIZE_SHAPE_MISMATCH", "a", 9),
    *[("A31", make_file({name: F32}, bytes(4)), "BAD_NAME", name, 9) for name in BAD_NAMES],
    *[("A33", one(b"[" * n + b"]" * n), "HEADER_TOO_DEEP", None, None) for n in (200, 1_000_000)],
    *[("A33", one(b"[" * n), "HEADER_TOO_DEEP", None, None) for n in (200, 1_000_000)],
    ("A33", one(b'{"x":' * 200 + b"1" + b"}" * 200), "HEADER_TOO_DEEP", None, None),
    ("A33", make_file(b'{"__metadata__":{"k":' + b"[" * 200 + b"]" * 200 + b"}}"), "HEADER_TOO_DEEP", None, None),
    ("A33", make_file(b"[" * 1_000_000), "HEADER_TOO_DEEP", None, None),
    *[
        ("A17", one(text), "BAD_TENSOR_INFO", "a", 13)
        for text in (b"1", b"null", b'"x"', b'["F32",[1],[0,4]]', b"[[]]")
    ],
]


@pytest.mark.parametrize(
    ("file", "code", "tensor", "offset"),
    [
        pytest.param(file, code, tensor, at, id=f"{row}-{number}-{code}")
        for number, (row, file, code, tensor, at) in enumerate(ROWS)
    ],
)
def test_bad_header_is_refused(file: bytes, code: str, tensor: str | None, offset: int | None) -> None:
    """Each row of group A is refused with its code, the tensor, the byte offset, and a text without raw bytes."""
    error = refusal_of(file)
    assert error.code == code
    first = error.problems[0]
    assert first.tensor == tensor
    assert first.file == "x.safetensors"
    if offset is not None:
        assert first.offset == offset
    text = str(error)
    assert code in text
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert len(text) < 10_000
    assert error.remedy


@pytest.mark.parametrize("size", [2**16, 2**20])
def test_huge_length_allocates_nothing(size: int) -> None:
    """A03: a length that the file only claims costs no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for claimed in (2**63, 2**64 - 1, 2**64 - 8, size * 2**20):
        with pytest.raises(HeaderError):
            parse_header_length(struct.pack("<Q", claimed), file_size=2**50)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024


def test_padding_of_spaces_is_accepted() -> None:
    """A10: spaces behind the header are what writers align the data with."""
    for num in range(20):
        header = parse_file(make_file(make_header({"a": F32}) + b" " * num, bytes(4)))
        assert header.data_start == 8 + len(make_header({"a": F32})) + num


def test_space_between_tokens_is_accepted() -> None:
    """White space between tokens means nothing, wherever JSON allows it."""
    text = json.dumps({"__metadata__": {"k": "v"}, **GOOD}, indent=3).encode().replace(b"\n", b"\r\n\t")
    assert parse_file(make_file(text, bytes(GOOD_NBYTES))).tensors == parse_file(GOOD_FILE).tensors
    spaced = json.dumps(GOOD).encode()
    assert parse_file(make_file(spaced, bytes(GOOD_NBYTES))).tensors == parse_file(GOOD_FILE).tensors


def test_shortcut_and_general_way_agree() -> None:
    """A header in the usual spelling and one that needs the general way give the same entries."""
    header, nbytes = layout({f"t{i}": ("F16", (i % 3 + 1, 2)) for i in range(50)})
    usual = parse_file(make_file(header, bytes(nbytes)))
    turned = {name: dict(reversed(value.items())) for name, value in header.items() if isinstance(value, dict)}
    assert parse_file(make_file(turned, bytes(nbytes))).tensors == usual.tensors
    escaped = make_header(header).replace(b"data_offsets", b"d\\u0061ta_offsets").replace(b"F16", b"F\\u00316")
    assert parse_file(make_file(escaped, bytes(nbytes))).tensors == usual.tensors


def test_zero_size_tensors_are_accepted() -> None:
    """Empty tensors take no bytes; several may stand at one offset, at the start, between and at the end."""
    header = {
        "e": entry("F32", [0], 4, 4),
        "a": entry("F32", [0, 3], 0, 0),
        "b": entry("F64", [5, 0, 7], 0, 0),
        "c": F32,
        "d": entry("U8", [0], 4, 4),
        "s": entry("F16", [], 4, 6),
    }
    tensors = parse_file(make_file(header, bytes(6))).tensors
    assert list(tensors) == ["a", "b", "c", "e", "d", "s"]
    assert tensors["s"].shape == ()
    assert parse_file(make_file({})).tensors == {}
    assert parse_file(make_file({"__metadata__": {}})).metadata == {}


def test_misaligned_data_is_accepted() -> None:
    """A30: where the data begins is no fault of the header; the loader copies into aligned memory."""
    header = parse_file(make_file(make_header({"u": entry("U8", [1], 0, 1), "f": entry("F32", [1], 1, 5)}), bytes(5)))
    assert header.tensors["f"].start == 1
    assert parse_file(make_file(make_header({"a": F32}) + b" ", bytes(4))).data_start % 4 != 0


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "layer.0.weight",
        "a b",
        "été",
        "层.0",
        "😀",
        "a..b",
        "...",
        "a/b",
        "/a",
        "{}",
        '"',
        "\\",
        "x" * 1024,
        "__m__",
    ],
)
def test_ordinary_names_are_accepted(name: str) -> None:
    """A31: printable text of any script is a name, dots and slashes included, escaped or not."""
    for ensure_ascii in (True, False):
        text = json.dumps({name: F32}, ensure_ascii=ensure_ascii).encode()
        assert list(parse_file(make_file(text, bytes(4))).tensors) == [name]


def test_all_problems_are_named_at_once() -> None:
    """P2: every fault of every tensor is in the one error, each with its tensor and offset."""
    header = {
        "__metadata__": {"k": 1},
        "bad\nname": entry("F32", [1], 0, 4),
        "dtype": entry("F33", [1], 4, 8),
        "shape": entry("F32", [-1], 8, 12),
        "size": entry("F32", [2], 12, 16),
        "both": {**entry("F99", [1.5], 20, 24), "extra": 1},
        "last": entry("F32", [1], 23, 27),
    }
    error = refusal_of(make_file(header, bytes(30)))
    assert [(p.code, p.tensor) for p in error.problems] == [
        ("METADATA_TYPE", None),
        ("BAD_NAME", "bad\nname"),
        ("BAD_DTYPE", "dtype"),
        ("BAD_SHAPE", "shape"),
        ("SIZE_SHAPE_MISMATCH", "size"),
        ("UNKNOWN_FIELD", "both"),
        ("BAD_DTYPE", "both"),
        ("BAD_SHAPE", "both"),
        ("OFFSET_GAP", "both"),
        ("OVERLAP", "last"),
        ("SIZE_MISMATCH", None),
    ]
    assert all(problem.offset is not None for problem in error.problems)
    text = make_header(header)
    for problem in error.problems[1:5]:
        at = (problem.offset or 0) - 8
        assert text[at : at + 1] in b'"['


def test_missing_fields_are_all_named() -> None:
    """A17: a tensor without any field has three problems, one for each."""
    error = refusal_of(make_file({"a": {}, "b": F32}, bytes(4)))
    assert [(p.code, p.tensor, p.expected) for p in error.problems] == [
        ("MISSING_FIELD", "a", field) for field in ("dtype", "shape", "data_offsets")
    ]


def test_overlap_names_both_tensors() -> None:
    """A25: an overlap and a gap name the tensor and the one before it."""
    error = refusal_of(make_file({"a": entry("U8", [2], 0, 2), "b\n": entry("U8", [2], 1, 3)}, bytes(3)))
    problem = error.problems[-1]
    assert (problem.code, problem.tensor, problem.expected, problem.found) == ("OVERLAP", "b\n", 2, 1)
    assert "'a'" in problem.message


def test_tensors_within_another_are_all_named() -> None:
    """A25: every tensor that lies within an earlier one overlaps it; the one behind it leaves no gap."""
    places = {"a": (0, 8), "b": (2, 4), "c": (4, 6), "d": (8, 9)}
    header = {name: entry("U8", [stop - start], start, stop) for name, (start, stop) in places.items()}
    error = refusal_of(make_file(header, bytes(9)))
    assert [(p.code, p.tensor, p.expected) for p in error.problems] == [("OVERLAP", "b", 8), ("OVERLAP", "c", 8)]


def test_size_mismatch_names_both_sizes() -> None:
    """A28: the size that the offsets ask for and the one that the file has are both said."""
    file = make_file({"a": F32}, bytes(5))
    problem = refusal_of(file).problems[0]
    assert (problem.expected, problem.found) == (len(file) - 1, len(file))
    assert problem.offset == len(file) - 1


def test_broken_json_comes_first() -> None:
    """A08: where the text breaks off, that is the first problem, with line and column, before those found so far."""
    error = refusal_of(make_file(b'{"a":{"dtype":"F33",\n  "shape":[1],"data_offsets":[0,4]},\n "b": ?}', bytes(4)))
    assert codes_of(error) == ["HEADER_BAD_JSON", "BAD_DTYPE"]
    assert "line 3 column 7" in str(error)


def test_number_of_problems_is_capped() -> None:
    """A file made of nothing but problems costs a bounded number of them."""
    text = b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}"
    assert len(refusal_of(make_file(text)).problems) == MAX_PROBLEMS


def test_limits_are_the_callers() -> None:
    """Every cap can be set, is inclusive, and is named when it is exceeded."""
    header, nbytes = layout({"ab": ("F32", (4, 2)), "c": ("F32", (1,))})
    file = make_file({"__metadata__": {"k": "v"}, **header}, bytes(nbytes))
    size = len(split_file(file)[0])
    parse_file(file, Limits(header_nbytes=size, num_tensors=2, rank=2, dim=4, name_length=2, num_metadata=1))
    for limits, code in [
        (Limits(header_nbytes=size - 1), "HEADER_TOO_LARGE"),
        (Limits(num_tensors=1), "HEADER_TOO_MANY_TENSORS"),
        (Limits(rank=1), "RANK_TOO_LARGE"),
        (Limits(dim=3), "DIM_TOO_LARGE"),
        (Limits(name_length=1), "BAD_NAME"),
        (Limits(num_metadata=0), "METADATA_TOO_LARGE"),
    ]:
        assert refusal_of(file, limits).code == code


def test_text_longer_than_its_file_is_refused() -> None:
    """The parser itself refuses a header that its file cannot hold, whoever calls it."""
    with pytest.raises(HeaderError) as caught:
        parse_header(b"{}", file_size=9)
    assert caught.value.code == "HEADER_PAST_EOF"
    with pytest.raises(HeaderError) as caught:
        parse_header(b"", file_size=9)
    assert caught.value.code == "HEADER_EMPTY"


def many(
    num: int, *, offsets: Callable[[int], tuple[int, int]] = lambda i: (i, i + 1), spelled: str = "data_offsets"
) -> bytes:
    """Return the text of a header of `num` one-byte tensors."""
    parts = (f'"{i}":{{"dtype":"U8","shape":[1],"{spelled}":[{offsets(i)[0]},{offsets(i)[1]}]}}' for i in range(num))
    return ("{" + ",".join(parts) + "}").encode()


def filled(head: bytes, unit: bytes, tail: bytes) -> bytes:
    """Return a header text of the size of our cap."""
    return head + unit * ((Limits().header_nbytes - len(head) - len(tail)) // len(unit)) + tail


BOMBS: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "A27-over-cap": (lambda: many(250_000), {"HEADER_TOO_MANY_TENSORS"}),
    "A27-escaped": (lambda: many(200_000, spelled="d\\u0061ta_offsets"), {"HEADER_TOO_MANY_TENSORS"}),
    "A27-overlap": (lambda: many(100_000, offsets=lambda i: (0, 1)), {"OVERLAP"}),
    "A27-overlap-over-cap": (lambda: many(250_000, offsets=lambda i: (0, 1)), {"HEADER_TOO_MANY_TENSORS"}),
    "A33-brackets": (lambda: filled(b'{"a":', b"[", b""), {"HEADER_TOO_DEEP"}),
    "A33-pairs": (lambda: filled(b'{"a":[', b"[],", b"[]]}"), {"HEADER_TOO_DEEP"}),
    "A33-objects": (lambda: filled(b'{"a":', b'{"a":', b""), {"HEADER_TOO_MANY_TENSORS"}),
    "A34-digits": (lambda: filled(b'{"a":{"dtype":"U8","shape":[', b"9", b'],"data_offsets":[0,1]}}'), {"BAD_SHAPE"}),
    "A34-scalar-digits": (lambda: filled(b'{"a":', b"9", b"}"), {"BAD_TENSOR_INFO"}),
    "A34-array": (lambda: filled(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0', b",0", b"]}}"), {"BAD_OFFSETS"}),
    "A34-rank": (
        lambda: filled(b'{"a":{"dtype":"U8","shape":[0', b",0", b'],"data_offsets":[0,0]}}'),
        {"RANK_TOO_LARGE"},
    ),
    "A34-strings": (lambda: filled(b'{"a":[""', b',""', b"]}"), {"BAD_TENSOR_INFO"}),
    "A34-open-array": (lambda: filled(b'{"a":[""', b',""', b""), {"HEADER_TOO_DEEP", "HEADER_BAD_JSON"}),
    "A34-nested-array": (lambda: filled(b'{"a":[[0', b",0", b"]]}"), {"HEADER_TOO_DEEP"}),
    "A34-members": (lambda: filled(b'{"":0', b',"":0', b"}"), {"BAD_NAME"}),
    "A34-fields": (lambda: filled(b'{"a":{"x":0', b',"x":0', b"}}"), {"UNKNOWN_FIELD"}),
    "A34-metadata-escapes": (lambda: filled(b'{"__metadata__":{"a":"', b"\\n", b'"}}'), {"SIZE_MISMATCH"}),
    "A34-metadata-open": (lambda: filled(b'{"__metadata__":{"a":"', b"\\n", b""), {"HEADER_BAD_JSON"}),
    "A34-quotes": (lambda: filled(b"{", b'"', b""), {"HEADER_BAD_JSON"}),
    "A34-backslashes": (lambda: filled(b'{"', b"\\", b""), {"HEADER_BAD_JSON"}),
    "A34-spaces": (lambda: filled(b'{"a"', b" ", b""), {"HEADER_BAD_JSON"}),
    "A31-name": (lambda: filled(b'{"', b"x", b'":0}'), {"BAD_NAME"}),
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_bomb_costs_little(bomb: str) -> None:
    """A27, A33, A34: no header within the cap costs more than a second of work or 64 MiB beside itself."""
    make, codes = BOMBS[bomb]
    text = make()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times_s = []
    for _ in range(3):  # the best of three: a busy machine slows work down, but never speeds it up
        began = time.thread_time()
        with pytest.raises(HeaderError) as caught:
            parse_header(text, file_size=8 + len(text) + 1)
        times_s.append(time.thread_time() - began)
        assert caught.value.code in codes
        if times_s[-1] < 1:
            break
    assert min(times_s) < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 * 1024


@pytest.mark.parametrize("claimed", [72 * 2**20, 95 * 2**20, 90_000_000])
def test_large_bomb_is_refused_by_its_length(claimed: int) -> None:
    """A27, A34: a million tensors, or 95 MiB of metadata, are refused by the first 8 bytes."""
    with pytest.raises(HeaderError) as caught:
        parse_header_length(struct.pack("<Q", claimed), file_size=claimed + 1_000_008)
    assert caught.value.code == "HEADER_TOO_LARGE"
    assert (caught.value.problems[0].expected, caught.value.problems[0].found) == (Limits().header_nbytes, claimed)


def test_braces_in_metadata_are_no_tensors() -> None:
    """A27: what counts is tensors; a config in the metadata may hold braces and the names of fields."""
    text = json.dumps([{"data_offsets": {}}] * 200)
    header = parse_file(make_file({"__metadata__": {"config": text}, "a": F32}, bytes(4)), Limits(num_tensors=10))
    assert header.metadata["config"] == text


def test_every_truncation_is_refused() -> None:
    """A35: no proper beginning of a good file is accepted, at any length."""
    for size in range(len(GOOD_FILE)):
        assert refusal_of(GOOD_FILE[:size]).problems


def test_every_bit_flip_is_refused_or_understood() -> None:
    """A36: a header with one bit flipped is refused, or read exactly as the reference reader reads it.

    Accepted flips are those that leave a valid, different header: another letter in a name or in the metadata, another
    dtype or order of the same size. No parser can tell; the digest of the header does (`WeightFile.header_sha256`).
    """
    data = bytes(range(GOOD_NBYTES))
    header, _ = split_file(GOOD_FILE)
    good = make_file(header, data)
    original = seen_by_us(good, parse_file(good))
    num_accepted = 0
    for bit in range(8 * (8 + len(header))):
        file = bytearray(good)
        file[bit // 8] ^= 1 << (bit % 8)
        try:
            parsed = parse_file(bytes(file))
        except HeaderError:
            continue
        num_accepted += 1
        seen = seen_by_us(bytes(file), parsed)
        assert seen == seen_by_reference(bytes(file))
        assert bytes(file[: parsed.data_start]) != good[: parsed.data_start]
        sizes = sorted(len(value[2]) for value in seen.values())
        assert sizes == sorted(len(value[2]) for value in original.values())
    assert 0 < num_accepted < 8 * len(header) // 10
