"""Looks up what this process runs on, for the verdict.

Rules this module keeps:

- It reads installed metadata and never imports a package, so that asking for torch's version does not load torch.
- A package that is missing or broken is left out of the answer; the verdict says what that means.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata as installed

from packaging.markers import default_environment
from packaging.requirements import Requirement

from hotglm.document import Report, parse_json
from hotglm.environment import Environment, find_distinct, parse_requirement
from hotglm.errors import ArgumentError, SourceError

__all__ = ["CREATION_KEY", "format_creation", "read_creation", "read_environment"]

CREATION_KEY = "hotglm.environment"
"""Key of a header's metadata that says where the file was made; what it holds is never decided upon, only compared."""

CREATION_PACKAGES = ("hotglm", "torch", "safetensors", "numpy", "transformers")
"""Packages that are recorded where they are installed, beside those that a file requires."""

_MARKERS = ("sys_platform", "platform_machine")
_MAX_CREATION_NBYTES = 16 * 2**10


def read_environment(requirements: Iterable[object] = ()) -> Environment:
    """Return this process's environment, with the version of every package that `requirements` name.

    Requirements that do not parse are passed over here; `hotglm.environment.find_unmet` reports them. So are those
    behind the first 257 distinct ones, because each costs a search through every installed package.
    """
    parsed = [parse_requirement(text) for text in find_distinct(requirements)]
    names = {requirement.name for requirement in parsed if isinstance(requirement, Requirement)}
    versions = {name: _read_version(name) for name in sorted(names)}
    return Environment(
        python=platform.python_version().rstrip("+"),  # from a checkout it ends in "+", which PEP 440 does not know
        packages={name: version for name, version in versions.items() if version is not None},
        markers={name: str(value) for name, value in default_environment().items()},
    )


def format_creation(requirements: Iterable[object] = ()) -> str:
    """Return this process's environment as JSON for the metadata of a file: python, machine and few packages.

    At most 16 KiB: beyond that only `CREATION_PACKAGES` are named.
    """
    here = read_environment((*CREATION_PACKAGES, *requirements))
    markers = {name: here.markers.get(name, "") for name in _MARKERS}
    text = json.dumps(replace(here, markers=markers).to_dict())
    if len(text) > _MAX_CREATION_NBYTES:
        known = {name: here.packages[name] for name in CREATION_PACKAGES if name in here.packages}
        text = json.dumps(replace(here, packages=known, markers=markers).to_dict())
    return text


def read_creation(metadata: Mapping[str, str], *, file: str | None = None) -> Environment | None:
    """Return the environment that a file was made in, from its metadata; None where it does not say.

    Raises:
        SourceError: what it says is not what `format_creation` writes.
    """
    text = metadata.get(CREATION_KEY)
    if text is None:
        return None
    headline = f"Expected the environment of its making in metadata {CREATION_KEY!r}"
    remedy = "write the file with hotglm.save_weights."
    report = Report(SourceError, headline=headline, remedy=remedy, prefix="METADATA", file=file)
    document = parse_json(text.encode(), report=report)
    try:
        return Environment.from_dict(document)
    except ArgumentError as error:
        raise SourceError(f"{headline}: {error.message}", code=error.code, remedy=remedy) from None


def _read_version(name: str) -> str | None:
    try:
        version: str | None = installed.version(name)
    except (installed.PackageNotFoundError, KeyError, ValueError, OSError):
        return None
    return version  # None for a broken installation, whatever the stub says
