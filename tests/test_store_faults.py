"""What hurts a store: errors of the system, files that were tidied away, texts that were not foreseen (D12 to D16)."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest

from hotglm.errors import SourceReadError, StoreBusyError, StoreWriteError
from hotglm.release.ledger import ReleaseId
from hotglm.release.locks import hold_exclusively
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.testing.seams import fail_with, hooked, only_nth
from support.kill_sweep import verify_store
from support.releases import fill, versions, write_source


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", creates=True)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a directory of sources `0` to `2`; side files are equal, weights differ."""
    for seed in range(3):
        write_source(tmp_path / "sources" / str(seed), seed=seed)
    return tmp_path / "sources"


def fails(kind: str, number: int) -> OSError:
    return OSError(number, os.strerror(number), kind)


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_a_link_to_what_is_shared_already_is_left_alone(store: Store, sources: Path) -> None:
    """S6: a release of the store that is linked into it again is whole: a file is not renamed onto itself."""
    fill(store, sources, 1)
    store.publish(store.find_release(1).path, version="2.0.0", is_linked=True)
    assert verify_store(store) == ["1.0.0", "2.0.0"]
    inodes = {(Path(one.path) / "model.safetensors").stat().st_ino for one in store.find_releases()}
    assert len(inodes) == 1


def test_no_name_of_a_file_stands_in_the_way_of_sharing(store: Store, sources: Path) -> None:
    """S6: while a file is replaced by the shared one its spare name is none that another file may have."""
    (sources / "0" / "config.json.hotglm-link").write_text("a name as an earlier version used")
    store.publish(sources / "0", name="ranker", version="1.0.0")
    store.publish(sources / "0", name="ranker", version="1.1.0")
    assert verify_store(store) == ["1.0.0", "1.1.0"]


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV, errno.EPERM])
def test_where_no_link_can_be_had_a_release_has_its_own_copy(number: int, store: Store, sources: Path) -> None:
    """S6: a file system that gives no more links costs space, no release."""

    def refuse(kind: str, _: int, __: tuple[object, ...]) -> None:
        if kind == "link":
            raise fails(kind, number)

    with hooked(refuse):
        fill(store, sources, 2)
    assert verify_store(store) == ["1.0.0", "1.1.0"]
    assert os.listdir(store.join("objects")) == []


# -- flushing ----------------------------------------------------------------------------------------------------------


def test_what_was_there_already_is_flushed_before_it_is_reported(store: Store, sources: Path) -> None:
    """S1, S3, D12: whoever moved or published it may have failed to flush; saying "done" again makes it so first."""
    fill(store, sources, 1)
    store.move_label("stable", "1.0.0")
    opened: dict[int, str] = {}
    flushed: list[str] = []

    def note(kind: str, _: int, args: tuple[object, ...]) -> object:
        if kind == "open":
            fd = os.open(str(args[0]), int(str(args[1])), 0o666)
            opened[fd] = os.path.relpath(str(args[0]), store.path)
            return fd
        if kind == "fsync":
            flushed.append(opened.get(int(str(args[0])), "?"))
        return None

    with hooked(note):
        store.publish(sources / "0", name="ranker", version="1.0.0")
        store.move_label("stable", "1.0.0")
    assert "releases" in flushed
    assert flushed[-1] == "labels"


def test_a_flush_that_failed_is_not_tried_again_and_believed(store: Store, sources: Path) -> None:
    """D12: a publisher whose file could not be flushed fails; none of its bytes become a release."""
    fail = only_nth("fsync", 1, fail_with("fsync", lambda: fails("fsync", errno.EIO)))
    with hooked(fail) as seen, pytest.raises(StoreWriteError) as refusal:
        store.publish(sources / "0", name="ranker", version="1.0.0")
    assert refusal.value.code == "IO_ERROR"
    assert seen.counts["fsync"] == 1
    assert versions(store) == []
    assert os.listdir(store.join("objects")) == os.listdir(store.join("tmp")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_leaves_nothing(number: int, store: Store, sources: Path) -> None:
    """D13: publisher, label mover and service get DISK_FULL; the store is as it was, and works once there is room."""
    fill(store, sources, 1)
    store.move_label("stable", "1.0.0")
    full = fail_with("pwrite", lambda: fails("pwrite", number))
    with store.open_release("1.0.0") as release:
        for change in (
            lambda: store.publish(sources / "1", name="ranker", version="1.1.0"),
            lambda: store.move_label("canary", "1.0.0"),
            lambda: store.service("api").begin(release),
        ):
            with hooked(only_nth("pwrite", 1, full)), pytest.raises(StoreWriteError) as refusal:
                change()
            assert refusal.value.code == "DISK_FULL"
    assert (versions(store), set(store.read_labels())) == (["1.0.0"], {"stable"})
    for directory, names in (("tmp", []), ("labels", ["stable.json"]), ("services", [])):
        assert os.listdir(store.join(directory)) == names
    fill(store, sources, 2)
    assert verify_store(store) == ["1.0.0", "1.1.0"]


def test_a_file_that_is_too_large_for_the_process_is_a_full_disk(store: Store, sources: Path) -> None:
    """D13: RLIMIT_FSIZE, as the kernel enforces it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StoreWriteError) as refusal:
            store.publish(sources / "0", name="ranker", version="1.0.0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.code == "DISK_FULL"
    assert os.listdir(store.join("tmp")) == []


def test_no_descriptors_is_a_typed_error_and_works_later(store: Store, sources: Path) -> None:
    """D14: with no descriptor to be had every change is refused with NO_DESCRIPTORS, and goes through afterwards."""
    fill(store, sources, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    codes = set()
    lowest = os.dup(0)  # the number that the next descriptor would have
    os.close(lowest)
    try:
        for spare in range(12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
            for change in (
                lambda: store.publish(sources / "1", name="ranker", version="1.1.0"),
                lambda: store.move_label("stable", "1.0.0"),
                store.collect_garbage,
                store.service("api").start,
            ):
                try:
                    change()
                except (StoreWriteError, SourceReadError) as error:
                    codes.add(error.code)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert codes == {"NO_DESCRIPTORS"}
    fill(store, sources, 2)
    assert verify_store(store) == ["1.0.0", "1.1.0"]


def test_a_model_whose_name_cannot_be_read_now_is_not_taken_for_ours(store: Store, sources: Path) -> None:
    """S2: where the disk does not say which model is there, a publish ends; it does not let another model in."""
    fill(store, sources, 1)
    manifest = os.path.join(store.find_release(1).path, "hotglm-manifest.json")

    def refuse(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "open" and args[0] == manifest:
            raise fails(kind, errno.EIO)

    with hooked(refuse), pytest.raises(SourceReadError):
        store.publish(sources / "1", name="other", version="2.0.0")
    os.unlink(manifest)  # one that is broken says nothing for ever
    store.publish(sources / "1", name="ranker", version="2.0.0")
    assert versions(store) == ["1.0.0", "2.0.0"]


# -- services ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["\u4e2d" * 5000, "\U0001f600" * 5000, "a file called \udcff", "x" * 5000])
def test_no_reason_makes_a_record_unreadable(reason: str, store: Store) -> None:
    """S3, S11: as many refusals as are kept, each with a long reason in any script, can be read again."""
    service = store.service("api")
    for number in range(1, 258):
        one = ReleaseId(sequence=number, version="1.0", digest=f"sha256:{number:064x}")
        service.refuse(one, reason if number > 250 else "x")
    state = service.read()
    assert len(state.refused) == 256
    assert all(one.reason.isascii() and len(one.reason) <= 1000 for one in state.refused)


def test_a_trial_that_could_not_be_noted_refuses_nothing(store: Store, sources: Path) -> None:
    """S11: where noting a trial fails after its record was replaced, it is taken back: no process died on it."""
    fill(store, sources, 1)
    service = store.service("api")
    with store.open_release("1.0.0") as release:
        renamed: list[str] = []

        def fail(kind: str, _: int, args: tuple[object, ...]) -> None:
            if kind == "rename":
                renamed.append(str(args[1]))
            elif kind == "fsync" and len(renamed) == 1 and not renamed[0].startswith("failed"):
                renamed[0] = "failed"
                raise fails(kind, errno.EIO)

        with hooked(fail), pytest.raises(StoreWriteError):
            service.begin(release)
        assert renamed[0] == "failed"
        assert service.start() is None
        assert (service.read().refused, service.read().trials) == ((), ())
        service.begin(release).confirm()


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_lock_file_that_was_tidied_away_keeps_others_out(store: Store, sources: Path) -> None:
    """S5: whoever waited for a lock file that is gone by then waits for the one that has its name now."""
    path = store.join("lock")
    reached = threading.Event()
    names: list[str] = []

    def swap(kind: str, number: int, _: tuple[object, ...]) -> None:
        if kind == "flock" and not names:
            names.append("gone")
            os.unlink(path)
            with open(path, "x"):
                reached.set()

    with hooked(swap) as seen, hold_exclusively(path, timeout_s=5):
        assert reached.is_set()
        assert seen.counts["flock"] == 2
        with pytest.raises(StoreBusyError), hold_exclusively(path, timeout_s=0):
            pass


def test_what_is_no_release_does_not_stop_publishing(store: Store, sources: Path) -> None:
    """S1, D16: a file or an empty directory with the name of a release is shown as broken, and passed over."""
    Path(store.join("releases", "000000004-0.9")).write_text("x")
    os.mkdir(store.join("releases", "000000003-0.8"))
    assert store.publish(sources / "0", name="ranker", version="1.0.0").sequence == 5
    shutil.rmtree(store.join("releases", "000000003-0.8"))
    assert store.collect_garbage(keep_newest=1).in_use == ()
