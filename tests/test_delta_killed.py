"""Deltas made, materialised, published and collected: killed anywhere, the old state or the new one is there (C15)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAST_CALLS = {"make-delta": 80, "materialize": 60, "publish-delta": 100, "collect-chain": 60}
STEPS = {"make-delta": 9, "materialize": 7, "publish-delta": 11, "collect-chain": 40}


@pytest.fixture
def directory() -> Iterator[Path]:
    """Yield a directory in memory where there is one: what is swept is order, and flushing a disk costs minutes."""
    memory = "/dev/shm"
    where = memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


def run_sweep(name: str, how: str, step: int, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run one sweep in a process of its own."""
    command = [sys.executable, "-m", "support.delta_sweep", name, how, str(step), str(directory)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)


@pytest.mark.parametrize("name", LEAST_CALLS)
def test_a_killed_change_is_done_or_not(name: str, directory: Path) -> None:
    """C15: SIGKILL in front of some calls leaves the old state or the new one, and the next try works."""
    done = run_sweep(name, "kill", STEPS[name], directory)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= LEAST_CALLS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST_CALLS)
@pytest.mark.parametrize("how", ["kill", "torn", "EIO", "ENOSPC", "EMFILE"])
def test_a_change_that_ends_at_any_call_is_done_or_not(name: str, how: str, directory: Path) -> None:
    """C15, long form: every call, killed, torn or failing."""
    done = run_sweep(name, how, 1, directory)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_sweep_finds_a_planted_bug(directory: Path) -> None:
    """S15: a collection that forgets what deltas build on is seen at once."""
    done = run_sweep("planted-collect", "kill", 50, directory)
    assert done.returncode != 0
    assert "cannot be made" in done.stderr
