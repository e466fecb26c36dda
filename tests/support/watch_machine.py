"""A watcher against a model of five lines: whatever is copied, broken, removed or labelled, and in what order."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotglm.events import RefusedEvent
from hotglm.testing.seams import hooked
from support.watched import Watched, break_release, pack_shelf, remove_tree

__all__ = ["LabelMachine", "ShelfMachine"]

VERSIONS = tuple(f"1.{minor}.0" for minor in (1, 2, 9, 10, 11))


@functools.cache
def _make_releases() -> dict[tuple[str, bool], Path]:
    """Pack every release once, good and bad; machines copy them."""
    directory = Path(tempfile.mkdtemp(prefix="hotglm-watch-machine-", dir=_find_memory()))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made = {}
    for at, version in enumerate(VERSIONS):
        for is_bad in (False, True):
            shelf = directory / f"{is_bad}" / "shelf"
            shelf.mkdir(parents=True, exist_ok=True)
            made[version, is_bad] = pack_shelf(shelf, at + 1, version=version, is_bad=is_bad)
    return made


def _find_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class ShelfMachine(RuleBasedStateMachine):
    """A plain directory of releases, of which the highest good one is followed upwards."""

    follow = ">=1"

    @initialize()
    def begin(self) -> None:
        self.stack = ExitStack()
        self.directory = Path(tempfile.mkdtemp(dir=_find_memory()))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.shelf = self.directory / "shelf"
        self.shelf.mkdir()
        self.watched = Watched(self.directory, place=self.shelf, follow=self.follow, max_retry_s=4.0)
        self.stack.callback(self.watched.slot.close)
        # The model: what stands there and whether it is whole and good, and what is live.
        self.there: dict[str, bool] = {}
        self.unreadable: set[str] = set()
        self.live: str | None = None
        self.bytes: Counter[str] = Counter()
        self.refusals: Counter[tuple[str, int]] = Counter()
        self.watched.slot.subscribe(self._count)

    def _count(self, event: object) -> None:
        if (
            isinstance(event, RefusedEvent)
            and event.version is not None
            and event.code not in ("IO_ERROR", "NOT_FOUND")
        ):
            self.refusals[event.version, self.bytes[event.version]] += 1

    # -- what happens --------------------------------------------------------------------------------------------------

    @rule(version=st.sampled_from(VERSIONS), is_bad=st.booleans())
    def copy(self, version: str, is_bad: bool) -> None:
        """A release appears whole, in the place of another one of its name."""
        fresh = self.shelf / ".fresh"
        shutil.copytree(_make_releases()[version, is_bad], fresh)
        self.remove(version)
        fresh.rename(self.shelf / version)
        self.there[version] = not is_bad
        self.bytes[version] += 1

    @rule(version=st.sampled_from(VERSIONS))
    def copy_half(self, version: str) -> None:
        """A release is being copied: its manifest is there, its weights are not."""
        self.remove(version)
        shutil.copytree(
            _make_releases()[version, False], self.shelf / version, ignore=shutil.ignore_patterns("*.safetensors")
        )
        self.bytes[version] += 1

    @rule(version=st.sampled_from(VERSIONS))
    def remove(self, version: str) -> None:
        """A release is removed."""
        self.there.pop(version, None)
        if (self.shelf / version).exists():
            remove_tree(self.shelf / version)

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data())
    def break_one(self, data: st.DataObject) -> None:
        """A bit of a good release flips on the disk; flipped twice it would be good again."""
        version = data.draw(st.sampled_from(sorted(version for version, is_good in self.there.items() if is_good)))
        break_release(self.shelf / version)
        self.there[version] = False
        self.bytes[version] += 1

    @precondition(lambda self: any(self.there.values()))
    @rule(number=st.integers(0, 2))
    def make_unreadable(self, number: int) -> None:
        """The weights of the highest good releases cannot be read for now, those of all others can."""
        good = sorted((version for version, is_good in self.there.items() if is_good), key=VERSIONS.index)
        self.unreadable = set(good[len(good) - number :]) if number else set()

    def _fail_to_read(self, kind: str, _: int, args: tuple[object, ...]) -> None:
        path = Path(str(args[0])) if kind == "open" else Path()
        if path.suffix == ".safetensors" and path.parent.name in self.unreadable:
            raise OSError(errno.EIO, "EIO")

    @rule()
    def look_while_the_disk_fails(self) -> None:
        """The watcher looks while nothing can be read."""

        def fail(kind: str, _: int, args: object) -> None:
            if kind in ("open", "preadv", "listdir"):
                raise OSError(errno.EIO, "EIO")

        with hooked(fail):
            self.watched.step()

    @rule()
    def rest(self) -> None:
        """Long enough passes for everything to settle: the watcher agrees with the model."""
        with hooked(self._fail_to_read):
            self.watched.wait(40)
        good = [version for version, is_good in self.there.items() if is_good and version not in self.unreadable]
        self.live = max([*good, *([] if self.live is None else [self.live])], key=VERSIONS.index, default=None)
        assert self.watched.status.applied == self.live, (self.there, self.watched.status)
        assert self.watched.serves(0 if self.live is None else VERSIONS.index(self.live) + 1)

    @invariant()
    def the_same_bad_bytes_are_staged_once(self) -> None:
        assert all(num <= 1 for num in getattr(self, "refusals", {}).values()), self.refusals

    @invariant()
    def what_is_half_there_is_not_staged(self) -> None:
        if hasattr(self, "watched"):
            assert self.watched.status.code not in ("INCOMPLETE", "MISSING_FILE")

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.rest()
            self.stack.close()


class LabelMachine(RuleBasedStateMachine):
    """A store whose label goes wherever it is moved to, forwards and backwards."""

    @initialize(bad=st.sets(st.sampled_from(VERSIONS), max_size=2))
    def begin(self, bad: set[str]) -> None:
        self.stack = ExitStack()
        self.directory = Path(tempfile.mkdtemp(dir=_find_memory()))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.watched = Watched(self.directory, max_retry_s=4.0)
        self.stack.callback(self.watched.slot.close)
        self.good = {version: version not in bad for version in VERSIONS}
        for version in VERSIONS:
            self.watched.store.publish(_make_releases()[version, version in bad])
        self.label: str | None = None
        self.live: str | None = None

    @rule(version=st.sampled_from(VERSIONS))
    def move(self, version: str) -> None:
        self.label = version
        self.watched.store.move_label("stable", version)

    @rule()
    def remove_label(self) -> None:
        self.label = None
        self.watched.store.remove_label("stable")

    @rule()
    def rest(self) -> None:
        self.watched.wait(20)
        if self.label is not None and self.good[self.label]:
            self.live = self.label
        assert self.watched.status.applied == self.live, self.watched.status
        assert self.watched.serves(0 if self.live is None else VERSIONS.index(self.live) + 1)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.rest()
            self.stack.close()
