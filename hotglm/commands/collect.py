"""`hotglm collect`: removes the releases of a store that nothing names, contents that no release has, and debris."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.errors import shorten_repr
from hotglm.release.collecting import Collected
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import StoredRelease

__all__ = ["COLLECT"]

_KEEP_NEWEST = 3


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the directory of the store")
    parser.add_argument(
        "--keep-newest",
        metavar="N",
        type=int,
        default=_KEEP_NEWEST,
        help=f"how many of the newest releases stay, whatever names them (default {_KEEP_NEWEST})",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tell what would go if nobody has it open; debris is not looked for"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    collected = store.collect_garbage(keep_newest=arguments.keep_newest, is_dry=arguments.dry_run)
    if arguments.json:
        print_json("hotglm.collect/1", {"path": store.path, "dry_run": arguments.dry_run, **_describe(collected)})
    else:
        print("\n".join(_show(collected, is_dry=arguments.dry_run)))
    return OK


def _describe(collected: Collected) -> dict[str, object]:
    return {
        "removed": [_identify(one) for one in collected.removed],
        "in_use": [_identify(one) for one in collected.in_use],
        "num_objects": collected.num_objects,
        "nbytes": collected.nbytes,
        "debris": list(collected.debris),
    }


def _identify(one: StoredRelease) -> dict[str, object]:
    return {"sequence": one.sequence, "version": str(one.version)}


def _show(collected: Collected, *, is_dry: bool) -> Iterator[str]:
    word = "would remove" if is_dry else "removed"
    releases, contents = show_count(len(collected.removed), "release"), show_count(collected.num_objects, "content")
    yield f"{word} {releases} and {contents} that no release has any more, {show_size(collected.nbytes)}"
    yield from (f"  {one.version} (number {one.sequence})" for one in collected.removed)
    yield from (f"in use, and left: {one.version} (number {one.sequence})" for one in collected.in_use)
    yield from (f"debris of a killed process: {shorten_repr(name)}" for name in collected.debris)


COLLECT = Command(
    name="collect",
    summary="remove releases of a store that no label or service names, and what killed processes left",
    epilog="What somebody has open stays. Exit code: 0, or 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
