"""What a release says about one of its files: how large it is, and which bytes it holds.

Rules this module keeps: values only; no IO, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FileEntry", "combine_pieces"]


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


def combine_pieces(hexadecimals: Sequence[str]) -> str:
    """Return the digest of a safetensors file from those of its header and its tensors, in file order (D2).

    >>> combine_pieces(["00" * 32])[:24]
    'safetensors:66687aadf862'
    """
    whole = hashlib.sha256(b"".join(bytes.fromhex(text) for text in hexadecimals))
    return f"safetensors:{whole.hexdigest()}"
