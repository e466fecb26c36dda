"""Reading what is on a device: to the host through the pinned ring, a window at a time.

Rules this module keeps:

- Nothing on the host is as large as a tensor but what the caller gives for it; what the device needs for a tensor that
  is not contiguous is a window's worth, or one of its rows.
- The host reads a window only after the event of the copy into it ("fetch" in [Note: streams], weights/device.py).
- Copies are on the side stream. Whoever reads what others may be writing puts the side stream behind them first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

from hotglm.weights import places
from hotglm.weights.device import Device
from hotglm.weights.digest import digest_tensor, format_digest, tensor_bytes, view_buffer
from hotglm.weights.pace import limit_piece, rest
from hotglm.weights.seals import Seal
from hotglm.weights.workers import Cancellation
from hotglm.weights.yielding import Work

__all__ = ["digest_in_place", "digest_on_device", "fetch_into", "fetch_sealed"]


def digest_in_place(tensor: torch.Tensor, *, cancellation: Cancellation) -> str:
    """Return the digest of a tensor's bytes, wherever it is.

    Raises:
        MemoryPlanError: it is on a device, and there is no pinned memory to be had.
        StageFailedError: the device has failed under every window of the ring.
    """
    device = places.active.find(tensor)
    return digest_tensor(tensor) if device is None else digest_on_device(tensor, device, cancellation=cancellation)


def digest_on_device(tensor: torch.Tensor, device: Device, *, cancellation: Cancellation) -> str:
    """Return the digest of the bytes of a tensor on `device`, hashed on the host by the calling thread.

    Raises:
        MemoryPlanError: there is no pinned memory to be had.
        StageFailedError: the device has failed under every window of the ring.
    """
    running = hashlib.sha256()
    _fetch(tensor, device, lambda _, data: running.update(view_buffer(data)), cancellation=cancellation)
    return format_digest(running.hexdigest())


def fetch_into(view: torch.Tensor, tensor: torch.Tensor, device: Device, *, cancellation: Cancellation) -> str:
    """Copy a tensor on `device` to a contiguous one of the same dtype and shape on the host; return its digest.

    What is hashed are the bytes that were fetched, before anybody else sees them.

    Raises:
        MemoryPlanError: there is no pinned memory to be had.
        StageFailedError: the device has failed under every window of the ring.
    """
    running, flat = hashlib.sha256(), tensor_bytes(view)

    def take(start: int, data: torch.Tensor) -> None:
        flat[start : start + data.numel()].copy_(data)
        running.update(view_buffer(data))

    _fetch(tensor, device, take, cancellation=cancellation)
    return format_digest(running.hexdigest())


def fetch_sealed(
    view: torch.Tensor, tensor: torch.Tensor, seal: Seal, device: Device, *, cancellation: Cancellation
) -> Seal | None:
    """Copy a tensor on `device` that is to have the digest of `seal` to the host; return the seal of the copy.

    None, and worthless values in `view`, where it has another digest.

    Raises:
        MemoryPlanError: there is no pinned memory to be had.
        StageFailedError: the device has failed under every window of the ring.
    """
    into = view if view.is_contiguous() else torch.empty(view.shape, dtype=view.dtype, device="cpu")
    if fetch_into(into, tensor, device, cancellation=cancellation) != seal.digest:
        return None
    if into is not view:
        view.copy_(into)
    return Seal(digest=seal.digest, is_finite=seal.is_finite)


def _fetch(
    tensor: torch.Tensor,
    device: Device,
    take: Callable[[int, torch.Tensor], object],
    *,
    cancellation: Cancellation,
) -> None:
    """Call `take` with the bytes of a tensor in row-major order, and where they begin, a window at a time."""
    if not tensor.numel():
        return
    ring = places.active.ring(device)
    start = 0
    with torch.no_grad(), device.staging(), device.submitting():
        for piece in _cut(tensor.detach(), limit_piece(ring.chunk_nbytes)):
            rest(Work.FETCH, piece.numel())
            with ring.lend(cancellation=cancellation) as window:
                data = window.fetch(piece)
                rest(Work.HASH, piece.numel())
                take(start, data)
            start += piece.numel()


def _cut(tensor: torch.Tensor, chunk_nbytes: int) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor in row-major order, flat and in pieces; of one that is not contiguous, copies."""
    num_rows = tensor.shape[0] if tensor.dim() else 1
    step = num_rows if tensor.is_contiguous() else max(1, chunk_nbytes // (tensor.nbytes // num_rows))
    for first in range(0, num_rows, step):
        flat = tensor_bytes(tensor[first : first + step] if tensor.dim() else tensor)
        for start in range(0, flat.numel(), chunk_nbytes):
            yield flat[start : start + chunk_nbytes]
