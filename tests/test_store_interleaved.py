"""Two processes that change one store at once: wherever the second comes, both are done or one is told (D17, D18)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.interleaving import PAIRS, PLANTS, interleave, plant
from support.sweeping import directory

__all__ = ["directory"]  # a fixture for every test here

LEAST_CALLS = 25
STEPS = {"publish one version": 4, "publish two versions": 4, "publish beside a collector": 4}
"""The short form: every how many calls of the first change the second is made; of the others, every second one."""


@pytest.mark.parametrize("name", PAIRS)
def test_a_change_inside_another_one(name: str, directory: Path) -> None:
    """D17, D18, S2, S4, S7 to S11: at any call of a change another one may be made, whole, by somebody else."""
    assert interleave(PAIRS[name], directory, step=STEPS.get(name, 2)) >= LEAST_CALLS


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_change_inside_another_one_at_every_call(name: str, directory: Path) -> None:
    """The long form: at every call."""
    assert interleave(PAIRS[name], directory, step=1) >= LEAST_CALLS


@pytest.mark.parametrize("name", PLANTS)
def test_a_lock_that_is_missing_is_found(name: str, directory: Path) -> None:
    """A store without one of its locks is found out by the same sweep (planted bugs)."""
    with plant(name), pytest.raises(AssertionError, match="the second change inside call"):
        interleave(PAIRS[PLANTS[name][2]], directory, step=1)
