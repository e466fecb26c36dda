"""Stores: releases appear whole, labels move to what was verified, nothing that is needed is collected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hotglm
from hotglm.errors import (
    ArgumentError,
    DigestMismatchError,
    SourceError,
    StoreBusyError,
    StoreConflictError,
    StoreError,
)
from hotglm.release.locks import hold_exclusively
from hotglm.release.packing import ReleaseDetails, pack
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
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


def code_of(error: pytest.ExceptionInfo[hotglm.HotglmError]) -> str:
    return error.value.code


# -- publishing --------------------------------------------------------------------------------------------------------


def test_published_releases_are_numbered_and_whole(store: Store, sources: Path) -> None:
    """S1, S2: releases are numbered from 1 on, verify, and are found by version, number and label."""
    fill(store, sources, 3)
    assert [(one.sequence, str(one.version)) for one in store.find_releases()] == [
        (1, "1.0.0"),
        (2, "1.1.0"),
        (3, "1.2.0"),
    ]
    store.move_label("stable", "1.1.0")
    for target in ("1.1.0", "1.1", 2, "stable", hotglm.Version("1.1.0")):
        with store.open_release(target) as release:
            release.verify()
            assert release.manifest.sequence == 2
    assert os.listdir(store.join("tmp")) == []


@pytest.mark.parametrize("target", ["9.9.9", 4, "canary", "no such", "../1", ""])
def test_what_is_not_in_the_store_is_named(target: str | int, store: Store, sources: Path) -> None:
    """A label, version or number that the store does not have is a typed error."""
    fill(store, sources, 1)
    with pytest.raises(StoreError) as refusal:
        store.open_release(target)
    assert code_of(refusal) == "NOT_IN_STORE"


def test_the_same_again_changes_nothing(store: Store, sources: Path) -> None:
    """B11: publishing the same bytes under the same version is no error, and no second release."""
    first = store.publish(sources / "0", name="ranker", version="1.0.0")
    assert store.publish(sources / "0", name="ranker", version="1.0.0") == first
    assert versions(store) == ["1.0.0"]


def test_a_version_means_the_same_bytes_for_ever(store: Store, sources: Path) -> None:
    """B10, D18: other bytes, or another description, under a version that is taken are refused."""
    fill(store, sources, 1)
    for source, details in ((1, None), (0, ReleaseDetails(requires=("torch",)))):
        with pytest.raises(StoreConflictError) as refusal:
            store.publish(sources / str(source), name="ranker", version="1.0.0", details=details)
        assert code_of(refusal) == "VERSION_REUSED"
    with pytest.raises(StoreConflictError) as refusal:
        store.publish(sources / "1", name="other", version="2.0.0")
    assert code_of(refusal) == "NAME_MISMATCH"
    assert versions(store) == ["1.0.0"]
    assert os.listdir(store.join("tmp")) == []


def test_a_release_can_be_published_again_elsewhere(store: Store, sources: Path, tmp_path: Path) -> None:
    """A packed release keeps what it says when it enters a store, but for its number; a damaged one does not enter."""
    pack(sources / "0", tmp_path / "packed", name="ranker", version="1.0.0", sequence=77).close()
    store.publish(tmp_path / "packed")
    with store.open_release("1.0.0") as release, hotglm.open_release(tmp_path / "packed") as packed:
        assert release.manifest.sequence == 1
        assert release.manifest.files == packed.manifest.files
        assert release.manifest.created_at == packed.manifest.created_at
    vocabulary = tmp_path / "packed" / "tokenizer" / "vocab.json"
    vocabulary.write_text('{"a": 1}')
    with pytest.raises(DigestMismatchError):
        open_store(tmp_path / "second", creates=True).publish(tmp_path / "packed")


def test_equal_files_are_one_file(store: Store, sources: Path) -> None:
    """S6: files of equal content have one inode in all releases; weights that differ do not."""
    fill(store, sources, 3)
    paths = [Path(one.path) for one in store.find_releases()]
    assert len({(path / "tokenizer" / "vocab.json").stat().st_ino for path in paths}) == 1
    assert len({(path / "model.safetensors").stat().st_ino for path in paths}) == 3
    store.publish(sources / "0", name="ranker", version="2.0.0")  # the same weights under a new version
    again = Path(store.find_release("2.0.0").path) / "model.safetensors"
    assert again.stat().st_ino == (paths[0] / "model.safetensors").stat().st_ino
    assert again.stat().st_mode & 0o222 == 0


def test_linked_sources_are_not_shared(store: Store, sources: Path) -> None:
    """S6: a file that was linked in from outside never becomes what other releases share; a change of it is found."""
    store.publish(sources / "0", name="ranker", version="1.0.0", is_linked=True)
    weights = sources / "0" / "model.safetensors"
    assert (Path(store.find_release("1.0.0").path) / "model.safetensors").stat().st_ino == weights.stat().st_ino
    store.publish(sources / "0", name="ranker", version="1.1.0")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with store.open_release("1.1.0") as release:
        release.verify()
    with store.open_release("1.0.0") as release, pytest.raises(DigestMismatchError):
        release.verify()


def test_a_shared_file_that_was_cut_is_made_anew(store: Store, sources: Path) -> None:
    """A content whose size is wrong is not shared on; the release that has it is refused by name."""
    fill(store, sources, 1)
    path = Path(store.find_release("1.0.0").path) / "tokenizer" / "vocab.json"
    path.chmod(0o644)
    os.truncate(path, 1)
    store.publish(sources / "1", name="ranker", version="1.1.0")
    with store.open_release("1.1.0") as release:
        release.verify()
    with pytest.raises(SourceError) as refusal:
        store.open_release("1.0.0")
    assert code_of(refusal) == "SIZE_MISMATCH"


def test_two_publishers_of_one_version_are_told(store: Store, sources: Path) -> None:
    """D18: of many publishers of one version with different bytes exactly one wins, and the others are told."""
    barrier, outcomes = threading.Barrier(5), []

    def publish(seed: int) -> None:
        barrier.wait()
        try:
            store.publish(sources / str(seed), name="ranker", version="1.0.0")
            outcomes.append("won")
        except StoreConflictError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["VERSION_REUSED"] * 4 + ["won"]
    assert versions(store) == ["1.0.0"]


PUBLISH = """
import sys
from hotglm.release.store_opening import open_store
store = open_store(sys.argv[1], creates=True)
for number in range(4):
    store.publish(sys.argv[2], name="ranker", version=f"{sys.argv[3]}.{number}.0")
"""


def test_several_processes_share_a_store(tmp_path: Path, sources: Path) -> None:
    """S5: processes that publish at once all succeed; numbers have no gap and no twin."""
    command = [sys.executable, "-c", PUBLISH, str(tmp_path / "shared")]
    running = [subprocess.Popen([*command, str(sources / "0"), str(major)], cwd=ROOT) for major in (1, 2, 3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    releases = open_store(tmp_path / "shared").find_releases()
    assert [one.sequence for one in releases] == list(range(1, 13))
    assert len({str(one.version) for one in releases}) == 12


# -- labels ------------------------------------------------------------------------------------------------------------


def test_a_label_moves_and_remembers(store: Store, sources: Path) -> None:
    """A label leads where it was moved last, and knows where it led before; moving it there again changes nothing."""
    fill(store, sources, 2)
    assert store.move_label("stable", "1.0.0", expected=None).revision == 1
    assert store.move_label("stable", "1.0.0").revision == 1
    label = store.move_label("stable", "1.1.0", expected="1.0.0")
    assert [move.release.version for move in label.moves] == ["1.1.0", "1.0.0"]
    assert store.move_label("canary", "stable").release == label.release
    assert store.read_labels() == {"stable": label, "canary": store.read_label("canary")}
    store.remove_label("stable", expected="1.1.0")
    store.remove_label("stable")
    assert set(store.read_labels()) == {"canary"}


@pytest.mark.parametrize("expected", [None, "1.1.0", "7.0"])
def test_a_label_that_stands_elsewhere_is_not_moved(expected: str | None, store: Store, sources: Path) -> None:
    """S4: compare-and-set; who expects something else is told, and the label stays."""
    fill(store, sources, 2)
    before = store.move_label("stable", "1.0.0")
    with pytest.raises(StoreConflictError) as refusal:
        store.move_label("stable", "1.1.0", expected=expected)
    assert code_of(refusal) == "LABEL_MOVED"
    if expected is not None:
        with pytest.raises(StoreConflictError):
            store.remove_label("stable", expected=expected)
    assert store.read_labels() == {"stable": before}


def test_of_two_who_move_a_label_one_wins(store: Store, sources: Path) -> None:
    """S4: of many that expect the same and move it elsewhere, exactly one does."""
    fill(store, sources, 5)
    store.move_label("stable", "1.0.0")
    barrier, outcomes = threading.Barrier(4), []

    def move(number: int) -> None:
        barrier.wait()
        try:
            store.move_label("stable", f"1.{number}.0", expected="1.0.0")
            outcomes.append("won")
        except StoreConflictError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=move, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["LABEL_MOVED"] * 3 + ["won"]
    assert store.read_labels()["stable"].revision == 2


def test_a_label_never_leads_to_a_broken_release(store: Store, sources: Path) -> None:
    """S4: one other byte, and the label stays where it is."""
    fill(store, sources, 2)
    before = store.move_label("stable", "1.0.0")
    path = Path(store.find_release("1.1.0").path) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DigestMismatchError):
        store.move_label("stable", "1.1.0")
    (Path(store.find_release("1.1.0").path) / "hotglm-manifest.json").unlink()
    with pytest.raises(SourceError) as refusal:
        store.move_label("stable", "1.1.0")
    assert code_of(refusal) == "INCOMPLETE"
    assert store.read_labels() == {"stable": before}


@pytest.mark.parametrize("name", ["", "Stable", "1.0", "v1", "a/b", "../x", ".x", "a b", "x" * 65, None, "rc1\n"])
def test_a_label_is_a_plain_word(name: str, store: Store, sources: Path) -> None:
    """S4: no path, no version, nothing that two file systems read differently."""
    fill(store, sources, 1)
    with pytest.raises(ArgumentError):
        store.move_label(name, "1.0.0")
    with pytest.raises(ArgumentError):
        store.service(name)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "hotglm.ledger/2", "record": {}}', "\x00" * 50, "[" * 9999]
)
def test_a_damaged_label_is_refused_and_nothing_is_collected(text: str, store: Store, sources: Path) -> None:
    """B28: what is not what the store wrote is never taken for "no label"; collection removes nothing then."""
    fill(store, sources, 5)
    store.move_label("stable", "1.0.0")
    Path(store.join("labels", "stable.json")).write_text(text)
    for ask in (store.read_labels, store.collect_garbage, lambda: store.open_release("stable")):
        with pytest.raises(StoreError) as refusal:
            ask()
        assert "stable.json" in str(refusal.value)
    assert len(versions(store)) == 5


# -- locks and opening -------------------------------------------------------------------------------------------------


def test_a_lock_that_is_held_is_named(store: Store, sources: Path) -> None:
    """S5: who waits too long for another process gets a typed error, and the store is as it was."""
    fill(store, sources, 1)
    hurried = open_store(store.path, lock_timeout_s=0.02)
    with hold_exclusively(store.join("lock"), timeout_s=1):
        for change in (
            lambda: hurried.publish(sources / "1", name="ranker", version="1.1.0"),
            lambda: hurried.move_label("stable", "1.0.0"),
            hurried.collect_garbage,
            hurried.service("api").start,
        ):
            with pytest.raises(StoreBusyError) as refusal:
                change()
            assert code_of(refusal) == "STORE_BUSY"
    assert versions(store) == ["1.0.0"]
    assert store.read_labels() == {}
    assert os.listdir(store.join("tmp")) == []


def test_only_a_store_is_opened(tmp_path: Path) -> None:
    """A directory of other things, a file and nothing are no stores; a half-made one is finished."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "half" / "labels").mkdir(parents=True)
    for path, creates in (("full", False), ("full", True), ("missing", False), ("half", False)):
        with pytest.raises(StoreError) as refusal:
            open_store(tmp_path / path, creates=creates)
        assert code_of(refusal) == "NOT_A_STORE"
    with pytest.raises(hotglm.HotglmError):
        open_store(tmp_path / "file", creates=True)
    with pytest.raises(ArgumentError):
        open_store(3)  # type: ignore[arg-type]  # what is tested
    assert open_store(tmp_path / "half", creates=True).find_releases() == []
    (tmp_path / "half" / "hotglm-store.json").write_text('{"format": "hotglm.store/2"}')
    with pytest.raises(StoreError):
        open_store(tmp_path / "half")
    assert not (tmp_path / "missing").exists()


def test_a_label_that_moves_while_it_is_followed_is_found(store: Store, sources: Path) -> None:
    """S4: whoever follows a label finds where it leads, though it moves to what was published just now."""
    fill(store, sources, 2)
    store.move_label("stable", "1.0.0")
    moved: list[str] = []

    def move(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "listdir" and str(args[0]).endswith("releases") and not moved:
            moved.append("now")
            store.publish(sources / "3", name="ranker", version="2.0.0")
            store.move_label("stable", "2.0.0")
            shutil.rmtree(store.find_release("1.0.0").path)  # as if it was collected

    def late(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "open" and str(args[0]).endswith("stable.json") and not moved:
            moved.append("now")
            store.publish(sources / "4", name="ranker", version="3.0.0")
            store.move_label("stable", "3.0.0")

    for hook, expected in ((move, "2.0.0"), (late, "3.0.0")):
        moved.clear()
        with hooked(hook), store.open_release("stable") as release:
            assert str(release.manifest.version) == expected
        assert moved
