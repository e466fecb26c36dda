"""Everything a demo found out, and its form for programs.

Rules this module keeps: the page and the JSON are made from the report alone; `schema` changes when its meaning does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hotglm.demo.outcome import Check, Side
from hotglm.demo.releases import Release
from hotglm.demo.tally import Moment, Run, Tally
from hotglm.demo.traffic import Exam

__all__ = ["Report", "write_report"]

_SCHEMA = "hotglm.demo/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one demo found out.

    Attributes:
        machine: what it ran on, in words.
        releases: the two good ones, the old one first.
        exam: what the clients asked about.
        runs: hotglm first, then its peers.
        tallies: one for each run.
        sides: what became of each bad release on both sides.
        checks: every claim about hotglm.
        duration_s: seconds that it took.
    """

    machine: str
    releases: Sequence[Release]
    exam: Exam
    runs: Sequence[Run]
    tallies: Sequence[Tally]
    sides: Sequence[Side]
    checks: Sequence[Check]
    duration_s: float

    @property
    def verdict(self) -> str:
        """Say how many claims came true."""
        num_met = sum(check.is_met for check in self.checks)
        return f"{num_met} of {len(self.checks)} claims came true"


def write_report(report: Report, path: Path) -> None:
    """Write `report` as one JSON document to `path`."""
    document = {
        "schema": _SCHEMA,
        "ok": all(check.is_met for check in report.checks),
        "machine": report.machine,
        "duration_s": report.duration_s,
        "releases": [{"version": r.version, "accuracy": r.accuracy} for r in report.releases],
        "table": [dataclasses.asdict(tally) for tally in report.tallies],
        "moments": {run.name: [_describe(moment, run) for moment in run.moments] for run in report.runs},
        "sides": [dataclasses.asdict(side) for side in report.sides],
        "checks": [dataclasses.asdict(check) for check in report.checks],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _describe(moment: Moment, run: Run) -> dict[str, object]:
    return {
        "kind": moment.kind.value,
        "title": moment.title,
        "began_s": moment.began_s - run.began_s,
        "duration_s": moment.ended_s - moment.began_s,
        "serving": moment.serving,
        "text": moment.text,
    }
