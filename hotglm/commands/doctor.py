"""`hotglm doctor`: the environment that weights were made in, and this one, package by package."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.subject import Subject, read_subject
from hotglm.environment import Environment
from hotglm.environment_comparison import EnvironmentFinding, find_environment_differences
from hotglm.problem import escape_text
from hotglm.release.environment import read_environment

__all__ = ["DOCTOR"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="weights as for inspect, or package.module:Class, whose requirements are looked at"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    subject = read_subject(arguments.path)
    made = subject.made_in
    here = read_environment(("torch", *(made.packages if made is not None else ()), *subject.requires))
    findings = list(find_environment_differences(made, here, requires=subject.requires))
    if arguments.json:
        print_json("hotglm.doctor/1", _describe(subject, here, findings))
    else:
        print("\n".join(_show(subject, findings)))
    return NO if any(finding.matters for finding in findings) else OK


def _describe(subject: Subject, here: Environment, findings: Sequence[EnvironmentFinding]) -> dict[str, object]:
    return {
        **subject.identify(),
        "requires": list(subject.requires),
        "made_in": None if subject.made_in is None else subject.made_in.to_dict(),
        "here": here.to_dict(),
        "fine": not any(finding.matters for finding in findings),
        "findings": [
            {
                "subject": finding.subject,
                "weight": finding.weight,
                "code": finding.code,
                "made": finding.made,
                "here": finding.here,
                "message": finding.message,
            }
            for finding in findings
        ],
    }


def _show(subject: Subject, findings: Sequence[EnvironmentFinding]) -> Iterator[str]:
    yield subject.show()
    if subject.requires:
        yield f"requires {', '.join(escape_text(text, limit=60) for text in subject.requires)}"
    if subject.made_in is None:
        yield "It does not say what it was made with."
    yield from (f"  {finding.weight:<8}{finding.explain()}" for finding in findings)
    num = {weight: sum(finding.weight == weight for finding in findings) for weight in ("error", "warning")}
    counts = [show_count(many, weight) for weight, many in num.items() if many]
    yield f"{' and '.join(counts)}." if counts else "Nothing here keeps it from being used as it was made."


DOCTOR = Command(
    name="doctor",
    summary="compare the environment that weights were made in with this one; reads headers only",
    epilog="Exit code: 0 if nothing that differs matters, 1 if something does, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
