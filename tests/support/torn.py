"""A harness that counts torn passes: readers call, one thread swaps, and every output says which version it came from.

The oracle's weights encode a prime `v` in every layer, half of them parameters and half buffers, so that an output is
`v ** layers` in every element exactly if one version ran the whole pass: products of different primes never coincide.
All numbers are exact in float64. Each pass is also held against what was published while it ran: one that shows a
version which was replaced before it began, or that goes back in time within its thread, is counted as stale.

An `Engine` is what is tested. hotglm's slot is one (`SlotEngine`); `support.planted` has the broken ones that the
harness must catch, so that a count of 0 means something.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

import hotglm

PRIMES = tuple(n for n in range(3, 200) if all(n % d for d in range(2, int(n**0.5) + 1)))
"""Versions that the oracle can encode; 199 ** 4 is far below 2 ** 53, so every output is exact."""

WIDTH = 4
LAYERS = 4
INPUT = torch.ones(WIDTH, dtype=torch.float64)

LEAN = hotglm.StagePolicy(digest=False, finite=False, num_threads=1, nice=0)
"""A stage with nothing in it but the swap, so that ten thousand of them fit into a test."""


class Oracle(nn.Module):
    """A model whose output is `version ** LAYERS` in every element, if one version ran the whole pass."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.boundary = boundary
        for name, value in weights(version).items():
            if int(name[1:]) % 2:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boundary = self.boundary
        if boundary is None:
            return self.w3.mv(self.w2.mv(self.w1.mv(self.w0.mv(x))))  # type: ignore[operator]
        for layer in range(LAYERS):
            boundary(layer)
            x = getattr(self, f"w{layer}").mv(x)
        return x


def weights(version: int) -> dict[str, torch.Tensor]:
    """Return the state of the oracle for `version`."""
    value = version / WIDTH
    return {f"w{layer}": torch.full((WIDTH, WIDTH), value, dtype=torch.float64) for layer in range(LAYERS)}


_ROOTS = {float(prime**LAYERS): prime for prime in PRIMES}
_TORN = 0


def read_version(output: torch.Tensor) -> int:
    """Return the version that made `output`, or 0 if it is a mixture."""
    row = output.tolist()
    return _ROOTS.get(row[0], _TORN) if row.count(row[0]) == WIDTH else _TORN


class Engine(Protocol):
    """What swaps a model under its readers."""

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Run one pass."""
        ...

    def swap(self, version: int) -> None:
        """Make `version` the one that passes see from when this returns."""
        ...

    def abandon(self) -> None:
        """Let a swap that has not come to its turn return without having been made."""
        ...


class SlotEngine:
    """hotglm's slot. Going to the version before the live one is a rollback, any other swap a whole `update`."""

    def __init__(
        self,
        version: int,
        *,
        boundary: Callable[[int], object] | None = None,
        memory: hotglm.MemoryPolicy | None = None,
        after_update: Callable[[hotglm.ModuleSlot], object] | None = None,
        swap: hotglm.Flip | hotglm.InPlace | None = None,
    ) -> None:
        # Two arenas and no third: the tightest memory, in which every update reuses what passes have just left.
        policy = memory or hotglm.MemoryPolicy(small_nbytes=0)
        self.slot = hotglm.ModuleSlot(
            Oracle(version, boundary=boundary),
            name="oracle",
            version=name_version(version),
            policy=LEAN,
            memory=policy,
            swap=swap,
        )
        self.call = self.slot.__call__
        self.num_updates = self.num_rollbacks = 0
        self._after_update = after_update
        self._held = self._live = version

    def swap(self, version: int) -> None:
        if version == self._held and version != self._live:
            self.slot.rollback(to=name_version(version))
            self.num_rollbacks += 1
        else:
            self.slot.update(weights(version), version=name_version(version))
            self.num_updates += 1
            if self._after_update is not None:
                self._after_update(self.slot)
        self._held, self._live = self._live, version

    def abandon(self) -> None:
        return


def name_version(version: int) -> str:
    """Return the version number under which a slot gets the weights of `version`."""
    return f"1.0.{version}"


def plan_swaps(*, updates: int, rollbacks: int = 0) -> list[int]:
    """Return versions to swap to, beginning after `PRIMES[0]`: new ones, with ways back and forth spread among them."""
    plan: list[int] = []
    live = before = PRIMES[0]
    fresh = itertools.cycle(PRIMES)
    for done in range(updates):
        live, before = next(prime for prime in fresh if prime not in (live, before)), live
        plan.append(live)
        for _ in range(rollbacks * (done + 1) // updates - rollbacks * done // updates):
            live, before = before, live
            plan.append(live)
    return plan


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run saw.

    Attributes:
        passes: how many ended.
        swaps: how many returned, while every reader was running.
        torn: outputs that no single version gives.
        stale: outputs of a version that was not live at any time during the pass, or that a thread had left behind.
        errors: whatever a reader or the swapper raised.
        duration_s: of the whole run.
    """

    passes: int = 0
    swaps: int = 0
    torn: int = 0
    stale: int = 0
    errors: list[BaseException] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong with what was seen."""
        return not (self.torn or self.stale or self.errors)


@contextlib.contextmanager
def switching_often(interval_s: float = 1e-6) -> Iterator[None]:
    """Make threads change places as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Run:
    """One run of the harness: what has been published so far, and what the readers found."""

    def __init__(
        self, engine: Engine, plan: Sequence[int], *, passes: int, until_torn: bool, deadline_s: float
    ) -> None:
        self.report = Report()
        self._engine = engine
        self._versions = [PRIMES[0], *plan]
        self._begun = self._done = 0  # positions in `_versions`: the newest swap that has begun, and that has returned
        self._passes = passes
        self._until_torn = until_torn
        self._deadline_s = deadline_s
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def read(self) -> None:
        call, versions, seen = self._engine.call, self._versions, 0
        try:
            while not self._stop.is_set():
                torn = stale = 0
                for _ in range(32):
                    first = max(seen, self._done)
                    version = read_version(call(INPUT))
                    last = self._begun
                    if version == _TORN:
                        torn += 1
                    elif versions[first] == version:
                        seen = first
                    elif version in versions[first : last + 1]:
                        seen = versions.index(version, first)
                    else:
                        stale += 1
                self._add(passes=32, torn=torn, stale=stale)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
            self.report.errors.append(error)
            self._stop.set()

    def swap(self) -> None:
        report = self.report
        try:
            for position in range(1, len(self._versions)):
                if self._stop.is_set():
                    return
                self._begun = position
                self._engine.swap(self._versions[position])
                if self._stop.is_set():
                    return
                self._done = position
                report.swaps += 1
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
            report.errors.append(error)
            self._stop.set()
        if report.passes >= self._passes:
            self._stop.set()

    def _add(self, *, passes: int, torn: int, stale: int) -> None:
        with self._lock:
            report = self.report
            report.passes += passes
            report.torn += torn
            report.stale += stale
            enough = report.passes >= self._passes and report.swaps == len(self._versions) - 1
            if enough or (self._until_torn and report.torn) or time.monotonic() > self._deadline_s:
                self._stop.set()

    def wait(self, timeout_s: float) -> None:
        self._stop.wait(timeout_s)
        self._stop.set()
        self._engine.abandon()


def run_harness(
    engine: Engine,
    plan: Sequence[int],
    *,
    readers: int,
    passes: int,
    budget_s: float,
    until_torn: bool = False,
) -> Report:
    """Let `readers` threads call `engine` while one more makes the swaps of `plan`; return what they saw.

    Readers run until there were `passes` of them and every swap has returned, so that each swap happens under load.

    Args:
        engine: starts at version `PRIMES[0]`.
        plan: versions to swap to.
        readers: number of reading threads.
        passes: least number of passes in all.
        budget_s: gives up after this time, in seconds; the counts then say what is missing.
        until_torn: stop at the first torn pass.
    """
    started = time.monotonic()
    run = _Run(engine, plan, passes=passes, until_torn=until_torn, deadline_s=started + budget_s)
    threads = [threading.Thread(target=run.read, name=f"reader-{index}") for index in range(readers)]
    threads.append(threading.Thread(target=run.swap, name="swapper"))
    with switching_often():
        for thread in threads:
            thread.start()
        run.wait(budget_s)
        for thread in threads:
            thread.join()
    run.report.duration_s = time.monotonic() - started
    return run.report


def dawdle_at_times(*, every: int = 4096, pause_s: float = 0.02) -> Callable[[int], object]:
    """Return a layer boundary at which one pass in `every` stops half way, for `pause_s` seconds.

    A pass takes microseconds and an update milliseconds. Without such passes it is left to the scheduler whether any
    pass is still running when the memory under it is written for the next but one version, and a run without a torn
    pass would say little.
    """
    passes = itertools.count(1)

    def dawdle(layer: int) -> None:
        if layer == LAYERS // 2 and next(passes) % every == 0:
            time.sleep(pause_s)

    return dawdle


class Relay:
    """A layer boundary at which every pass waits for the next to begin, so that some pass is always running."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self.begun = 0
        self._changed = threading.Condition()
        self._over = False

    def __call__(self, layer: int) -> None:
        if layer != 1:
            return
        with self._changed:
            self.begun += 1
            mine = self.begun
            self._over = self._over or mine >= self.limit
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.begun > mine or self._over, timeout=60)

    @property
    def is_over(self) -> bool:
        """Whether it was stopped, or the limit of passes was reached."""
        return self._over

    def stop(self) -> None:
        """Let every pass go on."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


def count_passes_until_swapped(engine: Engine, relay: Relay, *, readers: int) -> int | None:
    """Return how many passes began before one swap returned while passes never ceased; None if it never did.

    The engine's model has `relay` as its boundary.
    """

    def read() -> None:
        while not relay.is_over:
            engine.call(INPUT)

    swapped: list[int] = []

    def swap() -> None:
        engine.swap(PRIMES[1])
        if not relay.is_over:
            swapped.append(relay.begun)
        relay.stop()

    threads: list[threading.Thread] = [threading.Thread(target=read) for _ in range(readers)]
    threads.append(threading.Thread(target=swap))
    for thread in threads:
        thread.start()
    for thread in threads[:-1]:
        thread.join()
    engine.abandon()
    threads[-1].join()
    return swapped[0] if swapped else None


def run_in_thread(function: Callable[[], Any], *, timeout_s: float = 30.0) -> Any:
    """Return what `function` returns in a thread of its own, or raise what it raises.

    Raises:
        TimeoutError: it did not end, which is what a deadlock looks like from outside.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"no end within {timeout_s} s: a deadlock")
    if failure:
        raise failure[0]
    return outcome[0]
