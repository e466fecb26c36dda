"""`hotglm diff` on classes, contracts and weights, with compatibility modes over a history."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm.compatibility import Released
from hotglm.version import Version
from support.command_line import read_json, run
from support.contracts import contract, named, output, recording, tensor

MODELS = '''
import hotglm
from torch import nn
import torch

@hotglm.versioned("diffed", "1.0.0")
class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)
    def forward(self, x, scale=1.0):
        return self.a(x)

@hotglm.versioned("diffed", "2.0.0")
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(2, 3)
        self.tied = self.b
        self.register_buffer("cache", torch.zeros(3), persistent=False)
    def forward(self, x, scale=2.0):
        return self.b(x)

Two.migrations.state("1.0.0", "2.0.0", [hotglm.Rename(r"a\\.(.*)", r"b.\\1")])

class Holder:
    Nested = One

class Plain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a = nn.Linear(2, width)
    def forward(self, x):
        return self.a(x)

class Numeric(nn.Module):
    """Its constructor computes with its tensors, which the meta device cannot."""
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3 if float(torch.ones(1).sum()) == 1 else 4)

def make_plain():
    return Plain(3)

def make_contract():
    return hotglm.contract_of(Plain(3), inputs=[torch.ones(1, 2)])

broken = None

def fail():
    raise ValueError("\\x1b[31mno")
'''


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "diffed_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("diffed_models", None)


def test_two_classes_are_compared_as_contracts(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are imported and compared in everything that code knows, with explanation, bump and remedy."""
    assert run("diff", "diffed_models:One", "diffed_models:Two") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "old: 'diffed_models:One', model 'diffed', version 1.0.0"
    assert "  - DEFAULT_CHANGED (major): the default of argument 'scale' went from 1.0 to 2.0" in lines
    assert "Needs a step of major, such as 2.0.0 after 1.0.0." in lines
    assert "Claims a step of major (2.0.0 after 1.0.0): enough." in lines
    assert "  DEFAULT_CHANGED: keep the default, or take None for one that is worked out" in lines


def test_a_class_does_not_differ_from_itself(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The diff of a thing with itself is empty, for a class, an attribute of one and a module from a function."""
    assert run("diff", "diffed_models:Two", "diffed_models:Two") == 0
    assert "Nothing that callers, files or configs can notice." in capsys.readouterr().out
    assert run("diff", "diffed_models:One", "diffed_models:Holder.Nested") == 0
    assert run("diff", "diffed_models:make_plain", "diffed_models:make_plain") == 0
    assert run("diff", "diffed_models:Numeric", "diffed_models:Numeric") == 0


def test_weights_are_compared_with_a_class_in_what_files_show(models: Path) -> None:
    """Ties, buffers that no file has, and calls are no difference between weights and the class that wrote them."""
    sys.path.insert(0, str(models))
    import diffed_models  # type: ignore[import-not-found]

    hotglm.save_weights(diffed_models.Two(), models / "two.safetensors")
    assert run("diff", "two.safetensors", "diffed_models:Two") == 0
    assert run("diff", "diffed_models:Two", "two.safetensors") == 0
    assert run("diff", "two.safetensors", "diffed_models:One") == 1


def test_a_migration_makes_files_compatible_and_not_callers(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--mode` counts the migrations of the class: files are read across them, and another default stays a finding."""
    assert run("diff", "--json", "--mode", "full", "diffed_models:One", "diffed_models:Two") == 1
    document = read_json(capsys)
    findings = document["incompatibilities"]
    assert isinstance(findings, list)
    assert {finding["breakage"]["code"] for finding in findings} == {"DEFAULT_CHANGED"}
    assert [finding["direction"] for finding in findings] == ["backward", "forward"]
    assert (document["mode"], document["compatible"]) == ("full", False)
    assert document["breakages"] != []


@pytest.mark.parametrize(
    ("pattern", "exit_code"), [(r"a\\.(.*)", 0), (r"a\\.(bias)", 1), (r"(nothing)", 1)], ids=["fits", "part", "misses"]
)
def test_migrations_of_weights_are_run_dry(
    pattern: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--migrations` excuses what is stored only if a path leads from the one's tensors to the other's."""
    text = 'import hotglm\nsteps = hotglm.Migrations("m")\n'
    text += f'steps.state("1.0.0", "2.0.0", [hotglm.Rename("{pattern}", "b.\\\\1")])\n'
    (tmp_path / f"dry_{exit_code}_{len(pattern)}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for version, name in (("1.0.0", "a"), ("2.0.0", "b")):
        tensors = {f"{name}.weight": torch.ones(2, 2), f"{name}.bias": torch.ones(2)}
        hotglm.save_weights(tensors, tmp_path / f"{version}.safetensors", version=version)
    files = [tmp_path / "1.0.0.safetensors", tmp_path / "2.0.0.safetensors"]
    assert run("diff", "--mode", "full", *files) == 1
    steps = f"dry_{exit_code}_{len(pattern)}:steps"
    assert run("diff", "--mode", "full", "--migrations", steps, *files) == exit_code


def release(path: Path, version: str, one: hotglm.Contract) -> Path:
    path = path / f"{version}.json"
    path.write_text(json.dumps(Released(version=Version(version), contract=one).to_dict(), sort_keys=True))
    return path


def test_a_history_of_contracts_is_judged_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Contracts kept in files are a history: fine after the last one, and not after the one before it."""
    first = release(tmp_path, "1.0.0", contract(call=lambda x, old: 0))
    second, third = (release(tmp_path, v, contract(call=lambda x: 0)) for v in ("2.0.0", "2.1.0"))
    words = ["--history", first, "--", second, third]
    assert run("diff", "--mode", "backward", *words) == 0
    assert "Compatibility backward: yes." in capsys.readouterr().out
    assert run("diff", "--mode", "backward_transitive", *words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "Compatibility backward_transitive: no.",
        "  - 2.1.0 cannot serve the callers of 1.0.0: argument 'old' was removed.",
        "Remedies",
        "  ARGUMENT_REMOVED: take the argument and ignore it until the next major version",
    ]


def test_a_contract_in_a_file_may_come_without_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A contract alone is compared too; only a mode needs to know which came first."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(contract(outputs=recording(named(logits=output(2, 32000)))).to_dict()))
    new.write_text(json.dumps(contract(outputs=recording(named(logits=output(2, 32064)))).to_dict()))
    assert run("diff", old, new) == 1
    assert "(major): output 'logits' went from 32000 to 32064 wide" in capsys.readouterr().out
    assert run("diff", old, new, "--mode", "full") == 2
    err = capsys.readouterr().err
    assert err.count("NO_VERSION") == 2
    assert "Released.to_dict" in err


def test_a_recorded_contract_comes_from_a_function(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A function that returns a contract is called, so that outputs can be recorded too."""
    old = models / "old.json"
    old.write_text(json.dumps(hotglm.contract_of(torch.nn.Linear(2, 3), inputs=[torch.ones(1, 2)]).to_dict()))
    assert run("diff", "diffed_models:make_contract", old, "--json") == 1
    document = read_json(capsys)
    assert document["breakages"] != []


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("no_such_module_here:One", "ModuleNotFoundError"),
        ("diffed_models:Missing", "AttributeError"),
        ("diffed_models:Plain", "missing 1 required positional argument"),
        ("diffed_models:broken", "Expected something with a contract"),
        ("diffed_models:fail", "ValueError: \\x1b[31mno"),
        ("no/such:file", "NOT_FOUND"),
    ],
)
def test_what_cannot_be_had_is_an_error_without_a_traceback(
    models: Path, word: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word that leads nowhere gives exit code 2, and standard error says what was tried."""
    assert run("diff", "diffed_models:One", word) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert "Traceback" not in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "text", ["{}", '{"schema": "hotglm.contract/1"}', '{"schema": "hotglm.released/1"}', "{", "\xff"]
)
def test_a_file_that_is_no_contract_is_an_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON that is no contract, and what is no JSON, is refused with exit code 2."""
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    assert run("diff", path, path) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_history_without_a_mode_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier versions without a question about them are a mistake."""
    path = release(tmp_path, "1.0.0", contract(tensor("w")))
    assert run("diff", path, path, "--history", path) == 2
    assert "--mode" in capsys.readouterr().err


@pytest.mark.parametrize("version", [None, 3, "not a version"])
def test_a_released_contract_is_read_strictly(version: object) -> None:
    """Released.from_dict(r.to_dict()) == r, and anything else is one error with all problems."""
    made = Released(version=Version("1.2.0+abc"), contract=contract(tensor("w")))
    assert Released.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    with pytest.raises(hotglm.ArgumentError) as caught:
        Released.from_dict({**made.to_dict(), "version": version, "contract": {}, "schema": "x"})
    assert len(caught.value.problems) > 3
