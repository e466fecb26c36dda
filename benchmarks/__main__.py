"""`python -m benchmarks`: run all groups, or some, print the table and write the report."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Collection, Sequence

from benchmarks.bench import MIB, Bench, Row
from benchmarks.device import PARTS
from benchmarks.report import describe_load, describe_machine, name_report, to_json, to_markdown

__all__ = ["GROUPS", "main"]

GROUPS = (
    "call",
    "commit",
    "loading",
    "tail",
    "quiet",
    "rollback",
    "in_place",
    "memory",
    "restart",
    "migration",
    "compiled",
    "deltas",
    "releases",
    "watching",
    "device",
)
"""The modules that measure, in the order of the table; each has a `measure(bench)`."""

_RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code: 0 also where a target is missed, because a report is no test."""
    options = _parse(arguments)
    machine = describe_machine(() if options.rows == GROUPS else options.rows)
    if options.parts:
        machine["parts"] = ",".join(options.parts)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hotglm-bench-", dir=options.scratch) as directory:
        nbytes = (4 if options.quick else options.mib) * MIB
        bench = Bench(directory=directory, quick=options.quick, nbytes=nbytes, parts=options.parts)
        for group in options.rows:
            print(f"==> {group}", file=sys.stderr, flush=True)
            rows += importlib.import_module(f"benchmarks.{group}").measure(bench)
    machine["load after"] = describe_load()
    if options.quick:
        machine["quick"] = "a smoke test on tiny models: the figures mean nothing"
    text = to_markdown(rows, machine)
    print(text)
    _write(options.out, name_report(machine), {"md": text, "json": to_json(rows, machine)})
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", type=_split, default=GROUPS, help=f"groups, with commas between: {','.join(GROUPS)}")
    parser.add_argument("--parts", type=_split_parts, default=(), help=f"of the group device: {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, on tiny models: a smoke test")
    parser.add_argument("--out", help="directory of the report; benchmarks/results by default, nowhere with --quick")
    parser.add_argument("--scratch", help="directory for files of weights (6 GiB); the system's own by default")
    parser.add_argument("--mib", type=int, default=1024, help="size of the model, in MiB")
    options = parser.parse_args(arguments)
    if options.out is None and not options.quick:
        options.out = _RESULTS
    return options


def _split(text: str) -> tuple[str, ...]:
    return _pick(text, GROUPS, "group")


def _split_parts(text: str) -> tuple[str, ...]:
    return _pick(text, PARTS, "part")


def _pick(text: str, known: Collection[str], what: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such {what}: {', '.join(unknown)}")
    return names


def _write(directory: str | None, stem: str, texts: dict[str, str]) -> None:
    if directory is None:
        return
    os.makedirs(directory, exist_ok=True)
    for suffix, text in texts.items():
        with open(os.path.join(directory, f"{stem}.{suffix}"), "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main())
