"""Changes of a store that are ended somewhere, and what must be true then (P11, D09, D10). No torch, no threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hotglm import seam
from hotglm.errors import StoreError
from hotglm.release import digest_cache
from hotglm.release.directory import open_release
from hotglm.release.packing import pack
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.release.writing import write_file
from support.sources import write_source

__all__ = ["SCENARIOS", "Scenario", "look_everything_up", "verify_store"]


class Scenario:
    """One change, made again and again in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sources = [
            write_source(directory / "sources" / str(seed), seed=seed, shards=seed == 2) for seed in range(3)
        ]
        self.round = 0

    def prepare(self) -> None:
        """Make the old state."""

    def change(self) -> None:
        """Make the change that is ended somewhere."""

    def verify(self) -> None:
        """Raise unless the old state or the new one is there, and the change works when it is made again."""


def look_everything_up() -> None:
    """Have stores of this process remember every file, however small and new."""
    digest_cache._LEAST_NBYTES = 0
    digest_cache._GRANULE_NS = -(10**18)


_verified: set[tuple[object, ...]] = set()
"""Releases that this process has verified, with what tells that no file of them was written since."""


def verify_store(store: Store) -> list[str]:
    """Return the versions in a store, all of which verify, as does what labels lead to."""
    for stored in store.find_releases():
        if (seen := _identify(stored.path)) not in _verified:
            with open_release(stored.path) as release:
                release.verify()
            _verified.add(seen)
    for name, label in store.read_labels().items():
        with store.open_release(name) as release:
            assert release.digest == label.release.digest
    return [str(one.version) for one in store.find_releases()]


def _identify(directory: str) -> tuple[object, ...]:
    found: list[object] = [directory]
    for parent, _, names in os.walk(directory):
        statuses = [os.lstat(os.path.join(parent, name)) for name in sorted(names)]
        found += [(parent, name) for name in sorted(names)]
        found += [(one.st_ino, one.st_size, one.st_mtime_ns, one.st_mode) for one in statuses]
    return tuple(found)


def code_of(act: Callable[[], object]) -> str | None:
    """Return the code that `act` is refused with; None where it is not."""
    try:
        act()
    except StoreError as error:
        return error.code
    return None


class Publish(Scenario):
    """A release is published; a label leads to an earlier one."""

    seeds = (1,)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.store = open_store(directory / "store", creates=True)
        self.store.publish(self.sources[0], name="ranker", version="0.1")
        self.store.move_label("stable", "0.1")

    def prepare(self) -> None:
        self.store.collect_garbage(keep_newest=2)
        self.before = verify_store(self.store)
        self.version = f"1.{self.round}"

    def change(self) -> None:
        seed = self.seeds[self.round % len(self.seeds)]
        self.store.publish(self.sources[seed], name="ranker", version=self.version)

    def verify(self) -> None:
        assert verify_store(self.store) in (self.before, [*self.before, self.version])
        self.change()
        assert verify_store(self.store) == [*self.before, self.version]
        assert os.listdir(self.store.join("tmp")) == []


class PublishSharded(Publish):
    """A release of two shards, an index and side files is published."""

    seeds = (2,)


class PublishShared(Publish):
    """A release is published every file of which is shared with one that a label leads to."""

    seeds = (0,)

    def verify(self) -> None:
        super().verify()
        paths = (self.store.find_release(target).path for target in ("0.1", self.version))
        assert len({os.stat(os.path.join(path, "model.safetensors")).st_ino for path in paths}) == 1


class PublishKnown(PublishShared):
    """A release is published whose files are all known, and none of them is read."""

    def __init__(self, directory: Path) -> None:
        look_everything_up()
        super().__init__(directory)


class Label(Publish):
    """A label is moved from one release to another."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.store.publish(self.sources[1], name="ranker", version="0.2")

    def prepare(self) -> None:
        self.before = verify_store(self.store)
        self.old = self.store.read_labels()["stable"]
        self.target = "0.2" if self.old.release.version == "0.1" else "0.1"

    def change(self) -> None:
        self.store.move_label("stable", self.target, expected=self.old.release.version)

    def verify(self) -> None:
        assert verify_store(self.store) == self.before
        label = self.store.read_labels()["stable"]
        moved = (label.release.version, label.revision) == (self.target, self.old.revision + 1)
        assert label == self.old or (moved and label.moves[1:] == self.old.moves[:15])
        self.store.move_label("stable", self.target)
        assert self.store.read_labels()["stable"].release.version == self.target
        self.store.collect_garbage()
        assert sorted(os.listdir(self.store.join("labels"))) == ["stable.json"]


class RemoveLabel(Publish):
    """A label is removed; another one stays."""

    def prepare(self) -> None:
        self.store.move_label("canary", "0.1")

    def change(self) -> None:
        self.store.remove_label("canary")

    def verify(self) -> None:
        assert {"stable"} <= set(self.store.read_labels()) <= {"stable", "canary"}
        self.change()
        assert set(self.store.read_labels()) == {"stable"}


class PlantedLabel(Label):
    """A label that is not replaced whole: the sweep must find that (a test of the test)."""

    def change(self) -> None:
        with mock.patch("hotglm.release.ledger.replace_whole", replace_badly):
            super().change()


def replace_badly(path: str, content: bytes) -> None:
    """Remove a file and write it again."""
    seam.active.unlink(path)
    write_file(path, content)


class Collect(Publish):
    """Garbage is collected: two releases, their weights, and debris."""

    def prepare(self) -> None:
        for step in range(3):
            source = write_source(self.directory / f"{self.round}.{step}", seed=3 + self.round * 3 + step)
            self.store.publish(source, name="ranker", version=f"1.{self.round}.{step}")
        (Path(self.store.join("tmp")) / ".hotglm-dead.partial").mkdir()
        self.before = verify_store(self.store)

    def change(self) -> None:
        self.store.collect_garbage(keep_newest=1)

    def verify(self) -> None:
        left = verify_store(self.store)
        kept = ["0.1", self.before[-1]]
        assert set(kept) <= set(left) <= set(self.before)
        self.change()
        assert verify_store(self.store) == kept
        assert os.listdir(self.store.join("tmp")) == []
        assert len(os.listdir(self.store.join("objects"))) == 4  # two weights, a config and a vocabulary


class CollectBesideReader(Collect):
    """Garbage is collected while somebody has one of the releases open: that stays, and stays whole."""

    def prepare(self) -> None:
        super().prepare()
        self.opened = self.store.open_release(f"1.{self.round}.0")

    def verify(self) -> None:
        self.opened.verify()
        assert str(self.opened.manifest.version) in verify_store(self.store)
        self.opened.close()
        super().verify()


class Trial(Publish):
    """A service tries a release and confirms it."""

    def prepare(self) -> None:
        self.store.collect_garbage(keep_newest=2)
        self.version = f"1.{self.round}"
        self.store.publish(self.sources[1], name="ranker", version=self.version)
        self.service = self.store.service("api")
        self.old = self.service.start()

    def change(self) -> None:
        with self.store.open_release(self.version) as release, self.service.begin(release) as trial:
            trial.confirm()

    def verify(self) -> None:
        verify_store(self.store)
        confirmed = self.service.start()
        state = self.service.read()
        assert state.trials == ()
        if confirmed != self.old:
            assert confirmed is not None
            assert confirmed.version == self.version
        if any(refusal.release.version == self.version for refusal in state.refused):
            assert confirmed == self.old
            assert code_of(self.change) == "REFUSED"
            self.service.forgive(state.refused[0].release.digest)
        self.change()
        confirmed = self.service.start()
        assert confirmed is not None
        assert confirmed.version == self.version
        self.store.collect_garbage()
        assert os.listdir(self.store.join("services")) == ["api.json"]


class FailedTrial(Trial):
    """A service tries a release, which fails; what was confirmed before stays so."""

    def prepare(self) -> None:
        super().prepare()
        with self.store.open_release("0.1") as release, self.service.begin(release) as trial:
            trial.confirm()

    def change(self) -> None:
        with self.store.open_release(self.version) as release, self.service.begin(release) as trial:
            trial.fail("a reason")

    def verify(self) -> None:
        confirmed = self.service.start()
        assert confirmed is not None
        assert confirmed.version == "0.1"
        state = self.service.read()
        assert state.trials == ()
        assert {one.release.version for one in state.refused} <= {self.version}
        assert code_of(self.change) == ("REFUSED" if state.refused else None)
        self.service.forgive(self.service.read().refused[0].release.digest)


class Create(Scenario):
    """A store is made."""

    def prepare(self) -> None:
        self.path = self.directory / f"store-{self.round}"

    def change(self) -> None:
        open_store(self.path, creates=True)

    def verify(self) -> None:
        assert code_of(lambda: open_store(self.path)) in (None, "NOT_A_STORE")
        self.change()
        open_store(self.path).publish(self.sources[0], name="ranker", version="1.0")


class Pack(Scenario):
    """Weights are packed to a directory."""

    def prepare(self) -> None:
        (self.directory / "packed").mkdir(exist_ok=True)
        self.path = self.directory / "packed" / str(self.round)

    def change(self) -> None:
        pack(self.sources[2], self.path, name="ranker", version="1.0").close()

    def verify(self) -> None:
        if not self.path.exists():
            self.change()
        with open_release(self.path) as release:
            release.verify()
        pack(self.sources[1], self.path.with_suffix(".next"), name="ranker", version="1.0").close()
        assert not [name for name in os.listdir(self.path.parent) if name.startswith(".")]


class PackInPlace(Scenario):
    """A directory becomes a release where it is."""

    def prepare(self) -> None:
        self.path = write_source(self.directory / "packed" / str(self.round), seed=self.round)

    def change(self) -> None:
        pack(self.path, name="ranker", version="1.0").close()

    def verify(self) -> None:
        if not (self.path / "hotglm-manifest.json").exists():
            self.change()
        with open_release(self.path) as release:
            release.verify()


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "publish": Publish,
    "publish-sharded": PublishSharded,
    "publish-shared": PublishShared,
    "publish-known": PublishKnown,
    "label": Label,
    "remove-label": RemoveLabel,
    "planted-label": PlantedLabel,
    "collect": Collect,
    "collect-beside-reader": CollectBesideReader,
    "trial": Trial,
    "failed-trial": FailedTrial,
    "create": Create,
    "pack": Pack,
    "pack-in-place": PackInPlace,
}
