"""`hotglm show`: one release, with its files and tensors; with `--verify` every byte of it is read."""

from __future__ import annotations

import argparse
import sys

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json
from hotglm.commands.delta_changes import Changes, describe_changes, find_changes
from hotglm.commands.page import write_page
from hotglm.commands.progress import ProgressBar
from hotglm.commands.release_text import describe_release, show_release
from hotglm.commands.show_page import make_show_page
from hotglm.commands.target import open_target
from hotglm.release.directory import Release

__all__ = ["SHOW"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="RELEASE", help="its directory; with --store a label, version or number")
    parser.add_argument("--store", metavar="STORE", help="the store that RELEASE is in")
    parser.add_argument("--all", action="store_true", help="list every tensor with its digest, not a tree of them")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the picture, which needs nothing else")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare all digests")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    with open_target(arguments.release, store=arguments.store) as release:
        if arguments.verify:
            with ProgressBar(sys.stderr) as bar:
                release.verify(progress=bar.tell)
        changes = find_changes(release)
        if arguments.html is not None:
            write_page(arguments.html, make_show_page(release, changes, is_verified=arguments.verify))
        if arguments.json:
            print_json("hotglm.show/1", {**_describe(release, changes), "verified": bool(arguments.verify)})
        else:
            print("\n".join(show_release(release, changes, is_whole=arguments.all)))
            if arguments.verify:
                print("verified: every byte is the one that was promised")
    return OK


def _describe(release: Release, changes: Changes | None) -> dict[str, object]:
    manifest = release.manifest
    return {
        **describe_release(release),
        "weights": manifest.weights,
        "changes": None if changes is None else describe_changes(changes),
        "config": None if manifest.config is None else dict(manifest.config),
        "requires": list(manifest.requires),
        "capabilities": sorted(manifest.capabilities),
        "created_in": None if manifest.created_in is None else manifest.created_in.to_dict(),
        "contract": manifest.contract.to_dict(),
        "code": None if manifest.code is None else {"entry": manifest.code.entry, "files": list(manifest.code.files)},
        "files": [{"path": name, "size": one.size, "digest": one.digest} for name, one in manifest.files.items()],
        "tensors": [
            {"name": name, "dtype": one.dtype, "shape": list(one.shape), "file": one.file, "digest": one.digest}
            for name, one in manifest.tensors.items()
        ],
    }


SHOW = Command(
    name="show",
    summary="show one release, its files and its tensors; --verify reads every byte",
    epilog="Exit code: 0 if it is a whole release, 2 if it is not.",
    add_arguments=_add_arguments,
    run=_run,
)
