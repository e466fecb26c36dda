"""How far something long is, as it is told to a callback."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a stage or a release is: its current part, and bytes done of all bytes to do."""

    part: str
    done_nbytes: int
    total_nbytes: int
