"""`hotglm demo`: a live classifier of handwritten digits is updated under load in three ways; every answer is counted.

Rules this module keeps:

- The exit code is 0 only if every claim about hotglm came true in this very run; it is 1 if one did not.
- Whatever is made is in one temporary folder, which is gone at the end; the page and the report stay where they were
  asked for.
- One thread computes each pass, because several clients share the cores; the caller's setting is put back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import hotglm
from hotglm.demo.console import Console
from hotglm.demo.outcome import compare_sides, exit_code, verify
from hotglm.demo.page import write_page
from hotglm.demo.releases import NEW, OLD, make_bad_releases, make_release
from hotglm.demo.report import Report, write_report
from hotglm.demo.runs import FULL, QUICK, Material, Schedule, run_overwrite, run_restart, run_slot
from hotglm.demo.story import describe_checks, describe_sides, describe_table
from hotglm.demo.tally import tally
from hotglm.demo.traffic import NUM_CLIENTS, make_exam
from hotglm.demo.training import load_data
from hotglm.demo.updates import open_slot, read_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code.

    Args:
        argv: the words after `demo`; none when None.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    options = _make_parser().parse_args([] if argv is None else list(argv))
    schedule = QUICK if options.quick else FULL
    console = Console(expected_s=schedule.expected_s)
    try:
        with _one_thread(), tempfile.TemporaryDirectory(prefix="hotglm-demo-") as folder:
            report = _run(Path(folder), schedule, console)
    finally:
        console.close()
    _tell_end(report, console)
    if options.json is not None:
        write_report(report, options.json)
    write_page(report, options.html)
    console.say(f"\npage: {options.html.resolve()}")
    return exit_code(report.checks)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotglm demo",
        description="Update a live classifier of handwritten digits under load: with hotglm, with load_state_dict, and "
        "with a restart. Every answer is checked against the exact outputs of both versions.",
        epilog="Exit code: 0 if every claim about hotglm came true, 1 if one did not, 2 on an error.",
    )
    parser.add_argument("--quick", action="store_true", help="a short form, under 12 s")
    parser.add_argument(
        "--html", type=Path, default=Path("hotglm-demo.html"), metavar="PATH", help="the page (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was measured as JSON")
    return parser


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _run(folder: Path, schedule: Schedule, console: Console) -> Report:
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    console.say(f"hotglm {hotglm.__version__} demo, {machine}, {NUM_CLIENTS} clients\n")
    material = _prepare(folder, console)

    console.step("hotglm: update, refuse, roll back, under traffic")
    console.say("\n1. hotglm.ModuleSlot")
    console.say("\n".join(f"{' ' * 11}| {line}" for line in read_code(open_slot).splitlines()))
    slot_run = run_slot(material, schedule, console)

    console.step("the same traffic, with load_state_dict on the live model")
    console.say("\n2. load_state_dict on the live model")
    overwritten = run_overwrite(material, schedule, console)

    console.step("the same traffic, with a restart of the process")
    console.say("\n3. restart of the process")
    restarted = run_restart(material, schedule, console)

    runs = (slot_run.run, overwritten, restarted)
    tallies = tuple(map(tally, runs))
    return Report(
        machine=machine,
        releases=(material.old, material.new),
        exam=material.exam,
        runs=runs,
        tallies=tallies,
        sides=compare_sides(slot_run.refusals, material.exam, material.old.path),
        checks=verify(slot_run, tallies[0]),
        duration_s=console.elapsed_s,
    )


def _prepare(folder: Path, console: Console) -> Material:
    console.step("training two versions of a classifier")
    data = load_data()
    old, new = (make_release(version, data, folder) for version in (OLD, NEW))
    num_held_out = sum(map(len, data.answers))
    console.say(f"{len(data.labels)} handwritten digits to train on, {num_held_out} held out (scikit-learn's digits)")
    for release in (old, new):
        size = release.path.stat().st_size / 2**20
        console.say(f"  {release.path.name}  {size:.1f} MiB  {release.accuracy:.1%} of the held-out digits right")
    return Material(
        old=old,
        new=new,
        bad=make_bad_releases(new, folder),
        exam=make_exam(data, (old, new)),
        folder=folder,
    )


def _tell_end(report: Report, console: Console) -> None:
    console.say("\nThe same bad releases, offered to both:\n")
    console.say(describe_sides(report.sides))
    console.say("\nEvery answer counted:\n")
    console.say(describe_table(report.tallies))
    console.say("\nWhat hotglm promised:\n")
    console.say(describe_checks(report.checks))
    console.say(f"\n{report.verdict}, in {report.duration_s:.1f} s.")
