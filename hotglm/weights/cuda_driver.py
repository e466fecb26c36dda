"""What hotglm asks of the CUDA driver itself, because torch has no way of asking it.

Rules this module keeps:

- Whatever is asked for can be done without: where there is no driver, or where it refuses, the answer is None.
- Only functions that have been in the driver, with the same arguments, since CUDA 10.1. The runtime is never called: it
  would make a context on device 0 for a thread that has none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

__all__ = ["create_stream", "leaving_captures_alone"]

_THREAD_LOCAL = 1
"""`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`."""

_NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: not ordered with the default stream."""


@contextlib.contextmanager
def leaving_captures_alone() -> Iterator[None]:
    """Tell the driver that calls of this thread belong to no graph that another thread captures."""
    before = _exchange_capture_mode(_THREAD_LOCAL)
    try:
        yield
    finally:
        if before is not None:
            _exchange_capture_mode(before)


def create_stream(index: int) -> int | None:
    """Return the handle of a new stream of a device, ordered with nothing; None where the driver makes none.

    It belongs to the device's primary context, which is what torch uses and which stays for as long as the process.
    """
    driver = _find_driver()
    if driver is None:
        return None
    device, context, popped, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    try:
        if driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)):
            return None
        if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) or driver.cuCtxPushCurrent_v2(context):
            return None
        try:
            code: int = driver.cuStreamCreate(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(popped))
    except AttributeError:  # a function that this driver does not have
        return None
    return stream.value if code == 0 else None


def _exchange_capture_mode(mode: int) -> int | None:
    """Set how calls of this thread go with captures of others; return how before, None where the driver has no say."""
    driver = _find_driver()
    if driver is None:
        return None
    cell = ctypes.c_int(mode)
    try:
        code: int = driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(cell))
    except AttributeError:
        return None
    return cell.value if code == 0 else None


def _find_driver() -> ctypes.CDLL | None:
    global _driver  # noqa: PLW0603 - looked for once, and only where CUDA is used
    if _driver is None:
        with contextlib.suppress(OSError):
            _driver = ctypes.CDLL("libcuda.so.1")
    return _driver


_driver: ctypes.CDLL | None = None
