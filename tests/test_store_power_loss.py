"""A power cut leaves the old state or the new one, whatever was not flushed; and what was reported stays (D11)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hotglm import seam
from hotglm.errors import HotglmError, StoreWriteError
from hotglm.release.directory import open_release
from hotglm.release.packing import pack
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from support.kill_sweep import verify_store
from support.power_loss import Recorder, cuts, record
from support.releases import write_source
from support.sweeping import directory

__all__ = ["directory"]  # a fixture for every test here


def make_store(directory: Path) -> Store:
    """Return a store of 1.0 and 1.1, with a label on the first."""
    store = open_store(directory / "store", creates=True)
    for seed in range(2):
        store.publish(write_source(directory / str(seed), seed=seed), name="ranker", version=f"1.{seed}")
    store.move_label("stable", "1.0")
    write_source(directory / "2", seed=2, shards=True)
    return store


def find_lost(directory: Path, *, forgets_files: bool) -> list[str]:
    """Publish under a recorder, cut the power, and return what is wrong after any of the cuts."""
    store = make_store(directory)
    source = directory / "2"

    def publish() -> None:
        store.publish(source, name="ranker", version="2.0")

    recorder = record(Path(store.path), publish, forgets_files=forgets_files)
    wrong = []
    for path, is_over in cuts(recorder, directory):
        left = open_store(path)
        try:
            versions = verify_store(left)
            left.publish(source, name="ranker", version="3.0")
            left.move_label("stable", "3.0", expected="1.0")
        except HotglmError as error:
            wrong.append(error.code)
            continue
        expected = (["1.0", "1.1", "2.0"],) if is_over else (["1.0", "1.1"], ["1.0", "1.1", "2.0"])
        if versions not in expected:
            wrong.append(str(versions))
    return wrong


def test_a_power_cut_leaves_no_part_of_a_release(directory: Path) -> None:
    """S1, S9: after a cut anywhere every release that has its name is whole, and publishing goes on."""
    assert find_lost(directory, forgets_files=False) == []


def test_the_replay_finds_a_flush_that_is_missing(directory: Path) -> None:
    """A publisher whose files were not flushed leaves releases that are not whole, and that is seen (a planted bug)."""
    assert find_lost(directory, forgets_files=True)


def test_a_power_cut_leaves_a_label_where_it_was_or_is(directory: Path) -> None:
    """S3, S4: a label is never lost, and once its move was reported it stays moved."""
    store = make_store(directory)
    recorder = record(Path(store.path), lambda: store.move_label("stable", "1.1"))
    for path, is_over in cuts(recorder, directory):
        left = open_store(path)
        assert verify_store(left) == ["1.0", "1.1"]
        assert left.read_labels()["stable"].release.version in (("1.1",) if is_over else ("1.0", "1.1"))


def test_a_power_cut_leaves_a_service_with_what_it_confirmed(directory: Path) -> None:
    """S10, S11: what was confirmed stays; a trial that the power ended is refused, or was not begun yet."""
    store = make_store(directory)
    with store.open_release("1.0") as release, store.service("api").begin(release) as trial:
        trial.confirm()

    def change() -> None:
        with store.open_release("1.1") as release, store.service("api").begin(release) as trial:
            trial.confirm()

    recorder = record(Path(store.path), change)
    for path, is_over in cuts(recorder, directory):
        service = open_store(path).service("api")
        confirmed = service.start()
        assert confirmed is not None
        assert confirmed.version in (("1.1",) if is_over else ("1.0", "1.1"))
        assert service.read().trials == ()


def test_a_power_cut_leaves_no_part_of_what_is_packed(directory: Path) -> None:
    """R2: a directory that was packed to is a whole release or is not there."""
    source = write_source(directory / "source", shards=True)
    (directory / "packed").mkdir()
    change = lambda: pack(source, directory / "packed" / "r", name="r", version="1").close()  # noqa: E731 - one line
    recorder = record(directory / "packed", change)
    for path, is_over in cuts(recorder, directory):
        assert (path / "r").exists() or not is_over
        if (path / "r").exists():
            with open_release(path / "r") as release:
                release.verify()


def test_a_power_cut_leaves_no_part_of_what_is_collected(directory: Path) -> None:
    """S7, S9: while garbage is collected a release is there whole or not at all, and what is named stays."""
    store = make_store(directory)
    for seed in (3, 4):
        store.publish(write_source(directory / str(seed), seed=seed), name="ranker", version=f"1.{seed}")
    recorder = record(Path(store.path), lambda: store.collect_garbage(keep_newest=1))
    for path, is_over in cuts(recorder, directory):
        versions = verify_store(open_store(path))
        assert {"1.0", "1.4"} <= set(versions) <= ({"1.0", "1.4"} if is_over else {"1.0", "1.1", "1.3", "1.4"})


def test_a_power_cut_leaves_a_label_that_is_removed_whole_or_gone(directory: Path) -> None:
    """S3: a label that is removed is there as it was, or not at all; once that was reported it stays away."""
    store = make_store(directory)
    recorder = record(Path(store.path), lambda: store.remove_label("stable"))
    for path, is_over in cuts(recorder, directory):
        label = open_store(path).read_label("stable")
        assert label is None or (label.release.version == "1.0" and not is_over)


def test_a_power_cut_leaves_what_is_shared_whole(directory: Path) -> None:
    """S6: a release whose files were all linked to what was there is whole or not there; what it shares stays."""
    store = make_store(directory)
    recorder = record(Path(store.path), lambda: store.publish(directory / "0", name="ranker", version="2.0"))
    for path, is_over in cuts(recorder, directory):
        versions = verify_store(open_store(path))
        assert versions in ([["1.0", "1.1", "2.0"]] if is_over else [["1.0", "1.1"], ["1.0", "1.1", "2.0"]])


def test_a_power_cut_leaves_what_is_tried_refused_or_not_tried(directory: Path) -> None:
    """S10, S11: a trial that failed, and was reported so, stays refused; nothing unconfirmed is started on."""
    store = make_store(directory)
    with store.open_release("1.0") as release:
        store.service("api").begin(release).confirm()

    def change() -> None:
        with store.open_release("1.1") as release:
            store.service("api").begin(release).fail("a reason")

    recorder = record(Path(store.path), change)
    for path, is_over in cuts(recorder, directory):
        service = open_store(path).service("api")
        confirmed = service.start()
        assert confirmed is not None
        assert confirmed.version == "1.0"
        refused = [one.release.version for one in service.read().refused]
        assert refused in ([["1.1"]] if is_over else [[], ["1.1"]])


def test_a_power_cut_leaves_a_store_or_what_becomes_one(directory: Path) -> None:
    """S: a store that was reported made is one; one that was not can be made where its parts are."""
    recorder = record(directory, lambda: open_store(directory / "store", creates=True))
    for path, is_over in cuts(recorder, directory):
        assert (path / "store" / "hotglm-store.json").exists() or not is_over
        open_store(path / "store", creates=True)


class Interrupted(Recorder):
    """A recorder in which the first flush of one directory fails, as if the process had been killed in front of it."""

    def __init__(self, root: Path, *, fails: str) -> None:
        super().__init__(root)
        self.fails = str(root / fails)
        self.has_failed = False

    def fsync(self, fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == self.fails and not self.has_failed:
            self.has_failed = True
            raise OSError(errno.EIO, "planted")
        super().fsync(fd)


@pytest.mark.parametrize("kind", ["releases", "labels"])
def test_what_is_reported_at_the_second_try_survives_a_power_cut(kind: str, directory: Path) -> None:
    """S1, S3, D12: a release or label that stood there already, not flushed, is flushed before it is reported."""
    store = make_store(directory)

    def change() -> None:
        if kind == "releases":
            store.publish(directory / "2", name="ranker", version="2.0")
        else:
            store.move_label("stable", "1.1")

    recorder = Interrupted(Path(store.path), fails=kind)
    before, seam.active = seam.active, recorder
    try:
        with pytest.raises(StoreWriteError):
            change()
        change()
    finally:
        seam.active = before
    assert recorder.has_failed
    for path, is_over in cuts(recorder, directory):
        left = open_store(path)
        versions, label = verify_store(left), left.read_labels()["stable"]
        if is_over:
            assert versions[-1] == "2.0" if kind == "releases" else label.release.version == "1.1"
