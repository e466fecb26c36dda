"""`hotglm delta`: what changed between two releases, or since a release of a store, as a release of its own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from typing import Any

from hotglm.commands.command import OK, Command
from hotglm.commands.console import print_json, show_count, show_size
from hotglm.commands.progress import ProgressBar
from hotglm.commands.release_text import describe_release
from hotglm.commands.target import parse_target
from hotglm.commands.trust_options import add_key_options, read_key
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.release.directory import Release, open_release
from hotglm.release.packing import ReleaseDetails
from hotglm.release.store_opening import open_store

__all__ = ["DELTA", "describe_delta"]

# By name, because they import torch, which a machine that only looks at releases does without.
_MAKER = "hotglm.deltas.making"
_PUBLISHER = "hotglm.deltas.publishing"

_OF_STORES = ("base", "name", "version", "label", "max_chain", "max_ratio")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="the release it is made against; with --store, the new weights")
    parser.add_argument("new", metavar="NEW", nargs="?", help="the release that it leads to")
    parser.add_argument("target", metavar="DST", nargs="?", help="a directory that does not exist yet")
    parser.add_argument("--store", metavar="STORE", help="publish OLD, the new weights, as a delta in a store")
    parser.add_argument("--base", metavar="BASE", help="with --store: against this label, version or number")
    parser.add_argument("--name", metavar="NAME", help="with --store: name, where the weights do not say it")
    parser.add_argument("--version", metavar="VERSION", help="with --store: version, where the weights do not say it")
    parser.add_argument("--label", metavar="LABEL", help="with --store: let a label lead to the release then")
    parser.add_argument("--max-chain", metavar="N", type=int, help="with --store: in full after so many deltas (16)")
    parser.add_argument("--max-ratio", metavar="R", type=float, help="with --store: in full above this part (0.5)")
    add_key_options(parser, flag="--sign", is_required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    _verify_arguments(arguments)
    key = None if arguments.key is None else read_key(arguments)
    with ProgressBar(sys.stderr) as bar:
        show = bar.tell
        if arguments.store is None:
            maker: Any = importlib.import_module(_MAKER)
            release: Release = maker.make_delta(
                arguments.old, arguments.new, arguments.target, signing_key=key, progress=show
            )
        else:
            release = _publish(arguments, show, details=ReleaseDetails(signing_key=key))
    with release:
        if arguments.json:
            print_json(
                "hotglm.delta/1",
                {**describe_release(release), **describe_delta(release), "label": arguments.label},
            )
        else:
            print(_show(release, label=arguments.label))
    return OK


def _verify_arguments(arguments: argparse.Namespace) -> None:
    given = [name for name in _OF_STORES if getattr(arguments, name) is not None]
    if arguments.store is None and arguments.target is None:
        raise ArgumentError(
            "Expected OLD, NEW and DST, or --store, got less.", remedy="for example `hotglm delta OLD NEW DST`."
        )
    if arguments.store is None and given:
        raise ArgumentError(
            f"Expected --{given[0].replace('_', '-')} only with --store, got it without.",
            remedy="give --store, or leave it out.",
        )
    if arguments.store is not None and arguments.new is not None:
        raise ArgumentError(
            "Expected one source with --store, got more.", remedy="give the new weights alone: the store has the base."
        )


def _publish(arguments: argparse.Namespace, show: Any, *, details: ReleaseDetails) -> Release:
    publisher: Any = importlib.import_module(_PUBLISHER)
    limits = {
        name: getattr(arguments, name) for name in ("max_chain", "max_ratio") if getattr(arguments, name) is not None
    }
    base = None if arguments.base is None else parse_target(arguments.base)
    store = open_store(arguments.store, creates=True)
    stored = publisher.publish_delta(
        store,
        arguments.old,
        name=arguments.name,
        version=arguments.version,
        details=details,
        policy=publisher.DeltaPolicy(base=base, **limits),
        progress=show,
    )
    if arguments.label is not None:
        store.move_label(arguments.label, stored.sequence, progress=show)
    return open_release(stored.path)


def describe_delta(release: Release) -> dict[str, object]:
    """Return what a release carries and where it leads, as JSON values; of a full one, that it has no base."""
    manifest, delta = release.manifest, release.manifest.delta
    return {
        "base": None
        if delta is None
        else {"version": str(delta.base.version), "sequence": delta.base.sequence, "digest": delta.base.digest},
        "result_digest": release.result_digest,
        "payload_nbytes": None if delta is None else manifest.files[delta.payload].size,
        "result_nbytes": manifest.result.total_nbytes,
        "codecs": {} if delta is None else dict(sorted(Counter(one.codec for one in delta.tensors.values()).items())),
    }


def _show(release: Release, *, label: str | None) -> str:
    manifest, delta = release.manifest, release.manifest.delta
    headline = f"release {shorten_repr(manifest.name)} {manifest.version}, number {manifest.sequence}"
    lines = [f"{headline}, in full", f"in {shorten_repr(release.path)}", f"digest {release.digest}"]
    if delta is not None:
        codecs = Counter(one.codec for one in delta.tensors.values())
        how = ", ".join(f"{num} {codec}" for codec, num in sorted(codecs.items())) or "none"
        sizes = f"{show_size(manifest.total_nbytes)} instead of {show_size(manifest.result.total_nbytes)}"
        lines[0] = f"{headline}, a delta of {delta.base.version}, number {delta.base.sequence}"
        lines.insert(2, f"{sizes}; {show_count(len(manifest.tensors), 'tensor')}, of which changed: {how}")
        lines.append(f"result {release.result_digest}")
    return "\n".join(lines if label is None else [*lines, f"label {label} leads to it"])


DELTA = Command(
    name="delta",
    summary="make a delta between two releases, or publish weights in a store as one",
    epilog="A delta stands beside its base and leads to the very files of NEW. Exit code: 0, or 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
