"""Ends a process at each of its calls to the operating system while it makes, publishes or collects deltas.

Run as a program: `python -m support.delta_sweep NAME HOW STEP DIRECTORY`, as `support.kill_sweep`. Everything is small
enough for one thread, so that a fork is safe although torch is there.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from hotglm.deltas.making import make_delta
from hotglm.deltas.materializing import materialize
from hotglm.deltas.publishing import DeltaPolicy, publish_delta
from hotglm.errors import SourceError
from hotglm.release import collecting, environment
from hotglm.release.directory import open_release
from hotglm.release.store_opening import open_store
from support import kill_sweep
from support.deltas import State, pack_state, read_tree, write_state
from support.kill_scenarios import SCENARIOS as STORE_SCENARIOS
from support.kill_scenarios import Scenario, verify_store

__all__ = ["SCENARIOS"]

FIRST: State = {"w": ("F32", (200,), bytes(800)), "kept": ("F32", (3,), bytes(12)), "odd": ("I8", (1,), b"a")}


def change(number: int) -> State:
    """Return the tensors of a version; each needs every codec against the one before."""
    data = bytearray(FIRST["w"][2])
    data[4 * number + 2] = 1
    return {**FIRST, "w": ("F32", (200,), bytes(data)), "odd": ("I8", (1,), bytes([number % 256]))}


class MakeDelta(Scenario):
    """A delta is made between two releases."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.root = directory / "deltas"
        self.old, self.new = pack_state(self.root, 1, FIRST), pack_state(self.root, 2, change(2))
        self.wanted = read_tree(self.new)

    def prepare(self) -> None:
        self.path = self.root / f"delta-{self.round}"

    def change(self) -> None:
        make_delta(self.old, self.new, self.path).close()

    def verify(self) -> None:
        if not self.path.exists():
            self.change()
        with open_release(self.path) as release:
            release.verify()
        materialize(self.path, self.root / "made").close()
        assert read_tree(self.root / "made") == self.wanted
        assert not [name for name in os.listdir(self.root) if name.endswith(".partial")]
        for path in sorted([*(self.root / "made").rglob("*"), *self.path.rglob("*")]):
            path.unlink()
        (self.root / "made").rmdir()
        self.path.rmdir()


class Materialize(MakeDelta):
    """A delta becomes a full release."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.delta = self.root / "delta"
        make_delta(self.old, self.new, self.delta).close()
        self.before = read_tree(self.delta)

    def change(self) -> None:
        materialize(self.delta, self.path).close()

    def verify(self) -> None:
        if not self.path.exists():
            self.change()
        assert read_tree(self.path) == self.wanted
        assert read_tree(self.delta) == self.before
        materialize(self.delta, self.root / "made").close()
        assert not [name for name in os.listdir(self.root) if name.endswith(".partial")]
        for path in sorted([*(self.root / "made").rglob("*"), *self.path.rglob("*")]):
            path.unlink()
        (self.root / "made").rmdir()
        self.path.rmdir()


class PublishDelta(Scenario):
    """A release is published as a delta of the newest one, in a chain of at most three."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.store = open_store(directory / "store", creates=True)
        self.store.publish(write_state(directory / "0", FIRST), name="ranker", version="0.1")

    def prepare(self) -> None:
        self.store.collect_garbage(keep_newest=1)
        self.before = verify_store(self.store)
        self.source = write_state(self.directory / f"source-{self.round}", change(1 + self.round % 100))
        self.version = f"1.{self.round}"

    def change(self) -> None:
        policy = DeltaPolicy(max_chain=3, max_ratio=1)
        publish_delta(self.store, self.source, name="ranker", version=self.version, policy=policy)

    def verify(self) -> None:
        assert verify_store(self.store) in (self.before, [*self.before, self.version])
        self.change()
        assert verify_store(self.store) == [*self.before, self.version]
        assert os.listdir(self.store.join("tmp")) == []
        verify_chains(self)


class CollectChain(PublishDelta):
    """Old chains are collected; a label leads into one of them."""

    def prepare(self) -> None:
        for step in range(5):
            self.source = write_state(self.directory / f"source-{self.round}-{step}", change(1 + step))
            self.version = f"1.{self.round}.{step}"
            super().change()
            if step == 1:
                self.store.move_label("stable", self.version)

    def change(self) -> None:
        self.store.collect_garbage(keep_newest=1)

    def verify(self) -> None:
        verify_chains(self)
        self.change()
        verify_store(self.store)
        verify_chains(self)
        releases = self.store.find_releases()
        named = {move.release.sequence for one in self.store.read_labels().values() for move in one.moves}
        bases = {read_base(one.path) for one in releases}
        assert all(one.sequence in named | bases for one in releases[:-1])  # and nothing more
        assert os.listdir(self.store.join("tmp")) == []


class PlantedCollect(CollectChain):
    """A collection that looks at names alone, and takes the bases of deltas."""

    def change(self) -> None:
        with mock.patch.object(collecting, "find_needed", return_value=set()):
            super().change()


def read_base(path: str) -> int | None:
    """Return the number of the base of a release; None for a full one."""
    with open_release(path) as release:
        delta = release.manifest.delta
        return None if delta is None else delta.base.sequence


def verify_chains(scenario: PublishDelta) -> None:
    """Raise unless what labels lead to, and the newest release, can be made in full."""
    store = scenario.store
    targets: list[int | str] = [store.find_releases()[-1].sequence, *store.read_labels()]
    for target in targets:
        path = scenario.directory / "made"
        with store.open_release(target) as release:
            try:
                materialize(release, path).close()
            except SourceError as error:
                raise AssertionError(f"{release.path} cannot be made: {error}") from error
        for one in path.rglob("*"):
            one.unlink()
        path.rmdir()


SCENARIOS = {
    "make-delta": MakeDelta,
    "materialize": Materialize,
    "publish-delta": PublishDelta,
    "collect-chain": CollectChain,
    "planted-collect": PlantedCollect,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment._read_version = functools.cache(environment._read_version)
    STORE_SCENARIOS |= SCENARIOS
    gc.freeze()
    print(kill_sweep.sweep(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
