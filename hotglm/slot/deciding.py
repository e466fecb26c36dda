"""The decision of a stage: which code is to hold what is offered, and whether that may take the live version's place.

Rules this module keeps: headers are enough for it; no weight is read, no memory is taken, and every reason is in one
verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from hotglm.errors import ArgumentError
from hotglm.model.captured import verify_uncaptured
from hotglm.model.compiled import is_compiled
from hotglm.model.registry import find_definition
from hotglm.model.twin import Twin
from hotglm.release.environment import read_environment
from hotglm.slot.checks import COMPILES_LATER, promise_outputs
from hotglm.slot.code import Code, Question, choose_code
from hotglm.slot.migrating import describe_gap, hides_values
from hotglm.slot.source import Offer, verify_digests
from hotglm.slot.stage_request import StageRequest
from hotglm.slot.staged import StageRecord
from hotglm.slot.wrapped import verify_wrappers
from hotglm.verdict import Candidate, Verdict, decide
from hotglm.version import Version
from hotglm.weights.digest import combine_digests

__all__ = ["combine_views", "decide_code", "name_version"]

_LABEL_LENGTH = 12
"""Hexadecimal digits of the digest in the local label of a version that weights did not carry themselves."""


def decide_code(request: StageRequest, offer: Offer, record: StageRecord, *, serving: nn.Module) -> Code:
    """Return the code that is to hold `offer`, and what of the offer it is to hold; the verdict goes into `record`.

    Args:
        request: of the stage; `live` is what the offer is compared with, `version` that of the offer, if it is known.
        offer: as its source was opened.
        record: gets the verdict and the migration.
        serving: the module that serves, which is that of `live` unless the offer is to be quantised first.

    Raises:
        IncompatibleError: the verdict says no.
        HotglmError: it does not come to a verdict.
    """
    _verify_meant(request, offer)
    code = choose_code(
        Question(
            offer=offer,
            live=request.live,
            version=request.version,
            migrations=request.migrations,
            config=request.config,
            converts_dtypes=request.policy.convert_dtypes,
        )
    )
    request.owner.verify_code(code.module if code.is_new else serving)
    if code.is_new and not request.owner.is_in_place:
        verify_uncaptured(code.module)
    verify_wrappers(code.module, offer=code.offer, live=request.live.module)
    record.migration = code.offer.migration.lines if code.offer.migration is not None else ()
    live = None if code.is_new else request.live.contract
    code = replace(code, contract=promise_outputs(code.contract, request.policy, live=live))
    if request.config is not None and not _takes_config(code):
        raise ArgumentError(
            f"Expected no config for {type(code.module).__name__}, which declares none, got one.",
            remedy="declare it: @hotglm.versioned(..., config=ConfigClass), or leave config out.",
        )
    if request.policy.convert_dtypes:
        code = replace(code, offer=code.offer.with_dtypes_of(code.contract))
    record.verdict = _judge(request, code, serving=serving)
    record.verdict.raise_if_refused()
    return code


def _verify_meant(request: StageRequest, offer: Offer) -> None:
    if request.version is None and not request.policy.digest:
        raise ArgumentError(
            "Expected a version for a source that carries none, got none and digests are off.",
            remedy="pass version=..., or leave StagePolicy.digest on, which names the version by its content.",
        )
    verify_digests(offer, request.digests)


def _judge(request: StageRequest, code: Code, *, serving: nn.Module) -> Verdict:
    offer = code.offer
    candidate = Candidate(
        name=offer.name,
        version=request.version or code.stamped or request.live.version,
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
    if code.is_new and is_compiled(serving) and not (request.policy.warm_up or request.policy.goldens):
        verdict = replace(verdict, findings=(*verdict.findings, COMPILES_LATER))
    return verdict


def _takes_config(code: Code) -> bool:
    definition = find_definition(type(code.module))
    return definition is not None and definition.config is not None


def name_version(request: StageRequest, code: Code, digest: str | None) -> Version:
    """Return the version of what is staged: the one it has, or else one that its content names."""
    if request.version is not None:
        return request.version
    label = (digest or "").partition(":")[2][:_LABEL_LENGTH]
    live = request.live
    # Weights that fit as they are where others had to be migrated are not of the version that those were of.
    base = code.version if live.is_migrated else live.version
    return (code.stamped or base).with_local(label)


def combine_views(twin: Twin, digests: Mapping[str, str]) -> str:
    """Return the digest of all tensors of a twin of which `digests` are known."""
    views = twin.views
    return combine_digests({name: (views[name].dtype, views[name].shape, digest) for name, digest in digests.items()})
