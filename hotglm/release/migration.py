"""What migrating weights on disk will do, known from their headers alone.

Rules this module keeps: no torch, and no byte of a tensor is read. A version that the file does not carry is asked for,
never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hotglm.errors import Problem, UnknownVersionError, shorten_repr
from hotglm.migration.plan import MigrationPath, StatePlan
from hotglm.migration.registry import Migrations
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.release.files import WeightFiles
from hotglm.version import Version

__all__ = ["VERSION_KEY", "FileMigration", "plan_file_migration"]

VERSION_KEY = "hotglm.version"
"""Key of a file's metadata that holds the version of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMigration:
    """What is to become of the weights in some files.

    Attributes:
        path: the steps; empty where both versions have the same layout.
        plan: what every new tensor is made of.
        config: the new config; None where the files carry none.
    """

    path: MigrationPath
    plan: StatePlan
    config: Mapping[str, Any] | None


def plan_file_migration(
    files: WeightFiles, migrations: Migrations, *, to: str | Version, version: str | Version | None = None
) -> FileMigration:
    """Return what it takes to bring the weights in `files` to version `to`.

    Args:
        files: open; only their headers are used.
        migrations: the steps that are known.
        to: the version they are to be.
        version: the version they are; what the files say if None.

    Raises:
        VersionSyntaxError: a version does not parse.
        UnknownVersionError: neither the files nor the caller say what version they are.
        MigrationError: no one path leads there, or a step does not fit the config or the tensors.
    """
    start = version if version is not None else files.metadata.get(VERSION_KEY)
    if start is None:
        message = f"Expected a version in metadata {VERSION_KEY!r}, got none"
        raise UnknownVersionError(
            f"Expected weights that say what version they are, got {shorten_repr(files.path)}, which do not.",
            problems=[Problem(code="NO_VERSION", message=message, file=files.path)],
            remedy="say which version they are (version='1.4', or --from 1.4), or stamp them first "
            "(python -m hotglm stamp).",
        )
    path = migrations.plan(start, to)
    specs = {
        name: TensorSpec(dtype=location.entry.torch_dtype, shape=location.entry.shape)
        for name, location in files.tensors.items()
    }
    config = None if files.config is None else path.migrate_config(files.config)
    return FileMigration(path=path, plan=path.plan_state(specs), config=config)
