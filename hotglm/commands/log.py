"""`hotglm log`: the history of a store, drawn: releases, deltas below which their base stands, labels and services."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.commands.history import Entry, History, Row, plan_rows, read_history
from hotglm.commands.log_page import make_log_page
from hotglm.commands.page import write_page
from hotglm.commands.release_text import align, draw_bar
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.record import write_record
from hotglm.release.store_opening import open_store

__all__ = ["LOG"]

_WORDS: Mapping[str, str] = {"confirmed": "confirmed by", "trial": "on trial by", "refused": "refused by"}
_LEGEND = "* full, + delta: its base is the next one down its column, x broken"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the directory of the store")
    parser.add_argument("--newest", metavar="N", type=int, help="only the newest N releases")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the picture, which needs nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.newest is not None and arguments.newest < 1:
        raise ArgumentError(f"Expected at least 1 release, got {arguments.newest}.", remedy="give a larger --newest.")
    history = read_history(open_store(arguments.store), newest=arguments.newest)
    if arguments.html is not None:
        write_page(arguments.html, make_log_page(history))
    if arguments.json:
        print_json("hotglm.log/1", _describe(history))
    else:
        print("\n".join(_show(history)))
    return OK


def _describe(history: History) -> dict[str, object]:
    return {
        "path": history.path,
        "releases": [
            {
                "sequence": entry.stored.sequence,
                "version": str(entry.stored.version),
                "path": entry.stored.path,
                "refused": entry.refusal,
                **(entry.facts or {}),
                "signed": entry.is_signed,
                "labels": history.find_labels(entry),
            }
            for entry in history.entries
        ],
        "num_older": history.num_older,
        "labels": [write_record(history.labels[name]) for name in sorted(history.labels)],
        "services": [write_record(history.services[name]) for name in sorted(history.services)],
    }


def _show(history: History) -> Iterator[str]:
    releases = show_count(len(history.entries) + history.num_older, "release")
    yield f"store {shorten_repr(history.path)}: {releases}, {show_count(len(history.labels), 'label')}"
    if history.entries:
        largest = max(entry.nbytes for entry in history.entries)
        rows = [_show_row(row, history, largest=largest) for row in plan_rows(history.entries)]
        yield from align(
            [("", "number", "version", "created", "", "size", "what", ""), *rows], right=("number", "size")
        )
        if history.num_older:
            yield f"  and {history.num_older} older"
        if any(entry.base is not None for entry in history.entries):
            yield _LEGEND
    for name, label in sorted(history.labels.items()):
        yield f"label {name}, moved {show_count(label.revision, 'time')}"
        for move in label.moves:
            yield f"  {move.moved_at}  to {move.release.version} (number {move.release.sequence})"
    for name, state in sorted(history.services.items()):
        confirmed = "nothing confirmed" if state.confirmed is None else f"confirmed {state.confirmed.version}"
        yield f"service {name}: {confirmed}"
        yield from (f"  on trial: {trial.release.version}, since {trial.began_at}" for trial in state.trials)
        yield from (f"  refused: {one.release.version}, {shorten_repr(one.reason)}" for one in state.refused)


def _show_row(row: Row, history: History, *, largest: int) -> tuple[str, ...]:
    entry = row.entry
    created = "" if entry.facts is None else str(entry.facts["created"])
    size = "" if entry.facts is None else show_size(entry.nbytes).partition(" (")[0]
    signed = ", signed" if entry.is_signed else ""
    marks = [f"<- {', '.join(names)}"] if (names := history.find_labels(entry)) else []
    marks += [f"{_WORDS[mark]} {service}" for mark, service in history.find_marks(entry)]
    return (
        draw_graph(row),
        str(entry.stored.sequence),
        str(entry.stored.version),
        created,
        draw_bar(entry.nbytes, largest),
        size,
        f"{entry.what}{signed}",
        "; ".join(marks),
    )


def draw_graph(row: Row) -> str:
    """Return the columns of one line: a sign for the release, `|` for what passes by, `-'` for what leads to it."""
    last = max(row.column, *row.passes, *row.merges, 0)
    cells = [" "] * (2 * last + 1)
    if row.merges:
        for at in range(2 * row.column + 1, 2 * max(row.merges)):
            cells[at] = "-"
    for column in row.passes:
        cells[2 * column] = "|"
    for column in row.merges:
        cells[2 * column] = "'"
    cells[2 * row.column] = _sign(row.entry)
    return "".join(cells)


def _sign(entry: Entry) -> str:
    if entry.facts is None:
        return "x"
    return "*" if entry.facts["kind"] == "full" else "+"


LOG = Command(
    name="log",
    summary="draw the releases of a store and what they are made from, and where its labels lead and led",
    epilog="Exit code: 0, or 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
