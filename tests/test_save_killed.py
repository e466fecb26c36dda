"""A process that is killed while it saves leaves the old file or the new one (P11)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.model import save

ROOT = Path(__file__).resolve().parent.parent
SAVE = """
import os, signal, sys
import torch
from hotglm.model import save

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

replace = os.replace
{patch}
save.save_weights({{"w": torch.ones(2)}}, sys.argv[1], version="2.0.0")
"""


def read_version(path: Path) -> str:
    """Return the version that a slot takes from the file, having checked every digest in it."""
    module = nn.Module()
    module.register_buffer("w", torch.zeros(2))
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", accept="major")
    return str(slot.update(path).new_version)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ("os.write = kill", "1.0.1"),
        ("os.fsync = kill", "1.0.1"),
        ("os.replace = kill", "1.0.1"),
        ("os.replace = lambda *paths: (replace(*paths), kill())", "2.0.0"),
    ],
    ids=["before the write", "before the flush", "before the rename", "after the rename"],
)
def test_a_killed_save_leaves_one_whole_version(patch: str, expected: str, tmp_path: Path) -> None:
    """Killed before or after any step of a save, the path has one whole version, which loads with all its digests."""
    path = tmp_path / "w.safetensors"
    save.save_weights({"w": torch.zeros(2)}, path, version="1.0.1")
    command = [sys.executable, "-c", SAVE.format(patch=patch), str(path)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == -signal.SIGKILL
    assert read_version(path) == expected
