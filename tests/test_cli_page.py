"""What docs/cli.md shows is what the commands print."""

from __future__ import annotations

import doctest
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm import cli
from hotglm.release.environment import CREATION_KEY, read_environment
from support.bytes_maker import entry, make_file

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
FILES = "scorer-1.0.0.safetensors scorer-1.1.0.safetensors"


def find_examples() -> list[tuple[str, str, str]]:
    """Return each command about the two models, what the page shows of it, and the exit code where that is shown."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        command, _, shown = block.partition("\n")
        shown, _, code = shown.partition("$ echo $?\n")
        if "scorer" in command or "encoder" in command:
            found.append((command.removeprefix("$ hotglm "), shown, code.strip()))
    return found


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the two files of the page; the second one was made with an old torch."""
    monkeypatch.chdir(tmp_path)
    body = {"body.weight": torch.zeros(8, 4), "body.bias": torch.zeros(8)}
    hotglm.save_weights(body, "scorer-1.0.0.safetensors", name="scorer", version="1.0.0")
    here = read_environment(())
    made = {"python": here.python, "packages": {"torch": "1.13.1"}, "markers": dict(here.markers)}
    header: dict[str, object] = {
        "__metadata__": {
            "hotglm.name": "scorer",
            "hotglm.version": "1.1.0",
            "hotglm.requires": json.dumps(["numpy>=99"]),
            CREATION_KEY: json.dumps(made),
        }
    }
    end = 0
    for name, shape in (
        ("body.bias", [16]),
        ("body.weight", [16, 4]),
        ("norm.bias", [16]),
        ("norm.weight", [16]),
    ):
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = entry("F32", shape, start, end)
    Path("scorer-1.1.0.safetensors").write_bytes(make_file(header, bytes(end)))
    _write_encoder()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    return tmp_path


def _write_encoder() -> None:
    """Write weights of version 1 and the module whose migrations lead to version 2."""
    state = {"qkv.weight": torch.zeros(12, 4), "ln.weight": torch.ones(4), "ln.bias": torch.zeros(4)}
    hotglm.save_weights(state, "encoder-1.0.3.safetensors", name="encoder", version="1.0.3")
    operations = """[
        hotglm.Split("qkv.weight", ("q.weight", "k.weight", "v.weight")),
        hotglm.Rename(r"ln\\.(.*)", r"norm.\\1"),
    ]"""
    lines = ["import hotglm", 'migrations = hotglm.Migrations("encoder")']
    Path("mymodels.py").write_text("\n".join([*lines, f'migrations.state("1.0", "2.0", {operations})']))


EXAMPLES = find_examples()


def test_the_page_shows_every_command_about_weights() -> None:
    """There is an example of each command that reads weights, and of a mode."""
    assert {command.split()[0] for command, _, _ in EXAMPLES} >= {"inspect", "diff", "doctor", "migrate"}
    assert f"diff --mode full {FILES}" in {command for command, _, _ in EXAMPLES}


@pytest.mark.parametrize(
    ("command", "shown", "code"),
    [pytest.param(*one, id=one[0].split(" scorer")[0].split(" encoder")[0]) for one in EXAMPLES],
)
def test_the_page_shows_what_is_printed(
    command: str, shown: str, code: str, scorers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running a command of the page prints what stands below it, with `...` for what is left out."""
    exit_code = cli.main(command.split())
    printed = capsys.readouterr().out
    flags = doctest.ELLIPSIS
    assert doctest.OutputChecker().check_output(shown, printed, flags), printed
    assert not code or exit_code == int(code)
