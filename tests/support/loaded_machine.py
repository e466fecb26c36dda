"""A machine that a load and a service share, in simulated time: what pieces cost, and what the service suffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hotglm.weights.pace import PIECE_NBYTES, Pace, Senses, rest
from hotglm.weights.workers import Cancellation
from hotglm.weights.yielding import Work, Yielding

__all__ = ["Machine", "Sample", "load"]


@dataclass
class Machine:
    """One thread's time. A piece costs `excess(now)` times what it costs alone, and first queues `queue(now)` of it."""

    excess: Callable[[float], float] = lambda now_s: 1.0
    queue: Callable[[float], float] = lambda now_s: 0.0
    now_s: float = 0.0
    used_s: float = 0.0
    queued_s: float = 0.0
    worked: list[tuple[float, float]] = field(default_factory=list)

    def work(self, alone_s: float) -> None:
        """Be busy with a piece, and note from when to when."""
        cost_s = alone_s * self.excess(self.now_s)
        wait_s = cost_s * self.queue(self.now_s)
        self.queued_s += wait_s
        self.now_s += wait_s
        self.worked.append((self.now_s, self.now_s + cost_s))
        self.used_s += cost_s
        self.now_s += cost_s

    def wait(self, seconds: float) -> None:
        """Pause, or wait for a disk."""
        self.now_s += seconds

    def read(self) -> float:
        """Return the time spent in the queue, as the clock of a queue."""
        return self.queued_s

    def close(self) -> None:
        """Do nothing, as the clock of a queue."""

    def senses(self) -> Senses:
        """Return what a pace may know of it."""
        return Senses(now=lambda: self.now_s, used=lambda: self.used_s, open_queue=lambda: self, sleep=self.wait)

    def slow(self, started_s: float, alone_s: float, *, slowdown: float) -> float:
        """Return what a pass of the service takes that begins at `started_s`: `1 + slowdown` as long beside a piece.

        Pieces were worked at before; later ones than the pass are not looked at.
        """
        now_s, left_s = started_s, alone_s
        for begun_s, ended_s in self.worked:
            if ended_s <= now_s:
                continue
            free_s = max(0.0, begun_s - now_s)
            if free_s >= left_s:
                break
            now_s, left_s = now_s + free_s, left_s - free_s
            beside_s = min(ended_s - now_s, left_s * (1 + slowdown))
            now_s, left_s = now_s + beside_s, left_s - beside_s / (1 + slowdown)
        return now_s + left_s - started_s


@dataclass(frozen=True)
class Sample:
    """The share at one time."""

    now_s: float
    share: float


def load(
    machine: Machine, policy: Yielding, *, num_pieces: int, piece_s: float = 0.001, disk_s: float = 0.0
) -> tuple[list[Sample], Pace]:
    """Work at pieces of one kind, each with a wait for a disk in it; return the share after each, and the pace."""
    pace = Pace(policy, senses=machine.senses())
    samples = []
    with pace.working(Cancellation()):
        for _ in range(num_pieces):
            rest(Work.HASH, PIECE_NBYTES)
            machine.wait(disk_s)
            machine.work(piece_s)
            samples.append(Sample(machine.now_s, pace.share))
        rest()
    return samples, pace
