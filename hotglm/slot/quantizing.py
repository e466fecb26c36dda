"""Plain weights for a quantised module: decided on and loaded as for the plain model, then quantised by the user.

Rules this module keeps:

- Until they are quantised everything is as in a slot of the plain model: trust, digests, migrations, conversions and
  the verdict are of plain weights against the plain model.
- The plain copy lies in memory of its own, planned with the spare, and is gone when the stage ends. No rollback target
  is given up before the weights are quantised.
- Where what comes out differs from what is live in nothing but tensors, the live structure holds them, with whatever
  has been added to it since (hooks, compiled code); else the new module is the code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from hotglm.errors import (
    ArgumentError,
    DefinitionError,
    HotglmError,
    ModuleError,
    Problem,
    StageFailedError,
    UnswappableError,
    shorten_repr,
)
from hotglm.model.extents import lay_out
from hotglm.model.inspection import contract_of, find_state
from hotglm.model.likeness import find_unlike, note_values
from hotglm.model.plain import build_plain
from hotglm.model.registry import read_config
from hotglm.model.twin import Twin, copy_module
from hotglm.model.wrappers import find_wrapper_specs
from hotglm.problem import describe_exception
from hotglm.progress import Progress
from hotglm.slot.code import Code
from hotglm.slot.deciding import combine_views, decide_code, name_version
from hotglm.slot.generation import Generation
from hotglm.slot.loading import Loading
from hotglm.slot.quantized import verify_own, verify_quantized, verify_same_but_tensors
from hotglm.slot.refreshing import refresh_derived
from hotglm.slot.requantize import PlainOrigin, QuantizedFrom, Requantize
from hotglm.slot.source import Offer, open_source
from hotglm.slot.spare import Spares, TakenSpare
from hotglm.slot.stage_request import StageRequest
from hotglm.slot.staged import StageRecord
from hotglm.slot.targets import find_targets
from hotglm.weights import places
from hotglm.weights.exhaustion import is_out_of_memory
from hotglm.weights.layout import Layout
from hotglm.weights.pace import AtWill, Pace
from hotglm.weights.scattered import ScatteredArena
from hotglm.weights.split_arena import SplitArena

__all__ = ["find_plain", "quantize_offer", "verify_requantize"]


def verify_requantize(requantize: Requantize, module: nn.Module) -> PlainOrigin:
    """Return what is known of `module`, if it may have been quantised from what `requantize` builds.

    Raises:
        ArgumentError: it is no `Requantize`.
        ModuleError: no plain model can be built, or is of another kind; everything is named.
    """
    if not isinstance(requantize, Requantize):
        raise ArgumentError(
            f"Expected a Requantize, got {shorten_repr(requantize)}.",
            remedy="pass Requantize(build=..., quantize=...).",
        )
    plain = contract_of(build_plain(requantize.build, live=module)).state
    problems = []
    for name, wrapper in find_wrapper_specs(module).items():
        spec = plain.get(name)
        if spec is None or spec.shape != wrapper.shape:
            found = "none" if spec is None else f"one of shape {list(spec.shape)}"
            message = f"Expected a plain tensor of shape {list(wrapper.shape)} from build(), got {found}"
            problems.append(Problem(code="CANNOT_SWAP_QUANTIZED", message=message, tensor=name))
    if problems:
        raise UnswappableError(
            "Expected build() to return what the live module was quantised from, got another model.",
            problems=problems,
            remedy="build it with the config of the live one.",
        )
    return PlainOrigin(values=note_values(module))


def find_plain(request: StageRequest, offer: Offer) -> Generation | None:
    """Return what plain weights are to be compared with, as if it were live; None where `offer` is none of such.

    Modules and wrappers are quantised already, and so are tensors that fill the live module and not the plain one.

    Raises:
        ModuleError: no plain model can be built.
    """
    live = request.live
    if request.requantize is None or offer.module is not None or offer.wrappers:
        return None
    plain = _build(request.requantize, live)
    if _fills(live.contract, offer) and not _fills(plain.contract, offer):
        return None
    return plain


def _fills(contract: Contract, offer: Offer) -> bool:
    return next(find_unfilled(contract, offer.contract), None) is None


def _build(requantize: Requantize, live: Generation) -> Generation:
    origin = live.origin
    module = build_plain(
        requantize.build,
        live=live.module,
        model=None if origin is None else origin.model,
        config=None if origin is None else origin.config,
    )
    return Generation(
        module,
        number=live.number,
        name=live.name,
        version=live.version,
        contract=replace(contract_of(module), outputs=live.contract.outputs),
        code_version=live.code_version,
    )


def quantize_offer(
    request: StageRequest,
    offer: Offer,
    plain: Generation,
    record: StageRecord,
    spares: Spares,
    *,
    pace: Pace | AtWill,
) -> tuple[StageRequest, Code]:
    """Return what is left of a stage once the weights of `offer` are quantised: a request, and code with an offer.

    Args:
        request: of the stage.
        offer: as its source was opened.
        plain: from `find_plain`.
        record: gets the verdict, the plan, the origins and timings.
        spares: plans memory; nothing is taken from it.
        pace: of the stage.

    Raises:
        HotglmError: as a stage of the plain model.
        StageFailedError: `quantize` raised.
        ModuleError: what it returned is not like what is live; everything is named.
    """
    with record.timed("decide"):
        code = decide_code(replace(request, live=plain), offer, record, serving=request.live.module)
    request.cancellation.raise_if_cancelled()
    with ExitStack() as stack:
        work = _Work(request, code, record, spares, pace=pace)
        work.plan(stack)
        work.load()
        return work.quantize()


class _Work:
    """The plain weights of one stage, from the decision to what they became."""

    def __init__(
        self, request: StageRequest, code: Code, record: StageRecord, spares: Spares, *, pace: Pace | AtWill
    ) -> None:
        self._pace = pace
        self._request = request
        self._code = code
        self._record = record
        self._spares = spares

    def plan(self, stack: ExitStack) -> None:
        """Find room for all that will be there at once, and where every tensor comes from."""
        request, code = self._request, self._code
        with self._record.timed("plan"):
            self._layout = lay_out(find_state(code.module))
            # What it becomes is taken to be as large as what is live: twice, as the user makes it, and in the spare.
            becomes = lay_out(find_state(request.live.module))
            self._record.plan = self._spares.plan(becomes.nbytes, becomes.regions, beside=(self._layout, becomes))
            self._loading = Loading(
                code.offer,
                request.live,
                digests=request.digests,
                policy=replace(
                    request.policy, num_threads=request.num_threads, reuse=False
                ),  # what is live is no plain one
                cancellation=request.cancellation,
                count_writes=request.owner.count_writes,
                pace=self._pace,
            )
            self._loading.plan(code.contract, stack)

    def load(self) -> None:
        """Bring the plain weights into a copy of the plain model, and recompute what depends on them."""
        request, record = self._request, self._record
        with record.timed("memory"):
            taken = _take(self._layout)
            request.populate(taken.arena, self._pace)
            entries = list(find_state(self._code.module))
            twin = _copy(self._code, self._layout, taken, request=request)
        with record.timed("load", nbytes=self._code.offer.nbytes):
            targets = find_targets(twin, self._layout, entries)
            loaded, record.origins = self._loading.run(targets, taken=taken, report=request.report)
        record.converted = loaded.converted
        digest = combine_views(twin, loaded.digests) if request.policy.digest else None
        self._weights = QuantizedFrom(digest=digest, digests=dict(loaded.digests), nbytes=self._code.offer.nbytes)
        record.refreshed = refresh_derived(twin, loaded, refresh=request.refresh)
        self._module: nn.Module = twin.module
        # What is queued on a device may still read weights that nobody refers to; elsewhere they go one by one.
        self._lease = taken.lease if self._layout.regions else None

    def quantize(self) -> tuple[StageRequest, Code]:
        """Let the user quantise the plain model, and return what is left to do with what came of it."""
        request, record, code = self._request, self._record, self._code
        request.cancellation.raise_if_cancelled()
        model, config = type(code.module), read_config(self._module)
        version = record.version = name_version(request, code, self._weights.digest)
        nbytes = self._weights.nbytes
        with record.timed("quantize", nbytes=nbytes):
            request.report(Progress(part="quantize", done_nbytes=0, total_nbytes=nbytes))
            made = self._run()
            if self._lease is not None:
                self._lease.settle_passes()
            self._lease = None
            request.report(Progress(part="quantize", done_nbytes=nbytes, total_nbytes=nbytes))
        request.cancellation.raise_if_cancelled()
        with _named_after_quantize():
            offer = open_source(made)
        origin = PlainOrigin(
            weights=self._weights,
            model=model,
            config=config,
            values=note_values(made if offer.module is None else offer.module),
        )
        offer = replace(offer, label=code.offer.label, accepted=code.offer.accepted, origin=origin)
        return replace(request, version=version, digests={}), self._choose(offer)

    def _run(self) -> nn.Module:
        requantize, mode = self._request.requantize, self._request.mode
        if requantize is None:
            raise RuntimeError("plain weights are quantised only where the slot was told how")
        module, label = self._module, shorten_repr(_name(requantize.quantize))
        del self._module  # what it becomes may let go of it, layer by layer
        try:
            with replace(mode, autocast=False, cuda_autocast=False).applied():
                made = requantize.quantize(module)
        except HotglmError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise  # which time may heal
            raise StageFailedError(
                f"Expected {label} to quantise the plain model, got {describe_exception(error)}.",
                problems=[Problem(code="QUANTIZE_FAILED", message=f"{label} raised {describe_exception(error)}")],
                remedy="load these weights into the plain model by hand and quantise that; see the cause.",
            ) from error
        if made is not None and not isinstance(made, nn.Module):
            raise DefinitionError(
                f"Expected {label} to return a module, or None for the one that it was given, got "
                f"{shorten_repr(type(made).__name__)}.",
                remedy="let it return what it has quantised.",
            )
        return module if made is None else made

    def _choose(self, offer: Offer) -> Code:
        """Return the code that holds what came out: the live structure if that is the same, else the new module.

        Raises:
            UnswappableError: it is not like what is live; everything is named.
        """
        code, live, made = self._code, self._request.live, offer.module
        if made is None:
            raise RuntimeError("an offered module has a module")
        outputs = code.contract.outputs
        own = replace(code, module=made, offer=offer, is_new=True, gap=None, marks=None, reads=None, stamped=None)
        own = replace(own, contract=replace(contract_of(made), outputs=outputs))
        verify_own(made, live=live)
        if code.is_new:  # what becomes of another class or config need not be like what is live
            return own
        verify_quantized(made, own.contract, live=live)
        born = None if live.origin is None else live.origin.values
        unlike = list(find_unlike(live.module, made, built=code.module, born=born))
        if self._request.owner.is_in_place:
            verify_same_but_tensors(unlike)
        if unlike:
            return own
        return replace(
            own,
            module=live.module,
            contract=replace(live.contract, outputs=outputs),
            is_new=False,
            offer=replace(offer, module=None, recipe=None),
            marks=live.marks,
        )


def _take(layout: Layout) -> TakenSpare:
    arena = SplitArena(layout.regions) if layout.regions else ScatteredArena(layout)
    return TakenSpare(arena=arena, lease=arena.lend(layout.regions), is_fresh=True)


def _copy(code: Code, layout: Layout, taken: TakenSpare, *, request: StageRequest) -> Twin:
    constants = request.constants if request.refresh is None else ("*",)
    loose = [entry for entry in find_state(code.module) if not entry.persistent]
    places.active.wait_for_sources(entry.tensor for entry in loose)
    twin = copy_module(code.module, layout=layout, lease=taken.lease, constants=constants, marks=code.marks)
    with taken.lease.submitting():
        for entry in loose:
            twin.views[entry.name].copy_(entry.tensor.detach())
    flags = {path: part.training for path, part in request.live.module.named_modules()}
    for path, part in twin.module.named_modules():
        part.training = flags.get(path, request.live.module.training)
    return twin


@contextlib.contextmanager
def _named_after_quantize() -> Iterator[None]:
    """Say of a module that no slot can hold who made it."""
    try:
        yield
    except ModuleError as error:
        raise type(error)(
            f"{error.message} It is what quantize made.", problems=error.problems, remedy=error.remedy
        ) from error


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)
