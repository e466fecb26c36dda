"""A version that stands proved beside the live one, and the record of how it came there.

Rules this module keeps:

- A stage ends once: it is committed, discarded or superseded, whichever comes first, and says so to whoever comes
  later.
- Keeping the object after that keeps no memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from torch import nn

from hotglm import seam
from hotglm.errors import DiscardedError, SlotStateError, SupersededError
from hotglm.slot.claim import Ending, Fate, StageClaim
from hotglm.slot.generation import Generation, State
from hotglm.slot.memory import MemoryPlan
from hotglm.slot.receipt import Origins, StageTiming
from hotglm.verdict import Verdict
from hotglm.version import Version
from hotglm.weights.yielding import PaceRecord

__all__ = ["RECEIPT_PARTS", "StageRecord", "Staged"]

RECEIPT_PARTS = (
    *("source", "verdict", "plan", "timings", "checks", "carried", "refreshed", "converted", "origins", "migration"),
    *("recompiles", "recaptures", "pace"),
)
"""What a receipt takes over from the stage as it is."""


class Staged:
    """A version that stands proved beside the live one, and waits to be committed.

    A context manager: leaving it discards what was not committed. Any thread may use it.

    Attributes:
        version: its version.
        number: the generation it will be.
        base: number of the generation that was live when it was staged; `commit` expects that one unless told
        otherwise.
        verdict: why it may take the live version's place.
        plan: where its memory came from.
        contract: what it promises.
        digest: digest of its weights, None where hashing was turned off.
        digests: digest of each tensor, by name.
        timings: how long each part took.
        checks: what was proved, in words.
        origins: where its bytes came from.
        migration: what was done to bring the weights to the code's layout, in words; empty where nothing was.
        recompiles: pieces of code that torch compiled while it was staged.
        recaptures: device graphs that torch recorded while it was staged.
        pace: where the load yielded, how much it worked and paused.
    """

    __hotglm_slot__ = True

    def __init__(
        self,
        generation: Generation,
        *,
        owner: object,
        base: int,
        record: StageRecord,
        on_discard: Callable[[Staged], object],
    ) -> None:
        """Made by `ModuleSlot.stage` only; `owner` is the slot's admission, which alone may commit it.

        Raises:
            ValueError: the record has no verdict or plan, as that of a stage that did not come to its end.
        """
        if record.verdict is None or record.plan is None:
            raise ValueError("a stage that was not decided and planned cannot be staged")
        self.owner = owner
        self._on_discard = on_discard
        self._fate = Fate()
        self._generation: Generation | None = generation
        self.base = base
        self.source = record.source
        self.version = generation.version
        self.number = generation.number
        self.contract = generation.contract
        self.digest = generation.digest
        self.digests = generation.digests
        self.verdict: Verdict = record.verdict
        self.plan: MemoryPlan = record.plan
        self.timings = tuple(record.timings)
        self.checks = record.checks
        self.carried = record.carried
        self.refreshed = record.refreshed
        self.converted = tuple(record.converted)
        self.origins = record.origins
        self.migration = record.migration
        self.recompiles, self.recaptures = record.recompiles, record.recaptures
        self.pace = record.pace

    @property
    def state(self) -> State:
        """Where it is: staged, committed (then live or later), or discarded."""
        ending = self._fate.ending
        return State.STAGED if ending is None else ending.state

    @property
    def module(self) -> nn.Module:
        """The proved module, for a last look; not to be written.

        Raises:
            DiscardedError, SupersededError: it is no longer staged.
        """
        return self.generation.module

    @property
    def generation(self) -> Generation:
        """The generation it will be.

        Raises:
            DiscardedError, SupersededError: it is no longer staged.
        """
        generation = self._generation
        if generation is None:
            raise self._spent()
        return generation

    def discard(self) -> bool:
        """Give the spare back; return whether it was still staged. A committed or discarded stage is left as it is."""
        ended = self.drop()
        if ended:
            self._on_discard(self)
        return ended

    def drop(self) -> bool:
        """Discard it without announcing that; for the slot itself, which announces it later."""
        return self._end("was discarded")

    def supersede(self, *, by: str) -> bool:
        """Discard it because a newer stage begins; return whether it was still staged."""
        return self._end(f"was superseded by {by}")

    def claim(self) -> StageClaim:
        """Return what one commit takes to make it live, and gives back if that fails."""
        return StageClaim(self._fate, refusal=self._spent)

    def release(self) -> None:
        """Let go of the generation after the commit, so that keeping this object keeps no memory."""
        self._generation = None

    def _end(self, reason: str) -> bool:
        ended = self._fate.decide(Ending(state=State.DISCARDED, reason=reason))
        if self.state is State.DISCARDED:
            self._generation = None  # again, if need be: whoever ended it may have been interrupted on the way here
        return ended

    def _spent(self) -> SlotStateError:
        ending = self._fate.ending
        reason = "has ended" if ending is None else ending.reason
        kind = SupersededError if "superseded" in reason else DiscardedError
        return kind(
            f"Expected a stage that waits for its commit, got version {self.version}, which {reason}.",
            remedy="stage the source again.",
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Discard it unless it was committed."""
        self.discard()

    def __repr__(self) -> str:
        """Name version, generation and state."""
        return f"<Staged version {self.version}, generation {self.number}, {self.state.value}>"


@dataclass(slots=True, kw_only=True)
class StageRecord:
    """What a stage has found out so far; survives its failure, for the receipt."""

    source: str = ""
    version: Version | None = None
    verdict: Verdict | None = None
    plan: MemoryPlan | None = None
    timings: list[StageTiming] = field(default_factory=list)
    checks: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    refreshed: tuple[str, ...] = ()
    converted: list[str] = field(default_factory=list)
    origins: Origins = field(default_factory=Origins)
    migration: tuple[str, ...] = ()
    recompiles: int = 0
    recaptures: int = 0
    pace: PaceRecord | None = None

    @contextmanager
    def timed(self, part: str, nbytes: int = 0) -> Iterator[None]:
        """Time one part of the stage."""
        started = time.perf_counter()
        try:
            seam.active.reach(f"stage.{part}")
            yield
        finally:
            self.timings.append(StageTiming(part=part, duration_s=time.perf_counter() - started, nbytes=nbytes))
