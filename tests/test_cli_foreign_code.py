"""The command line beside code of others: what that prints, what it makes of configs, and interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm.compatibility import Released
from hotglm.config_spec import ConfigSpec
from hotglm.contract import Contract
from hotglm.version import Version
from support.command_line import run
from support.contracts import contract, tensor

MODULE = """
print("imported")
import hotglm
from torch import nn

@hotglm.versioned("noisy", "1.0")
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        print("built")
        self.w = nn.Linear(2, 2)
    def forward(self, x):
        print("called")
        return self.w(x)

steps = hotglm.Migrations("noisy")

@steps.config("1.0", "2.0")
def _(config):
    print("migrated")
    return {**config, "limit": config["limit"] * 1e308 * 10}

renames = hotglm.Migrations("noisy")
renames.state("1.0", "2.0", [hotglm.Rename(r"a", r"b")])

both = hotglm.Migrations("noisy")
both.state("1.0", "2.0", [hotglm.Rename(r"a", r"b")])
both.config("1.0", "2.0", [hotglm.RenameField("old", "new")])
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"noisy_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("hotglm.model.registry._definitions", {})
    return tmp_path


def name_of(directory: Path) -> str:
    return next(directory.glob("noisy_*.py")).stem


def test_json_stands_alone_whatever_the_code_of_others_prints(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output is one document; what imported modules and migrations print goes to standard error."""
    module = name_of(directory)
    hotglm.save_weights(torch.nn.Linear(2, 2), "a.safetensors", version="1.0", name="noisy", config={"limit": 0})
    moves = ["--to", "2.0", "--migrations", f"{module}:steps", "--json"]
    for words in (
        ["diff", "--json", f"{module}:Noisy", f"{module}:Noisy"],
        ["doctor", "--json", f"{module}:Noisy"],
        ["migrate", "a.safetensors", "--dry-run", *moves],
        ["migrate", "a.safetensors", "b.safetensors", *moves],
        ["golden", "verify", "--json", "nothing", "--import", module],
    ):
        run(*words)
        captured = capsys.readouterr()
        assert isinstance(json.loads(captured.out), dict), words
    assert (directory / "b.safetensors").exists()


@pytest.mark.parametrize("more", [["--dry-run"], ["--dry-run", "--json"], ["b.safetensors"]], ids=str)
def test_a_config_that_no_file_can_hold_is_refused_before(
    directory: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run does not look well where the real one would fail."""
    hotglm.save_weights({"w": torch.ones(2)}, "a.safetensors", version="1.0", config={"limit": 2})
    assert run("migrate", "a.safetensors", *more, "--to", "2.0", "--migrations", f"{name_of(directory)}:steps") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'limit'" in captured.err
    assert not (directory / "b.safetensors").exists()


@pytest.mark.parametrize(("steps", "exit_code"), [("renames", 1), ("both", 0)])
def test_a_migration_of_tensors_excuses_no_config(
    directory: Path, steps: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that is gone stays a finding unless a step of the path changes configs."""
    paths = []
    for version, one, field in (("1.0", "a", "old"), ("2.0", "b", "new")):
        released = Released(
            version=Version(version),
            contract=Contract(state=contract(tensor(one)).state, config=ConfigSpec.of({field: int})),
        )
        paths.append(directory / f"{version}.json")
        paths[-1].write_text(json.dumps(released.to_dict()))
    words = ["diff", "--json", "--mode", "backward", "--migrations", f"{name_of(directory)}:{steps}", *paths]
    assert run(*words) == exit_code
    found = json.loads(capsys.readouterr().out)["incompatibilities"]
    wanted = ["CONFIG_FIELD_REMOVED", "REQUIRED_CONFIG_FIELD_ADDED"] if exit_code else []
    assert [finding["breakage"]["code"] for finding in found] == wanted


def test_a_failed_command_leaves_standard_output_to_its_caller(directory: Path) -> None:
    """A file that cannot be written is no reason to lead the output of the process to nowhere."""
    hotglm.save_weights({"w": torch.ones(2)}, "a.safetensors")
    code = (
        "from hotglm import cli; print('before');"
        "print(cli.main(['stamp', 'a.safetensors', 'nowhere/x', '--version', '1']))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["before", "2"]
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["a.safetensors", "b.safetensors", "--version", "2"], ["a.safetensors", "--version", "2", "b.safetensors"]],
    ids=["before", "behind"],
)
def test_the_target_may_stand_behind_options(directory: Path, words: list[str]) -> None:
    """DST is found wherever it stands, and SRC is not written over instead."""
    hotglm.save_weights({"w": torch.ones(2)}, "a.safetensors")
    before = (directory / "a.safetensors").read_bytes()
    assert run("stamp", *words) == 0
    assert (directory / "b.safetensors").exists()
    assert (directory / "a.safetensors").read_bytes() == before
    with pytest.raises(SystemExit):
        run("stamp", *words, "c.safetensors")


def test_ctrl_c_ends_a_command_in_a_line(directory: Path) -> None:
    """An interrupted write leaves the file as it was, nothing beside it, and no traceback."""
    path = directory / "big.safetensors"
    nbytes = 600_000_000
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    with path.open("wb") as file:  # sparse
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    words = [sys.executable, "-m", "hotglm", "stamp", str(path), "--version", "2.0"]
    env = {"PYTHONPATH": ":".join(sys.path)}
    # A shell starts what runs in its background with Ctrl-C ignored, and a child inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not list(directory.glob(".hotglm-*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "hotglm: interrupted.\n")
    assert not list(directory.glob(".hotglm-*"))
    with path.open("rb") as file:
        assert file.read(8) == len(header).to_bytes(8, "little")
