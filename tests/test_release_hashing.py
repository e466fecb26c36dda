"""Hashing on all cores: the same digests as on one, no thread that stays, and failures that are typed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hotglm.errors import SourceChangedError, ThreadStartError
from hotglm.progress import Progress
from hotglm.release import hashing
from hotglm.release.directory import open_release
from hotglm.release.packing import pack
from support.releases import write_source


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash small files as large ones are hashed, in pieces of few bytes by four threads."""
    monkeypatch.setattr(hashing, "_SMALL_NBYTES", 0)
    monkeypatch.setattr(hashing, "_CHUNK_NBYTES", 5)
    monkeypatch.setattr(hashing, "num_hash_threads", lambda: 4)


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    """D1, D2: whatever threads do, a file's digest is over its bytes, and that of weights over header and tensors."""
    source = write_source(tmp_path / "source")
    with pack(source, tmp_path / "release", name="r", version="1") as release, release.open_weights() as weights:
        release.verify()
        for name, entry in release.manifest.files.items():
            content = (source / name).read_bytes()
            if not name.endswith(".safetensors"):
                assert entry.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
        content = (source / "model.safetensors").read_bytes()
        row = hashlib.sha256(content[: weights.files[0].header.data_start]).digest()
        for name, at in weights.tensors.items():
            tensor = hashlib.sha256(content[at.offset : at.offset + at.nbytes])
            assert release.manifest.tensors[name].digest == f"sha256:{tensor.hexdigest()}"
            row += tensor.digest()
        whole = f"safetensors:{hashlib.sha256(row).hexdigest()}"
        assert release.manifest.files["model.safetensors"].digest == whole
    assert (tmp_path / "release" / "model.safetensors").read_bytes() == content


def test_no_thread_outlives_a_failure(tmp_path: Path) -> None:
    """A progress that raises, or a source that is cut meanwhile, ends all threads and leaves nothing."""
    source = write_source(tmp_path / "source")
    before = threading.active_count()

    def fail(_: Progress) -> None:
        raise KeyError("planted")

    def cut(_: Progress) -> None:
        os.truncate(source / "model.safetensors", 300)

    outcomes: list[tuple[Callable[[Progress], None], type[Exception]]] = [(fail, KeyError), (cut, SourceChangedError)]
    for progress, expected in outcomes:
        with pytest.raises(expected):
            pack(source, tmp_path / "release", name="r", version="1", progress=progress)
        assert threading.active_count() == before
        assert os.listdir(tmp_path) == ["source"]


def test_threads_that_cannot_be_started_are_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K07: no thread to be had is a typed error."""
    with pack(write_source(tmp_path / "source"), tmp_path / "release", name="r", version="1") as release:

        def refuse(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
        with pytest.raises(ThreadStartError):
            release.verify()
    monkeypatch.undo()
    with open_release(tmp_path / "release") as again:
        again.verify()
