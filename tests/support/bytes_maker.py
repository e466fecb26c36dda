"""Safetensors files byte by byte, right and wrong, for tests of everything that reads them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

__all__ = ["NBITS", "Fields", "entry", "layout", "make_file", "make_header", "split_file"]

Fields = dict[str, object]

NBITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Every dtype of safetensors 0.8 and its size in bits, written down apart from the library's own table."""


def make_header(header: Mapping[str, object] | bytes) -> bytes:
    """Return a header's text; bytes stay as they are."""
    return header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()


def make_file(header: Mapping[str, object] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file of `header` and `data`; `length` is what its first 8 bytes claim, by default the truth."""
    text = make_header(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: Sequence[object], start: object, stop: object) -> Fields:
    """Return the fields of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def layout(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[dict[str, object], int]:
    """Return the header of `tensors` (name -> dtype and shape), one behind the other, and the size of the data."""
    header: dict[str, object] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        nbits = NBITS[dtype]
        for size in shape:
            nbits *= size
        header[name] = entry(dtype, shape, start, start + nbits // 8)
        start += nbits // 8
    return header, start


def split_file(file: bytes) -> tuple[bytes, bytes]:
    """Return header text and data of a file whose length is right."""
    (nbytes,) = struct.unpack("<Q", file[:8])
    return file[8 : 8 + nbytes], file[8 + nbytes :]
