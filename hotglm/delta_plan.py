"""Chains of deltas, folded: where each tensor of the result starts, and what is applied to it, each byte read once.

Rules this module keeps:

- Pure: no IO, no torch. A chain is walked from the release that is wanted back to where every tensor is known.
- A tensor starts where it is at hand by name, dtype, shape and digest: in what the caller has already, else as a whole
  part, else in a full release. What older releases say about it is not looked at.
- Nothing is believed that digests do not bind: a base is the release of that digest, a tensor the one of that digest.
- A chain ends: no release is in it twice, and it has at most `MAX_CHAIN` deltas (C07).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from hotglm.delta_fields import WHOLE, TensorDelta
from hotglm.errors import DeltaChainError, Problem, WrongBaseError, shorten_repr
from hotglm.manifest_fields import Manifest, ReleasedTensor

__all__ = [
    "MAX_CHAIN",
    "ChainPlan",
    "ChainPlanner",
    "FileStart",
    "KnownStart",
    "Link",
    "PartStart",
    "Step",
    "TensorIdentity",
    "TensorPlan",
    "missing_base",
    "plan_chain",
]

MAX_CHAIN = 64
"""How many deltas a chain may have."""

_WAIT = (
    "publish or fetch the releases it builds on, or its full form; a release that is still to come can be waited for."
)
_PUBLISH = "publish the release in full, or fetch its deltas again."


class TensorIdentity(NamedTuple):
    """What makes two tensors the same bytes: dtype (torch's name), shape, and digest (D1)."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, tensor: ReleasedTensor) -> TensorIdentity:
        """Return that of a tensor of a manifest."""
        return cls(tensor.dtype, tensor.shape, tensor.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One release of a chain.

    Attributes:
        manifest: what it says.
        digest: its result digest (D5).
        name: what it is called in messages, for example its path.
    """

    manifest: Manifest
    digest: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class KnownStart:
    """A tensor starts as the one that the caller has already under its name."""


@dataclass(frozen=True, slots=True)
class FileStart:
    """A tensor starts as that of its name in the weights of a full release.

    Attributes:
        link: place of that release in the chain; 0 is the release that is wanted, 1 its base, and so on.
    """

    link: int


@dataclass(frozen=True, slots=True)
class PartStart:
    """A tensor starts as a whole part of a payload.

    Attributes:
        link: place of the delta in the chain.
        part: name of the part.
    """

    link: int
    part: str


@dataclass(frozen=True, slots=True)
class Step:
    """One application of a delta to a tensor.

    Attributes:
        link: place of the delta in the chain.
        delta: what is applied.
    """

    link: int
    delta: TensorDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """How one tensor comes about.

    Attributes:
        start: where its bytes come from first.
        start_digest: the digest that they have there.
        steps: what is applied then, in this order; none changes dtype or shape.
    """

    start: KnownStart | FileStart | PartStart
    start_digest: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainPlan:
    """How the result of a chain comes about.

    Attributes:
        tensors: a plan for every tensor of the result, by name; read-only.
        num_links: how many releases were looked at: the one that is wanted and those that it builds on.
    """

    tensors: Mapping[str, TensorPlan]
    num_links: int

    @property
    def links(self) -> frozenset[int]:
        """Places in the chain of the releases that bytes are read from."""
        starts = {plan.start.link for plan in self.tensors.values() if not isinstance(plan.start, KnownStart)}
        return frozenset(starts | {step.link for plan in self.tensors.values() for step in plan.steps})


class _Wanted(NamedTuple):
    """What a tensor must be one release further back, and what is then applied to it, last step first."""

    identity: TensorIdentity
    steps: tuple[Step, ...]


@dataclass(slots=True)
class ChainPlanner:
    """Walks a chain back from the release that is wanted, one release at a time.

    Not thread-safe. A release is looked at only when all that come after it left something open, so that whoever opens
    them stops as soon as `next_base` is None.

    Attributes:
        known: what the caller has already, by name.
        max_length: how many deltas the chain may have.
    """

    known: Mapping[str, TensorIdentity] = field(default_factory=dict)
    max_length: int = MAX_CHAIN
    _plans: dict[str, TensorPlan] = field(default_factory=dict)
    _wanted: dict[str, _Wanted] = field(default_factory=dict)
    _links: list[Link] = field(default_factory=list)

    def add(self, link: Link) -> None:
        """Look at the next release: the one that is wanted, then its base, and so on.

        Raises:
            WrongBaseError: it is not the base that the one before names, or holds other tensors than that was made
                against.
            DeltaChainError: the chain leads in a circle, or is too long.
        """
        if not self._links:
            tensors = link.manifest.tensors.items()
            self._wanted = {name: _Wanted(TensorIdentity.of(one), ()) for name, one in tensors}
        else:
            self._verify_base(link)
        self._verify_chain(link)
        self._links.append(link)
        self._take_known()
        self._verify_tensors(link)
        if link.manifest.delta is None:
            self._start_in_files()
        else:
            self._walk_back(link.manifest.delta.tensors)
            self._take_known()

    @property
    def next_base(self) -> Link | None:
        """The delta whose base has to be looked at next; None when every tensor is known."""
        return self._links[-1] if self._wanted and self._links else None

    def finish(self) -> ChainPlan:
        """Return the plan.

        Raises:
            DeltaChainError: tensors are left that no release so far says where to take from (CHAIN_BASE_MISSING).
        """
        if (last := self.next_base) is not None:
            raise missing_base(last)
        plans = {name: self._plans[name] for name in sorted(self._plans)}
        return ChainPlan(tensors=MappingProxyType(plans), num_links=len(self._links))

    def _verify_base(self, link: Link) -> None:
        delta = self._links[-1].manifest.delta
        if delta is None or link.digest == delta.base.digest:
            return
        need, have = delta.base, link.manifest
        message = (
            f"Expected the base {need.version}, number {need.sequence}, with result {need.digest}, "
            f"got {have.version}, number {have.sequence}, with {link.digest}."
        )
        problem = Problem(
            code="DELTA_WRONG_BASE", message=message, file=link.name or None, expected=need.digest, found=link.digest
        )
        raise WrongBaseError(_headline(self._links[0]), problems=[problem], remedy=_PUBLISH)

    def _verify_chain(self, link: Link) -> None:
        delta, seen = link.manifest.delta, [one.digest for one in self._links]
        if delta is not None and delta.base.digest == link.digest:
            self._refuse("CHAIN_SELF", "Expected a delta against another release, got one against itself.", link)
        if link.digest in seen:
            self._refuse("CHAIN_LOOP", "Expected each release once in a chain, got one again.", link)
        if delta is not None and len(self._links) >= self.max_length:
            message = f"Expected at most {self.max_length} deltas in a chain, got more."
            self._refuse("CHAIN_TOO_LONG", message, link)

    def _refuse(self, code: str, message: str, link: Link) -> None:
        problem = Problem(code=code, message=message, file=link.name or None)
        raise DeltaChainError(_headline((*self._links, link)[0]), problems=[problem], remedy=_PUBLISH)

    def _verify_tensors(self, link: Link) -> None:
        """Refuse a base whose tensors are not the ones that deltas were made against (C05)."""
        tensors, problems = link.manifest.tensors, []
        for name, wanted in self._wanted.items():
            found = TensorIdentity.of(tensors[name]) if name in tensors else None
            if found != wanted.identity:
                message = f"Expected {_show(wanted.identity)} to start from, got {_show(found)}."
                code = "DELTA_UNKNOWN_TENSOR" if found is None else "DELTA_WRONG_BASE"
                problems.append(Problem(code=code, message=message, tensor=name, file=link.name or None))
        if problems:
            raise WrongBaseError(_headline(self._links[0]), problems=problems, remedy=_PUBLISH)

    def _take_known(self) -> None:
        for name in [name for name, wanted in self._wanted.items() if self.known.get(name) == wanted.identity]:
            self._start(name, KnownStart())

    def _start_in_files(self) -> None:
        place = len(self._links) - 1
        for name in list(self._wanted):
            self._start(name, FileStart(place))

    def _walk_back(self, deltas: Mapping[str, TensorDelta]) -> None:
        place = len(self._links) - 1
        for name in [name for name in self._wanted if name in deltas]:
            delta, wanted = deltas[name], self._wanted[name]
            if delta.codec == WHOLE:
                self._start(name, PartStart(place, delta.parts[0]))
            else:
                identity = wanted.identity._replace(digest=delta.base or "")
                self._wanted[name] = _Wanted(identity, (*wanted.steps, Step(place, delta)))

    def _start(self, name: str, start: KnownStart | FileStart | PartStart) -> None:
        identity, steps = self._wanted.pop(name)
        self._plans[name] = TensorPlan(start=start, start_digest=identity.digest, steps=steps[::-1])


def plan_chain(
    links: Sequence[Link], *, known: Mapping[str, TensorIdentity] | None = None, max_length: int = MAX_CHAIN
) -> ChainPlan:
    """Return how the result of a chain comes about.

    Args:
        links: the release that is wanted, its base, the base of that, and so on; a full release may end it.
        known: what the caller has already, by name: for example what is live.
        max_length: how many deltas the chain may have.

    Raises:
        WrongBaseError: a base is not the one that its delta was made against.
        DeltaChainError: releases are missing (CHAIN_BASE_MISSING), lead in a circle (CHAIN_LOOP, CHAIN_SELF), or are
            too many (CHAIN_TOO_LONG).
    """
    planner = ChainPlanner(known=known or {}, max_length=max_length)
    for link in links:
        planner.add(link)
        if planner.next_base is None:
            break
    return planner.finish()


def missing_base(link: Link, *, looked_in: str = "") -> DeltaChainError:
    """Return the refusal of a delta whose base is not there, or not yet; trying again later may succeed (C09)."""
    delta = link.manifest.delta
    need = "a base" if delta is None else f"its base {delta.base.version}, number {delta.base.sequence}"
    digest = None if delta is None else delta.base.digest
    where = f" in {shorten_repr(looked_in)}" if looked_in else ""
    message = f"Expected {need}, with result {digest}, got none{where}."
    problem = Problem(code="CHAIN_BASE_MISSING", message=message, file=link.name or None, expected=digest)
    return DeltaChainError(_headline(link), problems=[problem], remedy=_WAIT)


def _headline(link: Link) -> str:
    manifest = link.manifest
    return f"The delta {shorten_repr(manifest.name)} {manifest.version} cannot be applied."


def _show(identity: TensorIdentity | None) -> str:
    return "no such tensor" if identity is None else f"{identity.dtype} {list(identity.shape)} {identity.digest}"
