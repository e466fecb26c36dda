"""How long to wait before another try: twice as long each time, up to a limit, and not all processes at once.

Rules this module keeps: pure, and the same for the same arguments, so that a test can say when the next try is.
"""

from __future__ import annotations

import hashlib

__all__ = ["plan_pause_s"]

_MAX_DOUBLINGS = 40


def plan_pause_s(attempt: int, *, first_s: float, limit_s: float, seed: str) -> float:
    """Return the pause after failure number `attempt`, counted from 1, in seconds: between half and all of its bound.

    >>> bounds = [plan_pause_s(n, first_s=1.0, limit_s=8.0, seed="a") for n in range(1, 7)]
    >>> all(0.5 * bound <= pause <= bound for pause, bound in zip(bounds, (1, 2, 4, 8, 8, 8)))
    True

    Args:
        attempt: how many tries have failed.
        first_s: bound of the first pause.
        limit_s: bound of all pauses.
        seed: what tells those apart that should not all try at once.
    """
    bound_s = min(limit_s, first_s * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))
    digest = hashlib.sha256(f"{seed}/{attempt}".encode()).digest()
    return bound_s * (0.5 + int.from_bytes(digest[:4], "big") / 2**33)
