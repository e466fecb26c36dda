"""`hotglm label`: where a label of a store leads; and moving it, by compare-and-set where that is asked for."""

from __future__ import annotations

import argparse
import sys
from types import EllipsisType

from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.progress import ProgressBar
from hotglm.commands.target import parse_target
from hotglm.commands.trust_options import add_trust_options, open_trust_from
from hotglm.errors import ArgumentError
from hotglm.record import write_record
from hotglm.release.ledger import Label
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store

__all__ = ["LABEL"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the directory of the store")
    parser.add_argument("label", metavar="NAME", help="the label, such as 'stable'")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="a version, number or other label to lead it to")
    parser.add_argument("--expect", metavar="VERSION", help="only if it leads there now; 'none': only if it is new")
    parser.add_argument("--remove", action="store_true", help="remove it, and what it remembers")
    add_trust_options(parser, is_required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    _verify_arguments(arguments)
    store = open_store(arguments.store)
    was_removed = arguments.remove and _remove(store, arguments)
    if arguments.target is not None:
        _move(store, arguments)
    label = store.read_label(arguments.label)
    if arguments.json:
        print_json(
            "hotglm.label/1",
            {"path": store.path, "name": arguments.label, "label": None if label is None else write_record(label)},
        )
    else:
        print(f"removed label {arguments.label}" if was_removed else _show(arguments.label, label))
    return OK if label is not None or was_removed else NO


def _verify_arguments(arguments: argparse.Namespace) -> None:
    if arguments.remove and arguments.target is not None:
        raise ArgumentError("Expected TARGET or --remove, got both.", remedy="leave one of them out.")
    if arguments.expect is not None and arguments.target is None and not arguments.remove:
        raise ArgumentError("Expected --expect only with a change, got none.", remedy="give TARGET or --remove.")
    if arguments.remove and arguments.expect == "none":
        raise ArgumentError("Expected a version to expect, got 'none'.", remedy="leave --expect or --remove out.")
    if (arguments.roots is None) != (arguments.state is None):
        raise ArgumentError("Expected --roots and --state together, got one of them.", remedy="give both or none.")


def _move(store: Store, arguments: argparse.Namespace) -> None:
    expected: str | EllipsisType | None = ... if arguments.expect is None else arguments.expect
    trust = None if arguments.roots is None else open_trust_from(arguments)
    with ProgressBar(sys.stderr) as bar:
        store.move_label(
            arguments.label,
            parse_target(arguments.target),
            expected=None if expected == "none" else expected,
            trust=trust,
            progress=bar.tell,
        )


def _remove(store: Store, arguments: argparse.Namespace) -> bool:
    """Remove the label; return whether it was there."""
    was_there = store.read_label(arguments.label) is not None
    store.remove_label(arguments.label, expected=... if arguments.expect is None else arguments.expect)
    return was_there


def _show(name: str, label: Label | None) -> str:
    if label is None:
        return f"no label {name!a}"
    lines = [f"label {name} leads to {label.release.version}, moved {show_count(label.revision, 'time')}"]
    lines += [f"  {move.moved_at}  to {move.release.version} (number {move.release.sequence})" for move in label.moves]
    return "\n".join(lines)


LABEL = Command(
    name="label",
    summary="tell where a label of a store leads; move it or remove it",
    epilog="A label moves only to a release whose every byte was verified. Exit code: 0, 1 if there is no such label, "
    "2 on an error: so it is where --expect names another version than it leads to.",
    add_arguments=_add_arguments,
    run=_run,
)
