"""`hotglm doctor`, and what `save_weights` records for it."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.environment import Environment
from hotglm.environment_comparison import EnvironmentFinding, find_environment_differences
from hotglm.errors import ArgumentError
from hotglm.release.environment import CREATION_KEY, format_creation, read_creation, read_environment
from hotglm.release.files import open_weights
from support.bytes_maker import entry, make_file
from support.command_line import run

HERE = Environment(
    python="3.11.9",
    packages={"torch": "2.13.0+cpu", "numpy": "2.4.6"},
    markers={"sys_platform": "linux", "platform_machine": "x86_64"},
)


def find(made: Environment | None, *requires: str, here: Environment = HERE) -> dict[str, tuple[str, str]]:
    return {f.subject: (f.weight, f.code) for f in find_environment_differences(made, here, requires=requires)}


def made_with(**packages: str) -> Environment:
    return Environment(python="3.11.9", packages=packages, markers=HERE.markers)


# -- what differs and whether it matters -------------------------------------------------------------------------------


def test_the_same_environment_is_fine() -> None:
    """Nothing differs from itself."""
    assert {weight for weight, _ in find(HERE).values()} == {"same"}


@pytest.mark.parametrize(
    ("version", "weight", "code"),
    [
        ("2.13.0+cpu", "same", "SAME"),
        ("2.13.0+cu128", "note", "TORCH_CHANGED"),
        ("2.13.1", "note", "TORCH_CHANGED"),
        ("2.12.0", "warning", "TORCH_CHANGED"),
        ("1.13.0", "warning", "TORCH_CHANGED"),
        ("nightly", "warning", "TORCH_CHANGED"),
    ],
)
def test_another_minor_version_of_torch_is_a_warning(version: str, weight: str, code: str) -> None:
    """Kernels change with major and minor versions of torch; a patch or another build is to be known."""
    assert find(made_with(torch=version))["torch"] == (weight, code)


def test_other_packages_are_notes() -> None:
    """Another version of another package, or one that is missing here, is to be known unless it is required."""
    made = made_with(numpy="1.26.0", transformers="4.50.0")
    assert find(made) == {
        "machine": ("same", "SAME"),
        "python": ("same", "SAME"),
        "numpy": ("note", "PACKAGE_CHANGED"),
        "transformers": ("note", "PACKAGE_MISSING"),
    }


def test_an_unmet_requirement_is_an_error() -> None:
    """Requirements are what must be met, whether or not it is known what the weights were made with."""
    assert find(None, "numpy>=3") == {"requirement": ("error", "REQUIREMENT_UNMET")}
    assert find(None, "numpy>=2", "torch>=2.6") == {}


def test_no_torch_is_an_error() -> None:
    """Without torch nothing can be loaded."""
    assert find(None, here=Environment(python="3.11.9"))["torch"] == ("error", "TORCH_MISSING")


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(("linux", "aarch64"), "warning"), (("darwin", "x86_64"), "note"), (("linux", "x86_64"), "same")],
)
def test_another_processor_is_a_warning(kind: tuple[str, str], weight: str) -> None:
    """Another processor rounds differently; another system is to be known."""
    made = Environment(python="3.11.9", markers={"sys_platform": kind[0], "platform_machine": kind[1]})
    assert find(made)["machine"][0] == weight


def test_texts_from_a_file_are_escaped() -> None:
    """Names and versions come from a file, and reach no terminal raw."""
    finding = EnvironmentFinding(
        subject="\x1b[31m", weight="note", code="X", made="\x1b]0;", here="1", message="another version"
    )
    assert finding.explain() == "\\x1b[31m \\x1b]0; -> 1: another version"


# -- what is recorded --------------------------------------------------------------------------------------------------


def _save(path: Path, requires: tuple[str, ...] = ()) -> Environment:
    hotglm.save_weights({"w": torch.ones(2)}, path, requires=requires)
    with open_weights(path) as weights:
        made = read_creation(weights.metadata)
    assert made is not None
    return made


def test_a_saved_file_says_where_it_was_made(tmp_path: Path) -> None:
    """Python, machine, torch and its company, and the packages it requires are in the metadata."""
    made = _save(tmp_path / "w.safetensors", requires=("pytest>=8", "no-such-package-here; python_version<'3'"))
    assert made.python == platform.python_version()
    assert made.markers["platform_machine"] == platform.machine()
    assert made.packages["torch"] == metadata.version("torch")
    assert made.packages["pytest"] == metadata.version("pytest")
    assert set(made.packages) <= {"hotglm", "torch", "safetensors", "numpy", "transformers", "pytest"}
    assert Environment.from_dict(made.to_dict()) == made


def test_requirements_of_the_class_are_recorded_too(tmp_path: Path) -> None:
    """A package that `@versioned` requires is recorded with its version."""

    @hotglm.versioned("doctored", "1.0.0", requires=("hypothesis>=6",))
    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)

    hotglm.save_weights(Model(), tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        made = read_creation(weights.metadata)
    assert made is not None
    assert "hypothesis" in made.packages


def test_the_record_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many packages are required, the record stays small: then only the usual ones are named."""
    monkeypatch.setattr("hotglm.release.environment._read_version", lambda name: "1.0+" + "x" * 200)
    text = format_creation([f"package-{number}" for number in range(250)])
    assert len(text) < 16 * 2**10
    assert set(json.loads(text)["packages"]) == {"hotglm", "torch", "safetensors", "numpy", "transformers"}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"python": 3, "packages": {}, "markers": {}},
        {"python": "3", "packages": {"a": 1}, "markers": {}},
        {"python": "3", "packages": {}, "markers": {"a": "x" * 1000}},
        {"python": "3", "packages": {f"p{n}": "1" for n in range(999)}, "markers": {}},
    ],
    ids=range(6),
)
def test_a_record_that_cannot_be_meant_is_refused(document: object) -> None:
    """An environment from a file has texts only, few and short."""
    with pytest.raises(ArgumentError) as caught:
        Environment.from_dict(document)
    assert caught.value.code == "BAD_ENVIRONMENT"


def test_shards_may_be_made_on_several_machines(tmp_path: Path) -> None:
    """Shards that disagree about where they were made are one release all the same, made nobody knows where."""
    weight_map = {}
    for number in (1, 2):
        header: dict[str, object] = {
            "__metadata__": {CREATION_KEY: json.dumps({"python": f"3.{number}", "packages": {}, "markers": {}})}
        }
        header[f"w{number}"] = entry("F32", [1], 0, 4)
        (tmp_path / f"{number}.safetensors").write_bytes(make_file(header, bytes(4)))
        weight_map[f"w{number}"] = f"{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_weights(tmp_path / "model.safetensors.index.json") as weights:
        assert read_creation(weights.metadata) is None


# -- the command -------------------------------------------------------------------------------------------------------


def _write(path: Path, made: Environment | None, *requires: str) -> Path:
    texts = {"hotglm.name": "ranker", "hotglm.version": "1.0.0"}
    if made is not None:
        texts[CREATION_KEY] = json.dumps(made.to_dict())
    if requires:
        texts["hotglm.requires"] = json.dumps(requires)
    path.write_bytes(make_file({"__metadata__": texts, "w": entry("F32", [1], 0, 4)}, bytes(4)))
    return path


def _here(**packages: str) -> Environment:
    real = read_environment(("torch", "safetensors"))
    return Environment(python=real.python, packages={**real.packages, **packages}, markers=real.markers)


def test_doctor_finds_nothing_wrong_with_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was made here is fine here."""
    _save(tmp_path / "w.safetensors", requires=("torch>=2.6",))
    assert run("doctor", tmp_path / "w.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "requires torch>=2.6"
    assert f"  same    torch {metadata.version('torch')}" in lines
    assert lines[-1] == "Nothing here keeps it from being used as it was made."


def test_doctor_says_which_difference_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors first, then what may change numbers, then what is to be known; the exit code is 1."""
    path = _write(tmp_path / "w.safetensors", _here(torch="2.5.1", safetensors="0.1.0"), "torch>=99", "not one")
    assert run("doctor", path) == 1
    lines = capsys.readouterr().out.splitlines()
    torch_version = metadata.version("torch")
    assert [line[2:10].strip() for line in lines[2:-1]] == ["error", "error", "same", "same", "note", "warning"]
    assert f"  warning torch 2.5.1 -> {torch_version}: another minor version: kernels change, " in lines[-2]
    assert lines[-1] == "2 errors and 1 warning."


def test_doctor_as_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor --json` prints both environments and each finding as data."""
    path = _write(tmp_path / "w.safetensors", _here(torch="2.5.1"))
    assert run("doctor", "--json", path) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "hotglm.doctor/1"
    assert (document["name"], document["version"], document["fine"]) == ("ranker", "1.0.0", False)
    assert document["made_in"]["packages"]["torch"] == "2.5.1"
    (finding,) = (one for one in document["findings"] if one["subject"] == "torch")
    assert (finding["weight"], finding["code"], finding["made"]) == ("warning", "TORCH_CHANGED", "2.5.1")


def test_a_file_that_does_not_say_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made up about a file without a record."""
    assert run("doctor", _write(tmp_path / "w.safetensors", None)) == 0
    assert "It does not say what it was made with.\n" in capsys.readouterr().out


def test_a_directory_of_transformers_says_its_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config of Hugging Face names the version of transformers that wrote it."""
    _write(tmp_path / "model.safetensors", None)
    (tmp_path / "config.json").write_text('{"transformers_version": "4.1.0"}')
    assert run("doctor", tmp_path) == 0
    out = capsys.readouterr().out
    assert "  note    transformers 4.1.0 -> " in out
    assert "python" not in out


@pytest.mark.parametrize("text", ["{", "[]", '{"python": 3}'])
def test_a_broken_record_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record that cannot be read gives exit code 2, and the weights still load."""
    path = tmp_path / "w.safetensors"
    header = {
        "__metadata__": {CREATION_KEY: text},
        "weight": entry("F32", [1, 1], 0, 4),
        "bias": entry("F32", [1], 4, 8),
    }
    path.write_bytes(make_file(header, bytes(8)))
    assert run("doctor", path) == 2
    assert "SourceError" in capsys.readouterr().err
    slot = hotglm.ModuleSlot(nn.Linear(1, 1), version="1.0.0")
    slot.update(path)
    assert slot(torch.ones(1)).item() == 0


def test_doctor_looks_at_the_requirements_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class was made nowhere; what it requires is looked at."""
    (tmp_path / "doctored_models.py").write_text(
        "import hotglm\nfrom torch import nn\n\n"
        "@hotglm.versioned('doctored-class', '1.0.0', requires=['torch>=99'])\n"
        "class Model(nn.Module):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run("doctor", "doctored_models:Model") == 1
