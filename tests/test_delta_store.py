"""Deltas in a store: one version in one form, chains that end at anchors, and bases that no collection takes."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from hotglm.deltas.making import make_delta
from hotglm.deltas.materializing import materialize
from hotglm.deltas.publishing import DeltaPolicy, publish_delta
from hotglm.errors import (
    ArgumentError,
    DeltaChainError,
    DigestMismatchError,
    SourceChangedError,
    SourceError,
    StoreConflictError,
    StoreError,
)
from hotglm.progress import Progress
from hotglm.release import collecting
from hotglm.release.packing import pack
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import StoredRelease
from support.deltas import State, read_tree, write_state
from support.releases import versions

NUM = 300


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", creates=True)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Return eight versions of weights, each with a few elements changed since the one before."""
    rng, data = random.Random(1), bytearray(4 * NUM)
    found = []
    for number in range(8):
        data[rng.randrange(NUM) * 4 + 1] = number + 1
        state: State = {"w": ("F32", (NUM,), bytes(data)), "kept": ("I64", (9,), bytes(72)), "one": ("I8", (), b"x")}
        found.append(write_state(tmp_path / "sources" / str(number), state, note=str(number)))
    return found


def publish(store: Store, sources: list[Path], number: int, **options: object) -> StoredRelease:
    """Publish a version as a delta, however large that is in tests."""
    policy = DeltaPolicy(**{"max_ratio": 1, **options})  # type: ignore[arg-type]
    return publish_delta(store, sources[number], name="ranker", version=f"{number}.0", policy=policy)


def kinds(store: Store) -> str:
    """Return the kinds of all releases, oldest first, by their first letters."""
    found = []
    for one in store.find_releases():
        with store.open_release(one.sequence) as release:
            found.append(release.manifest.kind[0])
    return "".join(found)


def made_files(store: Store, target: str, path: Path) -> dict[str, bytes]:
    """Return the files of a release of a store, made in full, without its manifest."""
    with store.open_release(target) as release, materialize(release, path) as full:
        assert full.digest == release.result_digest
        full.verify()
    files = read_tree(path)
    files.pop("hotglm-manifest.json")
    return files


# -- publishing --------------------------------------------------------------------------------------------------------


def test_deltas_lead_to_what_was_published(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """R9: a chain in a store gives the very files of every source; the first release is full."""
    for number in range(5):
        stored = publish(store, sources, number)
        assert stored.sequence == number + 1
    assert kinds(store) == "fdddd"
    for number in range(5):
        assert made_files(store, f"{number}.0", tmp_path / str(number)) == read_tree(sources[number])
    store.move_label("stable", "4.0")
    with store.open_release("stable") as release:
        release.verify()


def test_a_chain_ends_at_an_anchor(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """After so many deltas a release is published in full, and the next ones build on that."""
    for number in range(8):
        publish(store, sources, number, max_chain=2)
    assert kinds(store) == "fddfddfd"
    assert made_files(store, "7.0", tmp_path / "made") == read_tree(sources[7])


def test_a_chain_of_64_is_folded_and_one_of_65_refused(
    store: Store, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C07: the longest chain gives the very files of its end; one delta more cannot be used, and is not published."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a hundred releases; what is flushed is tested elsewhere
    for number in range(65):
        policy = DeltaPolicy(max_ratio=1, max_chain=64)
        publish_delta(store, sources[number % 8], name="ranker", version=f"{number}.0", policy=policy)
    assert kinds(store) == "f" + 64 * "d"
    assert made_files(store, "64.0", tmp_path / "made") == read_tree(sources[0])
    with store.open_release("64.0") as release:
        make_delta(release, pack_anew(sources[3], tmp_path / "next"), store.join("releases", "next")).close()
    with pytest.raises(DeltaChainError) as refusal:
        materialize(store.join("releases", "next"), tmp_path / "too-long")
    assert refusal.value.code == "CHAIN_TOO_LONG"
    publish_delta(store, sources[1], name="ranker", version="65.0", policy=DeltaPolicy(max_ratio=1, max_chain=64))
    assert kinds(store)[-1] == "f"


def pack_anew(source: Path, path: Path) -> Path:
    """Make a full release of a source that stands in no store."""
    pack(source, path, name="ranker", version="99.0", sequence=99).close()
    return path


def test_a_version_in_which_nothing_changed_costs_next_to_nothing(
    store: Store, sources: list[Path], tmp_path: Path
) -> None:
    """A new number for the same tensors is a delta of headers alone."""
    publish(store, sources, 0)
    stored = publish_delta(store, sources[0], name="ranker", version="0.1", policy=DeltaPolicy(max_ratio=0.01))
    with store.open_release("0.1") as release:
        assert release.manifest.delta is not None
        assert not release.manifest.delta.tensors
        release.verify()
    assert made_files(store, "0.1", tmp_path / "made") == read_tree(sources[0])
    assert stored.sequence == 2


def test_a_delta_that_saves_too_little_is_published_in_full(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """Where most of the weights changed, a full release is as small and needs no base; nothing of the try is left."""
    publish(store, sources, 0)
    other = write_state(tmp_path / "other", {"w": ("F32", (NUM,), random.Random(8).randbytes(4 * NUM))})
    publish_delta(store, other, name="ranker", version="1.0")
    assert kinds(store) == "ff"
    assert os.listdir(store.join("tmp")) == []


def test_a_delta_may_be_against_any_release(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """A base is a label, a version or a number; one that is not there is refused."""
    store.publish(sources[0], name="ranker", version="0.0")
    store.publish(sources[1], name="ranker", version="1.0")
    store.move_label("stable", "0.0")
    for number, base in ((2, "stable"), (3, "1.0"), (4, 1)):
        publish(store, sources, number, base=base)
        assert made_files(store, f"{number}.0", tmp_path / str(number)) == read_tree(sources[number])
    with pytest.raises(StoreError):
        publish(store, sources, 5, base="nowhere")
    assert versions(store) == ["0.0", "1.0", "2.0", "3.0", "4.0"]


@pytest.mark.parametrize("options", [{"max_chain": 0}, {"max_chain": 65}, {"max_ratio": 0}, {"max_ratio": 1.1}])
def test_a_policy_that_cannot_be_meant_is_refused(options: dict[str, float]) -> None:
    """Limits out of their range are an argument error, before anything is read."""
    with pytest.raises(ArgumentError):
        DeltaPolicy(**options)  # type: ignore[arg-type]


def test_side_files_move_with_a_delta_and_are_shared(store: Store, sources: list[Path]) -> None:
    """S6: what stands beside weights is shipped whole, and shared with the release that has the same."""
    for source in sources:
        (source / "tokenizer").mkdir()
        (source / "tokenizer" / "vocab.json").write_text("{}")
    publish(store, sources, 0)
    publish(store, sources, 1)
    paths = [os.path.join(one.path, "tokenizer", "vocab.json") for one in store.find_releases()]
    assert len({os.stat(path).st_ino for path in paths}) == 1
    assert {os.stat(path).st_mode & 0o777 for path in paths} == {0o444}


def test_a_source_that_lies_about_its_digests_is_refused(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """What a file says of itself is compared before anything is published."""
    publish(store, sources, 0)
    release = tmp_path / "release"
    pack(sources[1], release, name="ranker", version="1.0").close()
    weights = release / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-80] + bytes([7] * 80))
    with pytest.raises(DigestMismatchError):
        publish(store, [sources[0], release], 1)
    assert versions(store) == ["0.0"]
    assert os.listdir(store.join("tmp")) == []


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_label_moves_only_to_a_delta_that_can_be_made(
    store: Store, sources: list[Path], tmp_path: Path, damage: str
) -> None:
    """S4: a label does not move to a delta whose base is lost or damaged, and moves when that is right again."""
    for number in range(3):
        publish(store, sources, number)
    told: list[Progress] = []
    store.move_label("stable", "1.0", progress=told.append)
    assert told[-1].done_nbytes == told[-1].total_nbytes
    assert [one.done_nbytes for one in told] == sorted(one.done_nbytes for one in told)
    base = Path(store.find_release("0.0").path)
    if damage == "lost":
        base.rename(tmp_path / "lost")
    else:
        weights = base / "model.safetensors"
        weights.chmod(0o644)
        good = weights.read_bytes()
        weights.write_bytes(good[:-300] + bytes([good[-300] ^ 1]) + good[-299:])
    with pytest.raises(SourceError) as refusal:
        store.move_label("stable", "2.0")
    assert refusal.value.code == {"lost": "CHAIN_BASE_MISSING", "flipped": "DIGEST_MISMATCH"}[damage]
    label = store.read_label("stable")
    assert label is not None
    assert label.release.version == "1.0"
    if damage == "lost":
        (tmp_path / "lost").rename(base)
        store.move_label("stable", "2.0")


def test_a_source_that_is_written_meanwhile_is_refused(store: Store, sources: list[Path]) -> None:
    """Weights that change while a delta of them is made are refused; nothing is published."""
    publish(store, sources, 0)
    weights = sources[1] / "model.safetensors"

    def write(_: Progress) -> None:
        weights.write_bytes(weights.read_bytes())

    with pytest.raises(SourceChangedError):
        publish_delta(store, sources[1], name="ranker", version="1.0", progress=write)
    assert versions(store) == ["0.0"]
    assert os.listdir(store.join("tmp")) == []


# -- one version, one form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["full", "delta"])
def test_a_version_is_there_in_one_form(store: Store, sources: list[Path], first: str) -> None:
    """S14, C14: full and delta of one version are one release; who comes second finds the first, with one result."""
    publish(store, sources, 0)
    ways: dict[str, Callable[[], StoredRelease]] = {
        "full": lambda: store.publish(sources[1], name="ranker", version="1.0"),
        "delta": lambda: publish(store, sources, 1, base="0.0"),
    }
    there = ways[first]()
    for way in ways.values():
        assert way() == there
    assert versions(store) == ["0.0", "1.0"]
    assert kinds(store) == f"f{first[0]}"
    for way in (
        lambda: store.publish(sources[2], name="ranker", version="1.0"),
        lambda: publish_delta(store, sources[2], name="ranker", version="1.0", policy=DeltaPolicy(max_ratio=1)),
    ):
        with pytest.raises(StoreConflictError, match="VERSION_REUSED"):
            way()


def test_both_forms_at_once_are_one_release(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """C14: full and delta of one version, published by two threads at once, end as one release, whole and right."""
    publish(store, sources, 0)
    for number in range(1, 8):
        barrier = threading.Barrier(2)
        found: list[StoredRelease] = []

        def run(make: Callable[[], StoredRelease], barrier: threading.Barrier = barrier) -> None:
            barrier.wait(30)
            found.append(make())  # noqa: B023 - joined before the next round

        makes = (
            lambda number=number: store.publish(sources[number], name="ranker", version=f"{number}.0"),
            lambda number=number: publish(store, sources, number, base="0.0"),
        )
        threads = [threading.Thread(target=run, args=(make,)) for make in makes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 2
        assert found[0] == found[1]
        assert made_files(store, f"{number}.0", tmp_path / f"made-{number}") == read_tree(sources[number])
    assert len(versions(store)) == 8


# -- collection --------------------------------------------------------------------------------------------------------


def test_collection_keeps_what_deltas_build_on(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """S15: the chains of all that stays stay, and nothing else does."""
    for number in range(8):
        publish(store, sources, number, max_chain=2)
    store.move_label("stable", "4.0")
    expected = store.collect_garbage(keep_newest=1, is_dry=True).removed
    collected = store.collect_garbage(keep_newest=1)
    assert collected.removed == expected
    assert [str(one.version) for one in collected.removed] == ["0.0", "1.0", "2.0", "5.0"]
    assert kinds(store) == "fdfd"
    for version in ("4.0", "7.0"):
        number = int(version[0])
        assert made_files(store, version, tmp_path / version) == read_tree(sources[number])


def test_a_collection_that_forgets_chains_is_found_out(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """The test above sees a planted bug: a collection that looks at names alone takes bases of what stays."""
    for number in range(4):
        publish(store, sources, number)
    with mock.patch.object(collecting, "find_needed", return_value=set()):
        store.collect_garbage(keep_newest=1)
    with pytest.raises(DeltaChainError) as refusal:
        made_files(store, "3.0", tmp_path / "made")
    assert refusal.value.code == "CHAIN_BASE_MISSING"


def test_a_delta_that_somebody_has_open_keeps_its_base(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """S8, S15: a delta that is in use is not taken, and neither is what it builds on."""
    for number in range(3):
        publish(store, sources, number)
    store.publish(sources[3], name="ranker", version="3.0")
    with store.open_release("1.0") as release:
        collected = store.collect_garbage(keep_newest=1)
        assert [str(one.version) for one in collected.removed] == ["2.0"]
        assert [str(one.version) for one in collected.in_use] == ["1.0"]
        materialize(release, tmp_path / "made").close()
    assert [str(one.version) for one in store.collect_garbage(keep_newest=1).removed] == ["0.0", "1.0"]


def test_what_cannot_be_read_may_need_anything_older(store: Store, sources: list[Path]) -> None:
    """S15: a release that stays and is damaged keeps everything older; nobody knows what it builds on."""
    for number in range(3):
        store.publish(sources[number], name="ranker", version=f"{number}.0")
    manifest = Path(store.find_release("2.0").path) / "hotglm-manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(b"{")
    assert store.collect_garbage(keep_newest=1).removed == ()


def test_a_base_stays_while_a_delta_of_it_is_made(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """S8: a collection in the middle of publishing takes neither the base nor what that builds on."""
    for number in range(3):
        publish(store, sources, number)
    store.publish(sources[3], name="ranker", version="3.0")
    removed: list[StoredRelease] = []

    def collect(_: object) -> None:
        removed.extend(store.collect_garbage(keep_newest=1).removed)

    policy = DeltaPolicy(base="2.0", max_ratio=1)
    publish_delta(store, sources[4], name="ranker", version="4.0", policy=policy, progress=collect)
    assert removed == []
    assert made_files(store, "4.0", tmp_path / "made") == read_tree(sources[4])


def test_a_base_that_was_lost_is_named(store: Store, sources: list[Path], tmp_path: Path) -> None:
    """C07: in a store a base is looked for under its name alone; a gap is named by version and number."""
    for number in range(3):
        publish(store, sources, number)
    os.rename(store.find_release("1.0").path, tmp_path / "lost")
    with pytest.raises(DeltaChainError, match=r"1\.0, number 2") as refusal:
        made_files(store, "2.0", tmp_path / "made")
    assert refusal.value.code == "CHAIN_BASE_MISSING"
    os.rename(tmp_path / "lost", store.join("releases", "000000002-1.0"))
    assert made_files(store, "2.0", tmp_path / "made") == read_tree(sources[2])
