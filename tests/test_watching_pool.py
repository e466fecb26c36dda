"""A pool of processes on one store: all converge, and none serves what was not confirmed after a crash (I04)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(("num_workers", "num_releases"), [(2, 15), pytest.param(4, 100, marks=pytest.mark.slow)])
def test_a_pool_follows_while_processes_are_killed(num_workers: int, num_releases: int) -> None:
    """I04, D17: killed at random while they try releases, the processes of a pool agree after each one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        command = [sys.executable, "-m", "support.watch_pool", str(num_workers), str(num_releases), directory]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    killed, refused = map(int, re.findall(r"\d+", done.stdout))
    assert killed >= num_releases // 4
    assert refused <= killed
