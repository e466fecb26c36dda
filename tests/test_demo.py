"""The short form of the demo, run once: it succeeds, shows what ran, and leaves a page that needs nobody else."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm import cli
from hotglm.demo import main, service, training, updates
from hotglm.demo.console import Console
from hotglm.demo.releases import NEW

# -- the short form, once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What one short demo left behind."""

    code: int
    text: str
    html: str
    report: dict[str, Any]
    num_threads: int


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    html, document, printed = folder / "page.html", folder / "report.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["demo", "--quick", "--html", str(html), "--json", str(document)])
    return Demo(
        code=code,
        text=printed.getvalue(),
        html=html.read_text(encoding="utf-8"),
        report=json.loads(document.read_text(encoding="utf-8")),
        num_threads=torch.get_num_threads(),
    )


def row(demo: Demo, name: str) -> dict[str, Any]:
    """Return the line of the table called `name`."""
    return next(line for line in demo.report["table"] if line["name"] == name)


def test_it_succeeds(demo: Demo) -> None:
    """The short demo ends with exit code 0, and every claim in its report came true."""
    assert [check for check in demo.report["checks"] if not check["is_met"]] == []
    assert demo.report["ok"] is True
    assert demo.report["schema"] == "hotglm.demo/1"
    assert demo.code == 0


def test_hotglm_loses_and_tears_nothing(demo: Demo) -> None:
    """Through 12 changes and 5 refusals, no request to the slot fails, and no answer is torn or stale."""
    line = row(demo, "hotglm")
    assert (line["num_changes"], line["num_failed"], line["num_torn"], line["num_stale"]) == (12, 0, 0, 0)
    assert line["num_requests"] > 100


def test_the_peers_ran_under_the_same_traffic(demo: Demo) -> None:
    """`load_state_dict` made as many changes as hotglm; the restart left clients without answers, hotglm did not."""
    overwrite, restart = row(demo, "load_state_dict"), row(demo, "process restart")
    assert overwrite["num_changes"] == row(demo, "hotglm")["num_changes"]
    assert overwrite["num_failed"] == 0
    assert restart["num_changes"] == 1
    assert restart["num_failed"] > 0
    assert restart["num_torn"] == 0  # a process of its own computes the same bits
    assert restart["silent_ms"] > 100
    assert row(demo, "hotglm")["silent_ms"] < restart["silent_ms"]


def test_the_bad_releases_are_refused_with_their_errors(demo: Demo) -> None:
    """Each bad release is refused with the error that names what is wrong; `load_state_dict` lets most of them live."""
    refusals = [moment for moment in demo.report["moments"]["hotglm"] if moment["kind"] == "refusal"]
    names = [moment["text"].partition(":")[0] for moment in refusals]
    assert names == ["HeaderError", "NonFiniteError", "IncompatibleError", "IncompatibleError", "DigestMismatchError"]
    assert all(f"Version {NEW} still serves, unchanged." in moment["text"] for moment in refusals)
    peers = {side["title"]: side["peer"] for side in demo.report["sides"]}
    assert peers["NaN in the weights"] == "no error, goes live; 100% of the answers are NaN"
    assert peers["wrong shape"].startswith("RuntimeError, with 7 of 8 tensors overwritten")
    assert peers["truncated file"].endswith("model unchanged")


def test_the_text_is_ascii_and_shows_the_lines_that_ran(demo: Demo) -> None:
    """The story is plain ASCII without a progress bar, and shows errors, code as in the source, and the table."""
    demo.text.encode("ascii")
    assert "\r" not in demo.text
    for function in (updates.open_slot, updates.swap, updates.try_update, updates.go_back):
        for line in inspect.getsource(function).splitlines()[2:]:
            assert line in demo.text
    for word in ("SHAPE_CHANGED", "MAJOR_REFUSED", "NONFINITE", "DIGEST_MISMATCH", "time without answers", "page: /"):
        assert word in demo.text


def test_it_puts_the_number_of_threads_back(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's number of torch threads is as it was, whatever happens in between."""
    before = torch.get_num_threads()
    assert demo.num_threads == before
    torch.set_num_threads(2)
    monkeypatch.setattr(main, "_prepare", lambda *_: 1 / 0)
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ZeroDivisionError):
        main.main([])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# -- the page ----------------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Collects whatever could make a browser fetch something, and counts elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        fetching = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "style"}
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in fetching]
        if tag in {"link", "img", "iframe", "object", "embed", "base", "video", "audio", "image", "use"}:
            self.found.append(tag)


def find_references(html: str) -> list[str]:
    """Return whatever in a page could make a browser fetch something."""
    parser = References()
    parser.feed(html)
    words = ("http:", "https:", "//cdn", "url(", "@import", "import(", "fetch(", "XMLHttpRequest", "WebSocket")
    return parser.found + [word for word in words if word in html]


def test_the_page_needs_nobody_else(demo: Demo) -> None:
    """The page refers to nothing outside of itself, and forbids a browser to fetch anything."""
    assert find_references(demo.html) == []
    assert "default-src 'none'" in demo.html
    assert "$" not in demo.html.replace("${", "").partition("<script>")[0]  # every placeholder was filled


@pytest.mark.parametrize(
    "planted", ['<img src="x.png">', "<style>@import 'x.css'</style>", '<a href="https://example.org">x</a>']
)
def test_the_search_for_references_finds_them(planted: str) -> None:
    """A page that does refer to something outside is caught."""
    assert find_references(f"<html>{planted}</html>")


def test_the_page_shows_every_answer(demo: Demo) -> None:
    """As many dots and crosses as answers, a panel for each run, and every number of the table."""
    num_answers = sum(line["num_requests"] - line["num_failed"] for line in demo.report["table"])
    paths = demo.html.split('<path class="dots ')[1:]
    assert sum(path.partition("</svg>")[0].partition("/>")[0].count("M") for path in paths) == num_answers
    assert demo.html.count('<svg class="chart"') == 3
    for line in demo.report["table"]:
        assert f">{line['num_requests']:,}</td>" in demo.html
    assert "prefers-color-scheme: dark" in demo.html


# -- what it stands on -------------------------------------------------------------------------------------------------


def test_without_scikit_learn_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where scikit-learn is missing, the command ends with 2 and says which extra to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(hotglm.MissingExtraError, match=r"hotglm\[demo\]"):
        training.load_data()
    assert cli.main(["demo"]) == 2
    assert "hotglm[demo]" in capsys.readouterr().err


def test_held_out_digits_are_held_out() -> None:
    """Each of scikit-learn's 1797 digits is trained on or asked about, none both; a request is a sheet of 16."""
    data = training.load_data()
    assert len(data.labels) + sum(map(len, data.answers)) == 1797
    assert {tuple(sheet.shape) for sheet in data.sheets} == {(16, 64)}
    assert data.images.min() == 0
    assert data.images.max() == 1


def test_code_is_read_from_the_function() -> None:
    """What is shown of a function is its source without the docstring, line by line."""
    for function in (updates.open_slot, updates.swap, updates.try_update, updates.overwrite, updates.restart):
        source, shown = inspect.getsource(function), updates.read_code(function)
        assert shown.startswith(f"def {function.__name__}(")
        assert '"""' not in shown
        assert set(shown.splitlines()) <= set(source.splitlines())
        assert len(shown.splitlines()) == len(source.splitlines()) - 1


def test_a_service_that_does_not_start_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it is ready is an error, not a wait; nobody answers then."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with service.Service(tmp_path) as stillborn:
        with pytest.raises(service.ServiceError, match="ready"):
            stillborn.start(tmp_path / "missing.safetensors")
        with pytest.raises(FileNotFoundError):
            stillborn.ask(torch.zeros(16, 64))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    """Progress is a plain line in a log, and a bar that makes way for the story on a terminal."""
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        console = Console(expected_s=10.0, stream=stream)
        console.step("training")
        console.say("done")
        console.wait(0.001)
        console.close()
    assert log.getvalue() == "[  0.0 s] training\ndone\n"
    assert "[....." in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")  # nothing of the bar is left
    assert "\r" + " " * 10 in terminal.getvalue().partition("done")[0]
