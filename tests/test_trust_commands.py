"""`hotglm keygen`, `sign`, `verify` and `trust`: what docs/trust.md shows, and an exit code for every outcome."""

from __future__ import annotations

import doctest
import json
import re
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hotglm.commands.verify import OUTCOMES, find_outcome
from hotglm.deltas.making import make_delta
from hotglm.errors import HotglmError, SourceReadError, TrustError, TrustStateError
from hotglm.trust.keys import write_public_key
from hotglm.trust.policy import read_clock
from support.bytes_maker import layout, make_file
from support.command_line import run
from support.trusted import Host, make_key, make_release, pack_tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trust.md"


def find_examples() -> list[tuple[str, str]]:
    """Return the commands of the page in order, each with what is shown."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    steps = [step.partition("\n") for block in blocks for step in block.split("$ hotglm ")[1:]]
    return [(command, shown) for command, _, shown in steps]


def test_the_page_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/trust.md, one after the other, print what stands below them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    header, nbytes = layout({"w": ("F32", (2,))})
    (tmp_path / "weights" / "model.safetensors").write_bytes(make_file(header, bytes(nbytes)))
    examples = find_examples()
    assert {command.split()[0] for command, _ in examples} == {"keygen", "trust", "pack", "sign", "verify"}
    for command, shown in examples:
        assert run(*shlex.split(command)) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        short = shown if shown.endswith("...\n") or "key sha256" not in shown else f"{shown}...\n"
        assert doctest.OutputChecker().check_output(short, printed, doctest.ELLIPSIS), printed


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Return a host whose clock is that of the commands."""
    made = Host(tmp_path)
    made.clock.now = read_clock()
    return made


def verify(host: Host, path: Path, *more: str) -> int:
    return run("verify", path, "--roots", host.roots_path, "--state", host.state_path, *more)


def test_every_outcome_has_an_exit_code(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accepted, signature refused, digest mismatch, expired, rolled back, unusable, and errors are told apart."""
    good = make_release(tmp_path / "good", version="1.1.0")
    host.offer(good)
    damaged = make_release(tmp_path / "damaged", version="1.2.0")
    (damaged / "a.txt").write_text("siDe")
    cases = [
        (good, 0),
        (pack_tiny(tmp_path / "unsigned", version="1.2.0"), 3),
        (make_release(tmp_path / "stranger", make_key("stranger"), version="1.2.0"), 3),
        (damaged, 4),
        (make_release(tmp_path / "expired", version="1.2.0", expires_at=read_clock() - timedelta(seconds=1)), 5),
        (make_release(tmp_path / "old"), 6),
        (tmp_path / "missing", 2),
    ]
    before = host.state_path.read_bytes()
    for path, code in cases:
        assert verify(host, path) == code, path
        printed = capsys.readouterr()
        assert ("accepted" in printed.out) == (code == 0)
        assert (printed.err == "") == (code == 0)
    assert host.state_path.read_bytes() == before
    host.state_path.write_bytes(b"")
    assert verify(host, good) == 7
    codes = [code for _, _, code in OUTCOMES]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2, 130} & set(codes)


@pytest.mark.parametrize(("error", "code"), [(TrustStateError, 7), (TrustError, 7), (SourceReadError, 2)])
def test_the_class_of_an_error_decides(error: type[HotglmError], code: int) -> None:
    """What is no outcome of trust is an error."""
    assert find_outcome(error("m"))[1] == code


def test_verify_answers_programs(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints one document for each outcome."""
    good, bad = make_release(tmp_path / "good"), pack_tiny(tmp_path / "bad")
    assert verify(host, good, "--json", "--slot", "ranker") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["accepted"], document["slot"]) == ("hotglm.verify/1", True, "ranker")
    assert document["keys"] == [make_key("release").public.id]
    assert verify(host, bad, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert (document["outcome"], document["code"]) == ("signature refused", "UNSIGNED")


def test_a_release_of_a_store_is_signed_and_verified(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--store`, PATH is a label, version or number."""
    monkeypatch.chdir(tmp_path)
    pack_tiny(tmp_path / "x")
    assert run("keygen", "other.pem", "--json") == 0
    assert json.loads(capsys.readouterr().out)["algorithm"] == "ed25519"
    words = ("pack", "x.source", "--store", "store", "--name", "ranker", "--version", "1.0.0")
    assert run(*words, "--sign", "other.pem", "--label", "stable") == 0
    assert verify(host, Path("1.0.0"), "--store", "store") == 3
    assert run("sign", "stable", "--store", "store", "--key", "other.pem", "--json") == 0
    trusting = ("--roots", host.roots_path, "--state", host.state_path)
    assert run("label", "store", "canary", "1.0.0", *trusting) == 2
    assert run("label", "store", "canary", "1.0.0", *trusting[:2]) == 2
    assert run("label", "store", "canary") == 1
    assert run("label", "store", "canary", "1.0.0") == 0


def test_a_delta_is_signed_by_its_command(host: Host, tmp_path: Path) -> None:
    """`hotglm delta --sign KEY` makes a signed delta."""
    assert run("keygen", tmp_path / "k.pem") == 0
    base, new = pack_tiny(tmp_path / "a"), pack_tiny(tmp_path / "b", version="1.1.0")
    assert run("delta", base, new, tmp_path / "delta", "--sign", tmp_path / "k.pem") == 0
    assert (tmp_path / "delta" / "hotglm-manifest.dsse.json").exists()
    assert verify(host, tmp_path / "delta") == 3  # by a key that this host does not know


def test_a_delta_is_verified_by_itself(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said of a signed delta is said of its own bytes, and not of those that it builds on."""
    base, new = pack_tiny(tmp_path / "a"), pack_tiny(tmp_path / "b", version="1.1.0")
    make_delta(base, new, tmp_path / "delta", signing_key=make_key("release")).close()
    assert verify(host, tmp_path / "delta") == 0
    assert "What it builds on was not read" in capsys.readouterr().out
    assert verify(host, make_release(tmp_path / "full", version="1.2.0")) == 0
    assert "builds on" not in capsys.readouterr().out


def test_memory_is_shown(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`trust show --json` has roots, floors, what was confirmed, and how long ago something was accepted."""
    trust = host.open(slot="api")
    trust.confirm(host.offer(make_release(tmp_path / "a"), trust))
    assert run("trust", "show", "--roots", host.roots_path, "--state", host.state_path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (record,) = document["records"]
    assert (record["slot"], record["model"], record["floor_version"]) == ("api", "ranker", "1.0.0")
    assert record["confirmed"]["version"] == "1.0.0"
    assert 0 <= record["accepted_s_ago"] < 60
    assert document["roots"]["roles"]["release"]["threshold"] == 1
    assert run("trust", "show", "--roots", host.roots_path, "--state", host.state_path) == 0
    assert "slot 'api'" in capsys.readouterr().out


def test_a_passphrase_opens_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that was made with a passphrase signs with that, and not without."""
    (tmp_path / "pass").write_text("between us\nnot this\n")
    assert run("keygen", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass") == 0
    path = pack_tiny(tmp_path / "a")
    assert run("sign", path, "--key", tmp_path / "k.pem") == 2
    assert "BAD_KEY" not in capsys.readouterr().out
    assert run("sign", path, "--key", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass") == 0


def test_limited_roles_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`trust new` takes thresholds, models and slots of a role."""
    for name in ("root", "a", "b"):
        write_public_key(tmp_path / name, make_key(name).public)
    root, pair = tmp_path / "root", f"{tmp_path / 'a'},{tmp_path / 'b'}"
    words = ["trust", "new", tmp_path / "roots.json", "--role", f"root={root}", "--role", f"team={pair}"]
    assert run(*words, "--threshold", "team=2", "--models", "team=m,n", "--slots", "team=s") == 0
    assert "role team: 2 of 2, models 'm', 'n', slots 's'" in capsys.readouterr().out
    assert run(*words) == 2  # it is there


@pytest.mark.parametrize(
    "more",
    [
        ["--threshold", "team=1"],
        ["--threshold", "root"],
        ["--threshold", "root=x"],
        ["--threshold", "root=2"],
        ["--role", "root=again"],
        ["--expires", "soon"],
        ["--after", "nothing"],
    ],
)
def test_words_that_cannot_be_meant_are_errors(more: list[str], tmp_path: Path) -> None:
    """Unknown roles, numbers that are none, thresholds that cannot be met: exit code 2, and nothing is written."""
    write_public_key(tmp_path / "root", make_key("root").public)
    assert run("trust", "new", tmp_path / "roots.json", "--role", f"root={tmp_path / 'root'}", *more) == 2
    assert not (tmp_path / "roots.json").exists()
