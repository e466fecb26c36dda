"""`hotglm pack`, `show` and `log`: what they print, what they return, and that they start without torch."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hotglm.release.directory import open_release
from hotglm.release.store_opening import open_store
from support.command_line import read_json, run
from support.releases import write_source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a directory with two directories of weights."""
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "ranker-a")
    write_source(tmp_path / "ranker-b", seed=1)
    return tmp_path


def find_examples() -> list[tuple[str, str]]:
    """Return the commands about a ranker or the store of models on the page, in order, each with what is shown."""
    page = (ROOT / "docs" / "cli.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    steps = [step.partition("\n") for block in blocks for step in block.split("$ hotglm ")[1:]]
    return [(command, shown) for command, _, shown in steps if re.search(r"\b(models|ranker-[ab])\b", command)]


def test_the_page_shows_what_is_printed(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of docs/cli.md, one after the other, print what stands below them."""
    examples = find_examples()
    assert [command.split()[0] for command, _ in examples] == ["pack", "pack", "show", "log", "label", "collect"]
    for command, shown in examples:
        assert run(*command.split()) == 0
        printed = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS), printed


def test_pack_copies_or_stays_in_place(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pack SRC DST` copies; `--in-place` adds a manifest; `--json` prints one document."""
    assert run("pack", "ranker-a", "out", "--name", "ranker", "--version", "2.0.0", "--json") == 0
    document = read_json(capsys)
    assert (document["schema"], document["version"], document["sequence"]) == ("hotglm.pack/1", "2.0.0", 1)
    words = ["--name", "ranker", "--version", "3.0.0", "--requires", "torch>=2.6", "--expires", "2030-01-31T12:00:00Z"]
    assert run("pack", "ranker-a", "--in-place", *words) == 0
    with open_release("out") as copied, open_release("ranker-a") as stayed:
        assert copied.manifest.files == stayed.manifest.files
        assert copied.digest == document["digest"]
        assert stayed.manifest.requires == ("torch>=2.6",)
        assert stayed.manifest.expires_at is not None
        assert stayed.manifest.expires_at.isoformat() == "2030-01-31T12:00:00+00:00"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pack", "ranker-a"], "Expected one of DST, --in-place and --store, got 0"),
        (["pack", "ranker-a", "out", "--in-place"], "got 2"),
        (["pack", "ranker-a", "out", "--label", "stable"], "only with --store"),
        (["pack", "ranker-a", "out", "--name", "r"], "got no version"),
        (["pack", "ranker-a", "out", "--name", "r", "--version", "x"], "Expected a version"),
        (["pack", "ranker-a", "out", "--name", "r", "--version", "1", "--expires", "soon"], "Expected a time"),
        (["pack", "missing", "out", "--name", "r", "--version", "1"], "NOT_FOUND"),
        (["show", "ranker-a"], "INCOMPLETE"),
        (["show", "stable", "--store", "missing"], "NOT_A_STORE"),
        (["log", "ranker-a"], "NOT_A_STORE"),
    ],
)
def test_mistakes_are_named(words: list[str], expected: str, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be meant, or is not there, is exit code 2 and one text without a traceback; nothing is made."""
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""
    assert sorted(os.listdir()) == ["ranker-a", "ranker-b"]


def test_show_verify_finds_another_byte(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`show` reads headers only; with `--verify` one other byte is exit code 2."""
    assert run("pack", "ranker-a", "out", "--name", "ranker", "--version", "1.0.0") == 0
    path = Path("out/tokenizer/vocab.json")
    path.write_text(path.read_text().replace("0", "1"))
    assert run("show", "out") == 0
    capsys.readouterr()
    assert run("show", "out", "--verify") == 2
    assert "DIGEST_MISMATCH" in capsys.readouterr().err


def test_show_and_log_as_json_say_everything(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` of both is one document with a schema; broken releases are in the history, too."""
    run("pack", "ranker-a", "--store", "models", "--name", "ranker", "--version", "1.0.0", "--label", "stable")
    run("pack", "ranker-b", "--store", "models", "--name", "ranker", "--version", "1.1.0", "--link")
    store = open_store("models")
    with store.open_release("1.0.0") as release:
        store.service("api").begin(release).confirm()
    os.unlink(Path(store.find_release("1.1.0").path) / "config.json")
    capsys.readouterr()
    assert run("show", "1", "--store", "models", "--json") == 0
    shown = read_json(capsys)
    assert (shown["schema"], shown["version"], shown["verified"]) == ("hotglm.show/1", "1.0.0", False)
    assert {tensor["name"] for tensor in shown["tensors"]} == {"w", "b", "empty", "scalar"}
    assert run("log", "models", "--json") == 0
    log = read_json(capsys)
    assert [(one["sequence"], one["refused"], one["labels"]) for one in log["releases"]] == [
        (2, "MISSING_FILE", []),
        (1, None, ["stable"]),
    ]
    assert log["services"][0]["confirmed"]["version"] == "1.0.0"
    assert run("log", "models") == 0
    printed = capsys.readouterr().out
    assert "broken: MISSING_FILE" in printed
    assert "service api: confirmed 1.0.0" in printed


def test_the_commands_start_without_torch(sources: Path) -> None:
    """Packing, publishing, showing and listing need no torch: a machine that only publishes has none."""
    code = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None
from hotglm import cli
words = "--store models --name ranker --version 1.0.0 --label stable"
assert cli.main(["pack", "ranker-a", *words.split()]) == 0
assert cli.main(["show", "stable", "--store", "models", "--verify"]) == 0
assert cli.main(["log", "models"]) == 0
assert cli.main(["label", "models", "canary", "stable"]) == 0
assert cli.main(["services", "models"]) == 0
assert cli.main(["collect", "models"]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
