"""Errors: one tree equal to its drawing, text that can be acted on, and nothing lost on the way out of a process."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm import errors
from hotglm.errors import HotglmError, IncompatibleError, Problem, shorten_repr
from hotglm.verdict import Verdict
from hotglm.version import Bump, Version

MODULES = {"hotglm.errors", "hotglm.source_errors"}


def find_classes(root: type[HotglmError] = HotglmError) -> list[type[HotglmError]]:
    """Return `root` and everything below it that hotglm defines."""
    below = [cls for sub in root.__subclasses__() for cls in find_classes(sub) if cls.__module__ in MODULES]
    return [root, *below]


CLASSES = find_classes()


def parse_drawing(text: str) -> dict[str, str | None]:
    """Return each class that the drawing shows with the one it hangs from."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in text.splitlines():
        drawn = re.match(r"    ((?:[│ ]   )*)((?:[├└]── )?)(\w+Error)\b", line)
        if drawn:
            depth = len(drawn[1]) // 4 + bool(drawn[2])
            path[depth:] = [drawn[3]]
            parents[drawn[3]] = path[depth - 1] if depth else None
    return parents


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """The drawing in errors.py shows every class, below the class it derives from, and no other."""
    derived: dict[str, str | None] = {
        cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not HotglmError
    }
    assert parse_drawing(errors.__doc__ or "") == {"HotglmError": None} | derived


def test_the_drawing_says_what_each_error_means() -> None:
    """Every leaf and branch below the root has a few words beside it."""
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "── " in line]
    assert all(re.search(r"\w+Error {2,}\S", line) for line in drawn)


def test_every_error_is_public_and_named_as_one() -> None:
    """Every class of the tree is in `__all__` and its name ends in Error; so is nothing else."""
    names = {cls.__name__ for cls in CLASSES}
    assert all(name.endswith("Error") for name in names)
    assert names == {name for name in errors.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_a_stable_code(cls: type[HotglmError]) -> None:
    """The class has a code of its own in upper case, which a problem's or the caller's code overrides."""
    assert re.fullmatch(r"[A-Z][A-Z_]*", cls.code)
    assert "code" in vars(cls)
    assert cls("m").code == cls.code
    assert cls("m", problems=[Problem(code="OFFSET_GAP", message="m")]).code == "OFFSET_GAP"
    assert cls("m", problems=[Problem(code="OFFSET_GAP", message="m")], code="MINE").code == "MINE"


def test_no_two_errors_share_a_code() -> None:
    """A code names one class."""
    codes = [cls.code for cls in CLASSES]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("SourceReadError", OSError),
        ("MemoryPlanError", MemoryError),
        ("DrainTimeoutError", TimeoutError),
        ("ThreadStartError", RuntimeError),
        ("MissingExtraError", ImportError),
    ],
)
def test_errors_are_also_what_python_would_raise(name: str, builtin: type[Exception]) -> None:
    """Code that catches the built-in kind catches ours."""
    assert issubclass(getattr(errors, name), builtin)


# -- attributes --------------------------------------------------------------------------------------------------------

PROBLEMS = (
    Problem(code="BAD_NAME", message="First.", tensor="w"),
    Problem(
        code="OFFSET_GAP", message="Second.", file="/m/a.safetensors", tensor="v", offset=17, expected=16, found=17
    ),
)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_a_process_boundary(cls: type[HotglmError]) -> None:
    """Pickling keeps the class, the text and every attribute."""
    error = cls("Headline.", problems=PROBLEMS, remedy="do this.", code="MINE").with_slot(
        slot="ranker", version="2.0.0", serving="1.0.0"
    )
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.args == error.args
    assert (again.file, again.tensor, again.offset) == ("/m/a.safetensors", "w", 17)


def test_a_refusal_keeps_its_verdict_across_a_process_boundary() -> None:
    """IncompatibleError carries the verdict with it."""
    error = IncompatibleError("No.")
    assert error.verdict is None
    error.verdict = Verdict(
        old_version=Version("1.0"), new_version=Version("2.0"), needed=Bump.MAJOR, claimed=Bump.MAJOR, findings=()
    )
    assert pickle.loads(pickle.dumps(error)).verdict == error.verdict


def test_where_is_that_of_the_first_problem_that_knows() -> None:
    """file, tensor and offset are those of the first problem that names one, None where none does."""
    error = HotglmError("m", problems=PROBLEMS)
    assert (error.file, error.tensor, error.offset) == ("/m/a.safetensors", "w", 17)
    assert (HotglmError("m").file, HotglmError("m").tensor, HotglmError("m").offset) == (None, None, None)


def test_with_slot_keeps_what_is_known_and_returns_the_error() -> None:
    """The innermost place that names the slot is right; later ones fill in only what is missing."""
    error = HotglmError("m")
    assert error.with_slot(slot="ranker", version=None, serving=None) is error
    error.with_slot(slot="other", version="2.0.0", serving="1.0.0")
    error.with_slot(slot="third", version="3.0.0", serving="3.0.0")
    assert (error.slot, error.version, error.serving) == ("ranker", "2.0.0", "1.0.0")


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_text_reads_from_what_failed_to_what_to_do() -> None:
    """Headline with slot and version, each problem with its place, what still serves, and last the remedy."""
    error = HotglmError("Cannot load.", problems=PROBLEMS, remedy="write it again.")
    error.with_slot(slot="ranker", version="2.0.0", serving="1.0.0")
    assert str(error).splitlines() == [
        "[slot 'ranker', version 2.0.0] Cannot load.",
        "  - BAD_NAME: First. (tensor 'w')",
        "  - OFFSET_GAP: Second. (file '/m/a.safetensors', tensor 'v', byte offset 17)",
        "Version 1.0.0 still serves, unchanged.",
        "Remedy: write it again.",
    ]


def test_a_short_error_is_one_line() -> None:
    """An error with nothing but a remedy stays on one line."""
    assert str(HotglmError("Cannot.", remedy="wait.")) == "Cannot. Remedy: wait."
    assert str(HotglmError("Cannot.")) == "Cannot."


@pytest.mark.parametrize(("num", "num_lines"), [(19, 20), (20, 21), (21, 22), (5000, 22)])
def test_the_text_shows_at_most_twenty_problems(num: int, num_lines: int) -> None:
    """The text spells out twenty problems and counts the rest; the attribute has all."""
    error = HotglmError("m", problems=(Problem(code="BAD_NAME", message=f"{n}.") for n in range(num)))
    lines = str(error).splitlines()
    assert len(lines) == num_lines
    assert len(error.problems) == num
    if num > 20:
        assert lines[-1] == f"  - and {num - 20} more (see `.problems`)"


HOSTILE = ["\x1b[31mred", "line\nbreak", "nul\0", "\u202eright to left", "bell\a", "\ud800", "é"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_never_printed_raw(name: str) -> None:
    """Names of slots, files and tensors are escaped, so that no byte in them reaches a terminal."""
    problem = Problem(code="BAD_NAME", message="Bad.", file=name, tensor=name)
    error = HotglmError("m", problems=[problem]).with_slot(slot=name, version=None, serving=None)
    text = str(error)
    assert not any(character in text for character in "\x1b\0\a\u202e")
    assert text.isprintable()
    assert len(text.splitlines()) == 1


@given(st.text())
def test_shortened_text_is_plain_and_short(value: str) -> None:
    """shorten_repr gives printable ASCII of bounded length, equal to ascii() where that is short."""
    text = shorten_repr(value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 120
    assert text == ascii(value) or len(ascii(value)) > 120


def test_a_huge_name_is_shortened_quickly() -> None:
    """A name of many megabytes costs no more than a long one."""
    assert len(shorten_repr("x" * 50_000_000)) <= 120
