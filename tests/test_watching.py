"""Watching: FAULTS group E row by row, on a clock that only moves when the test moves it."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import hotglm
from hotglm.errors import ArgumentError
from hotglm.events import CommittedEvent, DelayedEvent, QuarantinedEvent, RefusedEvent
from hotglm.release.store_reading import release_name
from hotglm.testing.seams import fail_with, hooked
from hotglm.watching.status import WatchState
from support.watched import Watched, break_release, make_slot, pack_shelf, remove_tree, write_weights

MANIFEST = "hotglm-manifest.json"


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    path = tmp_path / "shelf"
    path.mkdir()
    return path


# -- what is followed --------------------------------------------------------------------------------------------------


def test_a_label_is_followed_forwards_and_backwards(watched: Watched) -> None:
    """A move of the label is followed at the next look, backwards too; what is held is not read again."""
    for number in (1, 2, 3):
        watched.publish(number)
    watched.settle()
    assert watched.serves(3)
    watched.store.move_label("stable", "1.0.1")
    watched.wait(1.5)
    assert watched.serves(1)
    reads = []
    with hooked(lambda kind, _, args: reads.append(kind) if kind == "preadv" else None):
        watched.store.move_label("stable", "1.0.3")
        num_verified = len(reads)
        watched.wait(1.5)
        assert watched.serves(3)
        assert len(reads) == num_verified
    assert watched.state is WatchState.FOLLOWING
    assert watched.status.applied == watched.status.target == "1.0.3"


def test_a_constraint_leads_to_the_highest_version_that_it_admits(tmp_path: Path) -> None:
    """The highest version wins, not the latest number; pre-releases only when they are asked for."""
    for follow, prereleases, number in (
        (">=1.0,<2", False, 5),
        (">=1.0,<1.5", False, 4),
        (">=1.0,<2", True, 6),
        ("==1.9rc1", False, 6),
    ):
        directory = tmp_path / f"{follow}{prereleases}".replace("/", "")
        directory.mkdir()
        watched = Watched(directory, follow=follow, prereleases=prereleases)
        for one, version in ((5, "1.5.0"), (4, "1.4.0"), (6, "1.9rc1"), (7, "2.0.0"), (3, "1.0.5")):
            watched.publish(one, version, label=None)
        watched.settle()
        assert watched.serves(number), follow


def test_equal_digest_is_nothing_to_do(watched: Watched) -> None:
    """A label that moves to what is live, or is looked at again and again, stages nothing (E04)."""
    watched.publish(1)
    watched.store.move_label("canary", "1.0.1")
    watched.settle()
    for _ in range(50):
        watched.step()
    assert watched.status.counts.loads == 1
    assert len(watched.of(CommittedEvent)) == 1


def test_a_hand_outranks_the_watcher_until_the_target_moves(watched: Watched) -> None:
    """What the host does to the slot by hand is not undone by the next look; the next move of the label is followed."""
    watched.publish(1)
    watched.settle()
    watched.slot.rollback()
    watched.wait(5)
    assert watched.serves(0)
    watched.publish(2)
    watched.wait(1.5)
    assert watched.serves(2)


@pytest.mark.parametrize("follow", ["", "Stable!", ">>1", "no such label", None, 7])
def test_what_cannot_be_followed_is_refused(tmp_path: Path, follow: object) -> None:
    """Neither label nor constraint: typed, when the watcher is made."""
    with pytest.raises(ArgumentError, match="label or a constraint"):
        Watched(tmp_path, follow=follow)  # type: ignore[arg-type]  # that is what is tested


# -- a directory of releases -------------------------------------------------------------------------------------------


def test_a_plain_directory_is_followed_by_versions_and_by_links(tmp_path: Path, shelf: Path) -> None:
    """Without a store, directories that are called by their versions are followed, or a link that somebody turns."""
    for number in (1, 2):
        pack_shelf(shelf, number, version=f"1.0.{number}")
    (shelf / "stable").symlink_to("1.0.1")
    by_version = Watched(tmp_path, place=shelf, follow=">=1")
    by_link = Watched(tmp_path, place=shelf)
    by_version.settle()
    by_link.settle()
    assert by_version.serves(2)
    assert by_link.serves(1)
    (shelf / ".next").symlink_to("1.0.2")
    (shelf / ".next").replace(shelf / "stable")
    by_link.settle()
    assert by_link.serves(2)


def test_names_are_taken_by_rule_only(tmp_path: Path, shelf: Path) -> None:
    """E09: editors' files, dotfiles, partial copies, leading zeros and other spellings of a version are passed over."""
    pack_shelf(shelf, 1, version="1.0.1")
    whole = pack_shelf(shelf, 2, version="1.0.2", name="other")
    names = [".1.0.9", "1.0.9~", "1.0.9.partial", "1.0.9.swp", "01.0.9", "1.0.09", "v1.0.9", "latest", "1.0.9 ", "9"]
    for name in names:
        shutil.copytree(whole, shelf / name)
    (shelf / "1.0.9").write_text("a file")
    watched = Watched(tmp_path, place=shelf, follow=">=1,<9")
    watched.settle()
    assert watched.serves(1)
    assert watched.status.counts.loads == 1


def test_a_directory_called_by_another_version_is_refused(tmp_path: Path, shelf: Path) -> None:
    """A release that is not what its directory's name says is named, once, and the next lower one is taken."""
    pack_shelf(shelf, 2, version="1.0.2", name="1.0.9")
    pack_shelf(shelf, 1, version="1.0.1")
    watched = Watched(tmp_path, place=shelf, follow=">=1")
    watched.settle()
    assert watched.serves(1)
    assert [event.code for event in watched.of(QuarantinedEvent)] == ["VERSION_MISMATCH"]


@pytest.mark.parametrize("order", ["manifest last", "manifest first", "trickling"])
def test_a_half_copied_release_waits_until_it_is_whole(
    tmp_path: Path, shelf: Path, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    """E01: whatever the order of the files, a copy is not loaded before it is whole, and then once."""
    whole = pack_shelf(tmp_path / "away", 1, version="1.0.1")
    is_last = order == "manifest last"
    names = sorted(os.listdir(whole), key=lambda name: (name == MANIFEST) == is_last)
    watched = Watched(tmp_path, place=shelf, follow=">=1", retry_s=0.5, max_retry_s=2.0)
    target = shelf / "1.0.1"
    target.mkdir()
    for name in names:
        content = (whole / name).read_bytes()
        pieces = range(0, len(content) + 1, 97) if order == "trickling" else (0, len(content) // 2)
        for end in pieces:
            (target / name).write_bytes(content[:end])
            watched.wait(0.7)
            assert watched.serves(0)
        (target / name).write_bytes(content)
    watched.wait(5)
    assert watched.serves(1)
    assert watched.status.counts.commits == 1
    assert watched.status.refused == ()
    assert len(caplog.records) <= 5


# -- events ------------------------------------------------------------------------------------------------------------


def test_hints_say_nothing_but_look(watched: Watched) -> None:
    """E04: hints that come twice, late, reordered or for nothing make one attempt for each digest."""
    rng = random.Random(4)
    for number in (1, 2, 3):
        watched.publish(number)
        for _ in range(rng.randrange(1, 20)):
            watched.watcher._hint()
            watched.step()
    assert watched.serves(3)
    assert watched.status.counts.loads == 3


def test_polling_alone_finds_what_is_new(watched: Watched) -> None:
    """E03: without any event the next look, one interval later, finds it."""
    watched.settle()
    assert watched.state is WatchState.WAITING
    watched.publish(1)
    watched.wait(1.0)
    watched.step()
    assert watched.serves(1)


# -- storms ------------------------------------------------------------------------------------------------------------


def make_names(releases: Path, num: int, *, start: int = 1) -> None:
    """Make releases that are nothing but names: whoever opens one but the highest has lost time."""
    for number in range(start, start + num):
        (releases / release_name(number, f"1.0.{number}")).mkdir()


@pytest.mark.parametrize("num", [1500, pytest.param(12_000, marks=pytest.mark.slow)])
def test_a_burst_of_releases_ends_at_the_newest_within_one_interval(tmp_path: Path, num: int) -> None:
    """E02, E05: of thousands of releases the newest goes live at the next look, and only its manifest is opened."""
    watched = Watched(tmp_path, follow=">=1,<2")
    watched.publish(1, label=None)
    watched.settle()
    make_names(Path(watched.store.path, "releases"), num, start=2)
    watched.publish(num + 2, label=None)
    opened: list[str] = []
    with hooked(lambda kind, _, args: opened.append(args[0]) if kind == "open" else None):
        watched.wait(1.0)
        watched.step()
    assert watched.serves(num + 2)
    manifests = {os.path.dirname(path) for path in opened if path.endswith(MANIFEST)}
    newest = str(watched.find_path(f"1.0.{num + 2}"))
    assert manifests <= {newest, str(watched.find_path("1.0.1"))}
    assert (watched.status.counts.skipped, watched.status.counts.commits) == (num, 2)


def test_a_rename_storm_ends_at_its_last_version(watched: Watched) -> None:
    """E05: a label that moves ten times between two looks is followed to where it stands, and the rest is counted."""
    watched.publish(1)
    watched.settle()
    for number in range(2, 12):
        watched.publish(number)
    watched.wait(1.5)
    assert watched.serves(11)
    assert watched.status.counts.skipped == 9
    assert watched.status.counts.loads == 2


def test_a_newer_release_supersedes_a_load_in_flight(watched: Watched) -> None:
    """What is being loaded gives way to what is newer at the next look; nothing of it goes live, nobody is to blame."""
    watched.publish(1)
    watched.publish(2, label=None)
    is_moved: list[bool] = []

    def move(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "preadv" and not is_moved and watched.state is WatchState.LOADING:
            is_moved.append(True)
            watched.store.move_label("stable", "1.0.2")
            watched.clock.at_s += 2

    with hooked(move):
        watched.settle()
    assert watched.serves(2)
    assert watched.status.counts.superseded == 1
    assert [event.version for event in watched.of(CommittedEvent)] == ["1.0.2"]
    assert watched.of(RefusedEvent) == watched.of(QuarantinedEvent) == []


def test_publishers_who_never_pause_cannot_keep_everything_from_going_live(watched: Watched) -> None:
    """Where each load meets a newer release, the fourth is finished all the same."""
    numbers = iter(range(2, 50))
    watched.publish(1)

    def move(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "reach" and args[0] == "stage.load" and watched.state is WatchState.LOADING:
            with hooked(lambda *_: None):
                watched.publish(next(numbers))
            watched.clock.at_s += 2

    with hooked(move):
        for _ in range(8):
            watched.step()
            if watched.of(CommittedEvent):
                break
    assert [event.version for event in watched.of(CommittedEvent)] == ["1.0.4"]


# -- directories that come and go --------------------------------------------------------------------------------------


def test_a_store_that_vanishes_and_returns(watched: Watched) -> None:
    """E06: deleted: a clear error, once, and the live version serves; made again: the next look follows it."""
    watched.publish(1)
    watched.settle()
    away = Path(watched.store.path).rename(watched.directory / "away")
    watched.wait(10)
    assert (watched.state, watched.serves(1)) == (WatchState.WAITING, True)
    Path(watched.store.path).mkdir()  # as an empty mount point
    watched.wait(10)
    assert watched.serves(1)
    Path(watched.store.path).rmdir()
    Path(watched.store.path).symlink_to(away)
    watched.publish(2)
    watched.wait(1.5)
    assert watched.serves(2)
    Path(watched.store.path).unlink()
    made = hotglm.open_store(watched.store.path, creates=True)
    made.publish(write_weights(watched.directory / "anew", 7, version="1.0.1"))
    made.move_label("stable", "1.0.1")
    watched.wait(1.5)
    assert watched.serves(7)


def test_a_path_where_nothing_is_yet_is_waited_for(tmp_path: Path) -> None:
    """E06: a place that is mounted later is followed from then on; what it is is found out at each look."""
    place = tmp_path / "mounted"
    watched = Watched(tmp_path, place=place, follow=">=1")
    watched.wait(3)
    assert (watched.state, watched.status.code) == (WatchState.WAITING, "NOT_FOUND")
    place.symlink_to(watched.store.path)
    watched.publish(4, label=None)
    watched.wait(1.5)
    assert watched.serves(4)


@pytest.mark.parametrize("is_stored", [True, False])
def test_the_last_version_is_removed(tmp_path: Path, shelf: Path, is_stored: bool) -> None:
    """E10: what is live stays live when its release, or all of them, are removed; the next higher one is followed."""
    watched = Watched(tmp_path, place=None if is_stored else shelf, follow=">=1")
    for number in (1, 2):
        if is_stored:
            watched.publish(number, label=None)
        else:
            pack_shelf(shelf, number, version=f"1.0.{number}")
    watched.settle()
    assert watched.serves(2)
    where = Path(watched.store.path, "releases") if is_stored else shelf
    for version in ("1.0.2", "1.0.1"):
        remove_tree(next(path for path in where.iterdir() if path.name.endswith(version)))
        watched.wait(3)
        assert watched.serves(2)
    if is_stored:
        watched.publish(3, label=None)
    else:
        pack_shelf(shelf, 3, version="1.0.3")
    watched.wait(1.5)
    assert watched.serves(3)


def test_a_label_that_leads_nowhere_is_said_and_waited_for(watched: Watched) -> None:
    """E10: the labelled release is removed by hand: an error by name; the live version serves."""
    watched.publish(1)
    watched.settle()
    watched.publish(2)
    remove_tree(watched.find_path("1.0.2"))
    watched.wait(3)
    assert (watched.status.code, watched.serves(1)) == ("NOT_IN_STORE", True)
    watched.store.move_label("stable", "1.0.1")
    watched.wait(1.5)
    assert (watched.status.code, watched.state) == ("", WatchState.FOLLOWING)


# -- times and inodes --------------------------------------------------------------------------------------------------


def test_the_digest_decides_not_the_times(tmp_path: Path, shelf: Path) -> None:
    """E11: times in the future, equal or going back, and equal sizes, say nothing; other bytes of the manifest do."""
    path = pack_shelf(shelf, 1, version="1.0.1", name="stable")
    watched = Watched(tmp_path, place=shelf)
    watched.settle()
    for at_s in (4_000_000_000, 0, 4_000_000_000):
        for file in (path / MANIFEST, path):
            os.utime(file, (at_s, at_s))
        watched.wait(2)
    assert watched.status.counts.loads == 1
    times = (path / MANIFEST).stat()
    other = pack_shelf(shelf, 2, version="1.0.2", name=".other")
    for file in other.iterdir():
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    path.rename(shelf / ".old")
    other.rename(path)
    watched.wait(1.5)
    assert watched.serves(2)


# -- bad releases ------------------------------------------------------------------------------------------------------


def test_a_bad_release_is_refused_once_and_said_once(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """E07: a bad release that is met at a thousand looks is staged once, and told once: log, event, status."""
    watched.publish(1)
    watched.settle()
    watched.publish(2, bad=True)
    with caplog.at_level(logging.INFO, logger="hotglm.watch"):
        watched.wait(1000)
    assert watched.serves(1)
    assert (watched.state, watched.status.counts.loads, watched.status.counts.refused) == (WatchState.REFUSED, 2, 1)
    assert [event.code for event in watched.of(QuarantinedEvent)] == ["NONFINITE"]
    assert [refused.version for refused in watched.status.refused] == ["1.0.2"]
    assert len(caplog.records) == 1
    watched.publish(3)
    watched.wait(1.5)
    assert watched.serves(3)


def test_with_a_constraint_the_next_lower_release_wins(tmp_path: Path) -> None:
    """A refused release is stepped over: the highest one that is eligible goes live."""
    watched = Watched(tmp_path, follow=">=1")
    for number in (1, 2, 3):
        watched.publish(number, label=None, bad=number == 3)
    watched.settle()
    assert watched.serves(2)
    assert watched.status.reasons == ("1.0.3 was refused",)


@pytest.mark.parametrize("how", ["weights", "all"])
def test_a_bad_release_that_is_fixed_in_place_is_tried_again(tmp_path: Path, shelf: Path, how: str) -> None:
    """E08: other bytes under the same name, with or without another manifest, are another release."""
    path = pack_shelf(shelf, 1, version="1.0.1")
    good = break_release(path)
    watched = Watched(tmp_path, place=shelf, follow=">=1")
    watched.wait(20)
    assert (watched.serves(0), watched.status.counts.loads) == (True, 1)
    if how == "weights":
        next(path.glob("*.safetensors")).write_bytes(good)
    else:
        remove_tree(path)
        pack_shelf(shelf, 1, version="1.0.1")
    watched.wait(1.5)
    assert watched.serves(1)


def test_reasons_outlive_the_process_in_files(tmp_path: Path, shelf: Path) -> None:
    """A reason file keeps the next process from trying the same bytes; who removes it lets them be tried again."""
    path, reasons = pack_shelf(shelf, 1, version="1.0.1"), tmp_path / "reasons"
    break_release(path)
    Watched(tmp_path, place=shelf, follow=">=1", quarantine=reasons).wait(5)
    again = Watched(tmp_path, place=shelf, follow=">=1", quarantine=reasons)
    again.wait(5)
    assert again.status.counts.loads == 0
    (file,) = reasons.iterdir()
    assert "DIGEST_MISMATCH" in file.read_text()
    assert [refused.is_on_disk for refused in again.status.refused] == [True]
    assert not [name for name in os.listdir(path) if "refused" in name]
    file.unlink()
    again.wait(1.5)
    assert again.status.counts.loads == 1


def test_what_this_process_cannot_take_is_refused_by_it_alone(tmp_path: Path) -> None:
    """A step of versions that the slot does not take is not the release's fault: nothing on disk says so."""
    watched = Watched(tmp_path, service="api", trial_s=0.0)
    watched.publish(1, "2.0.0")
    watched.wait(30)
    assert (watched.status.counts.loads, watched.serves(0)) == (1, True)
    assert watched.store.service("api").read().refused == ()
    next_one = Watched(tmp_path, service="api", trial_s=0.0, slot=make_slot(accept="major"))
    next_one.settle()
    assert next_one.serves(1)


# -- failures that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_an_error_of_reading_is_tried_again_later(watched: Watched, number: int) -> None:
    """D07, D14, D15, D19: the same release is tried again, later and later, and goes live when reading works."""
    watched.publish(1)
    times: list[float] = []

    def fail(kind: str, _: int, args: tuple[object, ...]) -> object:
        if kind == "preadv":
            times.append(watched.clock.at_s)
            raise OSError(number, os.strerror(number))
        return None

    with hooked(fail):
        watched.wait(600)
    assert watched.state is WatchState.RETRYING
    starts = sorted(set(times))
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert 7 <= len(starts) <= 14
    assert all(0.5 <= pause <= 302 for pause in pauses)
    assert pauses[-1] > 100
    watched.watcher.scan_now()
    watched.settle()
    assert watched.serves(1)
    assert watched.status.refused == ()


def test_a_look_that_fails_is_made_again(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """D19, E06: the place cannot be read for a hundred looks: told once, and followed as soon as it can be."""
    watched.publish(1)
    with caplog.at_level(logging.INFO, logger="hotglm.watch"):
        with hooked(
            lambda kind, _, args: fail_with(kind, lambda: OSError(errno.EIO, "EIO"))(args) if kind == "open" else None
        ):
            watched.wait(100)
        assert len(caplog.records) == 1
    assert (watched.state, watched.serves(0)) == (WatchState.WAITING, True)
    watched.settle()
    assert watched.serves(1)


def test_memory_that_is_short_is_tried_again(watched: Watched) -> None:
    """D20: no memory for the spare: not the release's fault."""
    watched.publish(1)
    hook = fail_with("map_anonymous", lambda: OSError(errno.ENOMEM, "ENOMEM"))
    with hooked(lambda kind, _, args: hook(args) if kind == "map_anonymous" else None):
        watched.settle()
    assert (watched.state, watched.status.code) == (WatchState.RETRYING, "MEMORY")
    watched.wait(2)
    assert watched.serves(1)


@pytest.mark.parametrize("is_before", [True, False])
def test_what_waits_for_its_next_try_is_stepped_over(tmp_path: Path, is_before: bool) -> None:
    """A release whose file is missing keeps no lower one from going live, and wins as soon as its file is back."""
    watched = Watched(tmp_path, follow=">=1", max_retry_s=8.0)
    watched.publish(1, label=None)
    watched.settle()
    if is_before:
        watched.publish(2, label=None)
    watched.publish(3, label=None)
    path = take_weights(watched, "1.0.3")
    watched.wait(20)
    assert watched.serves(2 if is_before else 1)
    if not is_before:
        watched.publish(2, label=None)
        watched.wait(20)
    assert (watched.serves(2), watched.status.applied, watched.status.target) == (True, "1.0.2", "1.0.3")
    assert (watched.state, watched.status.code) == (WatchState.RETRYING, "MISSING_FILE")
    assert watched.status.next_try_s is not None
    shutil.copy(tmp_path / "away.safetensors", path)
    watched.wait(9)
    assert watched.serves(3)
    assert watched.status.next_try_s is None, watched.status
    assert [event.version for event in watched.of(CommittedEvent)] == ["1.0.1", "1.0.2", "1.0.3"]
    assert watched.status.refused == ()


def test_each_that_waits_has_its_own_pauses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three that wait are each tried ever more seldom, and told once each; of what is older than live none is tried."""
    watched = Watched(tmp_path, follow=">=1", retry_s=4.0, max_retry_s=512.0)
    watched.publish(5, "1.0.5", label=None)
    watched.settle()
    for number in (4, 6, 7, 8):
        watched.publish(number, label=None)
    for number in (6, 7, 8):
        take_weights(watched, f"1.0.{number}")
    with caplog.at_level(logging.INFO, logger="hotglm.watch"):
        watched.wait(2000)
    assert (watched.serves(5), watched.status.target) == (True, "1.0.8")
    tries = Counter(event.version for event in watched.of(RefusedEvent))
    assert set(tries) <= {"1.0.6", "1.0.7", "1.0.8"}
    assert watched.status.counts.retries <= 36
    assert watched.status.counts.retries >= 24
    assert len(caplog.records) <= 6


def test_a_label_steps_over_nothing(watched: Watched) -> None:
    """Where a label leads to what waits, what is live stays."""
    watched.publish(1)
    watched.settle()
    watched.publish(2, label=None)
    watched.publish(3)
    take_weights(watched, "1.0.3")
    watched.wait(100)
    assert (watched.serves(1), watched.state, watched.status.target) == (True, WatchState.RETRYING, "1.0.3")


def test_nothing_older_than_what_is_live_is_stepped_to(tmp_path: Path) -> None:
    """What the host itself made live counts as well: while a newer one waits, the process is not taken back."""
    watched = Watched(tmp_path, follow=">=0.1")
    for number, version in ((1, "0.9.0"), (2, "1.1.0")):
        watched.publish(number, version, label=None)
    take_weights(watched, "1.1.0")
    watched.wait(100)
    assert (watched.serves(0), watched.state, watched.status.target) == (True, WatchState.RETRYING, "1.1.0")


def test_a_next_try_breaks_off_no_load(tmp_path: Path) -> None:
    """A load that lasts longer than the pause of what waits is finished; only what never failed overtakes it."""
    watched = Watched(tmp_path, follow=">=1", retry_s=2.0)
    watched.publish(2, label=None)
    watched.publish(3, label=None)
    take_weights(watched, "1.0.3")

    def dawdle(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "preadv" and watched.state is WatchState.LOADING:
            watched.clock.at_s += 100

    with hooked(dawdle):
        watched.wait(150)
    assert (watched.serves(2), watched.status.counts.superseded) == (True, 0)


def test_a_disk_that_reads_nothing_is_not_tried_with_every_version(tmp_path: Path) -> None:
    """Only so many are stepped over at a time, and the newest goes live when the disk is back."""
    watched = Watched(tmp_path, follow=">=1", max_retry_s=8.0)
    for number in range(1, 31):
        watched.publish(number, label=None)
    tried = set()

    def fail(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "preadv" and watched.state is WatchState.LOADING:
            tried.add(watched.status.target)
            raise OSError(errno.EIO, "EIO")

    with hooked(fail):
        watched.wait(60)
    assert tried == {f"1.0.{number}" for number in range(15, 31)}
    watched.wait(9)
    assert watched.serves(30)


def test_what_waits_and_is_removed_is_forgotten(tmp_path: Path) -> None:
    """A release that is removed while it waits is not said to be tried again."""
    watched = Watched(tmp_path, follow=">=1", max_retry_s=8.0)
    watched.publish(1, label=None)
    watched.publish(2, label=None)
    take_weights(watched, "1.0.2")
    watched.wait(20)
    assert watched.state is WatchState.RETRYING
    remove_tree(watched.find_path("1.0.2"))
    watched.wait(20)
    assert (watched.serves(1), watched.state, watched.status.next_try_s) == (True, WatchState.FOLLOWING, None)


def take_weights(watched: Watched, version: str) -> Path:
    """Move the weights of a release out of the store; return where they were."""
    (path,) = watched.find_path(version).glob("*.safetensors")
    path.parent.chmod(0o755)
    shutil.move(path, watched.directory / "away.safetensors")
    return path


# -- preconditions -----------------------------------------------------------------------------------------------------


def test_a_precondition_delays_and_says_so_once(tmp_path: Path) -> None:
    """The reasons stand in the status, one event tells of the delay, and the update comes when it may."""
    waits: list[str | None] = ["busy"]

    def ask() -> str | None:
        return waits[0]

    watched = Watched(tmp_path, preconditions=(ask, lambda: None))
    watched.publish(1)
    watched.wait(100)
    assert (watched.state, watched.status.reasons, watched.serves(0)) == (WatchState.DELAYED, ("busy",), True)
    assert [(event.version, event.reasons) for event in watched.of(DelayedEvent)] == [("1.0.1", ("busy",))]
    watched.publish(2)
    watched.wait(2)
    assert [event.version for event in watched.of(DelayedEvent)] == ["1.0.1", "1.0.2"]
    waits[0] = None
    watched.wait(2)
    assert watched.serves(2)


def test_a_precondition_that_raises_delays(tmp_path: Path) -> None:
    """What cannot say that all is well is a reason to wait."""

    def ask() -> str | None:
        raise ValueError("no\nsuch sensor")

    watched = Watched(tmp_path, preconditions=(ask,))
    watched.publish(1)
    watched.settle()
    assert watched.status.reasons == ("a precondition raised ValueError: no\\nsuch sensor",)


@pytest.mark.parametrize("answer", [False, True, 0, ["busy"]])
def test_a_precondition_that_answers_in_another_way_is_said(tmp_path: Path, answer: object) -> None:
    """Neither None nor text: a typed failure in the status, which says what was answered and what is expected."""
    watched = Watched(tmp_path, preconditions=(lambda: answer, lambda: "busy"))
    watched.publish(1)
    watched.wait(10)
    assert (watched.state, watched.status.code, watched.serves(0)) == (WatchState.DELAYED, "BAD_ARGUMENT", True)
    assert watched.status.reasons == (f"a precondition answered {answer!r}", "busy")
    assert "Expected None or a text" in watched.status.error


def test_pausing_leaves_everything_as_it_is(watched: Watched) -> None:
    """While it is paused nothing goes live; afterwards the newest does."""
    watched.publish(1)
    watched.watcher.pause()
    watched.wait(10)
    assert (watched.state, watched.serves(0)) == (WatchState.PAUSED, True)
    watched.publish(2)
    watched.watcher.resume()
    watched.settle()
    assert watched.serves(2)


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_wall_clocks_that_jump_change_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """K08: waits come from the monotonic clock alone and are never negative."""
    for at_s in (0.0, 4e9, 1.7e9):
        monkeypatch.setattr("time.time", lambda at_s=at_s: at_s)
        watched.publish(1 + int(at_s) % 7, f"1.1.{int(at_s)}")
        assert watched.step() >= 0
        watched.wait(2)
        assert watched.state is WatchState.FOLLOWING
