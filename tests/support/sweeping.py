"""Sweeps over every call of a change, each in a process of its own, in a directory that costs no disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["directory", "run_program", "sweep"]

_ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def directory() -> Iterator[Path]:
    """Yield a directory in memory where there is one: what is swept is order, and flushing a disk costs minutes."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


def run_program(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a program of `support` in a process of its own."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": f"{_ROOT / 'tests'}:{_ROOT}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)


def sweep(name: str, how: str, step: int, directory: Path, *, program: str = "support.kill_sweep") -> int:
    """Run one sweep and return the number of calls it saw."""
    done = run_program(program, name, how, step, directory)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)
