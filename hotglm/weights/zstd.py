"""Zstandard, where it is installed: from the standard library (Python 3.14) or the extra `delta`.

Rules this module keeps:

- Nothing is imported before it is needed; without the extra the rest of the library works.
- Decompressing is bounded by what the caller knows must come out: a frame that says something else, says nothing, wants
  a dictionary, ends early or goes on behind its end is refused; no frame makes anybody allocate more (C06).
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from hotglm.errors import MissingExtraError

__all__ = ["FrameError", "compress", "decompress", "has_zstd", "limit_frame"]

_LEVEL = 1
"""Of level 1, 3 and 9, on xor-ed weights in planes of bytes: within 10 % in size, and the first is the fastest."""

_MODULES = ("compression.zstd", "backports.zstd")


class FrameError(ValueError):
    """A frame is not what it must be; the text is the rest of a sentence that begins with "got"."""


def has_zstd() -> bool:
    """Tell whether Zstandard can be used here."""
    return _find_zstd() is not None


def compress(data: bytes | bytearray | memoryview) -> bytes:
    """Return `data` as one frame that names its own length; the GIL is released meanwhile.

    Raises:
        MissingExtraError: the extra `delta` is not installed.
    """
    frame: bytes = _need_zstd().compress(data, _LEVEL)
    return frame


def limit_frame(nbytes: int) -> int:
    """Return the most bytes that a frame of `nbytes` can have (`ZSTD_COMPRESSBOUND`, and room for a longer header).

    >>> limit_frame(1 << 20) - (1 << 20)
    4160
    """
    return nbytes + (nbytes >> 8) + 64


def decompress(frame: bytes | bytearray, nbytes: int) -> bytearray:
    """Return the `nbytes` that `frame`, the whole of it, holds; the GIL is released meanwhile.

    Raises:
        FrameError: it holds something else, or is no whole frame. Not more than `nbytes` were allocated.
        MissingExtraError: the extra `delta` is not installed.
    """
    zstd = _need_zstd()
    try:
        info = zstd.get_frame_info(frame)
        if info.decompressed_size != nbytes or info.dictionary_id:
            raise FrameError(f"a frame that announces {info.decompressed_size} bytes, not {nbytes}")
        decompressor = zstd.ZstdDecompressor()
        content = decompressor.decompress(frame, nbytes)
        if not decompressor.eof:  # the end of a frame may be seen only when more is asked for
            content += decompressor.decompress(b"", 1)
    except (zstd.ZstdError, EOFError) as error:
        raise FrameError(f"no frame: {error}") from error
    if not decompressor.eof:
        raise FrameError("a frame that ends early")
    if decompressor.unused_data:
        raise FrameError(f"{len(decompressor.unused_data)} bytes behind the end of a frame")
    if len(content) != nbytes:
        raise FrameError(f"{len(content)} bytes, not {nbytes}")
    return bytearray(content)


@functools.cache
def _find_zstd() -> Any | None:
    for name in _MODULES[0 if sys.version_info >= (3, 14) else 1 :]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _need_zstd() -> Any:
    zstd = _find_zstd()
    if zstd is None:
        raise MissingExtraError(
            "Expected Zstandard for a delta with codec 'xor-zstd', got none installed.",
            remedy="install it: pip install 'hotglm[delta]'; or stage the full release.",
        )
    return zstd
