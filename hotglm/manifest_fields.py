"""What a release's manifest says, as values, and the paths that it may name.

Rules this module keeps:

- Values only: no IO, no torch. `hotglm.manifest` turns them into canonical bytes and back.
- A path that could lead out of the release, or mean another file on another system, has a fault (R6).
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from types import MappingProxyType

from hotglm.call_spec import CallSpec
from hotglm.config_spec import ConfigSpec
from hotglm.contract import Contract
from hotglm.delta_fields import DeltaFields
from hotglm.environment import Environment
from hotglm.file_entry import FileEntry
from hotglm.header import DTYPES
from hotglm.output_spec import OutputSpec
from hotglm.version import Version

__all__ = [
    "MANIFEST_NAME",
    "MAX_SEQUENCE",
    "RESERVED_PREFIX",
    "CodeEntry",
    "Manifest",
    "ReleasedTensor",
    "find_path_fault",
    "find_path_faults",
    "floor_time",
]

MANIFEST_NAME = "hotglm-manifest.json"
"""Name of the manifest in its directory (R1)."""

RESERVED_PREFIX = "hotglm-manifest."
"""What no other file of a release may begin with (R3): signatures stand there."""

MAX_SEQUENCE = 2**53 - 1
"""Largest sequence number (M5): every reader of JSON holds it exactly."""

_NBITS = {info.torch_name: info.nbits for info in DTYPES.values() if info.torch_name}
_MAX_PATH_NBYTES = 1024
_MAX_NAME_NBYTES = 255
_MAX_DEPTH = 16
_BAD_IN_PATH = re.compile(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedTensor:
    """One tensor of a release.

    Attributes:
        file: path of the file that holds it.
        dtype: torch's name without the prefix.
        shape: sizes of its dimensions.
        digest: `sha256:` and 64 hexadecimal digits over its bytes in row-major order (D1).
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 for a dtype that the format does not have."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes; 0 for a dtype that the format does not have."""
        return _NBITS.get(self.dtype, 0) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeEntry:
    """Model code that a release carries. It is declared and never loaded (M14).

    Attributes:
        entry: what would be loaded, as `package.module:Class`.
        files: paths of its files, sorted.
    """

    entry: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a release says about itself.

    Attributes:
        name: name of the model.
        version: its version.
        sequence: grows with every release of a store, from 1.
        files: every file of its directory by path, sorted; read-only.
        tensors: every tensor by name, sorted; read-only. Those of a delta are those that it leads to.
        weights: path of the safetensors file or shard index to load; None where the release carries no weights.
        config: fields of the model's config; None where unknown. Read-only at its first level.
        requires: PEP 508 requirements.
        capabilities: words for what the version can do.
        call: the call interface; None where unknown.
        config_spec: the config schema; None where unknown.
        outputs: what it gives back; None where unknown.
        created_at: when it was made, in UTC, to the second.
        created_in: what it was made on; None where unknown. Never decided upon, only compared.
        expires_at: when it must no longer be taken for new, in UTC, to the second; None for never.
        code: declared code; None where there is none.
        delta: what a delta says beyond that; None for a full release.
    """

    name: str
    version: Version
    sequence: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, ReleasedTensor]
    weights: str | None
    created_at: datetime
    config: Mapping[str, object] | None = None
    requires: tuple[str, ...] = ()
    capabilities: frozenset[str] = frozenset()
    call: CallSpec | None = None
    config_spec: ConfigSpec | None = None
    outputs: OutputSpec | None = None
    created_in: Environment | None = None
    expires_at: datetime | None = None
    code: CodeEntry | None = None
    delta: DeltaFields | None = None

    def __post_init__(self) -> None:
        """Take private read-only copies, sorted and cut to the second as they are written."""
        object.__setattr__(self, "created_at", floor_time(self.created_at))
        if self.expires_at is not None:
            object.__setattr__(self, "expires_at", floor_time(self.expires_at))
        object.__setattr__(self, "files", MappingProxyType(dict(sorted(self.files.items()))))
        object.__setattr__(self, "tensors", MappingProxyType(dict(sorted(self.tensors.items()))))
        if self.config is not None:
            object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    @property
    def kind(self) -> str:
        """`"full"`, or `"delta"` (M6)."""
        return "full" if self.delta is None else "delta"

    @property
    def result(self) -> Manifest:
        """The full manifest that a delta leads to; a full release is its own (D5)."""
        if self.delta is None:
            return self
        kept = {path: entry for path, entry in self.files.items() if path != self.delta.payload}
        return replace(self, files=kept | dict(self.delta.files), delta=None)

    @property
    def contract(self) -> Contract:
        """The contract of the release; kind, persistence and ties of its tensors are unknown, as in a file."""
        state = Contract.of_tensors({name: (spec.dtype, spec.shape) for name, spec in self.tensors.items()}).state
        return Contract(
            state=state,
            call=self.call,
            config=self.config_spec,
            outputs=self.outputs,
            capabilities=self.capabilities,
            requires=self.requires,
        )

    @property
    def total_nbytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(entry.size for entry in self.files.values())

    def is_expired(self, now: datetime) -> bool:
        """Tell whether it must no longer be taken for new at `now`; the instant of expiry is expired."""
        return self.expires_at is not None and now >= self.expires_at

    def __hash__(self) -> int:
        """Hash by what tells releases of one store apart."""
        return hash((self.name, self.version, self.sequence))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by value: a read-only mapping view can be neither."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        for name in ("files", "tensors", "config"):
            values[name] = None if values[name] is None else dict(values[name])
        return (_rebuild, (values,))


def _rebuild(values: dict[str, object]) -> Manifest:
    return Manifest(**values)  # type: ignore[arg-type]  # what __reduce__ took apart


def floor_time(instant: datetime) -> datetime:
    """Return an instant in UTC without its fraction of a second, as a manifest holds it (M12).

    >>> floor_time(datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)).isoformat()
    '2026-01-02T03:04:05+00:00'
    """
    return instant.astimezone(UTC).replace(microsecond=0)


def find_path_fault(path: str) -> str | None:
    r"""Return what is wrong with a path inside a release, as the rest of a sentence, or None (R6).

    >>> find_path_fault("tokenizer/vocab.json"), find_path_fault("../x")
    (None, "a part '..'")
    """
    if match := _BAD_IN_PATH.search(path):
        return f"a character that is not portable at index {match.start()} ({match[0]!a})"
    if unicodedata.normalize("NFC", path) != path:
        return "text that is not in normal form C"
    parts = path.split("/")
    if len(path.encode()) > _MAX_PATH_NBYTES or len(parts) > _MAX_DEPTH:
        return f"more than {_MAX_PATH_NBYTES} bytes or {_MAX_DEPTH} parts"
    for part in parts:
        if not part or part.startswith(".") or part.endswith((".", " ")):
            return f"a part {part!a}"
        if len(part.encode()) > _MAX_NAME_NBYTES:
            return f"a part of more than {_MAX_NAME_NBYTES} bytes"
    return f"a reserved name {parts[0]!a}" if parts[0].casefold().startswith(RESERVED_PREFIX) else None


def find_path_faults(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each path that may not stand beside the others, with what is wrong, as the rest of a sentence (R6, R7).

    >>> list(find_path_faults(["a/b", "A", "c"]))
    [('A', "a name that 'a/b' uses for a directory")]
    """
    paths = list(paths)
    files: dict[str, str] = {}
    directories: dict[str, str] = {}
    for path in paths:
        if (fault := find_path_fault(path)) is not None:
            yield path, fault
            continue
        folded = _fold(path)
        if folded in files:
            yield path, f"a twin of {files[folded]!a} where case is not told apart"
        files.setdefault(folded, path)
        for end in (at for at, character in enumerate(path) if character == "/"):
            spelt = directories.setdefault(_fold(path[:end]), path)
            if spelt[:end] != path[:end]:
                yield path, f"a twin of the directory of {spelt!a} where case is not told apart"
    for folded, path in files.items():
        if folded in directories:
            yield path, f"a name that {directories[folded]!a} uses for a directory"


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path.casefold())
