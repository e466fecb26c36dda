"""A small signed release, changed in every way that one bit or a missing end can change it (FAULTS B02, B16 to B19).

The oracle is the host's: open it, let trust judge it, verify every byte. It must be refused by one of the three, with
an error of ours, and the whole release must be accepted again when the change is undone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import DigestMismatchError, HotglmError, ReleaseError, SignatureError
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.directory import open_release
from hotglm.trust.policy import Trust
from support.trusted import Host, make_key, make_release

FILES = [MANIFEST_NAME, ENVELOPE_NAME, "model.safetensors", "a.txt"]


def judge(path: Path, trust: Trust) -> None:
    """Do what a host does with a release: raise unless all of it is what was signed."""
    with open_release(path) as release:
        trust.verify(release)
        release.verify()


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Trust]:
    host = Host(tmp_path)
    path = make_release(tmp_path / "a")
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    return path, host.open()


def changed(text: bytes) -> Iterator[bytes]:
    """Yield the text with each bit flipped, cut after each byte, and with one byte more."""
    for at in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[at // 8] ^= 1 << at % 8
        yield bytes(flipped)
    yield from (text[:end] for end in range(len(text)))
    yield text + b"\n"


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_every_cut_is_refused(name: str, signed: tuple[Path, Trust]) -> None:
    """No single bit of any file can be another, and no file can be shorter or longer."""
    path, trust = signed
    file = path / name
    text = file.read_bytes()
    fd = os.open(file, os.O_RDWR)
    num = 0
    # Signatures are read when they are judged, so that one open release will do: half of the time of the test.
    opened = open_release(path) if name == ENVELOPE_NAME else None
    for other in changed(text):
        os.pwrite(fd, other, 0)
        os.ftruncate(fd, len(other))
        num += 1
        try:
            if opened is not None:
                trust.verify(opened)
            judge(path, trust)
        except HotglmError:
            continue
        pytest.fail(f"accepted with {name} changed: change {num}")
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))
    os.close(fd)
    assert num == 9 * len(text) + 1
    if opened is not None:
        trust.verify(opened)
        opened.close()
    judge(path, trust)


def test_the_oracle_finds_an_accepted_change(signed: tuple[Path, Trust]) -> None:
    """Planted: a host that does not verify its files accepts a flipped bit, and that is seen (a test of the test)."""
    path, trust = signed
    (path / "a.txt").write_text("siDe")
    with open_release(path) as release:
        trust.verify(release)  # what is signed is the manifest; the files are bound by it, once they are read
    with pytest.raises(DigestMismatchError):
        judge(path, trust)


def swap_shards(path: Path) -> None:
    first, second, aside = path / "model.safetensors", path / "a.txt", path / ".aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def replace_by_fifo(path: Path) -> None:
    (path / "a.txt").unlink()
    os.mkfifo(path / "a.txt")


def replace_by_link(path: Path) -> None:
    shutil.copy(path / "a.txt", path.parent / "outside")
    (path / "a.txt").unlink()
    (path / "a.txt").symlink_to(path.parent / "outside")


def add_signed_looking_file(path: Path) -> None:
    (path / "b.txt").write_text("more")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (swap_shards, "SIZE_MISMATCH"),  # B17
        (replace_by_fifo, "NOT_REGULAR"),  # B18
        (replace_by_link, "NOT_REGULAR"),  # B21
        (add_signed_looking_file, "EXTRA_FILE"),  # B18
        (lambda path: (path / "a.txt").unlink(), "MISSING_FILE"),  # B18
        (lambda path: (path / "a.txt").write_text("sides"), "SIZE_MISMATCH"),  # B19
    ],
)
def test_other_files_beside_good_signatures_are_refused(
    damage: Callable[[Path], None], code: str, signed: tuple[Path, Trust]
) -> None:
    """A good envelope vouches for nothing but its manifest, and that for nothing but its files."""
    path, trust = signed
    damage(path)
    with pytest.raises(ReleaseError) as caught:
        judge(path, trust)
    assert code in {problem.code for problem in caught.value.problems}


def test_files_of_another_version_are_refused(signed: tuple[Path, Trust], tmp_path: Path) -> None:
    """Signed manifest and envelope of one version, weights of another one, equally signed (B16)."""
    path, trust = signed
    other = make_release(tmp_path / "b", version="1.0.1")
    shutil.copy(other / "model.safetensors", path / "model.safetensors")
    with pytest.raises(DigestMismatchError) as caught:
        judge(path, trust)
    assert caught.value.file is not None
    assert caught.value.file.endswith("model.safetensors")


def test_a_release_with_foreign_signatures_only_is_refused(signed: tuple[Path, Trust], tmp_path: Path) -> None:
    """The same release, signed by somebody else, is another matter (B03)."""
    stranger = make_release(tmp_path / "b", make_key("stranger"))
    with pytest.raises(SignatureError):
        judge(stranger, signed[1])
