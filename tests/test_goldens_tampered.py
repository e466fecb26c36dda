"""Goldens that were edited, renamed, copied, cut or left half-made: each is named as wrong, none is passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hotglm import cli
from hotglm.errors import ArgumentError, HotglmError, SourceError
from hotglm.testing import Tolerance, find_goldens, make_golden, read_golden
from hotglm.testing.golden_proof import find_outcomes
from hotglm.testing.goldens import _digest

NAME, VERSION = "tampered-model", "1.0.0"


class Answer(nn.Module):
    """A model that gives back whatever it was told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return make_golden(Answer(1), tmp_path / "kept", inputs=torch.ones(1, 2), name=NAME, version=VERSION)


def find_errors(directory: Path) -> dict[str, HotglmError | None]:
    found = find_outcomes(directory, make_model=lambda golden: Answer(1))
    return {outcome.label: outcome.error for outcome in found}


def test_a_golden_that_is_whole_is_verified(golden: Path) -> None:
    """The model of this file is right as it stands."""
    assert find_errors(golden.parent.parent) == {f"{NAME} {VERSION}": None}


@pytest.mark.parametrize("file", ["golden.json", "weights.safetensors", "tensors.safetensors"])
def test_a_golden_that_lost_a_file_is_named(golden: Path, file: str) -> None:
    """A missing file, golden.json too, makes a golden wrong and not absent."""
    (golden / file).unlink()
    assert [path.name for path in find_goldens(golden.parent.parent)] == [VERSION]
    (error,) = find_errors(golden.parent.parent).values()
    assert isinstance(error, SourceError)
    assert error.code == "BAD_GOLDEN"


def test_a_golden_under_another_name_is_refused(golden: Path) -> None:
    """A copy under another version or another model proves nothing about those."""
    root = golden.parent.parent
    shutil.copytree(golden, golden.parent / "2.0.0")
    shutil.copytree(golden, root / "other" / VERSION)
    errors = find_errors(root)
    assert errors.pop(f"{NAME} {VERSION}") is None
    assert {label: error and error.code for label, error in errors.items()} == {
        f"{NAME} 2.0.0": "BAD_GOLDEN",
        f"other {VERSION}": "BAD_GOLDEN",
    }


def test_a_golden_that_was_never_finished_is_none(golden: Path) -> None:
    """What a killed making left behind is not taken for a golden."""
    shutil.copytree(golden, golden.parent / ".2.0.0.0123.partial")
    assert [path.name for path in find_goldens(golden.parent.parent)] == [VERSION]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rtol", "x"),
        ("rtol", -1),
        ("atol", True),
        ("name", 5),
        ("version", 5),
        ("made_on", []),
        ("made_on", {"torch": 5}),
        ("digests", []),
        ("inputs", {"value": 1, "tensor": "x"}),
        ("outputs", {"tensor": []}),
    ],
)
def test_a_document_with_another_field_is_refused(golden: Path, field: str, value: object) -> None:
    """Every field is read strictly: one of another type is an error of the golden, never one of Python."""
    document = json.loads((golden / "golden.json").read_text())
    (golden / "golden.json").write_text(json.dumps({**document, field: value}))
    with pytest.raises(HotglmError):
        read_golden(golden)
    assert all(find_errors(golden.parent.parent).values())


def test_tensors_that_are_no_tensors_are_refused(golden: Path) -> None:
    """A file that fits its digest and is no safetensors file is an error of the golden."""
    (golden / "tensors.safetensors").write_bytes(b"nothing")
    document = json.loads((golden / "golden.json").read_text())
    document["digests"]["tensors.safetensors"] = _digest(golden / "tensors.safetensors")
    (golden / "golden.json").write_text(json.dumps(document))
    with pytest.raises(SourceError):
        read_golden(golden)


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("answer", "tolerance"),
    [
        (float("nan"), Tolerance()),
        ({"score": float("inf")}, Tolerance()),
        (nest(60), Tolerance()),
        (1, Tolerance(rtol=-1)),
        (1, Tolerance(atol=float("nan"))),
    ],
    ids=str,
)
def test_what_could_not_be_read_again_is_not_made(tmp_path: Path, answer: object, tolerance: Tolerance) -> None:
    """A golden is read before it is kept, so that none is made that is refused for ever after."""
    with pytest.raises(ArgumentError):
        make_golden(Answer(answer), tmp_path, inputs=torch.ones(1, 2), name=NAME, version=VERSION, tolerance=tolerance)
    assert not list(find_goldens(tmp_path))
    assert not list((tmp_path / NAME).glob("*"))


def test_names_of_directories_reach_the_terminal_escaped(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints plain ASCII, whatever directories are called."""
    golden.parent.rename(golden.parent.parent / "\x1b[31mred\N{SNOWMAN}")
    assert cli.main(["golden", "verify", str(golden.parent.parent)]) == 1
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
