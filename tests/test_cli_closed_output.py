"""The command line where standard output takes nothing: a full disk, or a shell that closed it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.bytes_maker import entry, make_file


@pytest.mark.parametrize("words", ["inspect", "inspect --json", "--help", "--version"])
@pytest.mark.parametrize("where", [">/dev/full", ">&-", ">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_an_answer_that_cannot_be_written_is_an_error(words: str, where: str, tmp_path: Path) -> None:
    """Where standard output takes nothing, the exit code is 2 and standard error says why, without a traceback."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(make_file({"w": entry("F32", [1], 0, 4)}, bytes(4)))
    path = shlex.quote(str(file)) if "inspect" in words else ""
    command = f"{shlex.quote(sys.executable)} -m hotglm {words} {path} {where}"
    # Without a buffer, `argparse` itself drops the help that it cannot write, and nobody hears of it.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=120, env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "2>" in where or re.fullmatch("hotglm: [^\n]+\n", done.stderr)
