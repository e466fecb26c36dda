"""Proof of identity: what is live is hashed again and held against what was committed.

Rules this module keeps:

- Passes do not wait for it: workers of low priority read, and write nothing. Tensors that share memory are read once.
- Whatever it says is of one generation. Under `Flip` the generation is held, and nobody writes it; in place, what was
  read while a commit wrote is read again.
- Every tensor that differs is named, in one error.
- What is on a device is looked at there (`quick`), or fetched through the pinned ring, a window at a time. What the
  calling thread's stream was given before is seen, as on the processor.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from hotglm.errors import ArgumentError, LiveMismatchError, Problem, shorten_repr
from hotglm.model.inspection import find_state
from hotglm.progress import Progress
from hotglm.quantity import is_count
from hotglm.slot.core import SlotCore
from hotglm.slot.generation import Generation
from hotglm.slot.live import find_kept
from hotglm.version import Version
from hotglm.weights import places
from hotglm.weights.device import Device
from hotglm.weights.device_seals import take_fingerprints
from hotglm.weights.digest import combine_digests
from hotglm.weights.download import digest_on_device
from hotglm.weights.pace import AT_WILL, AtWill, Pace, make_pace
from hotglm.weights.seals import Seal, matches_seal, seal_tensor
from hotglm.weights.supply import Kept
from hotglm.weights.workers import Cancellation, count_cores, run_tasks, start_thread

__all__ = ["LiveProof", "verify_live"]

_NUM_ATTEMPTS = 3
"""How often it is tried beside commits in place; after that it keeps them out, as a pass does."""

_MAX_THREADS = 4
_SIGNAL_S = 0.25

_Ended: TypeAlias = "queue.SimpleQueue[int | BaseException | None]"
"""What workers tell the thread that waits: bytes that were read, what went wrong, or that all is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveProof:
    """What is live, as it was read.

    Attributes:
        slot: name of the slot.
        version: live version.
        number: live generation.
        digest: of all tensors whose digests are known; None where one is not.
        digests: of each tensor, by name: taken now, or confirmed now by a fingerprint that was taken with it.
        num_compared: how many of them were held against what was committed; the others had no digest before.
        nbytes: bytes that were read.
        duration_s: how long that took, in seconds.
    """

    slot: str
    version: Version
    number: int
    digest: str | None
    digests: Mapping[str, str]
    num_compared: int
    nbytes: int
    duration_s: float


def verify_live(
    core: SlotCore, *, quick: bool, num_threads: int | None, progress: Callable[[Progress], object] | None
) -> LiveProof:
    """Return the proof of what is live; see `ModuleSlot.verify_live`."""
    if num_threads is not None and not is_count(num_threads):
        raise ArgumentError(
            f"Expected at least one thread, got {shorten_repr(num_threads)}.", remedy="leave num_threads out."
        )
    started, pace = time.perf_counter(), make_pace(core.settings.policy.pace)
    for _ in range(_NUM_ATTEMPTS):
        core.admission.wait_settled()
        before = core.admission.count_writes()
        if before % 2:
            continue  # the next commit has begun already
        reading = _Reading(core.admission.live.generation, quick=quick)
        reading.run(num_threads=num_threads, pace=pace, progress=progress)
        if core.admission.count_writes() == before:
            return reading.conclude(core, started=started)
    with core.admission.reading():
        reading = _Reading(core.admission.live.generation, quick=quick)
        reading.run(num_threads=num_threads, pace=AT_WILL, progress=progress)  # a commit waits for it
    return reading.conclude(core, started=started)


class _Reading:
    """One look at all tensors of one generation."""

    def __init__(self, generation: Generation, *, quick: bool) -> None:
        self._generation = generation
        self._quick = quick
        self._kept = find_kept(generation, generation.contract)
        entries = {e.name: e.tensor.detach() for e in find_state(generation.module) if e.persistent}
        self._tensors = entries
        self._first: dict[tuple[object, ...], str] = {}
        self._firsts = {
            name: self._first.setdefault(
                (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,),
                name,
            )
            for name, tensor in entries.items()
        }
        self._known: dict[str, Kept] = {}
        for name, first in self._firsts.items():
            if name in self._kept:
                self._known.setdefault(first, self._kept[name])
        self._found: dict[str, Seal] = {}
        self._fingerprints: dict[str, int | None] = {}
        self._nbytes = sum(self._count_nbytes(name) for name in self._first.values())
        self._devices = {name: places.active.find(entries[name]) for name in self._first.values()}

    def run(
        self, *, num_threads: int | None, pace: Pace | AtWill, progress: Callable[[Progress], object] | None
    ) -> None:
        """Read every tensor once, in workers; the calling thread waits, reports, and may be interrupted."""
        ended: _Ended = queue.SimpleQueue()
        cancellation, is_slow = Cancellation(), not isinstance(pace, AtWill)
        self._put_side_streams_behind()

        def work() -> None:
            try:
                for plan in (self._plan_look, self._plan_rest, self._plan_second_look):
                    run_tasks(
                        plan(ended, cancellation),
                        num_threads=num_threads or (1 if is_slow else min(_MAX_THREADS, max(1, count_cores() - 1))),
                        nice=10,
                        cancellation=cancellation,
                        name="hotglm-verify",
                        within=pace.working,
                    )
                ended.put(None)
            except BaseException as failure:  # noqa: BLE001 - raised again in the thread that waits
                ended.put(failure)

        try:
            start_thread(work, name="hotglm-verify")
            done = 0
            while True:
                with contextlib.suppress(queue.Empty):
                    outcome = ended.get(timeout=_SIGNAL_S)
                    if outcome is None:
                        return
                    if isinstance(outcome, BaseException):
                        raise outcome
                    done += outcome
                    if progress is not None:
                        progress(Progress(part="verify", done_nbytes=done, total_nbytes=self._nbytes))
        except BaseException as failure:
            cancellation.cancel(failure)  # workers stop at their next tensor
            raise

    def _put_side_streams_behind(self) -> None:
        """Have devices read what stands there once the work is done that came before this call.

        That is the work of this thread's stream; and that of all streams where nobody has published the tensors,
        because they came with the module.
        """
        for device in self._find_devices():
            with device.staging():
                device.wait_for(device.record_here() if self._generation.arena else device.record_passes())

    def _plan_look(self, ended: _Ended, cancellation: Cancellation) -> list[Callable[[], None]]:
        """Return the tasks that take fingerprints on devices, one for each; those that are known are proof enough."""
        return [functools.partial(self._look, device, ended, cancellation) for device in self._find_devices()]

    def _find_devices(self) -> tuple[Device, ...]:
        return tuple({device.name: device for device in self._devices.values() if device is not None}.values())

    def _look(self, device: Device, ended: _Ended, cancellation: Cancellation) -> None:
        mine = [name for name, other in self._devices.items() if other is device]
        self._fingerprints |= self._take_fingerprints(mine, device, cancellation)
        for name in mine if self._quick else ():
            fingerprint, kept = self._fingerprints[name], self._known.get(name)
            if fingerprint is None or kept is None or kept.seal.stride != self._tensors[name].stride():
                continue
            if kept.seal.fingerprint == fingerprint:
                self._found[name] = kept.seal
                ended.put(self._count_nbytes(name))

    def _take_fingerprints(self, names: list[str], device: Device, cancellation: Cancellation) -> dict[str, int | None]:
        tensors = [self._tensors[name] for name in names]
        found = take_fingerprints(tensors, device, pause=cancellation.raise_if_cancelled)
        return dict(zip(names, found, strict=True))

    def _plan_rest(self, ended: _Ended, cancellation: Cancellation) -> list[Callable[[], None]]:
        """Return the tasks that read what was not found yet; the largest first."""
        names = sorted(self._first.values(), key=self._count_nbytes, reverse=True)
        return [functools.partial(self._read, name, ended, cancellation) for name in names if name not in self._found]

    def _read(self, name: str, ended: _Ended, cancellation: Cancellation) -> None:
        tensor, kept, device = self._tensors[name], self._known.get(name), self._devices[name]
        if device is not None:
            self._found[name] = Seal(digest=digest_on_device(tensor, device, cancellation=cancellation))
        elif self._quick and kept is not None and matches_seal(tensor, kept.seal):
            self._found[name] = kept.seal
        else:
            self._found[name] = seal_tensor(tensor, digest=None, is_finite=False)
        ended.put(self._count_nbytes(name))

    def _plan_second_look(self, ended: _Ended, cancellation: Cancellation) -> list[Callable[[], None]]:
        """Return the tasks that take fingerprints again: what did not change is of the bytes that were hashed."""
        del ended
        return [functools.partial(self._look_again, device, cancellation) for device in self._find_devices()]

    def _look_again(self, device: Device, cancellation: Cancellation) -> None:
        read = [n for n, other in self._devices.items() if other is device and self._found[n].fingerprint is None]
        for name, fingerprint in self._take_fingerprints(read, device, cancellation).items():
            if fingerprint is not None and fingerprint == self._fingerprints[name]:
                stride = self._tensors[name].stride()
                self._found[name] = replace(self._found[name], fingerprint=fingerprint, stride=stride)

    def _count_nbytes(self, name: str) -> int:
        return self._tensors[name].numel() * self._tensors[name].element_size()

    def conclude(self, core: SlotCore, *, started: float) -> LiveProof:
        """Compare what was found.

        Raises:
            LiveMismatchError: naming every tensor that differs.
        """
        generation = self._generation
        digests = {name: self._found[first].digest for name, first in self._firsts.items()}
        expected = {name: kept.seal.digest for name, kept in self._kept.items()}
        problems = [
            Problem(
                code="LIVE_MISMATCH",
                message=f"Expected digest {digest}, got {digests[name]}",
                tensor=name,
                expected=digest,
                found=digests[name],
            )
            for name, digest in expected.items()
            if digests[name] != digest
        ]
        if problems:
            error = LiveMismatchError(
                f"Expected generation {generation.number} to have the weights it was committed with, got others.",
                problems=problems,
                remedy="stage and commit a release of this version again, or roll back; then look for what writes live "
                "weights (an optimizer, batch norm in training mode), or test the memory of this machine.",
            )
            core.add_context(error, generation.version)
            raise error
        # Later looks that are quick compare fingerprints, which were taken with these digests.
        for name, first in self._firsts.items():
            if name in expected and name == first and self._found[first].fingerprint is not None:
                known = generation.seals.get(name)
                if known is None or known.fingerprint is None:
                    generation.seals[name] = self._found[first]
        tensors = self._tensors
        return LiveProof(
            slot=core.settings.name,
            version=generation.version,
            number=generation.number,
            digest=combine_digests({n: (tensors[n].dtype, tensors[n].shape, d) for n, d in digests.items()}),
            digests=digests,
            num_compared=len(expected),
            nbytes=self._nbytes,
            duration_s=time.perf_counter() - started,
        )
