"""Bringing the tensors of an offer into the spare: from files, memory or what is live, as they are or migrated.

Rules this module keeps:

- What is live is held for as long as it is copied from, and never written.
- What a load finds out about bytes that are live is kept with their generation, so that nothing is hashed twice.
- Files that promise nothing but what is in memory already are read whole. There is nothing in them to be quick for, and
  whoever stages what he has wants to know whether it is good (tests/test_reuse.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from hotglm.contract import Contract
from hotglm.progress import Progress
from hotglm.slot.checks import StagePolicy
from hotglm.slot.generation import Generation
from hotglm.slot.live import find_kept, plan_sealing
from hotglm.slot.receipt import Origins
from hotglm.slot.source import Offer
from hotglm.slot.spare import TakenSpare
from hotglm.slot.supplying import open_supply
from hotglm.weights.arena import Lease
from hotglm.weights.budget import UNLIMITED, Budget
from hotglm.weights.loader import load_supply, load_tensors
from hotglm.weights.migration import load_migrated
from hotglm.weights.pace import AtWill, Pace
from hotglm.weights.proof import Loaded, LoadOptions, Target
from hotglm.weights.seals import Seal
from hotglm.weights.split_arena import SplitLease
from hotglm.weights.supply import Supply
from hotglm.weights.upload import Given, load_split
from hotglm.weights.workers import Cancellation, run_tasks

__all__ = ["Loading"]


class Loading:
    """The load of one stage: planned while nothing is given up yet, run when there is a spare to fill."""

    def __init__(
        self,
        offer: Offer,
        live: Generation,
        *,
        digests: Mapping[str, str],
        policy: StagePolicy,
        pace: Pace | AtWill,
        cancellation: Cancellation,
        count_writes: Callable[[], int],
    ) -> None:
        """Take what is to be loaded.

        Args:
            offer: as it was decided on; stays open.
            live: the generation that serves.
            digests: those that the caller adds to what the offer promises.
            policy: of the stage; it says how many threads.
            pace: of the stage.
            cancellation: of the stage.
            count_writes: see `plan_sealing`.
        """
        self._part = "load" if offer.origin is None else "place"
        self._offer = offer
        self._count_writes = count_writes
        self._live = live
        self._digests = digests
        self._policy = policy
        self._num_threads = policy.num_threads or 1
        self._pace = pace
        self._cancellation = cancellation
        self._supply: Supply | None = None

    def plan(self, code: Contract, stack: ExitStack) -> None:
        """Find out where every tensor comes from; what is opened for that is closed by `stack`.

        Raises:
            DeltaError: the releases that a delta builds on are not there, or not what they should be.
            SourceError: one of them cannot be read.
        """
        offer, kept = self._offer, {}
        if self._policy.reuse and offer.migration is None:
            if offer.files is None and offer.release is not None:
                self._seal_live(offer.release.manifest.tensors)
            kept = find_kept(self._live, code)
        self._supply = open_supply(offer, kept, digests=self._digests, stack=stack)

    def run(
        self, targets: Mapping[str, Target], *, taken: TakenSpare, report: Callable[[Progress], object]
    ) -> tuple[Loaded, Origins]:
        """Fill `targets`, which lie in the spare `taken`; return what was loaded, and from where.

        Raises:
            SourceError, TensorValueError, NonFiniteError: the bytes cannot be used; everything is named.
            MigrationStepError: a migration failed. MissingExtraError: a delta needs an extra.
        """
        rate = self._policy.max_bytes_per_s
        options = LoadOptions(
            digest=self._policy.digest,
            finite=self._policy.finite,
            expected={**self._offer.digests, **self._digests},
            num_threads=self._num_threads,
            nice=self._policy.nice,
            cancellation=self._cancellation,
            budget=UNLIMITED if rate is None else Budget(rate),
            pace=self._pace,
            report=_Meter(report, part=self._part, total_nbytes=self._offer.nbytes).add,
        )
        loaded = self._load(targets, taken, options=options)
        self._keep_seals(loaded)
        taken.arena.left = {targets[name].offset: seal for name, seal in loaded.seals.items()}
        origins = Origins(
            read_nbytes=loaded.read_nbytes,
            copied_nbytes=loaded.copied_nbytes,
            found_nbytes=loaded.found_nbytes,
            decoded_nbytes=loaded.decoded_nbytes,
            drifted=tuple(sorted(loaded.drifted)),
        )
        return loaded, origins

    def _load(self, targets: Mapping[str, Target], taken: TakenSpare, *, options: LoadOptions) -> Loaded:
        offer, lease = self._offer, taken.lease
        given = self._supply or offer.tensors or {}
        is_split = isinstance(lease, SplitLease)
        left = self._find_left(targets, taken) if self._policy.reuse and not is_split else {}
        if offer.files is not None and isinstance(given, Supply) and _reads_nothing(given, targets, left):
            given, left = Supply.of(offer.files, {}), {}
            self._supply = given
        if not isinstance(lease, SplitLease):
            return self._load_here(given, targets, lease=lease, options=options, left=left)
        return load_split(
            given,
            targets,
            lease=lease,
            options=options,
            names=[name for name in targets if name in offer.contract.state],
            load=lambda rest, views, image: self._load_here(rest, views, lease=image, options=options, left={}),
            is_plain=offer.migration is None,
        )

    def _load_here(
        self,
        given: Given,
        targets: Mapping[str, Target],
        *,
        lease: Lease,
        options: LoadOptions,
        left: Mapping[int, Seal],
    ) -> Loaded:
        """Fill targets in the processor's memory from all that is given, or from a part of it."""
        offer = self._offer
        if offer.migration is not None:
            source = offer.files or self._supply or offer.tensors or {}
            return load_migrated(source, offer.migration.plan, targets, lease=lease, options=options)
        if isinstance(given, Supply):
            return load_supply(given, targets, lease=lease, options=options, left=left)
        return load_tensors(given, targets, options=options)

    def _find_left(self, targets: Mapping[str, Target], taken: TakenSpare) -> dict[int, Seal]:
        """Return what the spare may still have of what the source itself promises, by offset."""
        left, promised = taken.arena.left, self._offer.digests
        offsets = {targets[name].offset: digest for name, digest in promised.items() if name in targets}
        return {at: left[at] for at, digest in offsets.items() if at in left and left[at].digest == digest}

    def _seal_live(self, names: Iterable[str]) -> None:
        run_tasks(
            plan_sealing(self._live, names, count_writes=self._count_writes, cancellation=self._cancellation),
            num_threads=self._num_threads,
            nice=self._policy.nice,
            cancellation=self._cancellation,
            name="hotglm-seal",
            within=self._pace.working,
        )

    def _keep_seals(self, loaded: Loaded) -> None:
        """Note what was found out of live tensors that were copied, in case the stage is not committed."""
        for name, source in ({} if self._supply is None else self._supply.tensors).items():
            if source.kept is not None and not source.steps and name in loaded.seals and name not in loaded.drifted:
                self._live.seals[name] = loaded.seals[name]


def _reads_nothing(supply: Supply, targets: Mapping[str, Target], left: Mapping[int, Seal]) -> bool:
    """Tell whether every tensor that has bytes is live, or left in the spare."""
    return all(
        source.kept is not None or not source.nbytes or targets[name].offset in left
        for name, source in supply.tensors.items()
        if name in targets
    )


class _Meter:
    """Counts bytes from many threads, and tells of every step."""

    def __init__(self, report: Callable[[Progress], object], *, part: str, total_nbytes: int) -> None:
        self._report = report
        self._part = part
        self._total_nbytes = total_nbytes
        self._done_nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done_nbytes += nbytes
        self._report(Progress(part=self._part, done_nbytes=self._done_nbytes, total_nbytes=self._total_nbytes))
