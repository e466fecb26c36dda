"""`hotglm log` and `hotglm show` as pictures: columns of deltas, bars, what changed, pages; hostile names stay text."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm.commands.history import Entry, History, plan_rows
from hotglm.commands.log import draw_graph
from hotglm.commands.log_page import make_log_page
from hotglm.commands.page import show_text
from hotglm.commands.show_page import make_show_page
from hotglm.commands.tensor_tree import Node, grow_tree
from hotglm.manifest_fields import ReleasedTensor
from hotglm.release.directory import open_release
from hotglm.release.ledger import Refusal, ReleaseId, ServiceState
from hotglm.release.packing import pack
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import StoredRelease, release_name
from hotglm.version import Version
from support.command_line import run
from support.deltas import State, write_state

FULL: State = {
    "a.0.w": ("F32", (4,), bytes(16)),
    "a.1.w": ("F32", (4,), bytes(16)),
    "gone": ("U8", (3,), b"abc"),
    "head": ("I8", (40,), bytes(range(40))),
}
NEXT: State = {
    **{name: one for name, one in FULL.items() if name != "gone"},
    "head": ("I8", (40,), bytes(range(1, 41))),
    "new<b>&amp;": ("U8", (2,), b"xy"),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Stand beside a store `models` of a full 1.0, a delta 2.0 on it that holds a hostile name, and a full 3.0."""
    monkeypatch.chdir(tmp_path)
    made = open_store("models", creates=True)
    made.publish(write_state(tmp_path / "1", FULL), name="ranker", version="1.0")
    write_state(tmp_path / "2", NEXT)
    new = tmp_path / "full-2"
    pack(tmp_path / "2", new, name="ranker", version="2.0", sequence=2).close()
    hotglm.make_delta(made.find_release("1.0").path, new, tmp_path / "delta").close()
    os.rename(tmp_path / "delta", made.join("releases", release_name(2, "2.0")))
    made.publish(write_state(tmp_path / "3", NEXT, note="3"), name="ranker", version="3.0")
    return made


# -- columns -----------------------------------------------------------------------------------------------------------


def make_entry(sequence: int, base: int | None, *, is_broken: bool = False) -> Entry:
    stored = StoredRelease(sequence=sequence, version=Version(f"1.{sequence}"), path="x")
    facts: dict[str, object] = {"kind": "full" if base is None else "delta", "nbytes": 10 * sequence, "base": None}
    if base is not None:
        facts["base"] = {"version": f"1.{base}", "sequence": base}
    facts |= {"name": "ranker", "created": "2026-01-02T03:04:05Z"}
    return Entry(
        stored=stored, facts=None if is_broken else facts, refusal="INCOMPLETE" if is_broken else None, base=base
    )


def draw(bases: dict[int, int | None]) -> list[str]:
    return [draw_graph(row) for row in plan_rows([make_entry(number, bases[number]) for number in sorted(bases)[::-1]])]


def test_a_delta_stands_above_its_base() -> None:
    """Chains are columns; deltas of one base join it; what has nothing to do with them passes by."""
    assert draw({1: None, 2: None}) == ["*", "*"]
    assert draw({1: None, 2: 1, 3: 2}) == ["+", "+", "*"]
    assert draw({1: None, 2: None, 3: 1}) == ["+", "| *", "*"]
    assert draw({1: None, 2: 1, 3: 1}) == ["+", "| +", "*-'"]
    assert draw({1: None, 2: None, 3: 2, 4: 1, 5: 2}) == ["+", "| +", "| | +", "*-|-'", "  *"]


@given(st.lists(st.integers(0, 40), max_size=40))
def test_every_delta_leads_to_its_base(choices: list[int]) -> None:
    """Whatever the history: following the column of a delta down ends at its base, and nothing else stands in it."""
    bases = {number + 1: choice or None for number, choice in enumerate(choices)}
    bases = {number: base if base is not None and base < number else None for number, base in bases.items()}
    rows = list(plan_rows([make_entry(number, bases[number]) for number in sorted(bases)[::-1]]))
    for at, row in enumerate(rows):
        if not row.continues:
            continue
        below = iter(rows[at + 1 :])
        ends = next(one for one in below if row.column in (one.column, *one.merges))
        assert ends.entry.stored.sequence == row.entry.base
        between = rows[at + 1 : rows.index(ends)]
        assert all(row.column in one.passes for one in between)
    assert sum(row.continues for row in rows) == sum(row.has_above + len(row.merges) for row in rows)


def test_a_hostile_number_of_deltas_is_drawn_in_few_columns() -> None:
    """A thousand deltas on one base do not make a picture a thousand columns wide."""
    lines = draw({1: None, **dict.fromkeys(range(2, 1000), 1)})
    assert max(map(len, lines)) < 40


# -- log ---------------------------------------------------------------------------------------------------------------


def test_log_draws_the_history(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Releases newest first, with bars, what a delta is made from, labels as pointers, and what services say."""
    store.move_label("stable", "2.0")
    with store.open_release("3.0") as release:
        store.service("api").begin(release).fail("no")
    with store.open_release("1.0") as release:
        store.service("api").begin(release).confirm()
    assert run("log", "models") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"  \*\s+3  3\.0 .*#+.*  full\s+refused by api$", lines[2])
    assert re.match(r"  \+\s+2  2\.0 .*  delta on 1\.0\s+<- stable$", lines[3])
    assert re.match(r"  \*\s+1  1\.0 .*  full\s+confirmed by api$", lines[4])
    assert run("log", "models", "--newest", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["version"] for one in document["releases"]] == ["3.0"]
    assert document["num_older"] == 2
    assert run("log", "models", "--newest", "2") == 0
    printed = capsys.readouterr().out
    assert "and 1 older" in printed
    assert "delta on 1.0, which is not here" in printed
    assert run("log", "models", "--newest", "0") == 2


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_tells_what_a_delta_changes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Added, modified and removed tensors with codec and bytes; without the base it says what it cannot know."""
    assert run("show", "2.0", "--store", "models") == 0
    printed = capsys.readouterr().out
    assert "1 added, 1 modified, 1 removed, 2 kept" in printed
    assert "\x1b" not in printed
    assert run("show", "2.0", "--store", "models", "--json") == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert {(one["name"], one["kind"], one["nbytes"]) for one in changes["tensors"]} == {
        ("new<b>&amp;", "added", 2),
        ("head", "modified", 40),
        ("gone", "removed", 3),
    }
    os.rename(store.find_release("1.0").path, "elsewhere")
    assert run("show", "2.0", "--store", "models") == 0
    printed = capsys.readouterr().out
    assert "the base is not here" in printed
    assert "2 replaced" in printed


def test_show_groups_tensors_or_lists_all(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers that are alike are one line of the tree; `--all` has every tensor with its digest."""
    assert run("show", "1.0", "--store", "models") == 0
    assert "'a.0..1.w' (2 alike)" in capsys.readouterr().out
    assert run("show", "1.0", "--store", "models", "--all") == 0
    printed = capsys.readouterr().out
    assert "'a.1.w'" in printed
    assert "alike" not in printed


names = st.lists(st.sampled_from(["0", "1", "2", "10", "a", "b", "", "\u0663", "w" * 40]), min_size=1, max_size=14)


@given(st.dictionaries(names.map(".".join), st.tuples(st.sampled_from(["float32", "int8"]), st.integers(0, 3))))
def test_a_tree_holds_every_tensor_once(drawn: dict[str, tuple[str, int]]) -> None:
    """Whatever the names: numbers and sizes below the root are those of all tensors."""
    tensors = {
        name: ReleasedTensor(file="f", dtype=dtype, shape=(size,), digest="") for name, (dtype, size) in drawn.items()
    }
    root = grow_tree(tensors)
    assert (root.num_tensors, root.nbytes) == (len(tensors), sum(one.nbytes for one in tensors.values()))
    assert count_leaves(root) == len(tensors)


def count_leaves(node: Node) -> int:
    return node.num_alike * ((node.tensor is not None) + sum(count_leaves(child) for child in node.children))


# -- pages -------------------------------------------------------------------------------------------------------------

ALLOWED = re.findall(
    r"\w+",
    "html head meta title style body main header footer section div span p h1 h2 ul li b i code svg path circle "
    "details summary table thead tbody tr th td",
)


class Page(HTMLParser):
    """Reads a page strictly: known elements, closed in order, nothing that could fetch or run."""

    VOID = ("meta", "path", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href", "srcset", "data", "action")
            assert "url(" not in (value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_are_written_and_need_nothing_else(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """`--html` writes one file with its own policy, no script, no address; hostile names are text in it (J12)."""
    assert run("log", "models", "--html", "log.html") == 0
    for version in ("1.0", "2.0"):
        assert run("show", version, "--store", "models", "--verify", "--html", f"{version}.html") == 0
    for name in ("log.html", "1.0.html", "2.0.html"):
        text = Path(name).read_text()
        page = Page(text)
        assert "default-src 'none'" in text
        assert "http:" not in text
        assert "https:" not in text
        assert "\x1b" not in page.text
        assert "prefers-color-scheme: dark" in text
    assert "new<b>&amp;" in Page(Path("2.0.html").read_text()).text
    assert run("log", "models", "--html", "missing/log.html") == 2
    capsys.readouterr()


HOSTILE = [
    "</style><script>alert(1)</script>",
    "' onmouseover='alert(1)",
    '"><img src=x onerror=alert(1)>',
    "\u202egpj.exe",
    "\x1b[2J",
    "${style}",
    "a" * 10_000,
    "&lt;b&gt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_gets_out_of_its_place(text: str, store: Store) -> None:
    """J12: whatever stands in a name, a path, a reason or a config stays text on the page."""
    one = ReleaseId(sequence=2, version="2.0", digest=f"sha256:{0:064x}")
    state = ServiceState(name="api", refused=(Refusal(release=one, reason=text, refused_at="now"),))
    entry = make_entry(2, None)
    entry = replace(entry, facts={**(entry.facts or {}), "name": text, "created": text})
    broken = replace(make_entry(1, None, is_broken=True), refusal=text)
    history = History(path=text, entries=[entry, broken], num_older=0, labels={}, services={"api": state})
    page = Page(make_log_page(history))
    assert show_text(text) in make_log_page(history)
    with open_release(store.find_release("1.0").path) as release:
        tensor = ReleasedTensor(file="model.safetensors", dtype="float32", shape=(1,), digest=text)
        manifest = replace(release.manifest, name=text, tensors={text: tensor, f"{text}.{text}": tensor})
        page = Page(make_show_page(replace(release, manifest=manifest), None, is_verified=False))
    assert "\u202e" not in page.text


def test_a_page_of_a_huge_release_is_cut(store: Store) -> None:
    """A release of many tensors with names that have nothing in common makes a page that a browser can open."""
    with open_release(store.find_release("1.0").path) as release:
        tensor = ReleasedTensor(file="model.safetensors", dtype="float32", shape=(1,), digest="")
        tensors: dict[str, Any] = {f"x{number}.y{number}.{kind}": tensor for number in range(5000) for kind in "ab"}
        text = make_show_page(
            replace(release, manifest=replace(release.manifest, tensors=tensors)), None, is_verified=True
        )
    Page(text)
    assert len(text) < 1_000_000
    assert "lines more" in text
