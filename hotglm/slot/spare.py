"""Taking the spare: planning memory, ending rollback targets for it, waiting for the last pass, giving up what is held.

Rules this module keeps:

- Plan first: `plan_spare` changes nothing and may refuse; `take_spare` does what the plan said.
- Waiting is bounded, by a time and by sense: what no pass or session is running in will not be let go of by waiting.
- Whoever holds a generation past the wait is named in an event, and keeps the memory; it is never written under them.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from hotglm.errors import ConflictError
from hotglm.model.inspection import find_state
from hotglm.slot.admission import Admission
from hotglm.slot.generation import Generation, Retired
from hotglm.slot.holders import Holder, find_passes
from hotglm.slot.memory import ArenaPool, DevicePlan, MemoryPlan, MemoryPolicy, read_available_nbytes, verify_fits
from hotglm.slot.sessions import Sessions
from hotglm.weights import places
from hotglm.weights.arena import Arena, Lease
from hotglm.weights.device import Device
from hotglm.weights.layout import Layout, Region
from hotglm.weights.split_arena import SplitArena
from hotglm.weights.workers import Cancellation

__all__ = ["Spares", "TakenSpare", "weights_nbytes"]

_GRACE_S = 0.05
"""How long references that are on their way out are waited for where no pass or session is running."""

_MAX_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenSpare:
    """A free arena, the lease on it, and whether its memory has never been touched."""

    arena: Arena
    lease: Lease
    is_fresh: bool


@dataclass(slots=True, kw_only=True)
class Spares:
    """Memory of one slot: its arenas, and the generations that have left but may still be held.

    Any thread may look; `take` is for one thread at a time, which its lock sees to even when a stage that was given up
    (a timeout) comes back to life beside its successor.
    """

    admission: Admission
    sessions: Sessions
    policy: MemoryPolicy
    on_held: Callable[[Retired, tuple[Holder, ...]], None]
    pool: ArenaPool = field(default_factory=ArenaPool)
    _retired: dict[int, Retired] = field(default_factory=dict)
    _taking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def retired(self) -> tuple[Retired, ...]:
        """The generations that are neither live nor held, as far as they were not seen to be free yet."""
        return tuple(self._retired.values())

    def reset_lock_after_fork(self) -> None:
        """Replace the lock in a forked child, where the thread that may have held it does not exist."""
        self._taking = threading.Lock()

    def plan(self, nbytes: int, regions: tuple[Region, ...] = (), *, beside: Sequence[Layout] = ()) -> MemoryPlan:
        """Return where `nbytes` for a spare will come from; change nothing.

        Args:
            nbytes: of the layout.
            regions: where they are, if they are not all the processor's.
            beside: what else the stage will hold at the same time, in memory that is not the slot's.

        Raises:
            MemoryPlanError: they are not to be had within the policy and the limits.
        """
        available = read_available_nbytes()
        is_free = self.pool.find_free(nbytes, regions) is not None
        retires = () if is_free else self._choose_retired(nbytes)
        is_reused = is_free or any(self._has_room(generation, nbytes, regions) for generation in retires)
        if beside:
            self._verify_beside(beside, available_nbytes=available)
        if not is_reused:
            dropped = sum(weights_nbytes(generation) for generation in retires if generation.arena is not None)
            wanted = [(nbytes, regions), *((one.nbytes, one.regions) for one in beside)]
            verify_fits(
                sum(size for size, _ in wanted),
                host_nbytes=sum(_host_nbytes(size, parts) for size, parts in wanted),
                pool_nbytes=self.pool.nbytes - self.pool.free_nbytes - dropped,
                policy=self.policy,
                available_nbytes=available + self._count_returned(None, retires),
                devices=_add_up(plan for _, parts in wanted for plan in self._plan_devices(parts, retires)),
                holders=self.describe_holders(),
            )
        return MemoryPlan(
            nbytes=nbytes,
            reuses=is_free,
            retires=tuple(generation.number for generation in retires),
            allocates_nbytes=0 if is_reused else nbytes,
            available_nbytes=available,
            devices=self._plan_devices(regions, retires),
            beside_nbytes=sum(one.nbytes for one in beside),
        )

    def _verify_beside(self, beside: Sequence[Layout], *, available_nbytes: int) -> None:
        """Refuse what is to be held before anything is given up or a free arena is dropped, if it does not fit.

        Raises:
            MemoryPlanError: it does not.
        """
        verify_fits(
            sum(one.nbytes for one in beside),
            host_nbytes=sum(_host_nbytes(one.nbytes, one.regions) for one in beside),
            pool_nbytes=self.pool.nbytes,
            policy=self.policy,
            available_nbytes=available_nbytes,
            devices=_add_up(
                DevicePlan(
                    name=region.device.name,
                    nbytes=region.nbytes,
                    available_nbytes=region.device.read_free_nbytes(),
                )
                for region in (region for one in beside for region in one.regions)
                if region.device is not None
            ),
            holders=self.describe_holders(),
        )

    def _plan_devices(self, regions: tuple[Region, ...], retires: tuple[Generation, ...]) -> tuple[DevicePlan, ...]:
        return tuple(
            DevicePlan(
                name=region.device.name,
                nbytes=region.nbytes,
                available_nbytes=region.device.read_free_nbytes() + self._count_returned(region.device, retires),
            )
            for region in regions
            if region.device is not None
        )

    def _count_returned(self, device: Device | None, retires: tuple[Generation, ...]) -> int:
        """Return the bytes of a device that come back when `retires` and the free arenas are let go of."""
        freed = sum(_arena_nbytes(arena, device) for arena in self.pool.free)
        return freed + sum(_nbytes_on(device, generation) for generation in retires)

    def take(self, plan: MemoryPlan, regions: tuple[Region, ...] = (), *, cancellation: Cancellation) -> TakenSpare:
        """Return a lease for `plan`; what it gives up is given up now.

        Raises:
            MemoryPlanError: memory that was there when it was planned has gone.
            ConflictError: a rollback target that was to be given up is live again.
        """
        with self._taking:
            cancellation.raise_if_cancelled()
            for number in plan.retires:
                self._retire(number, cancellation)
            arena = self._find_free(plan.nbytes, regions)
            is_fresh = arena is None
            if arena is None:
                arena = self._allocate(plan.nbytes, regions)
            lease = arena.lend(regions)
            self.pool.trim()
            return TakenSpare(arena=arena, lease=lease, is_fresh=is_fresh)

    def _find_free(self, nbytes: int, regions: tuple[Region, ...]) -> Arena | None:
        arena = self.pool.find_free(nbytes, regions)
        strays = self._find_strays()
        if arena is not None or not strays:
            return arena
        gc.collect()  # what failed may have left its memory in a circle of references
        for stray in strays:
            if not stray.is_free:
                self.pool.give_up(stray)
        return self.pool.find_free(nbytes, regions)

    def _find_strays(self) -> list[Arena]:
        """Return arenas in use that no generation owns: by a stage that was given up, or whose module somebody kept."""
        live = self.admission.live
        owned = [generation.arena for generation in (live.generation, *live.held)]
        owned += [retired.arena for retired in self.retired]
        return [arena for arena in self.pool.lent if all(arena is not other for other in owned)]

    def _allocate(self, nbytes: int, regions: tuple[Region, ...]) -> Arena:
        self.pool.trim()
        verify_fits(
            nbytes,
            host_nbytes=_host_nbytes(nbytes, regions),
            pool_nbytes=self.pool.nbytes,
            policy=self.policy,
            available_nbytes=read_available_nbytes(),
            devices=self._plan_devices(regions, ()),
            holders=self.describe_holders(),
        )
        return self.pool.allocate(nbytes, regions)

    def close(self) -> None:
        """Stop holding anything for rollback, and give every arena to those who still use it."""
        with self._taking:
            for held in self.admission.live.held:
                self.retire_now(held)
            self.pool.give_up_all()

    def wait_until_free(self, retired: Retired, *, timeout_s: float, cancellation: Cancellation) -> bool:
        """Wait until nothing of `retired` is in use; return whether that came to be.

        Returns early where nobody is running in it: a reference that is merely kept does not go away by waiting. Then
        one garbage collection is tried, for modules that refer to themselves in a circle.
        """
        started = time.monotonic()
        pause, collected = 0.0, False
        while not retired.is_free:
            cancellation.raise_if_cancelled()
            elapsed = time.monotonic() - started
            if elapsed >= timeout_s:
                return False
            if elapsed > _GRACE_S and next(self.find_runners(retired), None) is None:
                if collected:
                    return retired.is_free
                gc.collect()
                collected = True
            time.sleep(pause)
            pause = min(_MAX_POLL_S, 2 * pause + 1e-4)
        return True

    def find_runners(self, retired: Retired) -> Iterator[Holder]:
        """Yield the passes and sessions that are running in a retired generation."""
        yield from self.sessions.find(retired.number)
        module = retired.module
        if module is not None:
            yield from find_passes(module, retired.number)

    def forget_free(self) -> tuple[Retired, ...]:
        """Forget the retired generations that nobody holds any more; return them, each to one caller only."""
        free = (self._retired.pop(retired.number, None) for retired in self.retired if retired.is_free)
        return tuple(retired for retired in free if retired is not None)

    def describe_holders(self) -> str:
        """Return one sentence on who holds old generations, empty when nobody does."""
        parts = []
        for retired in self.retired:
            if retired.is_free:
                continue
            runners = [holder.description for holder in self.find_runners(retired)]
            what = "; ".join(runners) or "references kept outside the slot (see slot.find_holders())"
            parts.append(f"generation {retired.number} ({retired.nbytes} bytes) is held by {what}")
        nbytes = sum(arena.nbytes for arena in self._find_strays())
        if nbytes:
            parts.append(
                f"{nbytes} bytes are held by a stage that has not ended, or by what was kept of one that failed"
            )
        return f" Still held: {'. '.join(parts)}." if parts else ""

    def _choose_retired(self, nbytes: int) -> tuple[Generation, ...]:
        live = self.admission.live
        num_too_many = 1 + len(live.held) + 1 - self.policy.count_copies(nbytes)
        # First what was rolled back from, then what was live the longest time ago, and the rollback target last.
        now, oldest_first = live.generation.number, tuple(reversed(live.held))
        order = sorted(oldest_first, key=lambda held: (held is live.before, held.number < now))
        return tuple(order[: max(0, num_too_many)])

    def _has_room(self, generation: Generation, nbytes: int, regions: tuple[Region, ...]) -> bool:
        return generation.arena is not None and generation.arena.fits(nbytes, regions)

    def retire_now(self, generation: Generation) -> Retired | None:
        """Stop holding a generation for rollback, and watch its memory from now on; None if it was not held."""
        retired = Retired(generation, nbytes=weights_nbytes(generation))
        if not self.admission.retire(generation):
            return None
        self._retired[retired.number] = retired
        return retired

    def _retire(self, number: int, cancellation: Cancellation) -> None:
        generation = next((held for held in self.admission.live.held if held.number == number), None)
        retired = None if generation is None else self.retire_now(generation)
        if retired is None and self.admission.live.generation.number != number:
            return  # a stage that nobody waits for any more has given it up since the plan was made
        if retired is None:  # a rollback made it live since then
            raise ConflictError(
                f"Expected generation {number} to be a rollback target still, got a rollback to it meanwhile.",
                remedy="stage again, on top of what is live now.",
            )
        del generation  # the last reference of the slot's own; what is left is somebody's (see slot/admission.py)
        if not self.wait_until_free(retired, timeout_s=self.policy.drain_timeout_s, cancellation=cancellation):
            if retired.arena is not None:
                self.pool.give_up(retired.arena)
            self.on_held(retired, tuple(self.find_runners(retired)))


def weights_nbytes(generation: Generation) -> int:
    """Return the bytes of a generation's weights: of its arena, or of the tensors it came with."""
    if generation.arena is not None:
        return generation.arena.nbytes
    return sum(tensor.numel() * tensor.element_size() for tensor in _find_tensors(generation))


def _add_up(plans: Iterable[DevicePlan]) -> tuple[DevicePlan, ...]:
    """Return one plan for each device, for all that is to be on it."""
    found: dict[str, DevicePlan] = {}
    for plan in plans:
        known = found.get(plan.name)
        found[plan.name] = plan if known is None else replace(plan, nbytes=plan.nbytes + known.nbytes)
    return tuple(found.values())


def _host_nbytes(nbytes: int, regions: tuple[Region, ...]) -> int:
    """Return how many bytes of a layout are in the processor's memory."""
    return nbytes - sum(region.nbytes for region in regions if region.device is not None)


def _arena_nbytes(arena: Arena, device: Device | None) -> int:
    if isinstance(arena, SplitArena):
        return arena.find_nbytes(device)
    return arena.nbytes if device is None else 0


def _nbytes_on(device: Device | None, generation: Generation) -> int:
    if generation.arena is not None:
        return _arena_nbytes(generation.arena, device)
    return sum(tensor.nbytes for tensor in _find_tensors(generation) if places.active.find(tensor) is device)


def _find_tensors(generation: Generation) -> list[torch.Tensor]:
    return list({id(entry.tensor): entry.tensor for entry in find_state(generation.module)}.values())
