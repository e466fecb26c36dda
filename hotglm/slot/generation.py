"""Generations: one version inside a slot, from staging to spare memory.

Rules this module keeps:

- A generation is never changed once it is made; what changes is who refers to it, and what is known of its bytes.
- Its number only grows, and belongs in the key of every cache of results (`(generation.number, key)`): a cache filled
  under one version answers wrongly under the next.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from hotglm.contract import Contract
from hotglm.model.derived import Marks
from hotglm.model.inspection import find_state
from hotglm.model.twin import mark_loose_tensors
from hotglm.version import Version

if TYPE_CHECKING:
    from hotglm.slot.requantize import PlainOrigin
    from hotglm.trust.policy import Accepted
    from hotglm.weights.arena import Arena
    from hotglm.weights.exchange import Pair
    from hotglm.weights.seals import Seal

__all__ = ["TRANSITIONS", "Generation", "Retired", "State"]


class State(enum.Enum):
    """Where a version is on its way through a slot; `TRANSITIONS` says what may follow what."""

    STAGING = "staging"
    STAGED = "staged"
    LIVE_ON_TRIAL = "live, on trial"
    LIVE_CONFIRMED = "live, confirmed"
    DRAINING = "draining"
    SPARE = "spare"
    FAILED = "failed"
    DISCARDED = "discarded"


TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.STAGING: frozenset({State.STAGED, State.FAILED, State.DISCARDED}),
        State.STAGED: frozenset({State.LIVE_ON_TRIAL, State.DISCARDED}),
        State.LIVE_ON_TRIAL: frozenset({State.LIVE_CONFIRMED, State.DRAINING}),
        State.LIVE_CONFIRMED: frozenset({State.DRAINING}),
        # Held as rollback target, or waiting for its last pass: the same state, because passes may run in both.
        State.DRAINING: frozenset({State.LIVE_ON_TRIAL, State.LIVE_CONFIRMED, State.SPARE}),
        State.SPARE: frozenset({State.STAGING}),
        State.FAILED: frozenset(),
        State.DISCARDED: frozenset(),
    }
)


class Generation:
    """One version of the model inside a slot.

    As long as anybody refers to a generation, its module, or any tensor of it, its memory is not reused. Keep one for
    as long as a piece of work lasts (`with slot.acquire() as generation`), not longer.

    Attributes:
        number: grows by one with every generation of the slot; unique in it.
        version: what it is a version of.
        module: the module itself; the caller may run it, and must not write it.
        contract: what the version promises.
        digest: digest of its weights, `sha256:...`; None where hashing was turned off or not asked for.
        digests: digest of each tensor by name; empty where there is none.
        name: name of the slot.
        marks: its loose tensors as they were before passes ran in it.
        code_version: version of its code, whose layout its tensors have; another than `version` where older or newer
            weights were brought to it. A file of its tensors is to be given this one.
        is_migrated: whether its tensors were brought to its code by a migration.
        seals: what stages have found out about its bytes, by name of a tensor; for the stage that has the slot's turn.
        accepted: the proof that the slot's trust accepted the release that it came from; None where there is none.
        origin: the plain weights that it was quantised from by the slot, if it was; None where nothing is quantised.
        pairs: where weights are swapped in place, what of it is exchanged with the live module to make it live.
    """

    __slots__ = (
        "__weakref__",
        "_arena",
        "_lease",
        "accepted",
        "code_version",
        "contract",
        "digest",
        "digests",
        "is_migrated",
        "marks",
        "module",
        "name",
        "number",
        "origin",
        "pairs",
        "seals",
        "version",
    )

    def __init__(  # noqa: PLR0913 - all keyword-only, and only slots call it
        self,
        module: nn.Module,
        *,
        number: int,
        name: str,
        version: Version,
        contract: Contract,
        digests: Mapping[str, str] | None = None,
        digest: str | None = None,
        arena: Arena | None = None,
        lease: Callable[[], object | None] | None = None,
        marks: Marks | None = None,
        code_version: Version | None = None,
        is_migrated: bool = False,
        seals: Mapping[str, Seal] | None = None,
        accepted: Accepted | None = None,
        pairs: tuple[Pair, ...] = (),
        origin: PlainOrigin | None = None,
    ) -> None:
        """Put the parts together; made by slots only."""
        self.origin = origin
        self.accepted = accepted
        self.pairs = pairs
        self.is_migrated = is_migrated
        self.module = module
        self.number = number
        self.name = name
        self.version = version
        self.code_version = code_version if code_version is not None else version
        self.contract = contract
        self.digests: Mapping[str, str] = MappingProxyType(dict(digests or {}))
        self.digest = digest
        self._arena = arena
        self._lease = lease
        self.seals = dict(seals or {})
        self.marks = marks if marks is not None else mark_loose_tensors(module)

    @property
    def arena(self) -> Arena | None:
        """The arena its tensors lie in; None for the module that the slot was given."""
        return self._arena

    @property
    def lease(self) -> Callable[[], object | None] | None:
        """What tells whether its arena is still held on its behalf (`Lease.watch`); None without an arena."""
        return self._lease

    def housed_in(self, other: Generation, *, marks: Marks) -> Generation:
        """Return the same version, in the module and memory of another generation, whose tensors now hold it."""
        return Generation(
            other.module,
            number=self.number,
            name=self.name,
            version=self.version,
            contract=self.contract,
            digests=self.digests,
            digest=self.digest,
            arena=other.arena,
            lease=other.lease,
            marks=marks,
            code_version=self.code_version,
            is_migrated=self.is_migrated,
            pairs=other.pairs,
            seals=self.seals,
            accepted=self.accepted,
            origin=self.origin,
        )

    def __repr__(self) -> str:
        """Name the slot, the number and the version."""
        return f"<Generation {self.number} of {self.name!r}, version {self.version}>"


class Retired:
    """A generation that is neither live nor held: whose memory it is, and whether that is free yet.

    Holds nothing of the generation alive.
    """

    __slots__ = ("_arena", "_lease", "_module", "_tensors", "address", "nbytes", "number", "version")

    def __init__(self, generation: Generation, *, nbytes: int) -> None:
        """Note what can be asked later; the caller then lets go of the generation."""
        self.number = generation.number
        self.version = generation.version
        self.nbytes = nbytes
        self._module = weakref.ref(generation.module)
        self._arena = None if generation.arena is None else weakref.ref(generation.arena)
        self.address = 0 if generation.arena is None else generation.arena.address
        self._lease = generation.lease
        entries = find_state(generation.module) if self._arena is None else ()
        tensors = {id(tensor): tensor for entry in entries for tensor in (entry.tensor, entry.registered)}
        self._tensors = [weakref.ref(tensor) for tensor in tensors.values()]

    @property
    def arena(self) -> Arena | None:
        """The arena its tensors lie in, if it had one and the slot or somebody else still has it."""
        return None if self._arena is None else self._arena()

    @property
    def module(self) -> nn.Module | None:
        """The module, if somebody still holds it."""
        return self._module()

    def find_tensors(self) -> list[torch.Tensor]:
        """Return the tensors the module came with that somebody still refers to; none where it had an arena."""
        return [tensor for reference in self._tensors if (tensor := reference()) is not None]

    @property
    def is_free(self) -> bool:
        """Whether nothing of it is left in use."""
        if self._lease is not None:  # not the arena, which may be lent again by now
            return self._lease() is None
        return self._module() is None and all(reference() is None for reference in self._tensors)
