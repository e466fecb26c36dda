"""What a release says about one of its files: how large it is, and which bytes it holds.

Rules this module keeps: values only; no IO, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FileEntry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a release.

    Attributes:
        size: in bytes.
        digest: `sha256:` and 64 hexadecimal digits over its bytes, or `safetensors:` and as many over the digests of
            its header and tensors (D2).
    """

    size: int
    digest: str
