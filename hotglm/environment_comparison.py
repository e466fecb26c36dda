"""The environment that weights were made in, and the one they are in now: what differs, and whether that matters.

Rules this module keeps:

- Three weights: an *error* keeps the weights from being used (a requirement is not met, torch is missing); a *warning*
  may change what comes out (another minor version of torch, another kind of processor); a *note* is there to be known.
  What is equal is said too.
- Pure: two environments go in, findings come out. `hotglm.release.environment` looks at the machine.
- Names and versions may come from a file and are escaped in texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from packaging.version import InvalidVersion
from packaging.version import Version as PackageVersion

from hotglm.environment import Environment, find_unmet
from hotglm.problem import escape_text

__all__ = ["EnvironmentFinding", "Weight", "find_environment_differences"]

Weight = Literal["error", "warning", "note", "same"]


_NUMERICS = (
    "kernels change, so outputs may differ in their last bits; compare golden outputs with a tolerance, or record them "
    "again"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFinding:
    """What there is to say about one package, the interpreter or the machine.

    Attributes:
        subject: name of the package, `"python"`, `"machine"`, or the requirement.
        weight: how much it matters.
        code: a stable upper-case word.
        made: what the weights were made with; None where there was none or nobody knows.
        here: what there is here.
        message: one sentence.
    """

    subject: str
    weight: Weight
    code: str
    made: str | None = None
    here: str | None = None
    message: str

    @property
    def matters(self) -> bool:
        """Whether it is more than a note."""
        return self.weight in ("error", "warning")

    def explain(self) -> str:
        """Return it as one line of plain ASCII.

        >>> versions = {"made": "2.1", "here": "2.2"}
        >>> EnvironmentFinding(
        ...     subject="numpy", weight="note", code="PACKAGE_CHANGED", message="another version", **versions
        ... ).explain()
        'numpy 2.1 -> 2.2: another version'
        """
        if self.made is None and self.here is None:
            return self.message
        subject = escape_text(self.subject)
        made, here = ("none" if text is None else escape_text(text, limit=60) for text in (self.made, self.here))
        return f"{subject} {here}" if self.weight == "same" else f"{subject} {made} -> {here}: {self.message}"


def find_environment_differences(
    made: Environment | None, here: Environment, *, requires: Iterable[str] = ()
) -> Iterator[EnvironmentFinding]:
    """Yield one finding for each unmet requirement, the machine, the interpreter and each package, in that order.

    Args:
        made: the environment that the weights were made in; None where it is not known.
        here: the environment they are in now, with every package of `made` that is installed.
        requires: PEP 508 requirements of the weights.

    >>> there, here = (Environment(python="3.11.9", packages={"torch": v}) for v in ("2.6.0", "2.7.1"))
    >>> [(found.subject, found.weight) for found in find_environment_differences(there, here)]
    [('python', 'same'), ('torch', 'warning')]
    """
    for unmet in find_unmet(requires, here):
        yield EnvironmentFinding(subject="requirement", weight="error", code=unmet.code, message=unmet.message)
    if here.find_version("torch") is None:
        message = "Expected torch, got no such package; nothing can be loaded."
        yield EnvironmentFinding(subject="torch", weight="error", code="TORCH_MISSING", message=message)
    if made is None:
        return
    yield from _compare_machines(made, here)
    if made.python:
        yield _compare_versions("python", made.python, here.python)
    for name, version in made.packages.items():
        yield _compare_versions(name, version, here.packages.get(name))


def _compare_machines(made: Environment, here: Environment) -> Iterator[EnvironmentFinding]:
    kinds = [tuple(one.markers.get(key, "") for key in ("sys_platform", "platform_machine")) for one in (made, here)]
    (their_system, their_machine), (our_system, our_machine) = kinds
    if not (their_machine and our_machine):
        return
    texts = [" ".join(part for part in kind if part) for kind in kinds]
    if their_machine != our_machine:
        weight: Weight = "warning"
        message = "another kind of processor: its kernels round differently, so outputs may differ in their last bits"
    elif their_system != our_system:
        weight, message = "note", "another operating system"
    else:
        weight, message = "same", "the same"
    code = "SAME" if weight == "same" else "MACHINE_CHANGED"
    yield EnvironmentFinding(subject="machine", weight=weight, code=code, made=texts[0], here=texts[1], message=message)


def _compare_versions(name: str, made: str, here: str | None) -> EnvironmentFinding:
    weight, code, message = _judge(name, made, here)
    return EnvironmentFinding(subject=name, weight=weight, code=code, made=made, here=here, message=message)


def _judge(name: str, made: str, here: str | None) -> tuple[Weight, str, str]:
    if here is None:
        return "note", "PACKAGE_MISSING", "not installed here; it matters only to code that imports it"
    if made == here:
        return "same", "SAME", "the same"
    step = _find_step(made, here)
    if name == "torch" and step in ("major", "minor", "unknown"):
        which = "version" if step == "unknown" else f"{step} version"
        return "warning", "TORCH_CHANGED", f"another {which}: {_NUMERICS}"
    code = "PYTHON_CHANGED" if name == "python" else "TORCH_CHANGED" if name == "torch" else "PACKAGE_CHANGED"
    return "note", code, "another build of the same release" if step == "build" else "another version"


def _find_step(made: str, here: str) -> str:
    """Return which number of the release differs first; `"build"` where only the local label does."""
    try:
        one, other = PackageVersion(made), PackageVersion(here)
    except InvalidVersion:
        return "unknown"
    if one.major != other.major or one.epoch != other.epoch:
        return "major"
    if one.minor != other.minor:
        return "minor"
    return "build" if one.public == other.public else "patch"
