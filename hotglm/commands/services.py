"""`hotglm services`: what the services of a store confirmed, try and refuse; and letting one try a release again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hotglm.commands.command import NO, OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.record import write_record
from hotglm.release.ledger import ReleaseId, ServiceState
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store

__all__ = ["SERVICES"]

_LEAST_DIGITS = 8


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the directory of the store")
    parser.add_argument("service", metavar="NAME", nargs="?", help="only this service")
    parser.add_argument(
        "--forgive",
        metavar="DIGEST",
        help=f"let it try a refused release again: the digest, or its first {_LEAST_DIGITS} digits or more",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.forgive is not None and arguments.service is None:
        raise ArgumentError("Expected --forgive with the NAME of a service, got none.", remedy="give NAME.")
    store = open_store(arguments.store)
    is_done = True
    if arguments.forgive is not None:
        is_done = _forgive(store, arguments.service, arguments.forgive)
    states = store.read_services()
    if arguments.service is not None:
        states = {name: state for name, state in states.items() if name == arguments.service}
        is_done = is_done and bool(states)
    if arguments.json:
        services = [write_record(states[name]) for name in sorted(states)]
        print_json("hotglm.services/1", {"path": store.path, "services": services})
    else:
        for name in sorted(states):
            print("\n".join(_show(states[name])))
        if not states:
            print("no such service" if arguments.service is not None else "no services")
    return OK if is_done else NO


def _forgive(store: Store, name: str, word: str) -> bool:
    """Forgive the one release that is meant; tell whether there was one.

    Raises:
        ArgumentError: too few digits, or several releases begin with them.
    """
    digits = word.removeprefix("sha256:")
    if len(digits) < _LEAST_DIGITS:
        raise ArgumentError(
            f"Expected at least {_LEAST_DIGITS} digits of a digest, got {shorten_repr(word)}.",
            remedy="look at `hotglm services`.",
        )
    service = store.service(name)
    found = {one.release.digest for one in service.read().refused if _digits_of(one.release).startswith(digits)}
    if len(found) > 1:
        raise ArgumentError(
            f"Expected digits of one refused release, got those of {len(found)}.", remedy="give more of them."
        )
    for digest in found:
        service.forgive(digest)
    return bool(found)


def _digits_of(release: ReleaseId) -> str:
    return release.digest.removeprefix("sha256:")


def _show(state: ServiceState) -> Iterator[str]:
    confirmed = "nothing confirmed" if state.confirmed is None else f"confirmed {_name(state.confirmed)}"
    tries, refuses = show_count(len(state.trials), "trial"), show_count(len(state.refused), "refusal")
    yield f"service {state.name}: {confirmed}, {tries}, {refuses}"
    yield from (f"  on trial {_name(trial.release)} since {trial.began_at}" for trial in state.trials)
    for one in state.refused:
        yield f"  refused {_name(one.release)} at {one.refused_at}: {shorten_repr(one.reason)}"
        yield f"    {shorten_repr(one.release.digest)}"


def _name(release: ReleaseId) -> str:
    return f"{release.version} (number {release.sequence})"


SERVICES = Command(
    name="services",
    summary="tell what the services of a store confirmed, try and refuse",
    epilog="Exit code: 0, 1 if there is no such service, or nothing to forgive, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
