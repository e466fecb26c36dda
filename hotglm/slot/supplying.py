"""From an offer to what its load takes its bytes from: files, what is live, and deltas to either.

Rules this module keeps:

- What a source promises of a tensor by a digest is taken from the live generation where that has it, and only then:
  digests that the caller adds of his own are held against the source, never in its place.
- Nothing is reused across a migration, and no tensor of another dtype or shape than the code's.
- What a chain of deltas lacks is found out here, before memory is given up for the spare (P2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from hotglm.delta_plan import FileStart, KnownStart, PartStart, Step, TensorPlan
from hotglm.errors import DeltaError, DigestMismatchError
from hotglm.release.chains import Chain, open_chain
from hotglm.release.directory import Release
from hotglm.release.files import TensorLocation, WeightFile, WeightFiles
from hotglm.slot.live import identify
from hotglm.slot.source import Offer
from hotglm.weights.delta_codec import verify_parts
from hotglm.weights.delta_parts import FilePart
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.proof import describe_drift
from hotglm.weights.supply import Application, Kept, SourceTensor, Supply

__all__ = ["open_supply"]


def open_supply(
    offer: Offer, kept: Mapping[str, Kept], *, digests: Mapping[str, str], stack: ExitStack
) -> Supply | None:
    """Return what the tensors of an offer are made of; None for an offer that is in memory.

    Args:
        offer: as its source was opened.
        kept: what is live, by name; empty where nothing may be reused.
        digests: those that the caller adds.
        stack: closes what is opened here.

    Raises:
        DeltaChainError, WrongBaseError: the releases that a delta builds on are not there, or others.
        DeltaError: a payload is not what its manifest says.
        SourceError: a release that a delta builds on cannot be read.
    """
    kept = {name: one for name, one in kept.items() if digests.get(name, one.seal.digest) == one.seal.digest}
    if offer.files is not None:
        return Supply.of(offer.files, _choose_kept(offer, offer.files, kept))
    if offer.release is not None and offer.release.manifest.delta is not None:
        return _open_folded(offer.release, kept, stack=stack)
    return None


def _choose_kept(offer: Offer, files: WeightFiles, kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """Return the live tensors that are what the files promise: of the same dtype, shape and digest."""
    return {
        name: one
        for name, one in kept.items()
        if (location := files.tensors.get(name)) is not None
        if offer.digests.get(name) == one.seal.digest
        if TORCH_DTYPES[location.entry.torch_dtype] is one.tensor.dtype
        if location.entry.shape == tuple(one.tensor.shape)
    }


def _open_folded(release: Release, kept: Mapping[str, Kept], *, stack: ExitStack) -> Supply:
    """Return the supply of a delta, folded with those that it builds on."""
    chain = stack.enter_context(open_chain(release, known=identify(kept)))
    links = _Links(chain, stack)
    tensors = {name: links.find(name, plan, kept) for name, plan in chain.plan.tensors.items()}
    return Supply(
        label=repr(release.path),
        files=links.files,
        tensors=tensors,
        verify_unchanged=links.verify_unchanged,
        refill=partial(_refill, release, kept, links, stack),
    )


def _refill(
    release: Release, kept: Mapping[str, Kept], before: _Links, stack: ExitStack, names: Sequence[str]
) -> Supply:
    """Return the supply of tensors that are live no longer, from files alone.

    Raises:
        DigestMismatchError: the releases that have them are not there.
    """
    left = {name: one for name, one in kept.items() if name not in names}
    try:
        supply = _open_folded(release, left, stack=stack)
    except DeltaError as error:
        raise DigestMismatchError(
            "Expected live tensors that a delta can be applied to, got some that were written since they were loaded.",
            problems=[*map(describe_drift, sorted(names)), *error.problems],
            remedy="stage the full release; and find out what writes the memory of the live version.",
        ) from error

    def verify_unchanged() -> None:
        before.verify_unchanged()
        supply.verify_unchanged()

    tensors = {name: supply.tensors[name] for name in names}
    return replace(supply, tensors=tensors, verify_unchanged=verify_unchanged)


class _Links:
    """The releases of a chain, opened as far as bytes are read from them."""

    def __init__(self, chain: Chain, stack: ExitStack) -> None:
        self._releases = chain.releases
        self._stack = stack
        self._weights: dict[int, WeightFiles] = {}
        self._payloads: dict[int, WeightFiles] = {}

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Every file that is open."""
        return tuple(file for files in self._all() for file in files.files)

    def verify_unchanged(self) -> None:
        """Refuse files that were written to or cut since they were opened."""
        for files in self._all():
            files.verify_unchanged()

    def find(self, name: str, plan: TensorPlan, kept: Mapping[str, Kept]) -> SourceTensor:
        """Return what one tensor of the result is made of, whose payloads were judged by their headers."""
        promised = self._releases[0].manifest.tensors[name]
        source = SourceTensor(
            dtype=TORCH_DTYPES[promised.dtype],
            shape=promised.shape,
            location=self._locate(name, plan),
            kept=kept[name] if isinstance(plan.start, KnownStart) else None,
            steps=tuple(self._apply(step) for step in plan.steps),
        )
        for step in source.steps:
            numel = source.nbytes // source.dtype.itemsize
            verify_parts(name, step.codec, step.parts, dtype=source.dtype, numel=numel)
        return source

    def _locate(self, name: str, plan: TensorPlan) -> TensorLocation | None:
        if isinstance(plan.start, FileStart):
            return self._open_weights(plan.start.link).tensors[name]
        if isinstance(plan.start, PartStart):
            return self._open_payload(plan.start.link).tensors[plan.start.part]
        return None

    def _apply(self, step: Step) -> Application:
        located = self._open_payload(step.link).tensors
        parts = tuple(FilePart(location=located[part]) for part in step.delta.parts)
        return Application(codec=step.delta.codec, parts=parts)

    def _open_weights(self, link: int) -> WeightFiles:
        if link not in self._weights:
            self._weights[link] = self._stack.enter_context(self._releases[link].open_weights())
        return self._weights[link]

    def _open_payload(self, link: int) -> WeightFiles:
        if link not in self._payloads:
            self._payloads[link] = self._stack.enter_context(self._releases[link].open_payload())
        return self._payloads[link]

    def _all(self) -> tuple[WeightFiles, ...]:
        return (*self._payloads.values(), *self._weights.values())
