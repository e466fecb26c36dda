"""What a process runs on, and requirements that it meets, does not meet, or that cannot be judged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.contract import Contract
from hotglm.environment import Environment, find_unmet
from hotglm.release.environment import read_environment
from hotglm.verdict import Candidate, Verdict, decide
from hotglm.version import Version

HERE = Environment(
    python="3.11.9",
    packages={"torch": "2.13.0+cpu", "My_Package": "1.0rc1", "odd": "unknown"},
    markers={"sys_platform": "linux", "os_name": "posix"},
)


def judge(*, requires: tuple[str, ...]) -> Verdict:
    return decide(
        slot_name="ranker",
        live_version=Version("1.0.0"),
        live_contract=Contract(),
        candidate=Candidate(version=Version("1.0.1"), contract=Contract(), requires=requires),
        environment=HERE,
    )


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.reasons]


# -- requirements ------------------------------------------------------------------------------------------------------


def unmet(*requirements: str) -> list[str]:
    return [found.code for found in find_unmet(requirements, HERE)]


@pytest.mark.parametrize(
    "requirement",
    [
        "python>=3.11",
        "torch>=2.6",
        "torch>=2.6,<3",
        "torch==2.13.0",
        "torch",
        "my-package",
        "my.package>=1.0a1",
        "odd",
        "missing>1; sys_platform == 'win32'",
        "missing>1; python_version < '3.11'",
        "torch>=2; os_name == 'posix' and python_full_version >= '3.11.1'",
    ],
)
def test_a_requirement_that_is_met_is_no_finding(requirement: str) -> None:
    """Labels and pre-releases count where their numbers are; a marker for other machines leaves nothing to meet."""
    assert unmet(requirement) == []
    assert judge(requires=(requirement,)).accepted


@pytest.mark.parametrize(
    ("requirement", "got"),
    [
        ("python>=3.12", "version '3.11.9'"),
        ("torch>=3", "version '2.13.0+cpu'"),
        ("missing", "no such package"),
        ("my-package>=1.0", "version '1.0rc1'"),
        ("odd>=1", "version 'unknown'"),
        ("missing>1; sys_platform == 'linux'", "no such package"),
    ],
)
def test_a_requirement_that_is_not_met_says_what_was_found(requirement: str, got: str) -> None:
    """Each unmet requirement is one reason, with what is installed."""
    verdict = judge(requires=(requirement,))
    assert codes(verdict) == ["REQUIREMENT_UNMET"]
    assert got in verdict.reasons[0].message


@pytest.mark.parametrize(
    ("requirement", "why"),
    [
        ("", "does not parse"),
        ("torch>=", "does not parse"),
        ("\x1b[31mred", "does not parse"),
        ("a" * 257, "does not parse"),
        ("x; " + "(" * 120 + "python_version > '3'" + ")" * 120, "does not parse"),
        ("torch @ https://example.org/torch.whl", "names an address"),
        ("torch[opt]>=2.6", "names extras"),
        ("torch; platform_release > 1", "does not parse"),
        ("torch; python_version > 'three' and sys_platform ~= 'linux'", "marker that cannot be evaluated"),
    ],
)
def test_a_requirement_that_cannot_be_judged_is_refused_and_says_why(requirement: str, why: str) -> None:
    """What does not parse, and what a running process cannot tell, is a reason and not an exception."""
    verdict = judge(requires=(requirement,))
    assert codes(verdict) == ["BAD_REQUIREMENT"]
    assert why in verdict.reasons[0].message
    assert "\x1b" not in verdict.explain()
    assert len(verdict.reasons[0].message) < 400


def test_a_requirement_that_is_no_text_is_refused() -> None:
    """A release may list anything as a requirement, hashable or not."""
    assert [found.code for found in find_unmet([["torch"], 3, None], HERE)] == ["BAD_REQUIREMENT"] * 3


def test_a_flood_of_requirements_is_cut_off() -> None:
    """More than 256 requirements are refused without looking at the rest."""
    found = unmet(*(f"package{number}" for number in range(10_000)))
    assert len(found) == 257
    assert found[-1] == "BAD_REQUIREMENT"


@given(st.text(max_size=300))
def test_no_requirement_text_raises(requirement: str) -> None:
    """Any text is judged or refused, never an exception, and is never printed raw."""
    for found in find_unmet([requirement], HERE):
        assert found.message.isascii()


# -- environments ------------------------------------------------------------------------------------------------------


def test_an_environment_is_a_value() -> None:
    """Environments compare and hash by value, also after pickling, and cannot be changed."""
    again = pickle.loads(pickle.dumps(HERE))
    assert again == HERE
    assert hash(again) == hash(HERE)
    with pytest.raises(TypeError):
        HERE.packages["torch"] = "1.0"  # type: ignore[index]


def test_the_environment_is_read_from_installed_metadata() -> None:
    """Only packages that are asked about are looked up; what is missing or does not parse is left out."""
    here = read_environment(("torch>=2.6", "packaging", "surely-not-installed", "??", "python>=3"))
    assert here.packages == {"torch": metadata.version("torch"), "packaging": metadata.version("packaging")}
    assert list(find_unmet(["python>=3.11", "packaging; sys_platform != 'plan9'"], here)) == []


def test_a_flood_of_requirements_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more packages are looked up than the verdict looks at, and one to tell that there are more."""
    asked: list[str] = []

    def find(name: str) -> str:
        asked.append(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", find)
    read_environment(f"package{number % 5_000}" for number in range(10_000))
    assert len(asked) == len(set(asked)) == 257


@pytest.mark.parametrize("raised", [KeyError, OSError, ValueError])
def test_broken_metadata_is_a_package_that_is_not_there(
    raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package whose metadata cannot be read counts as not installed."""

    def broken(name: str) -> Callable[[], str]:
        raise raised(name)

    monkeypatch.setattr(metadata, "version", broken)
    assert read_environment(("torch",)).packages == {}
