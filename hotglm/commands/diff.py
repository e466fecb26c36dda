"""`hotglm diff`: compare two weights and tell how big a step of the version they are apart."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hotglm.breakage import Breakage, required_bump
from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import (
    NAME_KEY,
    identify_weights,
    print_json,
    read_declared_version,
    show_count,
    show_headline,
)
from hotglm.comparison import find_breakages
from hotglm.contract import Contract
from hotglm.release.files import WeightFiles, open_weights
from hotglm.version import Bump, Version

__all__ = ["DIFF"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="weights as for inspect")
    parser.add_argument("new", metavar="NEW", help="weights as for inspect")
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


def _run(arguments: argparse.Namespace) -> int:
    with open_weights(arguments.old) as old, open_weights(arguments.new) as new:
        breakages = tuple(find_breakages(_contract(old), _contract(new)))
        step = _Step(
            needed=max(Bump.PATCH, required_bump(breakages)),
            old=read_declared_version(old),
            new=read_declared_version(new),
        )
        if arguments.json:
            print_json("hotglm.diff/1", _describe_diff(old, new, breakages=breakages, step=step))
        else:
            print("\n".join(_show_diff(old, new, breakages=breakages, step=step)))
        # A file promises nothing but its name and layout, so every breakage that two files can have keeps one from
        # taking the place of the other under the same code; how big a step that is called is the author's business.
        return NO if breakages or _is_renamed(old, new) else OK


def _is_renamed(old: WeightFiles, new: WeightFiles) -> bool:
    """Tell whether the two are named as different models, which a slot would refuse (NAME_MISMATCH)."""
    names = {weights.metadata[NAME_KEY] for weights in (old, new) if NAME_KEY in weights.metadata}
    return len(names) > 1


def _contract(weights: WeightFiles) -> Contract:
    entries = ((name, location.entry) for name, location in weights.tensors.items())
    return Contract.of_tensors({name: (entry.torch_dtype, entry.shape) for name, entry in entries})


def _describe_diff(
    old: WeightFiles, new: WeightFiles, *, breakages: Iterable[Breakage], step: _Step
) -> dict[str, object]:
    breakages = list(breakages)
    return {
        "old": identify_weights(old),
        "new": identify_weights(new),
        "compatible": not breakages and not _is_renamed(old, new),
        "renamed": _is_renamed(old, new),
        "needed": step.needed.value,
        "claimed": None if step.claimed is None else step.claimed.value,
        "honest": step.is_honest,
        "honest_version": None if step.honest is None else str(step.honest),
        "breakages": [breakage.to_dict() for breakage in breakages],
    }


def _show_diff(old: WeightFiles, new: WeightFiles, *, breakages: Sequence[Breakage], step: _Step) -> Iterator[str]:
    yield f"old: {show_headline(old)}"
    yield f"new: {show_headline(new)}"
    if _is_renamed(old, new):
        yield "  - NAME_MISMATCH: they are named as different models; a slot of the one refuses the other"
    yield from (f"  - {breakage.code} ({breakage.bump.value}): {breakage.explain()}" for breakage in breakages)
    if breakages:
        yield f"{show_count(len(breakages), 'breakage')}: the code that holds the old one cannot hold the new one."
    else:
        yield "Same names, shapes and dtypes: the code that holds the old one holds the new one."
    honest = "" if step.honest is None else f", such as {step.honest} after {step.old}"
    yield f"Needs a step of {step.needed.value}{honest}."
    if step.claimed is not None:
        order = "after" if step.old is None or step.new is None or step.new >= step.old else "going back from"
        yield f"Claims a step of {step.claimed.value} ({step.new} {order} {step.old}): {_judge(step)}."


def _judge(step: _Step) -> str:
    return "enough" if step.is_honest else "too little"


DIFF = Command(
    name="diff",
    summary="compare two weights and tell how big a step of the version they are apart",
    epilog="Exit code: 0 if NEW fills the code that holds OLD as it is, 1 if it does not or names another model, "
    "2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
