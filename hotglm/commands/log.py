"""`hotglm log`: the history of a store: releases, numbers, labels and services."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.commands.release_text import align, describe_release
from hotglm.errors import SourceError, shorten_repr
from hotglm.record import write_record
from hotglm.release.directory import open_release
from hotglm.release.ledger import Label, ServiceState
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import StoredRelease, StoreReader

__all__ = ["LOG"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One release of the history; `refusal` says why it cannot be read, and `facts` is None then."""

    stored: StoredRelease
    facts: dict[str, object] | None
    refusal: str | None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the directory of the store")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    labels, services = store.read_labels(), store.read_services()
    entries = [_read(stored) for stored in reversed(store.find_releases())]
    if arguments.json:
        print_json("hotglm.log/1", _describe(store, entries, labels, services))
    else:
        print("\n".join(_show(store, entries, labels, services)))
    return OK


def _read(stored: StoredRelease) -> _Entry:
    try:
        with open_release(stored.path) as release:
            return _Entry(stored=stored, facts=describe_release(release), refusal=None)
    except SourceError as error:  # a history shows what is broken, too
        return _Entry(stored=stored, facts=None, refusal=error.code)


def _describe(
    store: StoreReader,
    entries: list[_Entry],
    labels: Mapping[str, Label],
    services: Mapping[str, ServiceState],
) -> dict[str, object]:
    return {
        "path": store.path,
        "releases": [
            {
                "sequence": entry.stored.sequence,
                "version": str(entry.stored.version),
                "path": entry.stored.path,
                "refused": entry.refusal,
                **(entry.facts or {}),
                "labels": _find_labels(entry, labels),
            }
            for entry in entries
        ],
        "labels": [write_record(labels[name]) for name in sorted(labels)],
        "services": [write_record(services[name]) for name in sorted(services)],
    }


def _find_labels(entry: _Entry, labels: Mapping[str, Label]) -> list[str]:
    return sorted(name for name, label in labels.items() if label.release.sequence == entry.stored.sequence)


def _show(
    store: StoreReader,
    entries: list[_Entry],
    labels: Mapping[str, Label],
    services: Mapping[str, ServiceState],
) -> Iterator[str]:
    counts = f"{show_count(len(entries), 'release')}, {show_count(len(labels), 'label')}"
    yield f"store {shorten_repr(store.path)}: {counts}"
    if entries:
        rows = [_show_entry(entry, labels) for entry in entries]
        yield from align([("number", "version", "created", "labels", "size"), *rows])
    for name, label in sorted(labels.items()):
        yield f"label {name}, moved {show_count(label.revision, 'time')}"
        for move in label.moves:
            yield f"  {move.moved_at}  to {move.release.version} (number {move.release.sequence})"
    for name, state in sorted(services.items()):
        confirmed = "nothing confirmed" if state.confirmed is None else f"confirmed {state.confirmed.version}"
        yield f"service {name}: {confirmed}"
        yield from (f"  on trial: {trial.release.version}, since {trial.began_at}" for trial in state.trials)
        yield from (f"  refused: {one.release.version}, {shorten_repr(one.reason)}" for one in state.refused)


def _show_entry(entry: _Entry, labels: Mapping[str, Label]) -> tuple[str, ...]:
    facts = entry.facts
    created = f"broken: {entry.refusal}" if facts is None else str(facts["created"])
    size = "" if facts is None else show_size(int(str(facts["nbytes"]))).partition(" (")[0]
    names = ", ".join(_find_labels(entry, labels)) or "-"
    return (str(entry.stored.sequence), str(entry.stored.version), created, names, size)


LOG = Command(
    name="log",
    summary="list the releases of a store, and where its labels lead and led",
    epilog="Exit code: 0, or 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
