"""What a delta release says beyond what every release says: its base, its payload, and how each tensor comes about.

Rules this module keeps:

- Values only: no IO, no torch.
- A release is known by the digest of its *full* manifest (D5), whether it stands there full or as a delta: a base is
  that release, in either form.
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from hotglm.file_entry import FileEntry
from hotglm.version import Version

__all__ = ["CODECS", "PAYLOAD_NAME", "WHOLE", "BaseRelease", "CodecRule", "DeltaFields", "TensorDelta"]

PAYLOAD_NAME = "delta.safetensors"
"""What a payload is called when hotglm makes one; a manifest may call it otherwise."""

WHOLE = "whole"
"""The codec that carries the bytes of a tensor as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRule:
    """What a codec needs, as far as a manifest shows it.

    Attributes:
        num_parts: tensors of the payload that one tensor takes.
        has_base: whether it is applied to a tensor of the base.
    """

    num_parts: int
    has_base: bool


CODECS: Mapping[str, CodecRule] = MappingProxyType(
    {
        WHOLE: CodecRule(num_parts=1, has_base=False),
        "xor-zstd": CodecRule(num_parts=1, has_base=True),
        "sparse": CodecRule(num_parts=2, has_base=True),
    }
)
"""Every codec of the format, by name (X6). All are exact to the bit (C11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRelease:
    """The release that a delta is applied to.

    Attributes:
        version: its version.
        sequence: its number.
        digest: `sha256:` and 64 hexadecimal digits over its full manifest (D5).
    """

    version: Version
    sequence: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDelta:
    """How one tensor of the result comes about.

    Attributes:
        codec: name of the codec, one of `CODECS`.
        base: digest of the tensor of the same name that it is applied to; None where it needs none.
        parts: names of the tensors of the payload that it takes, in the order that the codec asks for.
    """

    codec: str
    base: str | None
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaFields:
    """What a delta carries, and what it leads to.

    Attributes:
        base: the release it is applied to.
        payload: path of the safetensors file in the release that carries the differences.
        tensors: every tensor of the result that is not the base's own of that name; sorted, read-only.
        files: the safetensors files of the result by path, none of which stands in this release; sorted, read-only.
        headers: for each of those, the tensor of the payload that holds its bytes in front of the data, so that
            materialising gives the author's own files; sorted, read-only.
    """

    base: BaseRelease
    payload: str
    tensors: Mapping[str, TensorDelta]
    files: Mapping[str, FileEntry]
    headers: Mapping[str, str]

    def __post_init__(self) -> None:
        """Take private read-only copies, sorted as they are written."""
        for name in ("tensors", "files", "headers"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))

    def __hash__(self) -> int:
        """Hash by what tells the deltas of one store apart."""
        return hash((self.base, self.payload))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by value: a read-only mapping view can be neither."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("tensors", "files", "headers"):
            values[name] = dict(values[name])
        return (_rebuild, (values,))


def _rebuild(values: dict[str, object]) -> DeltaFields:
    return DeltaFields(**values)  # type: ignore[arg-type]  # what __reduce__ took apart
