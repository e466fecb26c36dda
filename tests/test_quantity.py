"""Settings that are numbers: what cannot be meant is refused when it is said, and not while it is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import hotglm

NO_COUNTS: tuple[Any, ...] = (0, -1, 1.5, math.nan, math.inf, True, "1", None, [])
NO_AMOUNTS: tuple[Any, ...] = (-1, math.nan, True, "1", [], 1j, 10**400)


@pytest.mark.parametrize("value", [value for value in NO_COUNTS if value is not None], ids=str)
def test_numbers_of_threads_are_whole(value: Any) -> None:
    """A number of threads that is none is refused where it is said; a proof that is asked for so reads nothing."""
    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="ranker", version="1.0.0")
    for make in (hotglm.StagePolicy, hotglm.InPlace, slot.verify_live):
        with pytest.raises(hotglm.ArgumentError):
            make(num_threads=value)
    slot.update({"weight": torch.eye(2), "bias": torch.zeros(2)}, version="1.0.1")
    assert slot(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [-1, 20, 0.5, math.nan, True, "1", None], ids=str)
def test_priorities_are_whole(value: Any) -> None:
    """Half a step of priority cannot be taken: no thread may find that out when it is to load weights."""
    with pytest.raises(hotglm.ArgumentError, match="bad nice"):
        hotglm.StagePolicy(nice=value)


@pytest.mark.parametrize("value", NO_AMOUNTS, ids=lambda value: str(value)[:8])
def test_times_rates_and_shares_are_amounts(value: Any) -> None:
    """Times, rates and shares are numbers of the size of a float; infinity is one where it can be meant."""
    with pytest.raises(hotglm.ArgumentError):
        hotglm.InPlace(timeout_s=value)
    for name in ("timeout_s", "max_bytes_per_s"):
        with pytest.raises(hotglm.ArgumentError, match=f"bad {name}"):
            hotglm.StagePolicy(**{name: value})
    for name in ("min_share", "max_share"):
        with pytest.raises(hotglm.ArgumentError):
            hotglm.Yielding(**{name: value})
    assert hotglm.InPlace(timeout_s=math.inf).timeout_s == math.inf


def test_a_share_that_would_take_for_ever_is_refused() -> None:
    """What is busy for `B` ends within `B / min_share`: a share of next to nothing promises no end."""
    for share in (5e-324, 1e-9):
        with pytest.raises(hotglm.ArgumentError, match=r"Expected 0\.001 <= min_share"):
            hotglm.Yielding(min_share=share)
