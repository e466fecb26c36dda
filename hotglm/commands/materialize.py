"""`hotglm materialize`: the full release that a delta leads to, with the author's own files."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.commands.progress import ProgressBar
from hotglm.commands.release_text import describe_release
from hotglm.commands.target import open_target
from hotglm.errors import shorten_repr
from hotglm.release.directory import Release

__all__ = ["MATERIALIZE"]

_MAKER = "hotglm.deltas.materializing"  # by name, because it imports torch


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="RELEASE", help="a directory; with --store a label, version or number")
    parser.add_argument("target", metavar="DST", help="a directory that does not exist yet")
    parser.add_argument("--store", metavar="STORE", help="look in this store")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    maker: Any = importlib.import_module(_MAKER)
    with open_target(arguments.release, store=arguments.store) as source, ProgressBar(sys.stderr) as bar:
        show = bar.tell
        release: Release = maker.materialize(source, arguments.target, progress=show)
    with release:
        if arguments.json:
            print_json("hotglm.materialize/1", describe_release(release))
        else:
            print(_show(release))
    return OK


def _show(release: Release) -> str:
    manifest = release.manifest
    files, tensors = show_count(len(manifest.files), "file"), show_count(len(manifest.tensors), "tensor")
    return "\n".join(
        [
            f"release {shorten_repr(manifest.name)} {manifest.version}, number {manifest.sequence}, in full",
            f"in {shorten_repr(release.path)}",
            f"{files}, {tensors}, {show_size(manifest.total_nbytes)}",
            f"digest {release.digest}",
        ]
    )


MATERIALIZE = Command(
    name="materialize",
    summary="make the full release that a delta leads to",
    epilog="DST appears whole or not at all. Exit code: 0 if it is there, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
