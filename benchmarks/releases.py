"""Releases: hashing, signing and packing on one core and on all, publishing what is there already, and small publishes.

Rules this module keeps:

- One core is one core of the affinity mask, for us and for `sha256sum`, which hashes on one anyway; files are warm.
- Both sides of a row are measured in turns in one child; what a round made is removed outside of the time taken.
- The row about signatures is left out, by name on standard error, where `cryptography` is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import hotglm
from benchmarks.bench import Bench, Row, Sample, alternate, at_least, describe_size
from benchmarks.files import make_weights, warm_cache

__all__ = ["ReleaseProbe", "measure"]

_NUM_TENSORS = 100
_NUM_SMALL = 50
_LEAST_SHARE = 0.8
"""Of as many times as there are cores: the rest goes to what one core does alone, and to memory they share."""


def measure(bench: Bench) -> list[Row]:
    """Return the rows."""
    weights = make_weights(bench, nbytes=bench.nbytes, num_tensors=_NUM_TENSORS)
    rounds = {"rounds": bench.rounds(5), "directory": os.path.join(bench.directory, "releases")}
    found = bench.ask_once("benchmarks.releases:ReleaseProbe", "run", path=weights.path, **rounds)
    samples = {name: Sample.of(values) for name, values in found.items()}
    return [*_hashing_rows(samples, bench), *_publishing_rows(samples, bench)]


def _hashing_rows(samples: dict[str, Sample], bench: Bench) -> Iterator[Row]:
    num_cores, size = len(os.sched_getaffinity(0)), describe_size(bench.nbytes)
    scales = f">= {_LEAST_SHARE} x cores"
    for what in ("verify", "sign", "pack"):
        if what not in samples:
            print(f"    left out: {what}, because cryptography is not installed", file=sys.stderr)
            continue
        ours, peer = samples[what], samples[f"{what} on one core"]
        ratio = peer.median / ours.median
        is_judged = what != "pack"
        yield Row(
            group="releases",
            name=f"{what} a release of {size}, {num_cores} cores",
            hotglm=ours,
            peer=peer,
            peer_name="the same on one core",
            unit="ms",
            ratio=ratio,
            ratio_name="one core / all",
            target=scales if is_judged else "",
            met=at_least(ratio, _LEAST_SHARE * num_cores) if is_judged else None,
            note="" if is_judged else "it writes a copy and flushes it: the disk decides",
        )
    ours, peer = samples["verify on one core"], samples["sha256sum"]
    yield Row(
        group="releases",
        name=f"verify a release of {size}, one core",
        hotglm=ours,
        peer=peer,
        peer_name="sha256sum",
        unit="ms",
        ratio=peer.median / ours.median,
        ratio_name="peer / hotglm",
        note="both take SHA-256 over every byte; the library differs (OpenSSL of Python, that of coreutils)",
    )


def _publishing_rows(samples: dict[str, Sample], bench: Bench) -> Iterator[Row]:
    size = describe_size(bench.nbytes)
    for peer_name, target, limit in (("the first publish", ">= 20x", 20.0), ("cp, sha256sum", "", None)):
        ours, peer = samples["publish again"], samples[peer_name]
        ratio = peer.median / ours.median
        yield Row(
            group="releases",
            name=f"publish {size} that are in the store, under a new version",
            hotglm=ours,
            peer=peer,
            peer_name=peer_name,
            unit="ms",
            ratio=ratio,
            ratio_name="peer / hotglm",
            target=target,
            met=None if limit is None else at_least(ratio, limit),
            note="no byte of a tensor is read (tests/test_digest_cache.py); the copy of the peer is not flushed"
            if limit is None
            else "no byte of a tensor is read (tests/test_digest_cache.py)",
        )
    ours, peer = samples["small publish"], samples["cp, sync, mv"]
    yield Row(
        group="releases",
        name=f"publish a small release, with {_NUM_SMALL} in the store",
        hotglm=ours,
        peer=peer,
        peer_name="copy, fsync of every file and directory, rename",
        unit="ms",
        ratio=peer.median / ours.median,
        ratio_name="peer / hotglm",
        note="one publisher; the peer neither hashes, nor numbers, nor looks whether the version is free",
    )


class ReleaseProbe:
    """Packs, verifies, signs and publishes one file of weights, in turns with the peers, in one process."""

    def __init__(self, *, path: str, rounds: int, directory: str) -> None:
        """Pack the weights once, and make a store with small releases in it."""
        self._path = path
        self._rounds = rounds
        self._directory = directory
        self._turn = 0
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        warm_cache(path)
        self._release = hotglm.pack(path, self._join("release"), name="ranker", version="1.0.0")
        self._small = self._make_small()
        self._store = hotglm.open_store(self._join("small-store"), creates=True)
        for number in range(_NUM_SMALL):
            self._store.publish(self._small, name="ranker", version=f"0.{number}")

    def run(self) -> dict[str, list[float]]:
        """Return the seconds of each round of everything."""
        sides: dict[str, Callable[[], float]] = {
            "verify": self._verify,
            "verify on one core": self._on_one_core(self._verify),
            "sha256sum": self._sum,
            "pack": self._pack,
            "pack on one core": self._on_one_core(self._pack),
            "the first publish": self._publish_first,
            "publish again": self._publish_again,
            "cp, sha256sum": self._copy_and_sum,
            "small publish": self._publish_small,
            "cp, sync, mv": self._place_small,
        }
        if importlib.util.find_spec("cryptography") is not None:
            self._key = hotglm.SigningKey.create(self._join("key.pem"))
            sides |= {"sign": self._sign, "sign on one core": self._on_one_core(self._sign)}
        found = alternate(sides, rounds=self._rounds)
        self._release.close()
        shutil.rmtree(self._directory)
        return {name: list(sample.values) for name, sample in found.items()}

    # -- hashing -------------------------------------------------------------------------------------------------------

    def _verify(self) -> float:
        return _time(self._release.verify)

    def _sign(self) -> float:
        return _time(lambda: hotglm.sign_release(self._release.path, self._key))

    def _sum(self) -> float:
        return _time(lambda: _call("sha256sum", self._path))

    def _pack(self) -> float:
        target = self._join("packed")
        taken = _time(lambda: hotglm.pack(self._path, target, name="ranker", version="1.0.0").close())
        shutil.rmtree(target)
        return taken

    def _on_one_core(self, act: Callable[[], float]) -> Callable[[], float]:
        def limited() -> float:
            with _one_core():
                return act()

        return limited

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish_first(self) -> float:
        target = self._join("first")
        store = hotglm.open_store(target, creates=True)
        taken = _time(lambda: store.publish(self._path, name="ranker", version="1.0.0"))
        shutil.rmtree(target)
        return taken

    def _publish_again(self) -> float:
        target = self._join("again")
        store = hotglm.open_store(target, creates=True)
        _age(self._path)
        store.publish(self._path, name="ranker", version="1.0.0")
        taken = _time(lambda: store.publish(self._path, name="ranker", version="1.1.0"))
        shutil.rmtree(target)
        return taken

    def _copy_and_sum(self) -> float:
        target = self._join("copy")
        taken = _time(lambda: _call("cp", self._path, target)) + _time(lambda: _call("sha256sum", target))
        os.unlink(target)
        return taken

    def _publish_small(self) -> float:
        self._turn += 1
        return _time(lambda: self._store.publish(self._small, name="ranker", version=f"1.{self._turn}"))

    def _place_small(self) -> float:
        self._turn += 1
        target = self._join(f"placed-{self._turn}")
        return _time(lambda: _place(self._small, target))

    def _make_small(self) -> str:
        directory = self._join("small")
        os.makedirs(directory)
        for number, size in enumerate((300, 40_000, 2_000)):
            with open(os.path.join(directory, f"file-{number}.json"), "w") as file:
                file.write(" " * size)
        hotglm.save_weights({"weight": _one_tensor()}, os.path.join(directory, "model.safetensors"))
        return directory

    def _join(self, name: str) -> str:
        return os.path.join(self._directory, name)


def _one_tensor() -> torch.Tensor:
    return torch.ones(64, 64)


def _time(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _call(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Run the body, and the threads it starts, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _age(path: str) -> None:
    """Wait until a file is old enough for its times to tell of a later write."""
    while (left := max(os.stat(path).st_mtime, os.stat(path).st_ctime) + 2.1 - time.time()) > 0:
        time.sleep(left)


def _place(source: str, target: str) -> None:
    partial = f"{target}.partial"
    shutil.copytree(source, partial)
    for name in os.listdir(partial):
        _flush(os.path.join(partial, name))
    _flush(partial)
    os.rename(partial, target)
    _flush(os.path.dirname(target))


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
