"""Publishing what was published before reads no weights; what changed since, or may have, is read (S13, P5)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hotglm.errors import DigestMismatchError
from hotglm.progress import Progress
from hotglm.release import digest_cache
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.testing.seams import hooked
from support.kill_sweep import verify_store
from support.sources import write_source

WEIGHTS = "model.safetensors"
YEAR_NS = 365 * 24 * 3600 * 10**9


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a store that looks every file up, however small; time for it is a year after the files were written."""
    monkeypatch.setattr(digest_cache, "_LEAST_NBYTES", 0)
    monkeypatch.setattr(digest_cache, "_GRANULE_NS", -YEAR_NS)
    return open_store(tmp_path / "store", creates=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def read_by(act: Callable[[], object]) -> int:
    """Return how many bytes of tensors were read: what stands behind the headers of the sources here."""
    read = 0

    def count(kind: str, _: int, args: tuple[object, ...]) -> object:
        nonlocal read
        if kind == "pread":
            fd, nbytes, offset = (int(str(one)) for one in args)
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors") and offset > 0:
                read += nbytes
        return None

    with hooked(count):
        act()
    return read


def publish(store: Store, source: Path | str, version: str, *, is_linked: bool = False) -> Callable[[], object]:
    return lambda: store.publish(source, name="ranker", version=version, is_linked=is_linked)


def inode(store: Store, version: str, name: str = WEIGHTS) -> int:
    return os.stat(os.path.join(store.find_release(version).path, name)).st_ino


# -- what is not read --------------------------------------------------------------------------------------------------


def test_an_unchanged_base_is_not_read_again(store: Store, source: Path) -> None:
    """S13: with a side file changed, or nothing, weights are neither read nor hashed, and are shared."""
    assert read_by(publish(store, source, "1.0")) > 0
    (source / "tokenizer" / "vocab.json").write_text('{"a": 1}')
    assert read_by(publish(store, source, "1.1")) == 0
    assert read_by(publish(store, source, "1.1")) == 0
    assert verify_store(store) == ["1.0", "1.1"]
    assert inode(store, "1.0") == inode(store, "1.1")
    with store.open_release("1.0") as old, store.open_release("1.1") as new:
        assert old.manifest.tensors == new.manifest.tensors
        assert old.manifest.files[WEIGHTS] == new.manifest.files[WEIGHTS]


def test_shards_are_known_one_by_one(store: Store, tmp_path: Path) -> None:
    """S13: of several shards only the one that changed is read."""
    source = write_source(tmp_path / "shards", shards=True)
    publish(store, source, "1.0")()
    path = source / "model-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read = []

    def note(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "pread" and int(str(args[2])) > 0:
            read.append(os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}")))

    with hooked(note):
        publish(store, source, "1.1")()
    assert set(read) == {"model-1.safetensors"}
    assert verify_store(store) == ["1.0", "1.1"]


def test_what_is_linked_is_not_read_again(store: Store, source: Path) -> None:
    """S13: a source that stays where it is and is linked each time is read once, though links move its change time."""
    assert read_by(publish(store, source, "1.0", is_linked=True)) > 0
    assert read_by(publish(store, source, "1.1", is_linked=True)) == 0
    assert read_by(publish(store, source, "1.2", is_linked=True)) == 0
    assert verify_store(store) == ["1.0", "1.1", "1.2"]
    assert inode(store, "1.2") == (source / WEIGHTS).stat().st_ino
    assert os.listdir(store.join("objects")) == []


def test_a_release_of_the_store_is_not_read_again(store: Store, source: Path, tmp_path: Path) -> None:
    """S13: what is a link to a content of the store is known by that."""
    publish(store, source, "1.0")()
    assert read_by(lambda: store.publish(store.find_release("1.0").path, version="1.1")) == 0
    mine = tmp_path / "mine"
    shutil.copytree(store.find_release("1.0").path, mine, copy_function=os.link)
    (mine / "hotglm-manifest.json").unlink()
    (mine / "notes.txt").write_text("new")
    assert read_by(publish(store, mine, "1.2")) == 0
    assert verify_store(store) == ["1.0", "1.1", "1.2"]


def test_progress_comes_to_its_end(store: Store, source: Path) -> None:
    """What is not read is done, too."""
    publish(store, source, "1.0")()
    told: list[Progress] = []
    store.publish(source, name="ranker", version="1.1", progress=told.append)
    assert told[-1].done_nbytes == told[-1].total_nbytes


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_file_written_just_before_is_read_again(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S13: a file whose times are as new as the clock is coarse may be written again with the same times."""
    monkeypatch.setattr(digest_cache, "_GRANULE_NS", 2 * 10**9)
    ahead_ns = (source / WEIGHTS).stat().st_mtime_ns + 3600 * 10**9  # of the clock, so that no slow machine matters
    os.utime(source / WEIGHTS, ns=(ahead_ns, ahead_ns))
    publish(store, source, "1.0")()
    assert read_by(publish(store, source, "1.1")) > 0
    assert verify_store(store) == ["1.0", "1.1"]


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_source_that_was_written_to_is_read(is_linked: bool, store: Store, source: Path) -> None:
    """S13: other bytes of the same size, and the time of the last write set back: the change time tells."""
    publish(store, source, "1.0")()
    path = source / WEIGHTS
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino
    assert read_by(publish(store, source, "1.1", is_linked=is_linked)) > 0
    assert verify_store(store) == ["1.0", "1.1"]
    assert inode(store, "1.0") != inode(store, "1.1")


def test_a_source_that_is_replaced_while_it_is_linked_is_read(store: Store, source: Path, tmp_path: Path) -> None:
    """S13: what was looked at is what is linked; a name that leads elsewhere by then is noticed."""
    publish(store, source, "1.0", is_linked=True)()
    other = write_source(tmp_path / "other", seed=9)
    linked: list[str] = []

    def swap(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind == "link" and str(args[0]).endswith(WEIGHTS) and not linked:
            linked.append("now")
            os.replace(other / WEIGHTS, source / WEIGHTS)

    with hooked(swap), pytest.raises(Exception, match="changed while it was being read"):
        publish(store, source, "1.1", is_linked=True)()
    assert verify_store(store) == ["1.0"]
    publish(store, source, "1.1", is_linked=True)()
    assert verify_store(store) == ["1.0", "1.1"]


def test_a_content_that_was_written_to_is_made_anew(store: Store, source: Path) -> None:
    """S13, S6: a content of the store that is not as it was made is not shared on; the next release is whole."""
    publish(store, source, "1.0")()
    path = Path(store.find_release("1.0").path) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    assert read_by(publish(store, source, "1.1")) > 0
    with store.open_release("1.1") as release:
        release.verify()
    with store.open_release("1.0") as release, pytest.raises(DigestMismatchError):
        release.verify()
    assert inode(store, "1.0") != inode(store, "1.1")
    assert read_by(publish(store, source, "1.2")) == 0


def test_what_no_time_shows_is_refused_where_it_is_read(store: Store, source: Path) -> None:
    """P5, S4: bytes that changed behind every back make a release that no label leads to and nobody loads."""
    publish(store, source, "1.0")()
    path = Path(store.find_release("1.0").path) / WEIGHTS
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_by(publish(store, source, "1.1")) == 0
    with pytest.raises(DigestMismatchError):
        store.move_label("stable", "1.1")
    assert store.read_labels() == {}


def flip(content: bytes) -> bytes:
    return content[:9] + bytes([content[9] ^ 1]) + content[10:]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], flip, lambda _: b"", lambda _: b"\x00" * 200, lambda _: b"{}\n"],
)
def test_a_damaged_entry_is_none(damage: Callable[[bytes], bytes], store: Store, source: Path) -> None:
    """S13: what a power cut, a bad disk or a later version left is passed over, and written anew."""
    publish(store, source, "1.0")()
    for path in Path(store.join("digests")).iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert read_by(publish(store, source, "1.1")) > 0
    assert read_by(publish(store, source, "1.2")) == 0
    shutil.rmtree(store.join("digests"))
    assert read_by(publish(store, source, "1.3")) > 0
    assert verify_store(store) == ["1.0", "1.1", "1.2", "1.3"]


def test_an_entry_that_cannot_be_written_is_no_failure(store: Store, source: Path) -> None:
    """S13: that nothing can be remembered costs time, later; what is published is published."""

    def refuse(kind: str, _: int, args: tuple[object, ...]) -> None:
        if kind in ("create", "mkdir") and "digests" in str(args[0]):
            raise OSError(errno.ENOSPC, "planted")

    with hooked(refuse):
        publish(store, source, "1.0")()
    assert verify_store(store) == ["1.0"]


# -- what goes ---------------------------------------------------------------------------------------------------------


def test_entries_go_with_what_they_lead_to(store: Store, source: Path, tmp_path: Path) -> None:
    """S7, S13: collection leaves entries of contents that are there, and of linked files that a release has."""
    publish(store, source, "1.0")()
    publish(store, write_source(tmp_path / "1", seed=1), "1.1", is_linked=True)()
    Path(store.join("digests", ".hotglm-dead.partial")).write_text("x")
    store.collect_garbage(keep_newest=2)
    assert ".hotglm-dead.partial" not in os.listdir(store.join("digests"))
    assert read_by(publish(store, source, "1.2")) == 0
    assert read_by(publish(store, tmp_path / "1", "1.3", is_linked=True)) == 0
    publish(store, write_source(tmp_path / "2", seed=2), "1.4")()
    before = len(os.listdir(store.join("digests")))
    store.collect_garbage(keep_newest=1)
    assert len(os.listdir(store.join("digests"))) == before - 3  # a source and its content; a linked one
    assert read_by(publish(store, source, "1.5")) > 0
    assert verify_store(store) == ["1.4", "1.5"]


def test_a_content_that_has_rotted_is_replaced_once_a_label_was_refused_for_it(store: Store, source: Path) -> None:
    """S13, S4: bytes that changed with all times as they were are known no more; sound ones take their place."""
    publish(store, source, "1.0")()
    path = Path(store.find_release("1.0").path, WEIGHTS)
    status = path.stat()
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(0o444)
    copy = shutil.copytree(source, source.with_name("fetched again"))
    publish(store, copy, "1.1")()
    with pytest.raises(DigestMismatchError):
        store.move_label("stable", "1.1")
    publish(store, copy, "1.2")()
    store.move_label("stable", "1.2", expected=None)
    assert inode(store, "1.2") != inode(store, "1.1")
    assert read_by(publish(store, copy, "1.3")) == 0
    store.move_label("stable", "1.3")
