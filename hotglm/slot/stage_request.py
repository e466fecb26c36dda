"""What a stage is asked for, and the threads that it may use.

Rules this module keeps: everything is settled before the stage's thread starts; nothing here is changed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from hotglm.migration.registry import Migrations
from hotglm.model.grad_mode import GradMode
from hotglm.progress import Progress
from hotglm.slot.admission import Admission
from hotglm.slot.checks import StagePolicy
from hotglm.slot.generation import Generation
from hotglm.slot.requantize import Requantize
from hotglm.slot.source import Source
from hotglm.slot.staged import Staged
from hotglm.trust.policy import Trust
from hotglm.version import Bump, Version
from hotglm.weights.arena import Arena
from hotglm.weights.pace import AtWill, Pace, rest
from hotglm.weights.places import Streams
from hotglm.weights.workers import Cancellation, count_cores, run_tasks
from hotglm.weights.yielding import Work

__all__ = ["StageRequest"]

_MAX_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRequest:
    """Everything a stage needs to know, settled before its thread starts."""

    source: Source
    version: Version | None
    name: str
    accept: Bump
    policy: StagePolicy
    constants: tuple[str, ...]
    digests: Mapping[str, str]
    config: Mapping[str, Any] | None
    refresh: Callable[[nn.Module], object] | None
    requantize: Requantize | None
    migrations: Migrations | None
    trust: Trust | None
    mode: GradMode
    streams: Streams
    live: Generation
    number: int
    owner: Admission
    cancellation: Cancellation
    report: Callable[[Progress], object]
    on_discard: Callable[[Staged], object]

    @property
    def num_threads(self) -> int:
        """How many threads read, copy and hash."""
        # One core is left to the service: a thread that shares it gets little done there and lengthens every pass (two
        # cores, 1 GiB: worst pass 1.14 of p50 with two threads, 1.03 with one, and the same 0.76 s for the stage).
        policy = self.policy
        return policy.num_threads or (1 if policy.pace else min(_MAX_THREADS, max(1, count_cores() - 1)))

    def populate(self, arena: Arena, pace: Pace | AtWill) -> None:
        """Fault the whole of `arena` in, so that loads do not."""

        def fault(start: int) -> None:
            rest(Work.FAULT, pace.chunk_nbytes)
            arena.populate(start, pace.chunk_nbytes)

        run_tasks(
            [partial(fault, start) for start in range(0, arena.nbytes, pace.chunk_nbytes)],
            num_threads=self.num_threads,
            nice=self.policy.nice,
            cancellation=self.cancellation,
            name="hotglm-populate",
            within=pace.working,
        )
