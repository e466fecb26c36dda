"""What other threads ask of a watcher, left where its own thread finds it.

Rules this module keeps: single stores of single values, so that no lock is needed on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Requests"]


@dataclass(slots=True, kw_only=True)
class Requests:
    """What other threads ask of a watcher: single stores of single values, read by its thread.

    Attributes:
        is_closed: whether it is to end.
        is_paused: whether it is to leave everything as it is.
        is_hinted: whether something may have changed.
        is_asked: whether somebody wants a look now, and what failed tried again.
        failure: the generation that must go, and why; None where nobody said so.
        confirmed: the generation that somebody confirmed last.
    """

    is_closed: bool = False
    is_paused: bool = False
    is_hinted: bool = False
    is_asked: bool = False
    failure: tuple[int, str] | None = None
    confirmed: int = 0
