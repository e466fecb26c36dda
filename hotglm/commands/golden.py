"""`hotglm golden make|verify`: record what a released version answers, and see that it still does."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from typing import Any

from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import foreign_output, print_json, show_count
from hotglm.errors import ArgumentError
from hotglm.problem import describe_exception, escape_text

__all__ = ["GOLDEN"]

# By name, because they import torch, which everything else here does without.
_PROOF, _FILES, _TRAFFIC = "hotglm.testing.golden_proof", "hotglm.testing.golden_files", "hotglm.testing.traffic"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="run one pass of a released version and record it beside its weights")
    verify = actions.add_parser("verify", help="see that every golden still loads and answers as recorded")
    for action in (make, verify):
        action.add_argument("directory", metavar="DIR", help="where all goldens are kept")
        action.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="Python module that registers the model's classes; may be given again",
        )
    make.add_argument("--weights", required=True, metavar="PATH", help="the released weights, as for inspect")
    make.add_argument(
        "--inputs",
        required=True,
        metavar="FILE",
        help="safetensors file of the arguments: 0, 1 and so on are positional, others go by name",
    )
    make.add_argument("--model", metavar="NAME", help="name of the model, where the weights carry none")
    make.add_argument("--version", metavar="VERSION", help="version, where the weights carry none")
    make.add_argument(
        "--rtol", type=float, default=1e-4, help="relative tolerance for later code (default %(default)s)"
    )
    make.add_argument(
        "--atol", type=float, default=1e-5, help="absolute tolerance for later code (default %(default)s)"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    _import_all(arguments.modules)
    if arguments.action == "make":
        return _make(arguments)
    proof: Any = importlib.import_module(_PROOF)
    with foreign_output():
        outcomes = list(proof.find_outcomes(arguments.directory))
    return _verify(outcomes, as_json=arguments.json)


def _import_all(names: Iterable[str]) -> None:
    for name in names:
        try:
            with foreign_output():
                importlib.import_module(name)
        except Exception as error:
            raise ArgumentError(
                f"Expected to import {name!a}, got {describe_exception(error)}.",
                remedy="run it where that module can be imported: python -m hotglm, from the root of the project.",
            ) from error


def _make(arguments: argparse.Namespace) -> int:
    files: Any = importlib.import_module(_FILES)
    traffic: Any = importlib.import_module(_TRAFFIC)
    path = files.record_golden(
        arguments.weights,
        inputs=arguments.inputs,
        directory=arguments.directory,
        name=arguments.model,
        version=arguments.version,
        tolerance=traffic.Tolerance(rtol=arguments.rtol, atol=arguments.atol),
    )
    print(f"made {str(path)!a}")
    return OK


def _verify(outcomes: list[Any], *, as_json: bool) -> int:
    bad = [outcome for outcome in outcomes if outcome.error is not None]
    if as_json:
        print_json(
            "hotglm.goldens/1", {"is_good": not bad and bool(outcomes), "goldens": list(map(_describe, outcomes))}
        )
    else:
        for outcome in outcomes:
            label = escape_text(outcome.label)
            print(outcome.proof if outcome.error is None else f"{label}: FAILED: {outcome.error}")
        print(f"{show_count(len(outcomes), 'golden')}, {len(bad)} failed")
    return NO if bad or not outcomes else OK


def _describe(outcome: Any) -> dict[str, object]:
    proof, error = outcome.proof, outcome.error
    return {
        "golden": outcome.label,
        "loads": error is None,
        "code_version": None if proof is None else str(proof.code_version),
        "is_exact": None if proof is None else proof.is_exact,
        "code": None if error is None else error.code,
        "message": None if error is None else str(error),
    }


GOLDEN = Command(
    name="golden",
    summary="record what a released version answers, and see that it still does",
    epilog="Exit code of verify: 0 if every golden loads and answers as recorded, 1 if one does not or there is none, "
    "2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
