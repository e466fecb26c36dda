"""What a slot is doing, as data that can be printed, logged or served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from hotglm.slot.holders import Holder
from hotglm.version import Version

__all__ = ["GenerationStatus", "Status", "Watching"]


class Watching(Protocol):
    """What something that looks after a slot, such as a watcher, says of itself; its text is one line."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as data that `json.dumps` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStatus:
    """One generation that is live, held for rollback, or gone but still in somebody's hands.

    Attributes:
        number: its number.
        version: its version.
        state: `"live"`, `"held"` or `"draining"`.
        nbytes: memory of its weights, in bytes.
        holders: passes and sessions running in it, for those that are not live; empty and draining means that
            references outside the slot keep it (`slot.find_holders()` names them).
    """

    number: int
    version: Version
    state: str
    nbytes: int
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One look at a slot.

    Attributes:
        name: of the slot.
        version: live version.
        number: live generation.
        trial: whether it still awaits `confirm()`.
        epoch: commits and rollbacks so far.
        generations: the live one, the held ones, and those that are gone but not free.
        staged: version that waits for its commit, or None.
        arenas_nbytes: bytes in arenas, those left to outside holders included.
        num_refused: stages refused so far.
        last_refusal: text of the latest refusal, empty if there was none.
        recompiles: how often passes of the live generation had torch compile something since it was staged (in place:
            since it became live); 0 where staging has warmed up all that passes need. Compiled modules only
            (docs/compiled.md).
        recaptures: how often torch recorded a device graph in them, likewise (torch tells from 2.8 on).
        closed: whether the slot takes updates no longer.
        swap: which swap policy it has, and why.
        watchers: what the watchers of this slot are doing.
    """

    name: str
    version: Version
    number: int
    trial: bool
    epoch: int
    generations: tuple[GenerationStatus, ...]
    staged: Version | None
    arenas_nbytes: int
    num_refused: int
    last_refusal: str
    closed: bool
    swap: str = ""
    recompiles: int = 0
    recaptures: int = 0
    watchers: tuple[Watching, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as data that `json.dumps` takes."""
        plain = dataclasses.asdict(dataclasses.replace(self, watchers=()))
        plain["watchers"] = [watcher.to_dict() for watcher in self.watchers]
        plain["version"] = str(self.version)
        plain["staged"] = None if self.staged is None else str(self.staged)
        for generation in plain["generations"]:
            generation["version"] = str(generation["version"])
        return plain

    def __str__(self) -> str:
        """Return it as text of a few lines."""
        trial = ", on trial" if self.trial else ""
        lines = [f"{self.name}: version {self.version} (generation {self.number}{trial}), {self.epoch} changes so far"]
        for generation in self.generations:
            lines.append(
                f"  {generation.state:9} {generation.number:>5}  {generation.version}  "
                f"{generation.nbytes / 2**20:.1f} MiB"
            )
            lines += [f"    held by {holder.description}" for holder in generation.holders]
        lines += [f"  staged          {self.staged}"] if self.staged else []
        lines += (
            [f"  refused {self.num_refused}, the last: {self.last_refusal.splitlines()[0]}"] if self.num_refused else []
        )
        lines += [f"  {watcher}" for watcher in self.watchers]
        return "\n".join(lines)
