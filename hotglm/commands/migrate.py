"""`hotglm migrate`: bring weights on disk to another version; `--dry-run` only says what that would do."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from hotglm.commands.command import OK, Command
from hotglm.commands.console import foreign_output, print_json, show_count, show_headline, show_size
from hotglm.commands.progress import ProgressBar
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.registry import Migrations
from hotglm.model.file_layout import format_config
from hotglm.problem import describe_exception
from hotglm.release.files import WeightFiles, open_weights
from hotglm.release.migration import FileMigration, plan_file_migration

__all__ = ["MIGRATE", "find_migrations"]

_WRITER = "hotglm.model.migrated_file"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a .safetensors file, a shard index, or a directory of either")
    parser.add_argument("target", metavar="DST", nargs="?", help="the .safetensors file to write; may be SRC")
    parser.add_argument("--to", required=True, metavar="VERSION", help="the version to be")
    parser.add_argument("--from", dest="start", metavar="VERSION", help="the version SRC is, where it does not say")
    parser.add_argument(
        "--migrations",
        required=True,
        metavar="MODULE:ATTRIBUTE",
        help="where the steps are: a hotglm.Migrations, or a class that has them (mypkg.models:Ranker)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done; reads headers only")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.target is None and not arguments.dry_run:
        raise ArgumentError("Expected a file to write, got none.", remedy="give DST, or --dry-run.")
    migrations = find_migrations(arguments.migrations)
    with open_weights(arguments.source) as files:
        with foreign_output():
            migration = plan_file_migration(files, migrations, to=arguments.to, version=arguments.start)
        if migration.config is not None:
            format_config(migration.config)  # what cannot be written must not look well in a dry run
        if not arguments.json:  # before anything is written
            print("\n".join(_show(files, migration, with_tensors=arguments.dry_run)), flush=True)
        document = _describe(files, migration)
    digests: dict[str, str] = {}
    if not arguments.dry_run:
        digests = _write(arguments, migrations)
    if arguments.json:
        target = None if arguments.dry_run else arguments.target
        print_json("hotglm.migrate/1", {**document, "written": target, "digests": digests})
    elif not arguments.dry_run:
        print(f"wrote {shorten_repr(arguments.target)}: {show_size(os.path.getsize(arguments.target))}")
    return OK


def _write(arguments: argparse.Namespace, migrations: Migrations) -> dict[str, str]:
    # By name, because it imports torch, which a dry run does without.
    writer: Any = importlib.import_module(_WRITER)
    with ProgressBar(sys.stderr) as bar, foreign_output():
        digests: dict[str, str] = writer.migrate_weights(
            arguments.source,
            arguments.target,
            migrations=migrations,
            to=arguments.to,
            version=arguments.start,
            progress=bar.show,
        )
    return digests


def find_migrations(reference: str) -> Migrations:
    """Return the migrations that `MODULE:ATTRIBUTE` names, importing the module as Python would from here.

    The user names it on his own command line; nothing that a file says is ever imported.

    Raises:
        ArgumentError: it names nothing, what it names has no migrations, or the module cannot be imported.
    """
    remedy = "give MODULE:ATTRIBUTE, such as mypkg.models:Ranker or mypkg.models:migrations."
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise ArgumentError(f"Expected MODULE:ATTRIBUTE, got {shorten_repr(reference)}.", remedy=remedy)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, and an installed script has not
    try:
        with foreign_output():
            found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise ArgumentError(
            f"Expected to import {shorten_repr(reference)}, got {describe_exception(error)}.", remedy=remedy
        ) from error
    migrations = found if isinstance(found, Migrations) else getattr(found, "migrations", None)
    if not isinstance(migrations, Migrations):
        message = f"Expected migrations at {shorten_repr(reference)}, got {shorten_repr(type(found).__name__)}."
        raise ArgumentError(message, remedy=remedy)
    return migrations


def _show(files: WeightFiles, migration: FileMigration, *, with_tensors: bool) -> Iterator[str]:
    yield show_headline(files)
    yield migration.path.explain()
    if not with_tensors:
        return
    yield migration.plan.explain()
    if migration.config is not None:
        yield f"config: {shorten_repr(dict(migration.config), limit=1000)}"
    specs = migration.plan.specs
    yield f"{show_count(len(specs), 'tensor')}, {show_size(sum(spec.nbytes for spec in specs.values()))}"
    yield from (f"  {shorten_repr(name)}: {spec}" for name, spec in specs.items())


def _describe(files: WeightFiles, migration: FileMigration) -> dict[str, object]:
    path, plan = migration.path, migration.plan
    return {
        "source": files.path,
        "from": str(path.source),
        "to": str(path.target),
        "steps": [{"step": str(hop), "direction": "up" if hop.is_up else "down"} for hop in path.hops],
        "config": None if migration.config is None else dict(migration.config),
        "tensors": [
            {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
            for name, spec in plan.specs.items()
        ],
        "dropped": list(plan.dropped),
    }


MIGRATE = Command(
    name="migrate",
    summary="bring weights on disk to another version, by migrations",
    epilog="DST appears whole or not at all. Exit code: 0 if it was written, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
