"""Waiting for what other threads do, without a fixed sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["wait_until"]


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
    """Look at `condition` until it holds, at most for `timeout_s`; return whether it did."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.002)
    return True
