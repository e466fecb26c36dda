"""Digests of tensors and of whole states.

Rules this module keeps:

- A tensor's digest is SHA-256 over its bytes in row-major order, as they stand in a safetensors file, so that anybody
  can recompute it with `sha256sum` on the byte range.
- A state's digest is SHA-256 over one line per tensor, sorted by name: it covers names, dtypes, shapes and bytes.
  Names are written as JSON strings, so that no name can imitate a line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from hotglm.weights.dtypes import dtype_name
from hotglm.weights.pace import cut_work
from hotglm.weights.yielding import Work

__all__ = ["combine_digests", "digest_tensor", "format_digest", "tensor_bytes", "view_buffer"]

ALGORITHM = "sha256"


def format_digest(hexadecimal: str) -> str:
    """Return the written form of a digest: `sha256:` and 64 hexadecimal digits."""
    return f"{ALGORITHM}:{hexadecimal}"


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `tensor` in row-major order as a flat uint8 tensor; a view where it is contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element is contiguous whatever its stride says


def digest_tensor(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, fetched from a device in one piece; the GIL is released while it runs."""
    data = tensor_bytes(tensor).cpu()
    if data.numel() == 0:
        return format_digest(hashlib.sha256().hexdigest())
    running = hashlib.sha256()
    for piece in cut_work(view_buffer(data), Work.HASH):
        running.update(piece)
    return format_digest(running.hexdigest())


def view_buffer(data: torch.Tensor) -> memoryview:
    """Return the memory of a flat uint8 tensor that is not empty, without a copy; `data` must outlive the view."""
    # ctypes, because torch has no buffer protocol of its own and numpy is not a dependency.
    overlay = (ctypes.c_char * data.numel()).from_address(data.data_ptr())
    return memoryview(overlay).cast("B")


def combine_digests(entries: Mapping[str, tuple[torch.dtype, Sequence[int], str]]) -> str:
    """Return the digest of a state from its tensors' dtype, shape and digest by name."""
    state = hashlib.sha256()
    for name in sorted(entries):
        dtype, shape, digest = entries[name]
        state.update(f"{json.dumps(name)} {dtype_name(dtype)} {list(shape)} {digest}\n".encode())
    return format_digest(state.hexdigest())
