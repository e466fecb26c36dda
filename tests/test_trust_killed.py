"""A host or signer that is killed anywhere leaves the old state or the new one, never a memory that is none (P11)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.sweeping import directory, run_program, sweep

__all__ = ["directory"]

LEAST_CALLS = {"accept": 60, "rotate": 45, "init": 20, "init-again": 20, "sign": 40, "pack-signed": 100}
STEPS = {"pack-signed": 4}
"""Distance of the calls that are tried, where not all are: packing is swept by itself in test_store_killed.py."""


@pytest.mark.parametrize("name", LEAST_CALLS)
def test_a_killed_change_is_done_or_not(name: str, directory: Path) -> None:
    """SIGKILL in front of every call leaves the old state or the new one, and the next try works."""
    assert sweep(name, "kill", STEPS.get(name, 1), directory) >= LEAST_CALLS[name]


@pytest.mark.slow
def test_every_call_of_signed_packing_is_swept(directory: Path) -> None:
    """The long form: every call, and every write torn."""
    for how in ("kill", "torn"):
        assert sweep("pack-signed", how, 1, directory) > 0


@pytest.mark.parametrize("how", ["torn", "ENOSPC"])
@pytest.mark.parametrize("name", ["accept", "rotate", "init"])
def test_a_failing_change_is_done_or_not(name: str, how: str, directory: Path) -> None:
    """A call that fails, or a write that is torn, is a typed error or a kill; the old state or the new one is there."""
    assert sweep(name, how, 1 if how == "torn" else 3, directory) > 0


def test_the_sweep_finds_a_memory_that_is_not_replaced_whole(directory: Path) -> None:
    """Planted: a memory that is removed before it is written is found out (a test of the tests above)."""
    done = run_program("support.kill_sweep", "planted-accept", "kill", 1, directory)
    assert done.returncode != 0
    assert "TRUST_STATE_MISSING" in done.stderr
