"""The bandwidth budget of a stage: on a manual clock, by the formula that weights/budget.py states."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hotglm
from hotglm.weights.budget import BURST_S, Budget, Unlimited
from hotglm.weights.workers import Cancellation

CALM = Cancellation()


@dataclass
class ManualClock:
    """Time that passes only while somebody sleeps."""

    now_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        with self.lock:
            self.now_s += duration_s


def make(rate: float, clock: ManualClock) -> Budget:
    return Budget(rate, clock=clock.read, sleep=clock.sleep)


@settings(max_examples=50)
@given(
    rate=st.integers(10**6, 10**9),
    pieces=st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 2)), min_size=1, max_size=12),
)
def test_a_budget_is_kept(rate: int, pieces: list[tuple[int, float]]) -> None:
    """Over any time t, at most rate * (t + 0.1 s) + one piece are moved."""
    clock = ManualClock()
    budget = make(rate, clock)
    moved: list[tuple[float, int]] = []
    for nbytes, pause_s in pieces:
        clock.sleep(pause_s)
        budget.take(nbytes, cancellation=CALM)
        moved.append((clock.now_s, nbytes))
    largest = max(nbytes for nbytes, _ in pieces)
    for first in range(len(moved)):
        for last in range(first, len(moved)):
            total = sum(nbytes for _, nbytes in moved[first : last + 1])
            assert total <= (rate * (moved[last][0] - moved[first][0] + BURST_S) + largest) * (1 + 1e-6)


def test_a_budget_is_used_up() -> None:
    """Whoever always has something to move gets the whole rate."""
    clock = ManualClock()
    budget = make(1000, clock)
    for _ in range(100):
        budget.take(100, cancellation=CALM)
    assert clock.now_s == pytest.approx((100 * 100 - 1000 * BURST_S) / 1000)


def test_threads_share_a_budget() -> None:
    """Threads that take from one budget together get no more than one would."""
    clock = ManualClock()
    budget = make(1000, clock)
    due = [budget._reserve(100) for _ in range(4)]
    assert due == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_waiting_ends_with_the_stage() -> None:
    """A stage that is cancelled does not wait out its budget."""
    clock, cancellation = ManualClock(), Cancellation()

    def sleep(duration_s: float) -> None:
        clock.sleep(duration_s)
        if clock.now_s > 1:
            cancellation.cancel(KeyboardInterrupt())

    budget = Budget(1.0, clock=clock.read, sleep=sleep)
    with pytest.raises(KeyboardInterrupt):
        budget.take(10**6, cancellation=cancellation)
    assert clock.now_s < 2


def test_without_a_limit_nothing_waits() -> None:
    """No budget is no wait, not even a look at the clock."""
    assert Unlimited().take(10**18, cancellation=CALM) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("kind", ["mapping", "live"])
def test_what_is_copied_from_memory_is_taken_from_the_budget(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a mapping, or of what is live, moves bytes as reading does."""
    taken: list[int] = []
    monkeypatch.setattr(Budget, "take", lambda budget, nbytes, *, cancellation: taken.append(nbytes))
    policy = hotglm.StagePolicy(max_bytes_per_s=1e6)
    slot = hotglm.ModuleSlot(nn.Linear(8, 8), name="m", version="1.0.0", policy=policy)
    state = {name: tensor.clone() for name, tensor in nn.Linear(8, 8).state_dict().items()}
    receipt = slot.update(state, version="1.0.1")
    nbytes = receipt.nbytes
    if kind == "live":
        state["bias"] = state["bias"] + 1
        hotglm.save_weights(state, tmp_path / "a.safetensors", version="1.0.2", name="m")
        slot.verify_live()
        taken.clear()
        assert slot.update(tmp_path / "a.safetensors").origins.copied_nbytes == 8 * 8 * 4
    assert sum(taken) == nbytes
