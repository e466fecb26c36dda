"""A publisher, label mover, collector or service that is killed anywhere leaves the old state or the new one (P11)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.sweeping import directory, run_program, sweep

__all__ = ["directory"]  # a fixture for every test here

ROOT = Path(__file__).resolve().parent.parent
HOWS = ("kill", "torn", "EIO", "ENOSPC", "EMFILE")
LEAST_CALLS = {
    "publish": 100,
    "publish-sharded": 120,
    "publish-shared": 90,
    "publish-known": 90,
    "label": 50,
    "remove-label": 10,
    "collect": 80,
    "collect-beside-reader": 70,
    "trial": 50,
    "failed-trial": 50,
    "create": 25,
    "pack": 100,
    "pack-in-place": 60,
}
"""About how many calls each change makes, a thousand in all: a sweep that ends earlier has not seen all of them."""


EVERY_SECOND = ("publish-sharded", "publish-shared", "publish-known", "collect-beside-reader")
"""What differs little from another one: of these every second call is tried; of all of them all in the long form."""


@pytest.mark.parametrize("name", LEAST_CALLS)
def test_a_killed_change_is_done_or_not(name: str, directory: Path) -> None:
    """D09, D10: SIGKILL in front of a call leaves the old state or the new one, and the next try works."""
    assert sweep(name, "kill", 2 if name in EVERY_SECOND else 1, directory) >= LEAST_CALLS[name]


@pytest.mark.parametrize("name", ["publish"])
def test_a_half_written_file_is_never_read(name: str, directory: Path) -> None:
    """D11: a kill in the middle of any write leaves nothing that is read."""
    assert sweep(name, "torn", 1, directory) >= 1


@pytest.mark.parametrize("name", ["publish", "trial"])
def test_a_failing_call_changes_nothing(name: str, directory: Path) -> None:
    """D12, D13, K06: a call that fails is a typed error, leaves the old state or the new one, and nothing open."""
    assert sweep(name, "ENOSPC", 4, directory) >= LEAST_CALLS[name]


def test_the_sweep_finds_a_planted_bug(directory: Path) -> None:
    """A label that is removed and written again, instead of replaced whole, is lost at some call, and that is seen."""
    done = run_program("support.kill_sweep", "planted-label", "kill", 1, directory)
    assert done.returncode != 0
    assert "of planted-label, kill" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", LEAST_CALLS)
def test_every_call_in_every_way(name: str, how: str, directory: Path) -> None:
    """The long form: every call of every change, killed, torn or failing, one by one."""
    assert sweep(name, how, 1, directory) >= (0 if how == "torn" else LEAST_CALLS[name])


@pytest.mark.parametrize(
    "num_kills",
    [
        100,
        pytest.param(10_000, marks=pytest.mark.slow),
        pytest.param(100_000, marks=pytest.mark.stress, id="long form"),
    ],
)
def test_a_storm_of_kills_leaves_a_whole_store(num_kills: int, directory: Path) -> None:
    """D17: processes that change one store at once and are killed at random lose nothing that was named or reported."""
    done = run_program("support.kill_storm", num_kills, directory)
    assert done.returncode == 0, done.stderr[-4000:]
