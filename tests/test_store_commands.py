"""`hotglm label`, `services` and `collect`: what they print, what they change, and what they return."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from support.command_line import read_json, run
from support.releases import fill, versions, write_source


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Stand beside a store `models` with 1.0.0 to 1.3.0, weights of which differ."""
    monkeypatch.chdir(tmp_path)
    for seed in range(4):
        write_source(tmp_path / "sources" / str(seed), seed=seed)
    made = open_store("models", creates=True)
    fill(made, tmp_path / "sources", 4)
    return made


# -- label -------------------------------------------------------------------------------------------------------------


def test_a_label_is_moved_shown_and_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """`label` moves to a version, a number or a label, tells where it leads, and removes; 1 is "no such label"."""
    assert run("label", "models", "stable") == 1
    assert "no label 'stable'" in capsys.readouterr().out
    assert run("label", "models", "stable", "1.0.0", "--expect", "none") == 0
    assert run("label", "models", "stable", "3", "--expect", "1.0.0") == 0
    assert run("label", "models", "canary", "stable") == 0
    assert run("label", "models", "stable") == 0
    assert "label stable leads to 1.2.0, moved 2 times" in capsys.readouterr().out
    assert run("label", "models", "canary", "--json") == 0
    document = read_json(capsys)
    assert (document["schema"], document["name"]) == ("hotglm.label/1", "canary")
    assert document["label"]["moves"][0]["release"]["version"] == "1.2.0"
    assert run("label", "models", "canary", "--remove", "--expect", "1.2.0", "--json") == 0
    assert read_json(capsys)["label"] is None
    assert run("label", "models", "canary", "stable") == run("label", "models", "canary", "--remove") == 0
    assert "removed label canary" in capsys.readouterr().out
    assert run("label", "models", "canray", "--remove") == 1
    assert capsys.readouterr().out == "no label 'canray'\n"
    assert set(store.read_labels()) == {"stable"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stable", "1.1.0", "--expect", "none"], "LABEL_MOVED"),
        (["stable", "1.1.0", "--expect", "1.2.0"], "LABEL_MOVED"),
        (["stable", "--remove", "--expect", "1.2.0"], "LABEL_MOVED"),
        (["stable", "9.9"], "NOT_IN_STORE"),
        (["stable", "9" * 5000], "NOT_IN_STORE"),
        (["Stable", "1.1.0"], "Expected the name of a label"),
        (["stable", "1.1.0", "--remove"], "got both"),
        (["stable", "--expect", "1.0.0"], "only with a change"),
        (["stable", "--remove", "--expect", "none"], "got 'none'"),
        (["stable", "1.1.0", "--expect", "x"], "Expected a version"),
    ],
)
def test_a_label_that_stands_elsewhere_is_an_error(
    words: list[str], expected: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """S4: --expect is compare-and-set: exit code 2, one text on standard error, and the label stays."""
    before = store.move_label("stable", "1.0.0")
    assert run("label", "models", *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""
    assert store.read_labels() == {"stable": before}


# -- services ----------------------------------------------------------------------------------------------------------


def test_services_are_listed_and_a_release_forgiven(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """`services` shows what is confirmed, tried and refused, reasons escaped; `--forgive` takes some of the digits."""
    assert run("services", "models") == 0
    assert "no services" in capsys.readouterr().out
    with store.open_release("1.1.0") as release:
        digest = release.digest
        store.service("api").begin(release).fail("latency \x1b[31mx10")
    with store.open_release("1.0.0") as release, store.service("api").begin(release):
        assert run("services", "models", "api") == 0
    printed = capsys.readouterr().out
    assert "service api: nothing confirmed, 1 trial, 1 refusal" in printed
    assert "\x1b" not in printed
    assert digest in printed
    assert run("services", "models", "--json") == 0
    document = read_json(capsys)
    assert document["schema"] == "hotglm.services/1"
    assert document["services"][0]["refused"][0]["release"]["version"] == "1.1.0"
    assert run("services", "models", "other") == 1
    assert run("services", "models", "api", "--forgive", "f" * 64) == 1
    assert run("services", "models", "api", "--forgive", digest.removeprefix("sha256:")[:12]) == 0
    left = [one.release.version for one in store.service("api").read().refused]
    assert left == ["1.0.0"]  # its trial was given up above
    capsys.readouterr()


@pytest.mark.parametrize(
    "words", [["--forgive", "0" * 64], ["api", "--forgive", "0123"], ["API", "--forgive", "0" * 9]]
)
def test_what_cannot_be_forgiven_is_named(words: list[str], store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A digest needs a service and enough digits; a name that cannot be one is an error."""
    assert run("services", "models", *words) == 2
    assert "Expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.0\x1b[31m"},
        {"version": "no version"},
        {"digest": "sha256:\x1b[31m"},
        {"sequence": 0},
    ],
)
def test_what_a_record_says_is_plain(change: dict[str, object], store: Store) -> None:
    """J12, S3: a record with a version, digest or number that no store writes is damaged, and is never printed."""
    store.move_label("stable", "1.0.0")
    path = Path(store.join("labels", "stable.json"))
    document = json.loads(path.read_text())
    document["record"]["moves"][0]["release"] |= change
    path.write_text(json.dumps(document))
    for words in (["log", "models"], ["label", "models", "stable"]):
        assert run(*words) == 2


# -- collect -----------------------------------------------------------------------------------------------------------


def test_collect_removes_what_it_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """S7: `--dry-run` changes nothing and foretells what goes; then that goes."""
    store.move_label("stable", "1.1.0")
    assert run("collect", "models", "--keep-newest", "1", "--dry-run", "--json") == 0
    foretold = read_json(capsys)
    assert (foretold["schema"], foretold["dry_run"]) == ("hotglm.collect/1", True)
    assert [one["version"] for one in foretold["removed"]] == ["1.0.0", "1.2.0"]
    assert len(versions(store)) == 4
    os.mkdir(store.join("tmp", ".hotglm-dead.partial"))
    assert run("collect", "models", "--keep-newest", "1", "--json") == 0
    done = read_json(capsys)
    assert {**done, "dry_run": True, "debris": []} == foretold
    assert done["debris"] == [".hotglm-dead.partial"]
    assert versions(store) == ["1.1.0", "1.3.0"]
    assert run("collect", "models") == 0
    assert "removed 0 releases and 0 contents" in capsys.readouterr().out
    assert run("collect", "models", "--keep-newest", "0") == 2


def test_collect_names_what_is_in_use(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """S8: a release that somebody has open is named and stays, also in front of a dry run."""
    with store.open_release("1.0.0") as release:
        assert run("collect", "models", "--keep-newest", "3", "--dry-run") == 0
        release.verify()
        assert run("collect", "models", "--keep-newest", "3") == 0
    printed = capsys.readouterr().out
    assert "would remove 1 release and 1 content" in printed
    assert "in use, and left: 1.0.0 (number 1)" in printed
    assert len(versions(store)) == 4
