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

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from hotglm.contract import Contract
from hotglm.errors import Problem, RefreshError
from hotglm.model.captured import leave_graph_trees
from hotglm.model.compilations import counting, forget_compiled
from hotglm.model.compiled import adopt_compiled, compile_as, find_calls
from hotglm.model.derived import Marks
from hotglm.model.graphed import prepare_graphs
from hotglm.model.inspection import StateEntry, contract_of, find_state
from hotglm.model.twin import Twin, copy_module, verify_copyable
from hotglm.slot.checks import run_checks
from hotglm.slot.code import Code
from hotglm.slot.deciding import combine_views, decide_code, name_version
from hotglm.slot.generation import Generation
from hotglm.slot.loading import Loading
from hotglm.slot.placing import plan_image
from hotglm.slot.quantizing import find_plain, quantize_offer
from hotglm.slot.refreshing import refresh_derived
from hotglm.slot.source import Offer, open_source
from hotglm.slot.spare import Spares, TakenSpare
from hotglm.slot.stage_request import StageRequest
from hotglm.slot.staged import Staged, StageRecord
from hotglm.slot.targets import find_targets
from hotglm.weights import places
from hotglm.weights.arena import Lease
from hotglm.weights.pace import AtWill, Pace, make_pace
from hotglm.weights.proof import Loaded, Target

__all__ = ["stage_version"]


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
        record.source, record.version = offer.label, request.version or offer.version
        request = replace(request, version=record.version)
        plain, pace = None, make_pace(request.policy.pace)
        stack.callback(_note_pace, record, pace)
        if request.requantize is not None:
            with record.timed("build"):
                plain = find_plain(request, offer)
        if plain is None:
            return _Stage(request, spares, record, offer, pace=pace).run(stack)
        request, code = quantize_offer(request, offer, plain, record, spares, pace=pace)
        del plain
        return _Stage(request, spares, record, code.offer, pace=pace).fill(code, stack)


def _note_pace(record: StageRecord, pace: Pace | AtWill) -> None:
    record.pace = pace.record


class _Stage:
    """One stage on its way; each method is one part of it."""

    def __init__(
        self, request: StageRequest, spares: Spares, record: StageRecord, offer: Offer, *, pace: Pace | AtWill
    ) -> None:
        self._request = request
        self._spares = spares
        self._record = record
        self._offer = offer
        self._pace = pace

    def run(self, stack: ExitStack) -> Staged:
        """Return the proved stage; `stack` closes what it opens."""
        request = self._request
        with self._record.timed("decide"):
            code = decide_code(request, self._offer, self._record, serving=request.live.module)
        request.cancellation.raise_if_cancelled()
        return self.fill(code, stack)

    def fill(self, code: Code, stack: ExitStack) -> Staged:
        """Return the proved stage of `code` with what it is offered."""
        record, cancellation, self._offer = self._record, self._request.cancellation, code.offer
        with record.timed("plan"):
            entries = list(find_state(code.module))
            beside_nbytes = 0 if record.plan is None else record.plan.beside_nbytes  # of weights that were quantised
            layout, plan = plan_image(self._request, self._spares, entries, module=code.module)
            record.plan = replace(plan, beside_nbytes=beside_nbytes)
            loading = self._plan_loading(code.contract, stack)
            if record.plan.retires:  # what would fail later must fail before the rollback target is given up
                verify_copyable(
                    code.module,
                    layout=layout,
                    constants=self._constants(),
                    marks=code.marks,
                    is_fixed=self._request.owner.is_in_place,
                )
        with record.timed("memory"):
            taken = self._spares.take(record.plan, layout.regions, cancellation=cancellation)
            if taken.is_fresh:
                self._request.populate(taken.arena, self._pace)
        with self._request.owner.reading(), record.timed("copy"):
            offered = entries if self._offer.module is not None else []
            places.active.wait_for_sources(
                (*(self._offer.tensors or {}).values(), *(entry.tensor for entry in offered))
            )
            twin = copy_module(
                code.module,
                layout=layout,
                lease=taken.lease,
                constants=self._constants(),
                marks=code.marks,
                is_fixed=self._request.owner.is_in_place,
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

    # -- memory and values -------------------------------------------------------------------------------------------

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
        if self._request.owner.is_in_place:
            leave_graph_trees(module)

    def _constants(self) -> tuple[str, ...]:
        """Return the patterns of derived state that needs no declaration of its own.

        What a module holds was computed from that module's own weights, which it is staged with; and whoever passes a
        `refresh` function for somebody else's model answers for all of it.
        """
        offer = self._offer
        covers_all = offer.module is not None or offer.origin is not None or self._request.refresh is not None
        return ("*",) if covers_all else self._request.constants

    def _load(self, loading: Loading, targets: Mapping[str, Target], taken: TakenSpare) -> Loaded:
        is_read = self._offer.origin is None  # else it was read, and counted, before it was quantised
        with self._record.timed("load" if is_read else "place", nbytes=self._offer.nbytes):
            try:
                loaded, origins = loading.run(targets, taken=taken, report=self._request.report)
            finally:
                self._record.pace = self._pace.record
        if is_read:
            self._record.origins, self._record.converted = origins, loaded.converted
        return loaded

    def _plan_loading(self, code: Contract, stack: ExitStack) -> Loading:
        """Find out where every tensor will come from, before memory is given up for it."""
        request = self._request
        # An image on the host is far from what is live on the device, whose fingerprints are of another kind.
        is_on_host = self._record.plan is not None and bool(self._record.plan.image)
        loading = Loading(
            self._offer,
            request.live,
            digests=request.digests,
            policy=replace(
                request.policy, num_threads=request.num_threads, reuse=request.policy.reuse and not is_on_host
            ),
            pace=self._pace,
            cancellation=request.cancellation,
            count_writes=request.owner.count_writes,
        )
        loading.plan(code, stack)
        return loading

    # -- proof -------------------------------------------------------------------------------------------------------

    def _prove(self, twin: Twin, code: Code, taken: TakenSpare, loaded: Loaded) -> Generation:
        request, record = self._request, self._record
        request.cancellation.raise_if_cancelled()
        with record.timed("refresh"):
            record.refreshed = refresh_derived(twin, loaded, refresh=request.refresh)
            marks = Marks(twin.loose)  # before warm-up, which is a pass
        with record.timed("check"), counting() as compilations:
            # In place the live module keeps its graphs, and a twin that never serves needs none.
            num_captured = 0 if request.owner.is_in_place else prepare_graphs(twin.module, home=taken.arena)
            proved = run_checks(twin.module, policy=request.policy, mode=request.mode)
        record.recompiles = compilations.num_compiled
        record.recaptures = compilations.num_captured + num_captured
        forget_compiled(call for _, call in find_calls(twin.module))
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
        digest = combine_views(twin, loaded.digests) if request.policy.digest else None
        record.version = name_version(request, code, digest)
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
            is_migrated=bool(record.migration),
            seals={name: seal for name, seal in loaded.seals.items() if seal.digest == loaded.digests.get(name)},
            accepted=code.offer.accepted,
            origin=code.offer.origin,
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


def _adopt_mode(module: nn.Module, live: nn.Module) -> None:
    """Give every part the training flag that the live part of that name has: the service's mode is the slot's."""
    flags = {path: part.training for path, part in live.named_modules()}
    for path, part in module.named_modules():
        part.training = flags.get(path, live.training)
