"""What the reference reader and writer (the `safetensors` package) make of a file, in plain values."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors

from hotglm.header import Header

__all__ = ["Seen", "metadata_by_reference", "seen_by_reference", "seen_by_us", "write_by_reference"]

Seen = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> dtype, shape and bytes of each tensor."""


def seen_by_reference(file: bytes) -> Seen:
    """Return what the reference reader makes of `file`; raises `SafetensorError` where it refuses."""
    found = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def seen_by_us(file: bytes, header: Header) -> Seen:
    """Return the same from a header of ours."""
    at = header.data_start
    return {e.name: (e.dtype, e.shape, file[at + e.start : at + e.stop]) for e in header.tensors.values()}


def metadata_by_reference(path: Path) -> Mapping[str, str]:
    """Return the metadata that the reference reader finds in the file at `path`."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def write_by_reference(
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]], metadata: Mapping[str, str] | None
) -> bytes:
    """Return the file that the reference writer makes of name -> dtype in its words, shape and bytes."""
    buffers = {name: ctypes.create_string_buffer(data, len(data)) for name, (_, _, data) in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=list(shape), data_ptr=ctypes.addressof(buffers[name]), data_len=len(data)
        )
        for name, (dtype, shape, data) in tensors.items()
    }
    return bytes(safetensors.serialize(specs, dict(metadata) if metadata is not None else None))
