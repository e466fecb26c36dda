"""How a staged version ends: the first to say so decides, and a commit that was not made takes its word back.

Rules this module keeps:

- One atomic step decides (`dict.setdefault`), so there is no lock to wait for, to forget in a fork, or to meet again in
  a finaliser that discards while a commit is claiming; and no interrupt finds it half done.
- Only whoever has decided can take it back, whatever the others do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hotglm.problem import HotglmError
from hotglm.slot.generation import State

__all__ = ["Claim", "Ending", "Fate", "NoClaim", "StageClaim"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ending:
    """One way to end: the state it leads to, and a phrase that says why; never equal to another one."""

    state: State
    reason: str


class Fate:
    """How one staged version has ended, if it has."""

    __slots__ = ("_decided",)

    def __init__(self) -> None:
        """Start undecided."""
        self._decided: dict[str, Ending] = {}

    @property
    def ending(self) -> Ending | None:
        """What was decided; None while nothing is."""
        return self._decided.get("ending")

    def decide(self, ending: Ending) -> bool:
        """End it so, unless it has ended; return whether this is how it ends."""
        return self._decided.setdefault("ending", ending) is ending

    def revoke(self, ending: Ending) -> None:
        """Take `ending` back, if this is how it ended."""
        if self.ending is ending:  # nobody else can change it from here on
            self._decided.clear()


class Claim(Protocol):
    """What a commit says of the stage it makes live: taken right before the change, given back where none was made."""

    def take(self) -> None:
        """Mark it as committed, or raise because it is no longer to be."""

    def give_back(self) -> None:
        """Undo `take`, if it was done."""


class NoClaim:
    """The claim of a rollback: what it goes to is held, and nobody can discard it."""

    __slots__ = ()

    def take(self) -> None:
        """Let it through."""

    def give_back(self) -> None:
        """Change nothing."""


class StageClaim:
    """The claim of one commit to one staged version."""

    __slots__ = ("_ending", "_fate", "_refusal")

    def __init__(self, fate: Fate, *, refusal: Callable[[], HotglmError]) -> None:
        """Take what is to be decided; `refusal` makes the error where somebody else has."""
        self._fate = fate
        self._refusal = refusal
        self._ending = Ending(state=State.LIVE_ON_TRIAL, reason="was committed already")

    def take(self) -> None:
        """Mark it as committed.

        Raises:
            DiscardedError, SupersededError: it is no longer staged.
        """
        if not self._fate.decide(self._ending):
            raise self._refusal()

    def give_back(self) -> None:
        """Let it be committed again: this commit has changed nothing."""
        self._fate.revoke(self._ending)
