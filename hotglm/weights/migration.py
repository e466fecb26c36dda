"""Filling a spare by way of a migration: tensors of one layout in, tensors of another one in their views.

Rules this module keeps:

- What is only moved is only read: where every output of a unit is ranges of bytes of its sources (renamed, or split,
  joined and stacked along the outermost dimension), these are read from the file straight into the arena, by the same
  reads as without a migration. Everything else is computed, unit by unit: operands into scratch memory, the result into
  its view. There is no second copy of the weights (`[Note: peak]`).
- A digest that the source promises is that of a source tensor, and is verified on that tensor's bytes, whatever becomes
  of them. Digests that are taken are of what is in the arena. A tensor that is dropped is not read.
- Bytes that two outputs share are read once and copied, so that what was verified is what runs.
- The rules of `weights/loader.py` hold here too: every tensor is filled once, further names are compared, all that
  fail are named.

[Note: peak]
Beside the spare itself, each of the T threads that load holds one block of scratch memory, in which the operands of one
unit stand, and what is computed on the way to one output of it: `peak <= spare + T * max over units (operands +
intermediates)`. An intermediate is an inner expression that is no view of its operand; the outputs themselves are
written where they stay. Only units that are computed count; those that are read into the arena take nothing. With a
mapping as source its tensors are the operands, and only a unit that calls a free function is given copies of them.
What a free function takes and returns is its own, and comes on top, as does an output that is computed (scaled, padded,
filled) for code of another dtype: it is converted once it is whole. Guarded by `tests/test_migrated_loading.py`.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from hotglm import seam
from hotglm.errors import DigestMismatchError, TensorValueError
from hotglm.migration.expression import find_sources
from hotglm.migration.plan import StatePlan, Unit
from hotglm.release.files import WeightFiles
from hotglm.weights.arena import Lease
from hotglm.weights.bundles import count_nbytes, make_turn, read_bundle
from hotglm.weights.digest import format_digest
from hotglm.weights.dtypes import dtype_name
from hotglm.weights.evaluation import Evaluation, count_room, has_call
from hotglm.weights.lowering import ByteRun, find_byte_runs
from hotglm.weights.operands import Operands, describe_mismatch
from hotglm.weights.pace import cut_work, rest
from hotglm.weights.plan import CHUNK_NBYTES, Read, Transfer, plan_reads
from hotglm.weights.proof import (
    Loaded,
    LoadOptions,
    Target,
    describe_conflict,
    equals_view,
    find_first_names,
    prove_tensor,
    run_load,
)
from hotglm.weights.scratch import Scratch
from hotglm.weights.supply import Supply
from hotglm.weights.yielding import Work

__all__ = ["load_migrated"]


def load_migrated(
    source: WeightFiles | Supply | Mapping[str, torch.Tensor],
    plan: StatePlan,
    targets: Mapping[str, Target],
    *,
    lease: Lease,
    options: LoadOptions,
) -> Loaded:
    """Bring the tensors of `source` into the layout of `targets`, by way of `plan`.

    Args:
        source: open files, what a delta is made of, or tensors by name, on which `plan` was made; not written or
            closed.
        plan: every output is one of `targets`, of its shape.
        targets: where each name goes.
        lease: the memory that the targets are views of.
        options: how; `expected` are digests of source tensors, and `report` counts bytes of the source.

    Raises:
        MigrationStepError: a free function failed; it, its step and its tensors are named.
        SourceReadError, SourceChangedError: the source cannot be read, or changed while it was.
        DigestMismatchError, TensorValueError, NonFiniteError: bytes are not acceptable; all are named.
        DeltaError, MissingExtraError: a delta cannot be applied.
        MemoryPlanError: there is no memory for the operands.
    """
    job = _Job(source, plan, targets, lease=lease, options=options)
    nbytes = sum(spec.nbytes for spec in plan.sources.values())
    job.report_unread()
    run_load(job.plan_firsts(), options, nbytes=nbytes)
    run_load(job.plan_seconds(), options, nbytes=nbytes)
    if isinstance(source, (WeightFiles, Supply)):
        source.verify_unchanged()
    job.loaded.raise_if_any(job.operands.label)
    return job.loaded


class _Job:
    """One migrated load: which outputs are read straight into the arena, and which are computed."""

    def __init__(
        self,
        source: WeightFiles | Supply | Mapping[str, torch.Tensor],
        plan: StatePlan,
        targets: Mapping[str, Target],
        *,
        lease: Lease,
        options: LoadOptions,
    ) -> None:
        self.loaded = Loaded()
        self._turn = make_turn(options)
        self._scratch = Scratch()
        self.operands = Operands(source, options=options, loaded=self.loaded, turn=self._turn)
        self._plan = plan
        self._targets = targets
        self._lease = lease
        self._options = options
        self._of_results = replace(options, expected={})  # what the source promises is no promise of the result
        self._files = source if isinstance(source, WeightFiles) else None
        first_names = find_first_names(plan.outputs, targets)
        self._firsts = {name for name in plan.outputs if first_names[targets[name].key] == name}
        self._runs: dict[str, tuple[ByteRun, ...]] = {}
        for unit in plan.units:
            self._runs |= self._lower(unit) or {}
        self._lock = threading.Lock()
        self._num_open = Counter({name: len(runs) for name, runs in self._runs.items()})

    def report_unread(self) -> None:
        """Count the bytes of the source that are not needed as done."""
        runs = sum(run.nbytes for runs in self._runs.values() for run in runs)
        computed = {name for unit in self._plan.units for name in self._find_needed(unit, self._computed(unit))}
        total = sum(map(self.operands.nbytes_of, self._plan.sources))
        self._options.report(max(0, total - runs - sum(map(self.operands.nbytes_of, computed))))

    def plan_firsts(self) -> list[Callable[[], None]]:
        """Return the tasks that fill every target once; the largest first, so that the threads end together."""
        reads = plan_reads(self._transfers(), chunk_nbytes=self._options.pace.chunk_nbytes)
        bundles = sorted(reads, key=count_nbytes, reverse=True)
        computed = [(unit, names) for unit in self._plan.units if (names := self._computed(unit))]
        return [
            *(functools.partial(self._read_bundle, self._files, bundle) for bundle in bundles if self._files),
            *(functools.partial(self._prove, name, None) for name, runs in self._runs.items() if not runs),
            *(functools.partial(self._compute_all, some) for some in self._bundle(computed)),
        ]

    def plan_seconds(self) -> list[Callable[[], None]]:
        """Return the tasks that compare further names with the first ones, and source digests with the arena."""
        seconds = [(unit, [name for name in unit.outputs if name not in self._firsts]) for unit in self._plan.units]
        promised = [name for name in self._options.expected if name in self._find_read_directly()]
        return [
            *(functools.partial(self._compare, unit, names) for unit, names in seconds if names),
            *(functools.partial(self._verify_source, name) for name in promised),
        ]

    # -- deciding ------------------------------------------------------------------------------------------------------

    def _lower(self, unit: Unit) -> dict[str, tuple[ByteRun, ...]] | None:
        """Return the byte runs of all outputs of a unit that are filled, or None where they must be computed."""
        if self._files is None:
            return None
        lowered: dict[str, tuple[ByteRun, ...]] = {}
        for name in unit.outputs:
            if name not in self._firsts:
                continue
            expression, view = self._plan.outputs[name], self._targets[name].view
            runs = find_byte_runs(expression)
            if runs is None or not view.is_contiguous() or dtype_name(view.dtype) != expression.spec.dtype:
                return None
            lowered[name] = runs
        return lowered if self._is_readable(lowered.values()) else None

    def _is_readable(self, lowered: Iterable[tuple[ByteRun, ...]]) -> bool:
        """Tell whether no byte is wanted twice, and every tensor with a promised digest is wanted whole."""
        by_source: dict[str, list[ByteRun]] = {}
        for runs in lowered:
            for run in runs:
                by_source.setdefault(run.source, []).append(run)
        for source, wanted in by_source.items():
            at, has_gap = 0, False
            for run in sorted(wanted, key=lambda run: run.start):
                if run.start < at:
                    return False
                has_gap, at = has_gap or run.start > at, run.stop
            has_gap = has_gap or at < self.operands.nbytes_of(source)
            if has_gap and source in self._options.expected:
                return False
        return True

    def _computed(self, unit: Unit) -> list[str]:
        return [name for name in unit.outputs if name in self._firsts and name not in self._runs]

    def _find_needed(self, unit: Unit, names: Iterable[str]) -> list[str]:
        """Return the sources of a unit that some of its outputs are computed from, in order."""
        needed = {source for name in names for source in find_sources(self._plan.outputs[name])}
        return [name for name in unit.sources if name in needed]

    def _find_read_directly(self) -> set[str]:
        return {run.source for runs in self._runs.values() for run in runs}

    def _bundle(self, units: list[tuple[Unit, list[str]]]) -> Iterator[list[tuple[Unit, list[str]]]]:
        """Yield tasks of units: the one with the largest operands first, so that scratch memory is taken once."""
        sizes = [sum(map(self.operands.nbytes_of, self._find_needed(*entry))) for entry in units]
        some: list[tuple[Unit, list[str]]] = []
        nbytes = 0
        for index in sorted(range(len(units)), key=sizes.__getitem__, reverse=True):
            some.append(units[index])
            nbytes += sizes[index]
            if nbytes >= CHUNK_NBYTES:
                yield some
                some, nbytes = [], 0
        if some:
            yield some

    # -- reading into the arena ----------------------------------------------------------------------------------------

    def _transfers(self) -> Iterator[Transfer]:
        if self._files is None:
            return
        numbers = {id(file): number for number, file in enumerate(self._files.files)}
        for name, runs in self._runs.items():
            offset = self._targets[name].offset
            for run in runs:
                location = self._files.tensors[run.source]
                yield Transfer(
                    name=name,
                    file=numbers[id(location.file)],
                    file_offset=location.offset + run.start,
                    arena_offset=offset,
                    nbytes=run.nbytes,
                )
                offset += run.nbytes

    def _read_bundle(self, files: WeightFiles, reads: tuple[Read, ...]) -> None:
        self.loaded.add(read_nbytes=count_nbytes(reads))
        for name, digest in read_bundle(reads, files.files, lease=self._lease, turn=self._turn, options=self._options):
            with self._lock:
                self._num_open[name] -= 1
                if self._num_open[name]:
                    continue
            runs = self._runs[name]
            self._prove(name, digest if len(runs) == 1 else None)
            self._options.report(sum(run.nbytes for run in runs))

    def _verify_source(self, name: str) -> None:
        """Compare a promised digest with the bytes of that tensor, wherever in the arena they were read to."""
        whole = self._find_whole(name)
        digest = self.loaded.digests.get(whole) if whole is not None else None
        expected = self._options.expected[name]
        digest = digest or self._digest_pieces(name)
        if digest != expected:
            self.loaded.problems.append((DigestMismatchError, describe_mismatch(name, expected, digest)))

    def _find_whole(self, source: str) -> str | None:
        """Return the output that is this source tensor and nothing else, if there is one."""
        run = ByteRun(source=source, start=0, nbytes=self.operands.nbytes_of(source))
        return next((name for name in self._outputs_of[source] if self._runs[name] == (run,)), None)

    def _digest_pieces(self, source: str) -> str:
        state = hashlib.sha256()
        for _, offset, nbytes in sorted(self._pieces_of(source)):
            self._options.cancellation.raise_if_cancelled()
            for piece in cut_work(self._lease.bytes(offset, nbytes), Work.HASH):
                state.update(piece)
        return format_digest(state.hexdigest())

    def _pieces_of(self, source: str) -> Iterator[tuple[int, int, int]]:
        """Yield where the runs of a source begin in it, where they lie in the arena, and their bytes."""
        for name in self._outputs_of[source]:
            offset = self._targets[name].offset
            for run in self._runs[name]:
                if run.source == source:
                    yield run.start, offset, run.nbytes
                offset += run.nbytes

    @functools.cached_property
    def _outputs_of(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, runs in self._runs.items():
            for source in dict.fromkeys(run.source for run in runs):
                found.setdefault(source, []).append(name)
        return found

    # -- computing -----------------------------------------------------------------------------------------------------

    def _compute_all(self, units: list[tuple[Unit, list[str]]]) -> None:
        for unit, names in units:
            self._compute(unit, names)

    def _compute(self, unit: Unit, names: list[str]) -> None:
        """Compute some outputs of one unit; returns before the next one begins, so that its operands are let go of."""
        evaluation = self._evaluate(unit, names)
        for name in names:
            self._options.cancellation.raise_if_cancelled()
            target, expression = self._targets[name], self._plan.outputs[name]
            rest()
            try:
                evaluation.write(expression, target.view)
            except TensorValueError as error:  # tensors that cannot be tied: named with all else that is wrong
                self.loaded.problems += [(TensorValueError, problem) for problem in error.problems]
                continue
            if dtype_name(target.view.dtype) != expression.spec.dtype:
                self.loaded.converted.append(name)
            self._prove(name, None)
        self._options.report(sum(map(self.operands.nbytes_of, self._find_needed(unit, names))))

    def _compare(self, unit: Unit, names: list[str]) -> None:
        evaluation = self._evaluate(unit, names)
        for name in names:
            self._options.cancellation.raise_if_cancelled()
            target = self._targets[name]
            if not equals_view(target.view, evaluation.compute(self._plan.outputs[name])):
                self.loaded.problems.append((TensorValueError, describe_conflict(name, target)))
            self._prove(name, None, is_first=False)

    def _evaluate(self, unit: Unit, names: list[str]) -> Evaluation:
        seam.active.reach("migration_unit")
        outputs = [self._plan.outputs[name] for name in names]
        calls = any(map(has_call, outputs))
        needed = self._find_needed(unit, names)
        room = self.operands.count_room(needed, owned=calls) + count_room(outputs, has_calls=calls)
        work = self._scratch.open(room)
        return Evaluation(self.operands.read(needed, owned=calls, work=work), work=work)

    def _prove(self, name: str, digest: str | None, *, is_first: bool = True) -> None:
        target = self._targets[name]
        prove_tensor(name, target, digest=digest, loaded=self.loaded, options=self._of_results)
        self.loaded.add(nbytes=target.view.numel() * target.view.element_size() if is_first else 0)
