"""May this version take the place of that one? One decision over version, contract, tensors and environment.

Rules this module keeps:

- The decision is pure: contracts and an environment go in, a verdict comes out; no file, clock or torch.
- Every reason is found, not only the first; what merely deserves to be known is a finding that does not refuse.
- `needed` is what callers can notice on the way from the live version to the candidate. Whether the numbers are honest
  is asked of the step from the lower version to the higher one, so that going back to an honest version is honest.
- Text in a finding is safe to print: names from outside are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hotglm.breakage import (
    Breakage,
    DtypeChanged,
    ShapeChanged,
    TensorMissing,
    TensorUnexpected,
    required_bump,
)
from hotglm.comparison import find_breakages, find_unfilled
from hotglm.contract import Contract
from hotglm.environment import Environment, find_unmet
from hotglm.errors import IncompatibleError, Problem, shorten_repr
from hotglm.version import Bump, Version, VersionRange

__all__ = ["Candidate", "Finding", "Verdict", "decide"]

_NUM_CLAUSES_SHOWN = 3
"""How many breakages one reason spells out; each is a finding of its own as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a verdict is based on.

    Attributes:
        code: stable upper-case word, e.g. `"UNDERCLAIMED"`; for a breakage, the breakage's own.
        message: one sentence.
        refuses: whether it alone is enough to refuse.
        breakage: the difference it is about, where it is about one.
        remedy: what would make it go away; empty when it does not refuse.
    """

    code: str
    message: str
    refuses: bool
    breakage: Breakage | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is offered to take the place of the live version.

    Attributes:
        name: name of the model, where the offer carries one.
        version: its version.
        contract: contract of the code that would hold the tensors.
        offered: contract of the tensors themselves; None when they are the code's own.
        reads: versions that the code can read; None for all.
        requires: PEP 508 requirements of the offer, beside those of `contract`.
    """

    name: str | None = None
    version: Version
    contract: Contract
    offered: Contract | None = None
    reads: VersionRange | None = None
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision, with every reason.

    Attributes:
        old_version: the live version.
        new_version: the version that would take its place.
        needed: how big a step callers can notice; PATCH when only values differ.
        claimed: how big a step the two version numbers claim.
        findings: what the decision is based on; those that refuse come first.
    """

    old_version: Version
    new_version: Version
    needed: Bump
    claimed: Bump
    findings: tuple[Finding, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the candidate may take the place of the live version."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """The findings that refuse."""
        return tuple(finding for finding in self.findings if finding.refuses)

    @property
    def remedy(self) -> str:
        """What would turn a refusal into a yes; empty when it is one."""
        return "; ".join(dict.fromkeys(finding.remedy for finding in self.reasons if finding.remedy))

    def explain(self) -> str:
        """Return the decision as text of several lines: the headline, every finding, and last the remedy."""
        lines = [self._headline()]
        lines += [f"  - {finding.code}: {finding.message}" for finding in self.findings if finding.refuses]
        lines += [f"  - note {finding.code}: {finding.message}" for finding in self.findings if not finding.refuses]
        return "\n".join([*lines, f"Remedy: {self.remedy}."] if self.remedy else lines)

    def raise_if_refused(self) -> None:
        """Return when the candidate is accepted.

        Raises:
            IncompatibleError: it is not; the error has this verdict and one problem for each reason.
        """
        if self.accepted:
            return
        remedy = f"{self.remedy}." if self.remedy else ""
        error = IncompatibleError(self._headline(), problems=map(_describe, self.reasons), remedy=remedy)
        error.verdict = self
        raise error

    def _headline(self) -> str:
        may = "may" if self.accepted else "may not"
        steps = f"claims a step of {self.claimed.value}, needs {self.needed.value}"
        return f"Version {self.new_version} {may} take the place of {self.old_version} ({steps})."


def decide(
    *,
    slot_name: str,
    live_version: Version,
    live_contract: Contract,
    candidate: Candidate,
    accept: Bump = Bump.MINOR,
    environment: Environment,
) -> Verdict:
    """Decide whether `candidate` may take the place of the live version; pure, and never raises.

    Args:
        slot_name: name of the slot, which the candidate's name must equal where it has one.
        live_version: the version that serves.
        live_contract: what that version promises.
        candidate: what is offered.
        accept: the biggest step that the slot takes.
        environment: what the process runs on.
    """
    breakages = tuple(find_breakages(live_contract, candidate.contract))
    needed = max(Bump.PATCH, required_bump(breakages))
    claimed = live_version.bump_to(candidate.version)
    findings = [
        *_find_wrong_name(slot_name, candidate),
        *_find_unfilled(candidate),
        *_find_unreadable(candidate),
        *_find_underclaimed(live_version, live_contract, candidate),
        *_find_too_big(live_version, candidate.version, breakages, claimed=claimed, accept=accept),
        *_find_unmet(candidate, environment),
        *_find_downgrade(live_version, candidate.version),
        *(Finding(code=b.code, message=f"{b.explain()}.", refuses=False, breakage=b) for b in breakages),
    ]
    return Verdict(
        old_version=live_version,
        new_version=candidate.version,
        needed=needed,
        claimed=claimed,
        findings=tuple(findings),
    )


def _find_wrong_name(slot_name: str, candidate: Candidate) -> Iterator[Finding]:
    if candidate.name is not None and candidate.name != slot_name:
        yield Finding(
            code="NAME_MISMATCH",
            message=f"Expected model {shorten_repr(slot_name)}, got {shorten_repr(candidate.name)}.",
            refuses=True,
            remedy=f"stage it in a slot named {shorten_repr(candidate.name)}",
        )


def _find_unfilled(candidate: Candidate) -> Iterator[Finding]:
    if candidate.offered is None:
        return
    for breakage in find_unfilled(candidate.contract, candidate.offered):
        yield Finding(
            code=breakage.code,
            message=f"{_describe_misfit(breakage)}; the code cannot hold that, whatever the version.",
            refuses=True,
            breakage=breakage,
            remedy=_CONVERT if isinstance(breakage, DtypeChanged) else _MIGRATE,
        )


_CONVERT = "convert the tensors, or stage with StagePolicy(convert_dtypes=True) for floating-point ones"
_MIGRATE = "convert or migrate the tensors to the code's layout, or provide the class that holds this one"


def _describe_misfit(breakage: Breakage) -> str:
    name = f"tensor {shorten_repr(breakage.subject)}"
    match breakage:
        case TensorMissing(old=spec):
            return f"Expected {name} ({spec.dtype}, shape {list(spec.shape)}), got none"
        case TensorUnexpected(new=spec):
            return f"Expected no {name}, got one ({shorten_repr(spec.dtype)}, shape {list(spec.shape)})"
        case ShapeChanged(old=old, new=new):
            return f"Expected {name} of shape {list(old)}, got {list(new)}"
        case DtypeChanged(old=dtype, new=other):
            return f"Expected {name} of dtype {dtype}, got {shorten_repr(other)}"
    return breakage.explain()


def _find_unreadable(candidate: Candidate) -> Iterator[Finding]:
    if candidate.reads is not None and candidate.version not in candidate.reads:
        yield Finding(
            code="UNREADABLE_VERSION",
            message=f"Expected a version in '{candidate.reads}' (what the code reads), got {candidate.version}.",
            refuses=True,
            remedy=f"provide a class that reads {candidate.version}",
        )


def _find_underclaimed(live_version: Version, live_contract: Contract, candidate: Candidate) -> Iterator[Finding]:
    live, offer = (live_version, live_contract), (candidate.version, candidate.contract)
    (low, before), (high, after) = (offer, live) if candidate.version.public < live_version.public else (live, offer)
    breakages = tuple(find_breakages(before, after))
    claimed, needed = low.bump_to(high), required_bump(breakages)
    if claimed >= needed or needed <= Bump.PATCH:
        return
    honest = low.bumped(needed)
    yield Finding(
        code="UNDERCLAIMED",
        message=f"claims {high} after {low}, but {_list_clauses(breakages, needed)}: needs {honest}.",
        refuses=True,
        remedy=f"number the later one {honest} or above",
    )


def _find_too_big(
    live: Version, new: Version, breakages: tuple[Breakage, ...], *, claimed: Bump, accept: Bump
) -> Iterator[Finding]:
    # Callers notice the step that is taken, so what the numbers claim never makes it smaller.
    step = max(claimed, Bump.PATCH, required_bump(breakages))
    if step <= accept:
        return
    why = _list_clauses(breakages, step) or f"{new} after {live} claims one"
    yield Finding(
        code=f"{step.name}_REFUSED",
        message=f"Expected a step of at most {accept.value}, got {step.value}: {why}.",
        refuses=True,
        remedy=f"pass accept={step.value!r} if the callers can take it",
    )


def _find_unmet(candidate: Candidate, environment: Environment) -> Iterator[Finding]:
    for unmet in find_unmet((*candidate.contract.requires, *candidate.requires), environment):
        remedy = "install what it requires" if unmet.code == "REQUIREMENT_UNMET" else "correct the requirement"
        yield Finding(code=unmet.code, message=unmet.message, refuses=True, remedy=remedy)


def _find_downgrade(live: Version, new: Version) -> Iterator[Finding]:
    if new.public < live.public:  # labels have no order that means anything
        yield Finding(code="DOWNGRADE", message=f"{new} is older than {live}.", refuses=False)


def _list_clauses(breakages: Iterable[Breakage], bump: Bump) -> str:
    """Join what the breakages that call for `bump` say; empty when none does."""
    clauses = [breakage.explain() for breakage in breakages if breakage.bump is bump]
    shown = clauses[:_NUM_CLAUSES_SHOWN]
    more = len(clauses) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _describe(finding: Finding) -> Problem:
    breakage = finding.breakage
    return Problem(
        code=finding.code,
        message=finding.message,
        tensor=breakage.subject if breakage is not None else None,
        expected=getattr(breakage, "old", None),
        found=getattr(breakage, "new", None),
    )
