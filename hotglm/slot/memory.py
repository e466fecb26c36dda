"""The arenas of a slot: planned before they are taken, lent in turns, given up to whoever will not let go.

Rules this module keeps:

- At most two copies of the weights: the live one and one more (P9). The one more is first of all the version that can
  be rolled back to, and becomes the spare when a stage needs it.
- Weights of at most `MemoryPolicy.small_nbytes` get a third arena, out of the fixed ring, so that a stage that fails
  leaves the rollback target untouched. For larger ones the user decides with `max_copies`.
- An arena that somebody outside still holds is never written; it is left to them and another one is taken, if the plan
  allows it (`[Note: lease]` in weights/arena.py).
- The plan is made, and may be refused, before anything is allocated or given up, on every device.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

from hotglm.errors import ArgumentError, MemoryPlanError
from hotglm.weights.arena import Arena
from hotglm.weights.layout import Region
from hotglm.weights.pinned_arena import PinnedArena
from hotglm.weights.split_arena import SplitArena

__all__ = [
    "RESERVE_NBYTES",
    "ArenaPool",
    "DevicePlan",
    "MemoryPlan",
    "MemoryPolicy",
    "read_available_nbytes",
    "verify_room",
]


RESERVE_NBYTES = 64 << 20
"""What a plan leaves to others: the passes that run, and the stacks and small objects of the stage's threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy:
    """How much memory a slot may use beside the live generation.

    Attributes:
        max_copies: copies of the weights, the live one included, 2 or more. With 2, a stage that has begun to fill the
            spare has used up the rollback target; with 3 it has not.
        small_nbytes: weights up to this size get one copy more than `max_copies`, in bytes.
        limit_nbytes: most bytes in all arenas of the slot, given-up ones included; None means what the machine, the
            container and the process limits leave.
        drain_timeout_s: how long a stage waits for passes to leave the memory it needs before it takes other memory,
            in seconds. Applies only while passes or sessions are running in it.
    """

    max_copies: int = 2
    small_nbytes: int = 64 << 20
    limit_nbytes: int | None = None
    drain_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ArgumentError: `max_copies` below 2, or something negative.
        """
        if self.max_copies < 2 or self.small_nbytes < 0 or self.drain_timeout_s < 0 or (self.limit_nbytes or 0) < 0:
            raise ArgumentError(
                f"Expected max_copies >= 2 and no negative size or time, got {self}.",
                remedy="a slot needs the live copy and a spare; use limit_nbytes to bound bytes.",
            )

    def count_copies(self, nbytes: int) -> int:
        """Return how many copies of weights of `nbytes` the slot may hold."""
        return self.max_copies + (1 if nbytes <= self.small_nbytes else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """The part of a spare that is on one device other than the processor.

    Attributes:
        name: of the device, `cuda:0`.
        nbytes: of the spare that are on it.
        available_nbytes: what it had free when the plan was made, with what the plan gives up there.
    """

    name: str
    nbytes: int
    available_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the spare's memory comes from.

    Attributes:
        nbytes: size of the spare.
        reuses: whether an arena that is free now is taken.
        retires: numbers of the held generations that are given up for it, the rollback targets that end here.
        allocates_nbytes: fresh memory, 0 where an arena is reused.
        available_nbytes: what the machine and its limits left when the plan was made; of the processor's memory.
        devices: the parts that are not in the processor's memory.
        image: where the image of what is exchanged in place lies, and why, if not where the live weights are.
        beside_nbytes: what is held beside the spare until the stage ends: where plain weights are quantised, these and
            what becomes of them.
    """

    nbytes: int
    reuses: bool
    retires: tuple[int, ...]
    allocates_nbytes: int
    available_nbytes: int
    devices: tuple[DevicePlan, ...] = ()
    beside_nbytes: int = 0
    image: str = ""

    def explain(self) -> str:
        """Return the plan as one sentence."""
        origin = (
            "a free arena"
            if self.reuses
            else f"{self.allocates_nbytes} fresh bytes of {self.available_nbytes} available"
        )
        given_up = (
            f"; gives up generation {', '.join(map(str, self.retires))} as rollback target" if self.retires else ""
        )
        parts = "".join(
            f"; {part.nbytes} of them on {part.name}, which has {part.available_nbytes} available"
            for part in self.devices
        )
        beside = (
            f" Beside it {self.beside_nbytes} bytes are held for plain weights and what they become."
            if self.beside_nbytes
            else ""
        )
        image = f" The image lies in {self.image}." if self.image else ""
        return f"The spare takes {self.nbytes} bytes from {origin}{parts}{given_up}.{beside}{image}"


class ArenaPool:
    """The arenas that belong to one slot. Changed by one thread at a time; any may ask for sizes."""

    def __init__(self) -> None:
        """Start with no memory."""
        self._arenas: list[Arena] = []
        # What tells that the last holder let go, and bytes; no arena, so that it can unmap itself then.
        self._given_up: list[tuple[Callable[[], object | None], int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes in all arenas of the slot, those that outsiders still hold included."""
        return sum(arena.nbytes for arena in self._arenas) + self.given_up_nbytes

    @property
    def given_up_nbytes(self) -> int:
        """Bytes in arenas that only outsiders still hold."""
        return sum(nbytes for lease, nbytes in list(self._given_up) if lease() is not None)

    def find_free(self, nbytes: int, regions: tuple[Region, ...] = ()) -> Arena | None:
        """Return the smallest free arena that holds `nbytes`, in those regions where there are any, or None."""
        fitting = [arena for arena in self._arenas if arena.is_free and arena.fits(nbytes, regions)]
        return min(fitting, key=lambda arena: arena.nbytes, default=None)

    def allocate(self, nbytes: int, regions: tuple[Region, ...] = ()) -> Arena:
        """Map a new arena; free ones that are too small for it are dropped first.

        Raises:
            MemoryPlanError: the system has no such memory.
        """
        self._arenas = [arena for arena in self._arenas if not arena.is_free or arena.fits(nbytes, regions)]
        self._given_up = [(lease, held) for lease, held in self._given_up if lease() is not None]
        arena = _make_arena(nbytes, regions)
        self._arenas.append(arena)
        return arena

    def give_up(self, arena: Arena) -> None:
        """Leave an arena to those who hold it; it unmaps itself when they let go."""
        if arena in self._arenas:
            self._arenas.remove(arena)
            self._given_up.append((arena.watch, arena.nbytes))

    def give_up_all(self) -> None:
        """Leave every arena to those who hold it."""
        for arena in list(self._arenas):
            self.give_up(arena)

    def trim(self) -> None:
        """Drop free arenas, so that a slot at rest holds no memory it has no use for."""
        self._arenas = [arena for arena in self._arenas if not arena.is_free]

    @property
    def lent(self) -> tuple[Arena, ...]:
        """The arenas that are in use."""
        return tuple(arena for arena in list(self._arenas) if not arena.is_free)

    @property
    def free(self) -> tuple[Arena, ...]:
        """The arenas that nobody uses; an allocation drops them first."""
        return tuple(arena for arena in list(self._arenas) if arena.is_free)

    @property
    def free_nbytes(self) -> int:
        """Bytes in them."""
        return sum(arena.nbytes for arena in self.free)


def _make_arena(nbytes: int, regions: tuple[Region, ...]) -> Arena:
    if not regions:
        return Arena(nbytes)
    pinned_for = regions[0].pinned_for
    return SplitArena(regions) if pinned_for is None else PinnedArena(nbytes, device=pinned_for)


def verify_fits(
    nbytes: int,
    *,
    host_nbytes: int,
    pool_nbytes: int,
    policy: MemoryPolicy,
    available_nbytes: int,
    devices: tuple[DevicePlan, ...],
    holders: str,
) -> None:
    """Return when `nbytes` of fresh memory are allowed, and there: `host_nbytes` of it here, the rest on devices.

    Raises:
        MemoryPlanError: they are not; the text names who holds old memory.
    """
    limit = policy.limit_nbytes
    if limit is not None and pool_nbytes + nbytes > limit:
        raise MemoryPlanError(
            f"Expected at most {limit} bytes in all arenas, got {pool_nbytes} and {nbytes} more.{holders}",
            remedy="let go of what holds old generations, or raise MemoryPolicy.limit_nbytes.",
        )
    for part in devices:
        if part.nbytes > part.available_nbytes:
            raise MemoryPlanError(
                f"Expected {part.nbytes} bytes of {part.name} for the spare, got {part.available_nbytes} "
                f"available.{holders}",
                remedy="free device memory, or let go of old generations.",
            )
    if host_nbytes and host_nbytes + RESERVE_NBYTES > available_nbytes:
        raise MemoryPlanError(
            f"Expected {host_nbytes} bytes of memory for the spare and {RESERVE_NBYTES} left for the service, "
            f"got {available_nbytes} available.{holders}",
            remedy="free memory, raise the container's or process's limit, or let go of old generations.",
        )


def verify_room() -> None:
    """Return when this process may still take what the threads of a stage need beside the spare.

    Not only for the stage's own sake: where no thread-local data can be had, the C library ends the process.

    Raises:
        MemoryPlanError: it may not.
    """
    if (available := _read_process()) < RESERVE_NBYTES:
        raise MemoryPlanError(
            f"Expected {RESERVE_NBYTES} bytes of address space for a stage to run in, got {available}.",
            remedy="raise the process's limit (RLIMIT_AS).",
        )


def read_available_nbytes() -> int:
    """Return how many bytes this process can still take: the least of machine, container and process limits."""
    return min(_read_machine(), _read_container(), _read_process())


_UNKNOWN = 1 << 62


def _read_machine() -> int:
    for line in _read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNKNOWN


def _read_container() -> int:
    limit, used = _read_text("/sys/fs/cgroup/memory.max").strip(), _read_text("/sys/fs/cgroup/memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return _UNKNOWN
    statistics = dict(line.split()[:2] for line in _read_text("/sys/fs/cgroup/memory.stat").splitlines())
    # Pages of files that nobody has used of late count as used, and are given back as soon as anybody asks.
    return int(limit) - int(used) + int(statistics.get("inactive_file", 0))


def _read_process() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return _UNKNOWN
    pages = _read_text("/proc/self/statm").split()
    return max(0, soft - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")) if pages else _UNKNOWN


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
