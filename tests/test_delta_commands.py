"""`hotglm delta` and `hotglm materialize`: what they make, print and refuse."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from hotglm.release.store_opening import open_store
from support.command_line import read_json, run
from support.deltas import State, pack_state, read_tree, write_state

FIRST: State = {"w": ("F32", (500,), random.Random(1).randbytes(2000)), "b": ("F32", (), b"abcd")}
SECOND: State = {**FIRST, "w": ("F32", (500,), FIRST["w"][2][:-1] + b"x")}


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two full releases and their sources, in the working directory."""
    pack_state(tmp_path, 1, FIRST)
    pack_state(tmp_path, 2, SECOND)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_delta_is_made_and_materialised(releases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands print what is there then, as text and as one document; the files come back byte for byte."""
    assert run("delta", "full-1", "full-2", "--json", "delta") == 0
    document = read_json(capsys)
    assert (document["schema"], document["kind"], document["version"]) == ("hotglm.delta/1", "delta", "2.0")
    assert (document["base"]["version"], document["base"]["sequence"], document["codecs"]) == ("1.0", 1, {"sparse": 1})
    assert document["payload_nbytes"] < document["nbytes"] < document["result_nbytes"]
    assert run("delta", "full-1", "full-2", "again") == 0
    printed = capsys.readouterr().out
    assert "a delta of 1.0, number 1" in printed
    assert "2 tensors, of which changed: 1 sparse" in printed
    assert f"result {document['result_digest']}" in printed
    assert run("materialize", "delta", "made", "--json") == 0
    made = read_json(capsys)
    assert (made["schema"], made["kind"], made["digest"]) == ("hotglm.materialize/1", "full", document["result_digest"])
    assert read_tree(releases / "made") == read_tree(releases / "full-2")
    assert run("materialize", "again", "made-again") == 0
    assert "number 2, in full" in capsys.readouterr().out


def test_a_store_takes_deltas(releases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--store` publishes against the newest or another release, in full where nothing is there or it pays more."""
    source = write_state(releases / "next", {**SECOND, "b": ("F32", (), b"wxyz")})
    for words, kind in (
        (["full-1"], "full"),
        (["full-2", "--label", "stable"], "delta"),
        ([str(source), "--name", "ranker", "--version", "3.0", "--base", "stable"], "delta"),
        ([str(source), "--name", "ranker", "--version", "4.0", "--base", "2.0", "--max-chain", "1"], "full"),
        ([str(source), "--name", "ranker", "--version", "5.0", "--base", "1", "--max-ratio", "0.001"], "full"),
    ):
        assert run("delta", *words, "--store", "models", "--json") == 0
        assert read_json(capsys)["kind"] == kind
    assert run("materialize", "3.0", "made", "--store", "models") == 0
    assert (releases / "made" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert open_store("models").read_labels()["stable"].release.version == "2.0"
    capsys.readouterr()
    assert run("show", "stable", "--store", "models", "--verify") == 0
    assert "delta" in capsys.readouterr().out
    assert run("log", "models") == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["delta", "full-1"], "Expected OLD, NEW and DST"),
        (["delta", "full-1", "full-2"], "Expected OLD, NEW and DST"),
        (["delta", "full-1", "full-2", "x", "--label", "a"], "--label only with --store"),
        (["delta", "full-1", "full-2", "x", "--max-chain", "3"], "--max-chain only with --store"),
        (["delta", "full-1", "full-2", "--store", "x"], "Expected one source"),
        (["delta", "full-1", "--store", "x", "--max-chain", "0"], "Expected a chain"),
        (["delta", "full-1", "full-1", "x"], "two different releases"),
        (["delta", "full-1", "missing", "x"], "NOT_FOUND"),
        (["delta", "full-1", "full-2", "full-1"], "EXISTS"),
        (["materialize", "full-1", "full-2"], "EXISTS"),
        (["materialize", "missing", "x"], "NOT_FOUND"),
    ],
)
def test_mistakes_are_named(
    words: list[str], expected: str, releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be meant is exit code 2 and one text without a traceback; no release is made."""
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""
    assert not [name for name in os.listdir() if name.endswith(".partial") or (name == "x" and "--store" not in words)]
