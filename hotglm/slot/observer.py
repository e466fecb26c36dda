"""Looking at a slot: its status, who holds old generations, and waiting until nobody does.

Rules this module keeps: looking costs the one who looks; no pass, commit or stage waits for it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

from hotglm.errors import DrainTimeoutError
from hotglm.model.compilations import count_captured, count_compiled
from hotglm.slot.core import SlotCore
from hotglm.slot.generation import Generation, Retired, State
from hotglm.slot.holders import Holder, find_passes, find_references
from hotglm.slot.spare import weights_nbytes
from hotglm.slot.status import GenerationStatus, Status, Watching

__all__ = ["attach_watcher", "find_holders", "read_status", "wait_drained"]

_POLL_S = 0.001

# Who looks after each slot, and tells about itself when asked. Tuples are replaced whole, so no lock is needed.
_watchers: weakref.WeakKeyDictionary[SlotCore, tuple[Callable[[], Watching], ...]] = weakref.WeakKeyDictionary()


def attach_watcher(core: SlotCore, describe: Callable[[], Watching]) -> Callable[[], None]:
    """Let `slot.status()` show what looks after the slot; return the function that ends this."""
    _watchers[core] = (*_watchers.get(core, ()), describe)

    def detach() -> None:
        _watchers[core] = tuple(one for one in _watchers.get(core, ()) if one is not describe)

    return detach


def read_status(core: SlotCore) -> Status:
    """Return what the slot is doing; see `ModuleSlot.status`."""
    live = core.admission.live
    staged = core.stager.staged
    return Status(
        name=core.settings.name,
        version=live.generation.version,
        number=live.generation.number,
        trial=live.trial,
        epoch=live.epoch,
        generations=(
            _describe(live.generation, "live", ()),
            *(_describe(held, "held", tuple(_find_runners(core, held))) for held in live.held),
            *(_describe_retired(core, retired) for retired in core.spares.retired if not retired.is_free),
        ),
        staged=staged.version if staged is not None and staged.state is State.STAGED else None,
        arenas_nbytes=core.spares.pool.nbytes,
        num_refused=core.num_refused,
        last_refusal=core.refusals[-1] if core.refusals else "",
        closed=core.admission.is_closed,
        swap=str(core.settings.swap),
        recompiles=count_compiled(live.generation.module),
        recaptures=count_captured(live.generation.module),
        watchers=tuple(describe() for describe in _watchers.get(core, ())),
    )


def find_holders(core: SlotCore) -> tuple[Holder, ...]:
    """Return who holds a generation that is gone; see `ModuleSlot.find_holders`."""
    found: list[Holder] = []
    for retired in core.spares.retired:
        if retired.is_free:
            continue
        found += core.spares.find_runners(retired)
        found += find_references(retired)
    return tuple(found)


def wait_drained(core: SlotCore, timeout_s: float | None) -> None:
    """Wait until only the live generation is in use; see `ModuleSlot.wait_drained`.

    Raises:
        DrainTimeoutError: it took longer.
    """
    started = time.monotonic()
    while True:
        busy = [holder for held in core.admission.live.held for holder in _find_runners(core, held)]
        core.publish(*core.note_drained())
        if not busy and not core.spares.retired:
            return
        if timeout_s is not None and time.monotonic() - started >= timeout_s:
            error = _drain_timeout(core, timeout_s, busy)
            core.add_context(error)
            raise error
        time.sleep(_POLL_S)


def _drain_timeout(core: SlotCore, timeout_s: float, busy: list[Holder]) -> DrainTimeoutError:
    running = [holder for retired in core.spares.retired for holder in core.spares.find_runners(retired)]
    texts = "\n".join(map(str, (*busy, *running)))
    return DrainTimeoutError(
        f"Expected old generations to be free within {timeout_s} s, got them still in use."
        f"{core.spares.describe_holders()}\n{texts}".rstrip(),
        remedy="end the named passes and sessions; slot.find_holders() names references.",
    )


def _find_runners(core: SlotCore, generation: Generation) -> list[Holder]:
    number = generation.number
    return [*core.sessions.find(number), *find_passes(generation.module, number)]


def _describe(generation: Generation, state: str, holders: tuple[Holder, ...]) -> GenerationStatus:
    return GenerationStatus(
        number=generation.number,
        version=generation.version,
        state=state,
        nbytes=weights_nbytes(generation),
        holders=holders,
    )


def _describe_retired(core: SlotCore, retired: Retired) -> GenerationStatus:
    return GenerationStatus(
        number=retired.number,
        version=retired.version,
        state="draining",
        nbytes=retired.nbytes,
        holders=tuple(core.spares.find_runners(retired)),
    )
