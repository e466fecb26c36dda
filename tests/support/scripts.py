"""Python text run in an interpreter of its own, with the checkout and tests/support on its path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

__all__ = ["run_script"]

_ROOT = Path(__file__).resolve().parents[2]


def run_script(
    text: str,
    *arguments: str,
    flags: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run `text` and return what came of it; a hang ends the test, and the interpreter."""
    path = f"import sys\nsys.path[:0] = [{str(_ROOT)!r}, {str(_ROOT / 'tests')!r}]\n"
    return subprocess.run(
        [sys.executable, *flags, "-c", path + textwrap.dedent(text), *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
