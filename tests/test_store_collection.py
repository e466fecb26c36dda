"""Garbage collection of a store: nothing goes that is named, new or open; everything else does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hotglm.errors import ArgumentError
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.release.workspace import make_workspace
from hotglm.testing.seams import hooked
from support.releases import fill, versions, write_source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", creates=True)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a directory of sources `0` to `4`; side files are equal, weights differ."""
    for seed in range(5):
        write_source(tmp_path / "sources" / str(seed), seed=seed)
    return tmp_path / "sources"


def test_what_is_named_or_new_stays(store: Store, sources: Path) -> None:
    """S7: labels, their history, services and the newest releases keep what they name; the rest goes, content too."""
    fill(store, sources, 5)
    store.move_label("stable", "1.0.0")
    store.move_label("stable", "1.4.0")
    with store.open_release("1.1.0") as release:
        store.service("api").begin(release).confirm()
    collected = store.collect_garbage(keep_newest=1)
    assert [str(one.version) for one in collected.removed] == ["1.2.0", "1.3.0"]
    assert collected.num_objects == 2
    assert versions(store) == ["1.0.0", "1.1.0", "1.4.0"]
    for version in versions(store):
        with store.open_release(version) as release:
            release.verify()
    assert len(os.listdir(store.join("objects"))) == 5  # three weights, one config, one vocabulary
    again = store.collect_garbage(keep_newest=1)
    assert (again.removed, again.num_objects, again.debris) == ((), 0, ())


def test_numbers_are_not_given_twice(store: Store, sources: Path) -> None:
    """S2: a number that was collected is not given again, and the newest release is never collected."""
    fill(store, sources, 3)
    store.collect_garbage(keep_newest=1)
    assert versions(store) == ["1.2.0"]
    assert store.publish(sources / "4", name="ranker", version="2.0.0").sequence == 4
    with pytest.raises(ArgumentError):
        store.collect_garbage(keep_newest=0)


def test_what_somebody_has_open_is_not_collected(store: Store, sources: Path) -> None:
    """S8, D17: an open release stays whole until it is closed."""
    fill(store, sources, 3)
    with store.open_release("1.0.0") as release:
        collected = store.collect_garbage(keep_newest=1)
        assert [str(one.version) for one in collected.in_use] == ["1.0.0"]
        assert versions(store) == ["1.0.0", "1.2.0"]
        release.verify()
    assert [str(one.version) for one in store.collect_garbage(keep_newest=1).removed] == ["1.0.0"]


HOLD = """
import sys
from hotglm.release.store_opening import open_store
release = open_store(sys.argv[1]).open_release("1.0.0")
print("open", flush=True)
sys.stdin.read()
"""


def test_a_killed_reader_keeps_nothing(store: Store, sources: Path) -> None:
    """S8: a lease of another process holds while it lives, and ends with it however it ends."""
    fill(store, sources, 2)
    command = [sys.executable, "-c", HOLD, store.path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        assert store.collect_garbage(keep_newest=1).removed == ()
        reader.send_signal(signal.SIGKILL)
        reader.wait(30)
    assert [str(one.version) for one in store.collect_garbage(keep_newest=1).removed] == ["1.0.0"]


def test_debris_is_ignored_and_cleaned(store: Store, sources: Path) -> None:
    """S9, D16: what killed processes left is no release, and goes with the next publisher; what lives stays."""
    shutil.copytree(sources / "0", store.join("tmp", ".hotglm-0123.partial"))
    os.mkdir(store.join("releases", "junk"))
    os.mkdir(store.join("releases", ".hotglm-1.partial"))
    Path(store.join("labels", ".hotglm-2.partial")).write_text("x")
    Path(store.join("labels", "stable.json.swp")).write_text("x")
    with make_workspace(store.join("tmp")) as alive:
        store.publish(sources / "0", name="ranker", version="1.0.0")
        assert os.listdir(store.join("tmp")) == [os.path.basename(alive)]
        assert versions(store) == ["1.0.0"]
        assert store.collect_garbage().debris == (".hotglm-2.partial",)
        assert os.path.isdir(alive)
    assert os.listdir(store.join("tmp")) == []


def test_manifests_are_read_before_the_lock_is_taken(store: Store, sources: Path) -> None:
    """S5: whoever collects a large store keeps no publisher waiting while it reads what builds on what."""
    fill(store, sources, 5)
    opened: list[bool] = []
    is_locked: list[bool] = []

    def note(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "open" and str(args[0]).endswith(os.sep + "lock"):
            is_locked.append(True)
        if kind == "open" and str(args[0]).endswith("hotglm-manifest.json"):
            opened.append(bool(is_locked))

    with hooked(note):
        store.collect_garbage(keep_newest=4)
    assert opened == [False] * 4
