"""Exchanges of bytes in place that fail where a test wants them to."""

from __future__ import annotations

from hotglm import seam

__all__ = ["FailAt"]


class FailAt(seam.Seam):
    """Fails before the nth copy of an exchange."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def reach(self, place: str) -> None:
        if place == "exchange.copy":
            self.left -= 1
            if self.left == 0:
                raise MemoryError("planted")
