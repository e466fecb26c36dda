"""Looks up what this process runs on, for the verdict.

Rules this module keeps:

- It reads installed metadata and never imports a package, so that asking for torch's version does not load torch.
- A package that is missing or broken is left out of the answer; the verdict says what that means.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from packaging.markers import default_environment
from packaging.requirements import Requirement

from hotglm.environment import Environment, find_distinct, parse_requirement

__all__ = ["read_environment"]


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


def _read_version(name: str) -> str | None:
    try:
        version: str | None = metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError, ValueError, OSError):
        return None
    return version  # None for a broken installation, whatever the stub says
