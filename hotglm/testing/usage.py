"""What a process has: descriptors, maps, threads, memory, objects; and whether a step that is repeated leaves any.

Rules this module keeps: the first half of the repetitions is not measured, because caches, the allocator and the slot's
own history fill in it; what is left behind after that grows with the number of steps, or it is no leak.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotglm.slot.generation import Generation
from hotglm.testing.waiting import wait_until
from hotglm.weights.arena import Arena

__all__ = ["Usage", "assert_no_leak"]

_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
_SETTLING_NBYTES = 4 << 20
_MAX_GROWTH_PER_STEP = 100
"""Bytes. A leaked arena is 16 KiB of memory per swap, a leaked generation hundreds of objects, tens of KiB; what may
grow is what the allocator has not given back: once `_SETTLING_NBYTES`, and 26 bytes per swap after that, as measured
over swaps 7,000 to 10,000."""
_VANISHING_S = 10.0
"""How long a thread that was joined may take to vanish from /proc."""
_KEPT_MAPS = 16
"""Stacks of ended threads that glibc keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What this process has at one moment.

    Attributes:
        descriptors: open file descriptors.
        maps: mapped ranges of memory.
        tasks: threads, those that are not Python's included.
        rss_nbytes: resident memory, in bytes.
        objects: objects that the garbage collector knows.
        generations: generations of slots.
        arenas: arenas of slots.
    """

    descriptors: int
    maps: int
    tasks: int
    rss_nbytes: int
    objects: int
    generations: int
    arenas: int

    @classmethod
    def look(cls) -> Usage:
        """Collect garbage, then look."""
        gc.collect()
        objects = gc.get_objects()
        return cls(
            descriptors=len(os.listdir("/proc/self/fd")),
            maps=len(Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()),
            tasks=len(os.listdir("/proc/self/task")),
            rss_nbytes=int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_NBYTES,
            objects=len(objects),
            generations=sum(type(item) is Generation for item in objects),
            arenas=sum(type(item) is Arena for item in objects),
        )


def assert_no_leak(
    step: Callable[[int], object], *, num: int = 100, max_objects_per_step: float = 32, max_new_tasks: int = 0
) -> None:
    """Run `step` `num` times, and see that the second half left nothing behind.

    Linux only. A step is one update, rollback, refusal or whatever is to leave nothing: descriptors, maps, threads,
    generations, arenas and memory must be what they were half-way.

    Args:
        step: called with 0, 1, 2 and so on.
        num: how often in all; at least 2.
        max_objects_per_step: objects that may stay per step. The history of a slot keeps its latest 1,000 changes, of a
            few objects each; a leaked generation is hundreds of objects. Past 1,000 changes 0.1 is enough.
        max_new_tasks: threads that may stay: those of a thread pool that your model starts on its own.

    Raises:
        AssertionError: with everything that grew.
    """
    half = num // 2
    for index in range(half):
        step(index)
    before = Usage.look()
    for index in range(half, num):
        step(index)
    after = Usage.look()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before.tasks + max_new_tasks, timeout_s=_VANISHING_S)
    tasks = len(os.listdir("/proc/self/task"))
    num_steps = num - half
    grown = [
        f"{name} {old} -> {new}"
        for name, old, new, limit in (
            ("descriptors", before.descriptors, after.descriptors, before.descriptors),
            ("maps", before.maps, after.maps, before.maps + _KEPT_MAPS),
            ("threads", before.tasks, tasks, before.tasks + max_new_tasks),
            ("generations", before.generations, after.generations, before.generations),
            ("arenas", before.arenas, after.arenas, before.arenas),
            ("objects", before.objects, after.objects, before.objects + max_objects_per_step * num_steps),
            (
                "resident bytes",
                before.rss_nbytes,
                after.rss_nbytes,
                before.rss_nbytes + _SETTLING_NBYTES + _MAX_GROWTH_PER_STEP * num_steps,
            ),
        )
        if new > limit
    ]
    if grown:
        raise AssertionError(
            f"Expected {num_steps} steps to leave nothing behind, got {', '.join(grown)}. "
            "Remedy: look for who keeps generations, modules or tensors (slot.find_holders())."
        )
