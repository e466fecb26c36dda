"""Release directories: whole or refused by name, nothing from outside, and the bytes that run are those promised."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import ArgumentError, HotglmError, ReleaseError, SourceError, SourceReadError
from hotglm.manifest import format_manifest
from hotglm.release.directory import is_release, open_release
from hotglm.release.packing import ReleaseDetails, pack
from support.releases import write_source

MANIFEST = "hotglm-manifest.json"
GOLDEN = Path(__file__).parent / "golden" / "release-1"


class Small(nn.Module):
    """Holds the tensors of `write_source`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("b", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 4, dtype=torch.int8))
        self.register_buffer("scalar", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 2) -> (n, 3)."""
        return x @ self.w


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Return a release of two shards, an index, a config and a tokenizer."""
    source = write_source(tmp_path / "source", shards=True)
    pack(source, tmp_path / "release", name="ranker", version="1.4.0").close()
    return tmp_path / "release"


def refused(path: Path) -> list[str]:
    """Return the codes that opening and verifying a release is refused with."""
    with pytest.raises(SourceError) as refusal, open_release(path) as opened:
        opened.verify()
    return [problem.code for problem in refusal.value.problems]


def read_all(path: Path) -> dict[str, bytes]:
    """Return every file below `path` by its name there."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# -- what is there -----------------------------------------------------------------------------------------------------


def test_the_golden_release_verifies_for_ever() -> None:
    """B30: a release of format 1 that was packed once is read by every later hotglm, byte for byte."""
    assert is_release(str(GOLDEN))
    with open_release(GOLDEN) as opened:
        opened.verify()
        assert opened.digest == "sha256:eb100b67e0f8b7aca9afa1c44c114cea169c21b92f266bbdd795a4514d3df350"
        assert (opened.manifest.name, str(opened.manifest.version), opened.manifest.sequence) == ("ranker", "1.4.0", 7)
        assert opened.read_file("tokenizer/vocab.json") == b'{"a": 0}'
        assert format_manifest(opened.manifest) == (GOLDEN / MANIFEST).read_bytes()


def test_a_release_is_opened_by_its_manifest(release: Path) -> None:
    """An open release knows its manifest, its side files and its weights; nothing stays open after it."""
    before = set(os.listdir("/proc/self/fd"))
    with open_release(release) as opened, opened.open_weights() as weights:
        assert set(opened.manifest.files) == {
            "config.json", "model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json",
            "tokenizer/vocab.json",
        }  # fmt: skip
        assert set(weights.tensors) == {"w", "b", "empty", "scalar"}
        assert opened.manifest.config == {"hidden_size": 3, "eps": 1e-05}
        assert opened.read_file("tokenizer/vocab.json") == b'{"a": 0}'
        with pytest.raises(ArgumentError):
            opened.read_file("../source/config.json")
        with pytest.raises(ArgumentError):
            opened.read_file("model-0.safetensors")
        opened.verify()
    assert set(os.listdir("/proc/self/fd")) == before


def test_hidden_names_and_signatures_are_passed_over(release: Path) -> None:
    """R3, E09: dotfiles, partial files and reserved names are no part of a release."""
    (release / ".swp").write_text("x")
    (release / ".hotglm-0.partial").mkdir()
    (release / "hotglm-manifest.sig").write_text("x")
    (release / "tokenizer" / ".DS_Store").write_text("x")
    with open_release(release) as opened:
        opened.verify()


# -- what is refused ---------------------------------------------------------------------------------------------------


def replace_file(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def link_to_hosts(path: Path) -> None:
    path.symlink_to("/etc/hosts")


def link_directory(release: Path) -> None:
    shutil.move(release / "tokenizer", release.parent / "moved")
    (release / "tokenizer").symlink_to(release.parent / "moved")


def swap(release: Path) -> None:
    """Exchange the contents of two shards, names kept."""
    one, two = release / "model-0.safetensors", release / "model-1.safetensors"
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda r: (r / MANIFEST).unlink(), "INCOMPLETE"),
    "an empty manifest": (lambda r: (r / MANIFEST).write_text(""), "MANIFEST_BAD_JSON"),
    "a link as manifest": (lambda r: replace_file(r / MANIFEST, lambda p: p.symlink_to("config.json")), "NOT_REGULAR"),
    "a fifo as manifest": (lambda r: replace_file(r / MANIFEST, os.mkfifo), "NOT_REGULAR"),
    "an extra file": (lambda r: (r / "evil.py").write_text("x"), "EXTRA_FILE"),
    "an extra file within": (lambda r: (r / "tokenizer" / "x").write_text("x"), "EXTRA_FILE"),
    "an empty directory": (lambda r: (r / "empty").mkdir(), "EXTRA_FILE"),
    "a missing file": (lambda r: (r / "config.json").unlink(), "MISSING_FILE"),
    "a missing shard": (lambda r: (r / "model-1.safetensors").unlink(), "MISSING_FILE"),
    "a directory for a file": (lambda r: replace_file(r / "config.json", os.mkdir), "NOT_REGULAR"),
    "a fifo for a file": (lambda r: replace_file(r / "config.json", os.mkfifo), "NOT_REGULAR"),
    "a socket for a file": (lambda r: replace_file(r / "config.json", bind), "NOT_REGULAR"),
    "a link to a file": (
        lambda r: replace_file(r / "config.json", lambda p: p.symlink_to("/etc/hosts")),
        "NOT_REGULAR",
    ),
    "a link to a directory": (link_directory, "EXTRA_FILE"),
    "a partial file": (lambda r: os.truncate(r / "model-0.safetensors", 100), "SIZE_MISMATCH"),
    "a longer file": (lambda r: os.truncate(r / "config.json", 10**6), "SIZE_MISMATCH"),
    "a hole": (lambda r: (r / "config.json").write_bytes(bytes((r / "config.json").stat().st_size)), "DIGEST_MISMATCH"),
    "swapped shards": (swap, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_that_is_not_what_it_says_is_refused(damage: str, release: Path) -> None:
    """R1 to R5, B16 to B21, D06: whatever else is there than the manifest says, the release is refused by name."""
    spoil, code = DAMAGES[damage]
    spoil(release)
    assert code in [*refused(release), ""]


def test_everything_that_is_wrong_is_named_at_once(release: Path) -> None:
    """A missing, an extra and a partial file are one refusal."""
    (release / "config.json").unlink()
    (release / "extra").write_text("x")
    os.truncate(release / "model-0.safetensors", 9)
    assert sorted(refused(release)) == ["EXTRA_FILE", "MISSING_FILE", "SIZE_MISMATCH"]


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """A36: another bit in any byte of any file is refused."""
    pack(write_source(tmp_path / "source"), tmp_path / "release", name="ranker", version="1.4.0").close()
    contents = read_all(tmp_path / "release")
    del contents[MANIFEST]  # tests/test_manifest.py flips its bits
    for name, content in contents.items():
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            (tmp_path / "release" / name).write_bytes(damaged)
            assert refused(tmp_path / "release"), (name, at)
        (tmp_path / "release" / name).write_bytes(content)
    with open_release(tmp_path / "release") as opened:
        opened.verify()


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    """A path that is missing, a file, a store or no path at all gets a typed error."""
    (tmp_path / "file").write_text("x")
    for name, expected in (("missing", "check the path"), ("file", "hotglm pack")):
        assert not is_release(str(tmp_path / name))
        with pytest.raises(SourceReadError, match=expected) as unread:
            open_release(tmp_path / name)
        assert unread.value.code == "NOT_FOUND"
    with pytest.raises(ArgumentError):
        open_release(3)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ReleaseError) as refusal:
        open_release(tmp_path)
    assert refusal.value.code == "INCOMPLETE"
    hotglm.open_store(tmp_path / "store", creates=True)
    with pytest.raises(ReleaseError, match=r"got a store of releases, .* `hotglm log`"):
        open_release(tmp_path / "store")


# -- as a source -------------------------------------------------------------------------------------------------------


def make_slot(**options: object) -> hotglm.ModuleSlot:
    """Return a slot of zeros."""
    return hotglm.ModuleSlot(Small(), name="ranker", version="1.0.0", accept="major", **options)  # type: ignore[arg-type]


def test_a_release_is_staged_by_its_manifest(release: Path) -> None:
    """Version, config and digests of a staged release are those of its manifest; nothing of it stays open."""
    before = set(os.listdir("/proc/self/fd"))
    with contextlib.closing(make_slot()) as slot:
        receipt = slot.update(release)
        with open_release(release) as opened:
            promised = {name: one.digest for name, one in opened.manifest.tensors.items()}
        assert str(slot.version) == "1.4.0"
        assert receipt.digests == promised
        shutil.rmtree(release)
        assert slot(torch.ones(1, 2)).shape == (1, 3)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["model-0.safetensors", "model-1.safetensors"])
@pytest.mark.parametrize("at", [9, -1])
def test_a_release_with_other_bytes_is_refused_by_the_slot(name: str, at: int, release: Path) -> None:
    """P5, B16: one other byte in a header or a tensor is the ordinary typed error, and the live generation serves."""
    content = bytearray((release / name).read_bytes())
    content[at] ^= 1
    (release / name).write_bytes(content)
    with contextlib.closing(make_slot()) as slot:
        before = slot(torch.ones(1, 2)).clone()
        with pytest.raises(SourceError):
            slot.update(release)
        assert str(slot.version) == "1.0.0"
        assert torch.equal(slot(torch.ones(1, 2)), before)


def test_requirements_and_names_of_the_manifest_are_judged(tmp_path: Path) -> None:
    """P7: an unmet requirement, or another model's name, in the manifest refuses the release."""
    source = write_source(tmp_path / "source")
    details = ReleaseDetails(requires=("no-such-package>=1",))
    pack(source, tmp_path / "a", name="ranker", version="1.4.0", details=details).close()
    pack(source, tmp_path / "b", name="other", version="1.4.0").close()
    with contextlib.closing(make_slot()) as slot:
        for path in (tmp_path / "a", tmp_path / "b"):
            with pytest.raises(HotglmError) as refusal:
                slot.update(path)
            assert isinstance(refusal.value, hotglm.IncompatibleError)
        assert str(slot.version) == "1.0.0"


def test_a_half_copied_release_is_refused_by_the_slot(release: Path, tmp_path: Path) -> None:
    """E01: with the manifest missing it is a directory of weights; with it, but a file short, it is refused."""
    names = sorted(read_all(release), key=lambda name: name != MANIFEST)  # the manifest first, against the rule
    with contextlib.closing(make_slot()) as slot:
        for num in range(1, len(names)):
            shutil.rmtree(tmp_path / "half", ignore_errors=True)
            for name in names[:num]:
                (tmp_path / "half" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(release / name, tmp_path / "half" / name)
            with pytest.raises(ReleaseError) as refusal:
                slot.update(tmp_path / "half")
            assert refusal.value.code == "MISSING_FILE"
        shutil.copytree(release, tmp_path / "half", dirs_exist_ok=True)
        slot.update(tmp_path / "half")
        assert str(slot.version) == "1.4.0"


def test_a_config_with_infinity_stays_in_its_file(tmp_path: Path) -> None:
    """M11: what JSON cannot say is read from `config.json`, its digest verified, and staged like any other config."""
    source = write_source(tmp_path / "source")
    (source / "config.json").write_text('{"limit": Infinity}')
    with pack(source, tmp_path / "release", name="ranker", version="1.4.0") as opened:
        assert opened.manifest.config is None
        assert opened.read_config() == {"limit": float("inf")}
    with contextlib.closing(make_slot()) as slot:
        slot.update(tmp_path / "release")
        (tmp_path / "release" / "config.json").write_text('{"limit":-Infinity}')
        with pytest.raises(SourceError):
            slot.update(tmp_path / "release")
        assert str(slot.version) == "1.4.0"


def test_a_link_to_a_release_is_followed_once(release: Path, tmp_path: Path) -> None:
    """A link that is turned to another release while one is read leads nobody there: the first is read to its end."""
    pack(write_source(tmp_path / "other", seed=9), tmp_path / "second", name="ranker", version="2.0.0").close()
    (tmp_path / "current").symlink_to(release)
    with open_release(tmp_path / "current") as opened:
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to(tmp_path / "second")
        opened.verify()
        assert opened.path == str(release)


def test_more_files_than_descriptors_are_verified(tmp_path: Path) -> None:
    """D14: a release of more side files than a process may open is packed and verified."""
    source = write_source(tmp_path / "source")
    for number in range(200):
        (source / f"side-{number}.txt").write_text(str(number))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 150, hard))
    try:
        with pack(source, tmp_path / "release", name="ranker", version="1.4.0") as opened:
            opened.verify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
