"""Staging: from a source to a proved spare, while the live generation serves. May fail anywhere; then nothing changed.

Rules this module keeps:

- The order is: open, choose code, decide, plan, take memory, copy the structure, load, refresh, warm up, check.
  Everything that headers can decide is decided before a byte is read, and the rollback target is given up only after
  that (P2, P7).
- It runs in a thread of its own; the caller waits. The heavy parts run in low-priority workers; the thread itself keeps
  its priority, because it runs Python: descheduled with the GIL in its hands it would stop every pass.
- A stage that fails leaves no reference behind: frames in the error's traceback are cleared, so that an error that
  somebody keeps does not keep the spare's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hotglm.contract import Contract
from hotglm.errors import ArgumentError, Problem, RefreshError
from hotglm.migration.registry import Migrations
from hotglm.model.compilations import counting, forget_compiled
from hotglm.model.compiled import adopt_compiled, compile_as, is_compiled
from hotglm.model.derived import Marks
from hotglm.model.extents import lay_out
from hotglm.model.grad_mode import GradMode
from hotglm.model.inspection import StateEntry, contract_of, find_state
from hotglm.model.registry import find_definition
from hotglm.model.twin import Twin, copy_module, verify_copyable
from hotglm.progress import Progress
from hotglm.release.environment import read_environment
from hotglm.slot.admission import Admission
from hotglm.slot.checks import COMPILES_LATER, StagePolicy, promise_outputs, run_checks
from hotglm.slot.code import Code, Question, choose_code
from hotglm.slot.generation import Generation
from hotglm.slot.loading import Loading
from hotglm.slot.migrating import describe_gap, hides_values
from hotglm.slot.refreshing import refresh_derived
from hotglm.slot.source import Offer, Source, open_source, verify_digests
from hotglm.slot.spare import Spares, TakenSpare
from hotglm.slot.staged import Staged, StageRecord
from hotglm.slot.targets import find_targets
from hotglm.slot.wrapped import verify_wrappers
from hotglm.trust.policy import Trust
from hotglm.verdict import Candidate, decide
from hotglm.version import Bump, Version
from hotglm.weights import places
from hotglm.weights.arena import Arena, Lease
from hotglm.weights.digest import combine_digests
from hotglm.weights.places import Streams
from hotglm.weights.plan import CHUNK_NBYTES
from hotglm.weights.proof import Loaded, Target
from hotglm.weights.workers import Cancellation, count_cores, run_tasks

__all__ = ["StageRequest", "stage_version"]

_MAX_THREADS = 4
_LABEL_LENGTH = 12
"""Hexadecimal digits of the digest in the local label of a version that weights did not carry themselves."""


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


def stage_version(request: StageRequest, spares: Spares, record: StageRecord) -> Staged:
    """Run a stage to its end, in the calling thread.

    Raises:
        HotglmError: it cannot be staged; the live generation is as it was.
    """
    with ExitStack() as stack:
        stack.enter_context(places.active.working(request.streams))
        with record.timed("open"):
            offer = open_source(request.source, trust=request.trust)
            stack.callback(offer.close)
        return _Stage(request, spares, record, offer).run(stack)


class _Stage:
    """One stage on its way; each method is one part of it."""

    def __init__(self, request: StageRequest, spares: Spares, record: StageRecord, offer: Offer) -> None:
        self._request = request
        self._spares = spares
        self._record = record
        self._offer = offer
        record.source = offer.label
        self._declared = request.version or offer.version
        record.version = self._declared

    def run(self, stack: ExitStack) -> Staged:
        """Return the proved stage; `stack` closes what it opens."""
        record, cancellation = self._record, self._request.cancellation
        with record.timed("decide"):
            code = self._decide()
        cancellation.raise_if_cancelled()
        with record.timed("plan"):
            entries = list(find_state(code.module))
            layout = lay_out(entries, like=find_state(self._request.live.module))
            record.plan = self._spares.plan(layout.nbytes, layout.regions)
            loading = self._plan_loading(code.contract, stack)
            if record.plan.retires:  # what would fail later must fail before the rollback target is given up
                verify_copyable(code.module, layout=layout, constants=self._constants(), marks=code.marks)
        with record.timed("memory"):
            taken = self._spares.take(record.plan, layout.regions, cancellation=cancellation)
            if taken.is_fresh:
                self._populate(taken.arena)
        with self._request.owner.reading(), record.timed("copy"):
            twin = copy_module(
                code.module, layout=layout, lease=taken.lease, constants=self._constants(), marks=code.marks
            )
            taken.lease.tie_to(twin.module)
            record.carried = twin.carried
            self._adopt(twin.module)
            self._carry_over(entries, twin, taken.lease)
        loaded = self._load(loading, find_targets(twin, layout, entries), taken)
        generation = self._prove(twin, code, taken, loaded)
        cancellation.raise_if_cancelled()
        request = self._request
        if request.trust is not None and generation.accepted is not None:
            request.trust.accept(generation.accepted)  # the last thing that may refuse: what is remembered is proved
        return Staged(
            generation, owner=request.owner, base=request.live.number, record=record, on_discard=request.on_discard
        )

    # -- decide ------------------------------------------------------------------------------------------------------

    def _decide(self) -> Code:
        request, offer = self._request, self._offer
        if self._declared is None and not request.policy.digest:
            raise ArgumentError(
                "Expected a version for a source that carries none, got none and digests are off.",
                remedy="pass version=..., or leave StagePolicy.digest on, which names the version by its content.",
            )
        verify_digests(offer, request.digests)
        code = choose_code(
            Question(
                offer=offer,
                live=request.live,
                version=self._declared,
                migrations=request.migrations,
                config=request.config,
                converts_dtypes=request.policy.convert_dtypes,
            )
        )
        request.owner.verify_code(code.module)
        offer = self._offer = code.offer
        verify_wrappers(code.module, offer=offer, live=request.live.module)
        self._record.migration = offer.migration.lines if offer.migration is not None else ()
        live = None if code.is_new else request.live.contract
        code = replace(code, contract=promise_outputs(code.contract, request.policy, live=live))
        if request.config is not None and not _takes_config(code):
            raise ArgumentError(
                f"Expected no config for {type(code.module).__name__}, which declares none, got one.",
                remedy="declare it: @hotglm.versioned(..., config=ConfigClass), or leave config out.",
            )
        if request.policy.convert_dtypes:
            offer = self._offer = offer.with_dtypes_of(code.contract)
        candidate = Candidate(
            name=offer.name,
            version=self._declared or code.stamped or request.live.version,
            contract=code.contract,
            offered=offer.contract,
            reads=code.reads,
            requires=offer.requires,
        )
        verdict = decide(
            slot_name=request.name,
            live_version=request.live.version,
            live_contract=request.live.contract,
            candidate=candidate,
            accept=request.accept,
            environment=read_environment((*offer.requires, *code.contract.requires)),
        )
        if code.gap is not None and (hides_values(code.gap) or not verdict.accepted):
            verdict = replace(verdict, findings=(describe_gap(code.gap), *verdict.findings))
        if code.is_new and is_compiled(request.live.module) and not (request.policy.warm_up or request.policy.goldens):
            verdict = replace(verdict, findings=(*verdict.findings, COMPILES_LATER))
        self._record.verdict = verdict
        verdict.raise_if_refused()
        return code

    # -- memory and values -------------------------------------------------------------------------------------------

    def _populate(self, arena: Arena) -> None:
        def fault(start: int) -> Callable[[], None]:
            return lambda: arena.populate(start, CHUNK_NBYTES)

        self._run_tasks([fault(start) for start in range(0, arena.nbytes, CHUNK_NBYTES)])

    def _carry_over(self, entries: list[StateEntry], twin: Twin, lease: Lease) -> None:
        with lease.submitting():
            for entry in entries:
                if not entry.persistent:
                    twin.views[entry.name].copy_(entry.tensor.detach())

    def _adopt(self, module: nn.Module) -> None:
        """Give `module` the training flags and the compilation of what serves, or of what was offered compiled."""
        recipe = self._offer.recipe
        if recipe is not None and module._compiled_call_impl is None:
            compile_as(module, recipe)
        _adopt_mode(module, self._request.live.module)
        adopt_compiled(module, self._request.live.module)

    def _constants(self) -> tuple[str, ...]:
        """Return the patterns of derived state that needs no declaration of its own.

        What a module holds was computed from that module's own weights, which it is staged with; and whoever passes a
        `refresh` function for somebody else's model answers for all of it.
        """
        covers_all = self._offer.module is not None or self._request.refresh is not None
        return ("*",) if covers_all else self._request.constants

    def _load(self, loading: Loading, targets: Mapping[str, Target], taken: TakenSpare) -> Loaded:
        with self._record.timed("load", nbytes=self._offer.nbytes):
            loaded, self._record.origins = loading.run(targets, taken=taken, report=self._request.report)
        self._record.converted = loaded.converted
        return loaded

    def _plan_loading(self, code: Contract, stack: ExitStack) -> Loading:
        """Find out where every tensor will come from, before memory is given up for it."""
        request = self._request
        loading = Loading(
            self._offer,
            request.live,
            digests=request.digests,
            policy=request.policy,
            num_threads=self._num_threads(),
            cancellation=request.cancellation,
            count_writes=request.owner.count_writes,
        )
        loading.plan(code, stack)
        return loading

    def _num_threads(self) -> int:
        # One core is left to the service: a thread that shares it gets little done there and lengthens every pass (two
        # cores, 1 GiB: worst pass 1.14 of p50 with two threads, 1.03 with one, and the same 0.76 s for the stage).
        return self._request.policy.num_threads or min(_MAX_THREADS, max(1, count_cores() - 1))

    def _run_tasks(self, tasks: list[Callable[[], None]]) -> None:
        run_tasks(
            tasks,
            num_threads=self._num_threads(),
            nice=self._request.policy.nice,
            cancellation=self._request.cancellation,
            name="hotglm-populate",
        )

    # -- proof -------------------------------------------------------------------------------------------------------

    def _prove(self, twin: Twin, code: Code, taken: TakenSpare, loaded: Loaded) -> Generation:
        request, record = self._request, self._record
        request.cancellation.raise_if_cancelled()
        with record.timed("refresh"):
            record.refreshed = refresh_derived(twin, loaded, refresh=request.refresh)
            marks = Marks(twin.loose)  # before warm-up, which is a pass
        with record.timed("check"), counting() as compilations:
            proved = run_checks(twin.module, policy=request.policy, mode=request.mode)
        record.recompiles, record.recaptures = compilations.num_compiled, compilations.num_captured
        forget_compiled(twin.module)
        # What passes, checks and refreshes have queued is over before anybody can see what it wrote ("publish" in
        # [Note: streams], weights/device.py).
        taken.lease.settle_passes()
        self._verify_layout(twin.module, code.contract)
        self._adopt(twin.module)  # again: it may have changed meanwhile
        values = [
            *(["finite values"] if request.policy.finite else []),
            *([f"{len(loaded.digests)} digests taken"] if loaded.digests else []),
        ]
        record.checks = (*values, *proved)
        digest = self._combine(twin, loaded)
        record.version = self._name_version(digest, code)
        pairs = request.owner.pair(twin.module, was_refreshed=bool(record.refreshed))
        return Generation(
            twin.module,
            number=request.number,
            name=request.name,
            version=record.version,
            contract=code.contract,
            digests=loaded.digests,
            digest=digest,
            arena=taken.arena,
            lease=taken.lease.watch,
            marks=marks,
            code_version=code.version,
            is_migrated=code.offer.migration is not None,
            seals={name: seal for name, seal in loaded.seals.items() if seal.digest == loaded.digests.get(name)},
            accepted=code.offer.accepted,
            pairs=pairs,
        )

    def _verify_layout(self, module: nn.Module, planned: Contract) -> None:
        """Refuse code that has changed the layout the verdict was about while it refreshed or ran.

        Raises:
            RefreshError: naming what is new, gone or different.
        """
        found = contract_of(module, is_fixed=self._request.owner.is_in_place).state
        names = [name for name in {**found, **planned.state} if found.get(name) != planned.state.get(name)]
        if names:
            raise RefreshError(
                "Expected the layout that was decided on, got another after refresh, warm-up and checks.",
                problems=[Problem(code="LAYOUT_CHANGED", message="New, gone or different", tensor=n) for n in names],
                remedy="register parameters and buffers in the constructor, and write them in place later.",
            )

    def _combine(self, twin: Twin, loaded: Loaded) -> str | None:
        if not self._request.policy.digest:
            return None
        views = twin.views
        return combine_digests({name: (views[name].dtype, views[name].shape, d) for name, d in loaded.digests.items()})

    def _name_version(self, digest: str | None, code: Code) -> Version:
        if self._declared is not None:
            return self._declared
        label = (digest or "").partition(":")[2][:_LABEL_LENGTH]
        live = self._request.live
        # Weights that fit as they are where others had to be migrated are not of the version that those were of.
        base = code.version if live.is_migrated else live.version
        return (code.stamped or base).with_local(label)


def _takes_config(code: Code) -> bool:
    definition = find_definition(type(code.module))
    return definition is not None and definition.config is not None


def _adopt_mode(module: nn.Module, live: nn.Module) -> None:
    """Give every part the training flag that the live part of that name has: the service's mode is the slot's."""
    flags = {path: part.training for path, part in live.named_modules()}
    for path, part in module.named_modules():
        part.training = flags.get(path, live.training)
