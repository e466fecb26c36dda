"""How much memory a piece of work takes at its peak, by the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["read_peak"]


def read_peak(work: Callable[[], object]) -> int:
    """Return by how many bytes the process rose above where it stood while `work` ran."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests gave back would be taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not let a process reset its peak")
    before = _read_status("VmRSS")
    work()
    return _read_status("VmHWM") - before


def _read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
