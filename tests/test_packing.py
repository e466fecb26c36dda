"""Packing: weights become a release as they are, whole or not at all, and say no more than is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm.errors import ArgumentError, DigestMismatchError, ReleaseError
from hotglm.manifest import parse_manifest
from hotglm.release.packing import pack
from support.releases import write_source

MANIFEST = "hotglm-manifest.json"


def read_all(path: Path) -> dict[str, bytes]:
    """Return every file below `path` by its name there."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_packing_copies_every_byte_and_changes_none(tmp_path: Path) -> None:
    """R9: a packed release holds the files of its source, byte for byte, the hidden ones left out."""
    source = write_source(tmp_path / "source", shards=True)
    before = read_all(source)
    pack(source, tmp_path / "release", name="ranker", version="1.4.0").close()
    after = read_all(tmp_path / "release")
    assert read_all(source) == before
    del before[".gitattributes"], after[MANIFEST]
    assert after == before
    assert sorted(os.listdir(tmp_path)) == ["release", "source"]


def test_packing_in_place_adds_a_manifest_alone(tmp_path: Path) -> None:
    """Without a destination the directory becomes the release; again, it is one already."""
    source = write_source(tmp_path / "source")
    before = read_all(source)
    with pack(source, name="ranker", version="1.4.0", sequence=3) as opened:
        opened.verify()
        assert opened.manifest.sequence == 3
    after = read_all(source)
    assert parse_manifest(after.pop(MANIFEST)) == opened.manifest
    assert after == before
    with pytest.raises(hotglm.HotglmError) as refusal:
        pack(source, name="ranker", version="1.5.0")
    assert refusal.value.code == "EXISTS"


def test_links_of_a_cache_are_copied_and_refused_in_place(tmp_path: Path) -> None:
    """A snapshot of links, as a hub's cache has it, becomes a release of files; in place it is refused, all named."""
    blobs = write_source(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    with pack(tmp_path / "snapshot", tmp_path / "release", name="r", version="1") as opened:
        opened.verify()
    with pytest.raises(ReleaseError) as refusal:
        pack(tmp_path / "snapshot", name="r", version="1")
    assert [problem.code for problem in refusal.value.problems] == ["NOT_REGULAR"] * 2
    assert not (tmp_path / "snapshot" / MANIFEST).exists()


def test_a_file_that_says_what_it_is_needs_no_name(tmp_path: Path) -> None:
    """Name, version, config, requirements and environment come from the file, if the caller does not say them."""
    path = tmp_path / "w.safetensors"
    hotglm.save_weights({"w": torch.ones(2)}, path, name="m", version="2.0.0", config={"a": [1]}, requires=["torch"])
    with pack(path, tmp_path / "release") as opened:
        manifest = opened.manifest
        assert (manifest.name, str(manifest.version), manifest.config) == ("m", "2.0.0", {"a": [1]})
        assert manifest.requires == ("torch",)
        assert manifest.created_in is not None
        assert manifest.weights == "w.safetensors"
    with pytest.raises(ArgumentError):
        pack(write_source(tmp_path / "source"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_source_that_is_broken_does_not_become_a_release(tmp_path: Path) -> None:
    """Digests that the source carries are held against its bytes; nothing is left where the release would have been."""
    path = tmp_path / "w.safetensors"
    hotglm.save_weights({"w": torch.ones(2)}, path, name="m", version="2.0.0")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestMismatchError):
        pack(path, tmp_path / "release")
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_destination_that_is_taken_is_not_touched(tmp_path: Path) -> None:
    """Where something is, nothing is packed to."""
    source = write_source(tmp_path / "source")
    (tmp_path / "taken").mkdir()
    with pytest.raises(hotglm.HotglmError) as refusal:
        pack(source, tmp_path / "taken", name="r", version="1")
    assert refusal.value.code == "EXISTS"
    assert os.listdir(tmp_path / "taken") == []


def test_progress_reaches_all_bytes(tmp_path: Path) -> None:
    """Progress grows to the size of everything that is copied; what it raises ends the packing and leaves nothing."""
    source = write_source(tmp_path / "source", shards=True)
    seen: list[hotglm.Progress] = []
    with pack(source, tmp_path / "release", name="r", version="1", progress=seen.append) as opened:
        assert seen[-1].done_nbytes == seen[-1].total_nbytes == opened.manifest.total_nbytes

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "other", name="r", version="1", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["release", "source"]
