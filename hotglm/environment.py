"""What a process runs on, and which requirements that does not meet.

Rules this module keeps:

- Requirements are PEP 508 text, parsed by `packaging`; there is no second grammar. They may come from a file, so a text
  that does not parse is a finding, never an exception.
- What a running process cannot tell is refused, not ignored: extras and the address a package was installed from.
- Pre-releases and local labels count where their numbers are: `2.13.0+cpu` meets `>=2.6`.
- An environment is a value; `hotglm.release.environment` is what looks at the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName, default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from hotglm.errors import ArgumentError, shorten_repr

__all__ = ["MAX_REQUIREMENTS", "Environment", "Unmet", "find_distinct", "find_unmet", "parse_requirement"]

_MAX_LENGTH = 256
"""Longest requirement that is parsed."""

MAX_REQUIREMENTS = 256
"""Most requirements that are looked at; a release that lists more is an attack or a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a process runs on.

    Attributes:
        python: version of the interpreter, e.g. `"3.11.9"`.
        packages: installed version of each package that was asked about, by name; a read-only mapping. A package that
            is not in it is not installed.
        markers: values of the PEP 508 marker variables, e.g. `sys_platform`; one that is not in it is empty.
    """

    python: str
    packages: Mapping[str, str] = field(default_factory=dict)
    markers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take private read-only copies, with package names in normal form."""
        packages = {str(canonicalize_name(name)): version for name, version in self.packages.items()}
        object.__setattr__(self, "packages", MappingProxyType(packages))
        object.__setattr__(self, "markers", MappingProxyType(dict(self.markers)))

    def find_version(self, name: str) -> str | None:
        """Return the version of `name`, where `"python"` is the interpreter; None when it is not installed."""
        canonical = canonicalize_name(name)
        return self.python if canonical == "python" else self.packages.get(canonical)

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values, in a fixed order."""
        return {
            "python": self.python,
            "packages": dict(sorted(self.packages.items())),
            "markers": dict(sorted(self.markers.items())),
        }

    @classmethod
    def from_dict(cls, document: object) -> Environment:
        """Return the environment that `to_dict` wrote; members that it does not write are passed over.

        Args:
            document: JSON values, as `json.loads` gives them; they may come from a file.

        Raises:
            ArgumentError: a member is not what `to_dict` writes; all are named.
        """
        members = document if isinstance(document, Mapping) else {}
        wrong = [
            *([] if isinstance(members.get("python"), str) else ["python"]),
            *(name for name in ("packages", "markers") if not _is_of_texts(members.get(name))),
        ]
        if wrong:
            raise ArgumentError(
                f"Expected an environment as Environment.to_dict writes it, got bad {', '.join(wrong)}.",
                code="BAD_ENVIRONMENT",
                remedy="write the file with hotglm.save_weights.",
            )
        return cls(python=members["python"], packages=members["packages"], markers=members["markers"])

    def __hash__(self) -> int:
        """Hash by value."""
        return hash((self.python, frozenset(self.packages.items()), frozenset(self.markers.items())))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by value: a read-only mapping view can be neither."""
        return (_rebuild, (self.python, dict(self.packages), dict(self.markers)))


def _is_of_texts(value: object) -> bool:
    """Tell whether `value` maps texts to texts, few enough and short enough to be looked at one by one."""
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_REQUIREMENTS
        and all(isinstance(text, str) and len(text) <= _MAX_LENGTH for pair in value.items() for text in pair)
    )


def _rebuild(python: str, packages: dict[str, str], markers: dict[str, str]) -> Environment:
    return Environment(python=python, packages=packages, markers=markers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """One requirement that an environment does not meet.

    Attributes:
        code: `"REQUIREMENT_UNMET"`, or `"BAD_REQUIREMENT"` where the text cannot be judged.
        message: one sentence.
    """

    code: str
    message: str


def parse_requirement(text: object) -> Requirement | Unmet:
    """Return the parsed requirement, or why it cannot be judged."""
    try:
        if not isinstance(text, str) or len(text) > _MAX_LENGTH:
            raise InvalidRequirement
        requirement = Requirement(text)
    except (InvalidRequirement, RecursionError):  # brackets within brackets
        return _bad(text, "does not parse as one (write it like 'torch>=2.6')")
    if requirement.url is not None:
        return _bad(text, "names an address, and a running process cannot tell where a package came from")
    if requirement.extras:
        return _bad(text, "names extras, and a running process cannot tell which were installed; name their packages")
    return requirement


def find_distinct(requirements: Iterable[object]) -> Iterator[object]:
    """Yield each requirement once, in the order given; at most one more than is looked at, to tell a flood by."""
    seen: list[object] = []  # not a set: what a file lists as a requirement need not be hashable
    for text in requirements:
        if text not in seen:
            seen.append(text)
            yield text
            if len(seen) > MAX_REQUIREMENTS:
                return


def find_unmet(requirements: Iterable[object], environment: Environment) -> Iterator[Unmet]:
    """Yield what `environment` does not meet, each requirement at most once, in the order given.

    >>> [unmet.message for unmet in find_unmet(["torch>=2.6"], Environment(python="3.12.1"))]
    ["Expected 'torch>=2.6', got no such package."]
    """
    for number, text in enumerate(find_distinct(requirements)):
        if number == MAX_REQUIREMENTS:
            yield Unmet(code="BAD_REQUIREMENT", message=f"Expected at most {MAX_REQUIREMENTS} requirements, got more.")
            return
        parsed = parse_requirement(text)
        unmet = parsed if isinstance(parsed, Unmet) else _find_reason(parsed, environment)
        if unmet is not None:
            yield unmet


def _find_reason(requirement: Requirement, environment: Environment) -> Unmet | None:
    try:
        if requirement.marker is not None and not requirement.marker.evaluate(_marker_values(environment)):
            return None  # it is for other machines
    except (UndefinedComparison, UndefinedEnvironmentName, InvalidVersion):
        return _bad(requirement, "has a marker that cannot be evaluated here")
    found = environment.find_version(requirement.name)
    if found is not None and _admits(requirement, found):
        return None
    got = "no such package" if found is None else f"version {shorten_repr(found)}"
    return Unmet(code="REQUIREMENT_UNMET", message=f"Expected {shorten_repr(str(requirement))}, got {got}.")


def _admits(requirement: Requirement, found: str) -> bool:
    try:
        return requirement.specifier.contains(Version(found), prereleases=True)
    except InvalidVersion:
        return not requirement.specifier  # no number to compare with: only a bare name is met


def _marker_values(environment: Environment) -> dict[str, str]:
    # `evaluate` fills what is missing from the machine it runs on; naming every variable keeps the verdict pure.
    python_version = ".".join(environment.python.split(".")[:2])
    return {
        **dict.fromkeys(default_environment(), ""),
        **environment.markers,
        "python_full_version": environment.python,
        "python_version": python_version,
    }


def _bad(text: object, why: str) -> Unmet:
    shown = shorten_repr(text if isinstance(text, str) or not isinstance(text, Requirement) else str(text))
    return Unmet(code="BAD_REQUIREMENT", message=f"Expected a requirement, got {shown}, which {why}.")
