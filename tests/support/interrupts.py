"""Ctrl-C at random moments of what changes and uses a slot."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from hotglm.errors import ThreadStartError

__all__ = ["interrupt_rounds"]


def interrupt_rounds(
    work: Callable[[int], object], verify: Callable[[int], object], *, num_rounds: int, longest_s: float
) -> None:
    """Run `work` with the number of each round, interrupted at a random moment, and `verify` behind it.

    Args:
        work: is interrupted between any two bytecodes.
        verify: is not interrupted.
        num_rounds: how many; a tenth of them have to be interrupted, or the test has shown nothing.
        longest_s: latest moment of an interrupt.
    """
    chance = random.Random(19)
    num_interrupted = 0
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(num_rounds):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, longest_s))
                    work(number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, ThreadStartError):  # `Condition.wait` may turn the one into the other
                num_interrupted += 1
            verify(number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert num_interrupted > num_rounds // 10
