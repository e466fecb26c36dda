"""`hotglm diff`: what changed between two versions, how big a step that is, and who gets along with whom."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hotglm.breakage import Breakage, required_bump
from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.migrate import find_migrations
from hotglm.commands.subject import Subject, read_subject
from hotglm.comparison import find_breakages, find_unfilled
from hotglm.compatibility import CompatibilityMode, Incompatibility, Released, find_incompatibilities
from hotglm.contract import Contract
from hotglm.errors import ArgumentError, MigrationError, Problem
from hotglm.migration.plan import MigrationPath
from hotglm.migration.registry import Migrations
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.version import Bump, Version

__all__ = ["DIFF"]

_SUBJECT = "weights as for inspect, a contract in a .json file, or package.module:Class, which is imported"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help=_SUBJECT)
    parser.add_argument("new", metavar="NEW", help="likewise")
    parser.add_argument(
        "--mode",
        choices=[mode.value for mode in CompatibilityMode],
        help="tell whether NEW gets along with OLD (transitive: with the history too) and with the files of both",
    )
    parser.add_argument("--history", nargs="+", default=[], metavar="EARLIER", help="versions before OLD, for --mode")
    parser.add_argument(
        "--migrations",
        metavar="MODULE:ATTRIBUTE",
        help="for --mode: the migrations that carry stored versions over; those of the classes where left out",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The step from one version to another: what it needs, and what it claims where both are known."""

    needed: Bump
    old: Version | None
    new: Version | None

    @property
    def honest(self) -> Version | None:
        """The smallest version after the old one that would be honest."""
        return None if self.old is None else self.old.bumped(self.needed)

    @property
    def claimed(self) -> Bump | None:
        """How big a step the two versions claim."""
        return None if self.old is None or self.new is None else self.old.bump_to(self.new)

    @property
    def is_honest(self) -> bool | None:
        """Whether they claim enough; a label is enough for new values (PATCH)."""
        return None if self.claimed is None else self.claimed >= self.needed or self.needed is Bump.PATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Everything that the command has to say."""

    old: Subject
    new: Subject
    breakages: tuple[Breakage, ...]
    step: _Step
    mode: CompatibilityMode | None
    findings: tuple[Incompatibility, ...]

    @property
    def is_renamed(self) -> bool:
        """Whether the two are named as different models, which a slot would refuse (NAME_MISMATCH)."""
        return None not in (names := {self.old.name, self.new.name}) and len(names) > 1

    @property
    def is_compatible(self) -> bool:
        """Whether NEW may take the place of OLD: in the mode that was asked for, or else without any difference.

        A file promises nothing but its name and layout, so every breakage that two files can have keeps one from taking
        the place of the other under the same code; how big a step that is called is the author's business.
        """
        return not self.is_renamed and not (self.breakages if self.mode is None else self.findings)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.history and arguments.mode is None:
        raise ArgumentError("Expected --mode with --history, got none.", remedy="add --mode backward_transitive.")
    *history, old, new = (read_subject(word) for word in (*arguments.history, arguments.old, arguments.new))
    if old.is_file != new.is_file:  # what only code knows is not compared with weights, which cannot tell
        old, new = (replace(one, contract=_as_in_files(one.contract)) for one in (old, new))
    breakages = tuple(find_breakages(old.contract, new.contract))
    step = _Step(needed=max(Bump.PATCH, required_bump(breakages)), old=old.version, new=new.version)
    mode = None if arguments.mode is None else CompatibilityMode.parse(arguments.mode)
    found = None if arguments.migrations is None else find_migrations(arguments.migrations)
    findings = () if mode is None else tuple(_find_incompatibilities([*history, old], new, mode, found))
    answer = _Answer(old=old, new=new, breakages=breakages, step=step, mode=mode, findings=findings)
    if arguments.json:
        print_json("hotglm.diff/1", _describe(answer))
    else:
        print("\n".join(_show(answer)))
    return OK if answer.is_compatible else NO


def _as_in_files(contract: Contract) -> Contract:
    """Return what files of a version show: persistent tensors, a tied one under its first name."""
    specs = contract.state.values()
    held = {spec.name: (spec.dtype, spec.shape) for spec in specs if spec.persistent and spec.tied in (None, spec.name)}
    return Contract.of_tensors(held)


def _find_incompatibilities(
    history: Sequence[Subject], new: Subject, mode: CompatibilityMode, migrations: Migrations | None
) -> list[Incompatibility]:
    without = [subject.path for subject in (*history, new) if subject.version is None]
    if without:
        message = "Expected a version that it carries or declares, got none"
        raise ArgumentError(
            "Expected versions to put in order.",
            problems=[Problem(code="NO_VERSION", message=message, file=path) for path in without],
            remedy="save weights with save_weights(version=...) and contracts with Released.to_dict(), and declare "
            "classes with @hotglm.versioned.",
        )
    released = [Released(version=one.version, contract=one.contract) for one in (*history, new) if one.version]
    known = (migrations, *(subject.migrations for subject in (new, *reversed(history))))
    steps = next((one for one in known if one is not None and one.history()), None)
    found = find_incompatibilities(released[:-1], released[-1], mode)
    contracts = {one.version: one.contract for one in released}
    return [one for one in found if steps is None or not (one.is_stored and _is_carried_over(steps, one, contracts))]


def _is_carried_over(steps: Migrations, finding: Incompatibility, contracts: Mapping[Version, Contract]) -> bool:
    """Tell whether a path leads from the one version to the other, and carries over what the finding is about.

    Of configs, whose values nobody has here, only whether a step of the path changes them at all.
    """
    start, end = finding.earlier, finding.later
    if finding.direction == "forward":
        start, end = end, start
    try:
        path = steps.plan(start, end)
        if path.is_empty or finding.is_config:
            return any(hop.changes for hop in path.hops)
        return _fills(path, contracts[start], contracts[end])
    except MigrationError:  # no path, an ambiguous one, or one whose steps do not fit
        return False


def _fills(path: MigrationPath, start: Contract, end: Contract) -> bool:
    """Tell whether the dry run of a path leads from the tensors of one version to those of the other."""
    written = _as_in_files(start)
    specs = {name: TensorSpec(dtype=spec.dtype, shape=spec.shape) for name, spec in written.state.items()}
    made = path.plan_state(specs).specs
    offered = Contract.of_tensors({name: (spec.dtype, spec.shape) for name, spec in made.items()})
    return next(find_unfilled(end, offered), None) is None


# -- JSON --------------------------------------------------------------------------------------------------------------


def _describe(answer: _Answer) -> dict[str, object]:
    step = answer.step
    return {
        "old": answer.old.identify(),
        "new": answer.new.identify(),
        "compatible": answer.is_compatible,
        "renamed": answer.is_renamed,
        "needed": step.needed.value,
        "claimed": None if step.claimed is None else step.claimed.value,
        "honest": step.is_honest,
        "honest_version": None if step.honest is None else str(step.honest),
        "breakages": [{**breakage.to_dict(), "remedy": breakage.remedy} for breakage in answer.breakages],
        "mode": None if answer.mode is None else answer.mode.value,
        "incompatibilities": [finding.to_dict() for finding in answer.findings],
    }


# -- text --------------------------------------------------------------------------------------------------------------


def _show(answer: _Answer) -> Iterator[str]:
    breakages, step = answer.breakages, answer.step
    yield f"old: {answer.old.show()}"
    yield f"new: {answer.new.show()}"
    if answer.is_renamed:
        yield "  - NAME_MISMATCH: they are named as different models; a slot of the one refuses the other"
    yield from (f"  - {breakage.code} ({breakage.bump.value}): {breakage.explain()}" for breakage in breakages)
    yield from _conclude(answer)
    honest = "" if step.honest is None else f", such as {step.honest} after {step.old}"
    yield f"Needs a step of {step.needed.value}{honest}."
    if step.claimed is not None:
        order = "after" if step.old is None or step.new is None or step.new >= step.old else "going back from"
        judged = "enough" if step.is_honest else "too little"
        yield f"Claims a step of {step.claimed.value} ({step.new} {order} {step.old}): {judged}."
    if answer.mode is not None:
        yield from _show_mode(answer.mode, answer.findings)
    yield from _show_remedies([*breakages, *(finding.breakage for finding in answer.findings)])


def _conclude(answer: _Answer) -> Iterator[str]:
    num, are_files = len(answer.breakages), answer.old.is_file or answer.new.is_file
    if are_files and num:
        yield f"{show_count(num, 'breakage')}: the code that holds the old one cannot hold the new one."
    elif are_files:
        yield "Same names, shapes and dtypes: the code that holds the old one holds the new one."
    else:
        yield f"{show_count(num, 'breakage')}." if num else "Nothing that callers, files or configs can notice."


def _show_mode(mode: CompatibilityMode, findings: Sequence[Incompatibility]) -> Iterator[str]:
    yield f"Compatibility {mode.value}: {'no' if findings else 'yes'}."
    yield from (f"  - {finding.explain()}" for finding in findings)


def _show_remedies(breakages: Sequence[Breakage]) -> Iterator[str]:
    """Show what to do, once for each kind of breakage."""
    remedies = {breakage.code: breakage.remedy for breakage in breakages}
    if remedies:
        yield "Remedies"
        yield from (f"  {code}: {remedy}" for code, remedy in remedies.items())


DIFF = Command(
    name="diff",
    summary="compare two versions and tell how big a step they are apart, and who gets along with whom",
    epilog="Exit code: 0 if NEW may take the place of OLD (without --mode: if nothing differs), 1 if it may not or "
    "names another model, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
