"""`hotglm sign`: one signature more for a release, of which every byte is read first, or for roots of trust."""

from __future__ import annotations

import argparse
import os
import sys

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count
from hotglm.commands.progress import ProgressBar
from hotglm.commands.target import open_target
from hotglm.commands.trust_options import add_key_options, read_key
from hotglm.errors import shorten_repr
from hotglm.trust.signing import sign_release, sign_roots

__all__ = ["SIGN"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="PATH", help="a release, or roots of trust; with --store a label or version")
    parser.add_argument("--store", metavar="STORE", help="the store that PATH is in")
    add_key_options(parser, flag="--key", is_required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    key = read_key(arguments)
    if arguments.store is None and os.path.isfile(arguments.target):
        path, num = arguments.target, sign_roots(arguments.target, key)
    else:
        with open_target(arguments.target, store=arguments.store) as release, ProgressBar(sys.stderr) as bar:
            path = release.path
            num = sign_release(path, key, progress=bar.tell)
    if arguments.json:
        print_json("hotglm.sign/1", {"path": path, "key": key.public.id, "num_signatures": num})
    else:
        print(f"signed {shorten_repr(path)} with {key.public.id}; it has {show_count(num, 'signature')}")
    return OK


SIGN = Command(
    name="sign",
    summary="sign a release, or roots of trust; signatures add up",
    epilog="A release is signed only if every byte is the one that its manifest promises. Exit code: 0 if the "
    "signature is there, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
