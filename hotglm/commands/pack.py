"""`hotglm pack`: existing weights become a release: where they are, copied to a directory, or in a store."""

from __future__ import annotations

import argparse
import sys

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.commands.progress import ProgressBar
from hotglm.commands.release_text import describe_release
from hotglm.commands.trust_options import add_key_options, parse_time, read_key
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.release.directory import Release, open_release
from hotglm.release.packing import ReleaseDetails, pack
from hotglm.release.store_opening import open_store

__all__ = ["PACK"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a .safetensors file, a shard index, a directory, or a release")
    parser.add_argument("destination", metavar="DST", nargs="?", help="a directory that does not exist yet")
    parser.add_argument("--in-place", action="store_true", help="let the directory SRC become the release")
    parser.add_argument("--store", metavar="STORE", help="publish in a store, which is made where nothing is")
    parser.add_argument("--label", metavar="LABEL", help="with --store: let a label lead to the release then")
    parser.add_argument("--link", action="store_true", help="with --store: link files instead of copying them")
    parser.add_argument("--name", metavar="NAME", help="name of the model, where the weights do not say it")
    parser.add_argument("--version", metavar="VERSION", help="version, where the weights do not say it")
    parser.add_argument("--requires", metavar="REQUIREMENT", action="append", help="such as 'torch>=2.6'; repeatable")
    parser.add_argument("--expires", metavar="TIME", help="when it must not be taken for new any more: ISO 8601")
    add_key_options(parser, flag="--sign", is_required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    _verify_arguments(arguments)
    details = ReleaseDetails(
        requires=None if arguments.requires is None else tuple(arguments.requires),
        expires_at=None if arguments.expires is None else parse_time(arguments.expires),
        signing_key=None if arguments.key is None else read_key(arguments),
    )
    with ProgressBar(sys.stderr) as bar:
        show = bar.tell
        if arguments.store is None:
            release = pack(
                arguments.source,
                arguments.destination,
                name=arguments.name,
                version=arguments.version,
                details=details,
                progress=show,
            )
        else:
            store = open_store(arguments.store, creates=True)
            stored = store.publish(
                arguments.source,
                name=arguments.name,
                version=arguments.version,
                details=details,
                is_linked=arguments.link,
                progress=show,
            )
            if arguments.label is not None:
                store.move_label(arguments.label, stored.sequence, progress=show)
            release = open_release(stored.path)
    with release:
        if arguments.json:
            print_json("hotglm.pack/1", {**describe_release(release), "label": arguments.label})
        else:
            print(_show(release, label=arguments.label))
    return OK


def _verify_arguments(arguments: argparse.Namespace) -> None:
    ways = [arguments.destination is not None, arguments.in_place, arguments.store is not None]
    if sum(ways) != 1:
        raise ArgumentError(
            f"Expected one of DST, --in-place and --store, got {sum(ways)}.",
            remedy="say where the release is to be: `hotglm pack SRC DST`, for example.",
        )
    if arguments.store is None and (arguments.label is not None or arguments.link):
        raise ArgumentError(
            "Expected --label and --link only with --store, got one without.", remedy="give --store, or leave it out."
        )


def _show(release: Release, *, label: str | None) -> str:
    manifest = release.manifest
    files, tensors = show_count(len(manifest.files), "file"), show_count(len(manifest.tensors), "tensor")
    lines = [
        f"release {shorten_repr(manifest.name)} {manifest.version}, number {manifest.sequence}",
        f"in {shorten_repr(release.path)}",
        f"{files}, {tensors}, {show_size(manifest.total_nbytes)}",
        f"digest {release.digest}",
    ]
    return "\n".join(lines if label is None else [*lines, f"label {label} leads to it"])


PACK = Command(
    name="pack",
    summary="make a release of existing weights, without rewriting them",
    epilog="The release appears whole or not at all. Exit code: 0 if it is there, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
