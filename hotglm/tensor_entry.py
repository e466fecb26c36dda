"""One tensor of a safetensors header: its dtypes, our caps, its entry, and how the entry is read.

Rules this module keeps:

- Pure: no IO, no torch.
- Each fault is reported with the tensor's name and the byte of the value; one faulty field does not hide another.
- Where FAULTS.md has a row for a refusal, the comment cites it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hotglm.document import Report, Scanner, Value
from hotglm.errors import shorten_repr

__all__ = [
    "DEFAULT_LIMITS",
    "DTYPES",
    "DtypeInfo",
    "EntryReader",
    "Limits",
    "TensorEntry",
    "find_name_fault",
]

_MAX_NBITS = 8 * (2**63 - 1)
_MAX_OFFSET = 2**64 - 1
_FIELDS = ("dtype", "shape", "data_offsets")
_SIZE = rb"(?:0|[1-9][0-9]{0,15}+)"
_USUAL = re.compile(
    rb'\{"dtype": ?+"([A-Z0-9_]++)", ?+"shape": ?+\[((?:'
    + _SIZE
    + rb"(?:, ?+"
    + _SIZE
    + rb'){0,31}+)?+)\], ?+"data_offsets": ?+\[('
    + _SIZE
    + rb"), ?+("
    + _SIZE
    + rb")\]\}"
)
"""A tensor's fields as every known writer puts them. Only a shortcut: what it does not take goes the general way."""

_BAD_CHARACTER = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: NUL, newline, ANSI escapes
    "\u2028\u2029"  # line and paragraph separator
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # bidirectional controls
)
_PARENT = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeInfo:
    """A dtype of the format.

    Attributes:
        torch_name: its name in torch, without `torch.`; empty when no torch tensor of that shape can hold it.
        nbits: size of one element, in bits.
    """

    torch_name: str
    nbits: int


def _dtypes(**nbits_of: tuple[str, int]) -> Mapping[str, DtypeInfo]:
    return MappingProxyType({name: DtypeInfo(torch_name=torch, nbits=n) for name, (torch, n) in nbits_of.items()})


DTYPES: Mapping[str, DtypeInfo] = _dtypes(
    BOOL=("bool", 8),
    U8=("uint8", 8),
    I8=("int8", 8),
    U16=("uint16", 16),
    I16=("int16", 16),
    U32=("uint32", 32),
    I32=("int32", 32),
    U64=("uint64", 64),
    I64=("int64", 64),
    F16=("float16", 16),
    BF16=("bfloat16", 16),
    F32=("float32", 32),
    F64=("float64", 64),
    C64=("complex64", 64),
    F8_E4M3=("float8_e4m3fn", 8),
    F8_E4M3FNUZ=("float8_e4m3fnuz", 8),
    F8_E5M2=("float8_e5m2", 8),
    F8_E5M2FNUZ=("float8_e5m2fnuz", 8),
    F8_E8M0=("float8_e8m0fnu", 8),
    F4=("", 4),  # torch has float4_e2m1fn_x2, which packs two in one element: the shape would not be the file's
    F6_E2M3=("", 6),
    F6_E3M2=("", 6),
)
"""Every dtype of safetensors 0.8. Those without a torch name are refused as UNSUPPORTED_DTYPE (A19)."""


_LOADABLE = {name.encode(): (name, info.nbits) for name, info in DTYPES.items() if info.torch_name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps on what a file may ask of us. All are inclusive.

    Attributes:
        header_nbytes: length of a header, in bytes. Real ones take about 100 bytes a tensor.
        num_tensors: tensors in one file.
        rank: dimensions of one tensor.
        dim: size of one dimension, in elements.
        name_length: length of a tensor's name, in characters.
        num_metadata: entries in the metadata of one file.
        index_nbytes: length of a shard index, in bytes.
        num_index_tensors: tensors in a shard index.
        num_shards: files that a shard index may name; each takes a descriptor.
        config_nbytes: length of a `config.json`, in bytes.
    """

    header_nbytes: int = 16 * 2**20
    num_tensors: int = 100_000
    rank: int = 32
    dim: int = 2**48
    name_length: int = 1024
    num_metadata: int = 10_000
    index_nbytes: int = 64 * 2**20
    num_index_tensors: int = 500_000
    num_shards: int = 4096
    config_nbytes: int = 4 * 2**20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as the header describes it.

    Attributes:
        name: its name; free of control characters, but print it with `repr`.
        dtype: the format's word, e.g. `"F32"`; always one that torch has a name for.
        shape: elements in each dimension; empty for a scalar.
        start: first byte, counted from the start of the data section.
        stop: the byte behind the last one, counted likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def torch_dtype(self) -> str:
        """Name of its dtype in torch, e.g. `"float32"`."""
        return DTYPES[self.dtype].torch_name


def find_name_fault(name: str, *, max_length: int = DEFAULT_LIMITS.name_length) -> str | None:
    r"""Return what is wrong with a tensor's name, as the rest of a sentence, or None (A31).

    >>> find_name_fault("layer.0.weight"), find_name_fault("a\x1b[2J")
    (None, "a control character at index 1 ('\\x1b')")
    """
    if not name:
        return "an empty name"
    if len(name) > max_length:
        return f"one of {len(name)} characters"
    is_plain = name.isascii() and name.isprintable()
    if not is_plain and (match := _BAD_CHARACTER.search(name)) is not None:
        return f"a control character at index {match.start()} ({match[0]!a})"
    if ".." in name and _PARENT.search(name):
        return "a path to a parent directory"
    return None


class EntryReader:
    """Reads the entry of one tensor after the other, from where `scanner` stands."""

    def __init__(self, scanner: Scanner, *, limits: Limits, report: Report) -> None:
        """Read from `scanner`, under `limits`; refusals go to `report`."""
        self._scanner = scanner
        self._limits = limits
        self._report = report

    def read(self, name: str, at: int) -> TensorEntry | None:
        """Step over the value of `name`, whose key stands at byte `at`, and return it.

        Returns:
            The entry, to be believed only when nothing was reported; None when not even its offsets are known.
        """
        if (fault := find_name_fault(name, max_length=self._limits.name_length)) is not None:
            self._report.add("BAD_NAME", f"Expected a plain name, got {fault}.", at=at, tensor=name)
        if (usual := self._read_usual(name)) is not None:
            return usual
        fields = self._read_fields(name, at)
        offsets = self._read_offsets(name, fields.get("data_offsets"))
        dtype = self._read_dtype(name, fields.get("dtype"))
        shape = self._read_shape(name, fields.get("shape"), dtype=dtype)
        if offsets is None:
            return None
        if shape is not None and dtype is not None:
            self._verify_size(name, at, dtype=dtype, shape=shape, offsets=offsets)
        return TensorEntry(name=name, dtype=dtype or "", shape=shape or (), start=offsets[0], stop=offsets[1])

    def _read_usual(self, name: str) -> TensorEntry | None:
        """Step over fields that are written the usual way and are right; else stay there and return None."""
        match = _USUAL.match(self._scanner.text, self._scanner.pos)
        if match is None:
            return None
        word, sizes, first, last = match.groups()
        shape = tuple(map(int, sizes.split(b","))) if sizes else ()
        dtype, nbits = _LOADABLE.get(word, ("", 0))
        start, stop = int(first), int(last)
        if (
            math.prod(shape) * nbits != 8 * (stop - start)
            or start >= stop  # also when a size is zero: then another one may be too large
            or len(shape) > self._limits.rank
            or max(shape, default=0) > self._limits.dim
        ):
            return None
        self._scanner.pos = match.end()
        return TensorEntry(name=name, dtype=dtype, shape=shape, start=start, stop=stop)

    def _read_fields(self, name: str, at: int) -> dict[str, Value]:
        scanner = self._scanner
        if not scanner.take(b"{"):
            value = scanner.value()
            message = f"Expected an object with dtype, shape and data_offsets, got {value.show()}."
            self._report.add("BAD_TENSOR_INFO", message, at=value.at, tensor=name)
            return {}
        fields: dict[str, Value] = {}
        for key, key_at in scanner.members():
            if key in fields:  # A14
                message = f"Expected each field once, got {shorten_repr(key)} twice."
                self._report.add("DUPLICATE_KEY", message, at=key_at, tensor=name)
            elif key not in _FIELDS:  # A16
                message = f"Expected only dtype, shape and data_offsets, got {shorten_repr(key)}."
                self._report.add("UNKNOWN_FIELD", message, at=key_at, tensor=name, found=key)
            fields[key] = scanner.value()
        for field in _FIELDS:
            if field not in fields:
                message = f"Expected the field {field!r}, got none."
                self._report.add("MISSING_FIELD", message, at=at, tensor=name, expected=field)
        return fields

    def _read_dtype(self, name: str, value: Value | None) -> str | None:
        if value is None:
            return None
        dtype = self._scanner.decode(value) if value.kind == "string" else None
        if dtype is None or dtype not in DTYPES:
            message = f"Expected a dtype of the format, got {value.show()}."
            self._report.add("BAD_DTYPE", message, at=value.at, tensor=name)
            return None
        if not DTYPES[dtype].torch_name:
            message = f"Expected a dtype that torch can load, got {dtype!r}."
            self._report.add("UNSUPPORTED_DTYPE", message, at=value.at, tensor=name, found=dtype)
        return dtype

    def _read_shape(self, name: str, value: Value | None, *, dtype: str | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        rank = value.raw.count(b",") + 1
        if value.kind == "array" and rank > self._limits.rank and b'"' not in value.raw:  # A21, before it is read
            message = f"Expected at most {self._limits.rank} dimensions, got {rank}."
            self._report.add("RANK_TOO_LARGE", message, at=value.at, tensor=name, found=rank)
            return None
        shape = value.integers()
        if shape is None:
            message = f"Expected a list of sizes as shape, got {value.show()}."
            self._report.add("BAD_SHAPE", message, at=value.at, tensor=name)
            return None
        # Zero sizes are left out: the product must fit however a reader orders it, also for [2**40, 2**40, 0].
        nbits = math.prod(filter(None, shape)) * (DTYPES[dtype].nbits if dtype is not None else 8)
        is_dim_too_large = max(shape, default=0) > self._limits.dim
        if nbits > _MAX_NBITS and not (is_dim_too_large and 0 in shape):  # A22
            message = f"Expected a tensor of less than 2**63 bytes, got shape {list(shape)}."
            self._report.add("SIZE_OVERFLOW", message, at=value.at, tensor=name)
            return None
        if is_dim_too_large:  # A23
            message = f"Expected sizes up to {self._limits.dim}, got shape {list(shape)}."
            self._report.add("DIM_TOO_LARGE", message, at=value.at, tensor=name)
            return None
        return shape

    def _read_offsets(self, name: str, value: Value | None) -> tuple[int, int] | None:
        if value is None:
            return None
        match value.integers():
            case (start, stop) if start <= stop <= _MAX_OFFSET:
                return start, stop
        message = f"Expected data_offsets [start, stop] with start <= stop, got {value.show()}."
        self._report.add("BAD_OFFSETS", message, at=value.at, tensor=name)
        return None

    def _verify_size(self, name: str, at: int, *, dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> None:
        nbits = math.prod(shape) * DTYPES[dtype].nbits
        nbytes = offsets[1] - offsets[0]
        if nbits != 8 * nbytes:  # A29
            message = f"Expected {nbits / 8:.15g} bytes for {dtype} {list(shape)}, got data_offsets over {nbytes}."
            self._report.add("SIZE_SHAPE_MISMATCH", message, at=at, tensor=name, expected=-(-nbits // 8), found=nbytes)
