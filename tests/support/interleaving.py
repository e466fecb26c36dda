"""Two changes of one store, the second whole inside the first, at each of its calls to the operating system (D17, D18).

A lock is taken by descriptor, so two changes in one thread keep each other out as two processes would. The second one
does not wait: where the first holds what it needs it is told so, and made again afterwards, which is what waiting comes
to. `PLANTS` take the locks away, one each: a sweep that does not find that proves nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hotglm import seam
from hotglm.errors import HotglmError, StoreBusyError
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import StoreReader
from hotglm.testing.seams import hooked
from support.kill_sweep import verify_store
from support.releases import write_source

__all__ = ["PAIRS", "PLANTS", "interleave"]


@dataclass(frozen=True)
class Pair:
    """Two changes, and what must be true when both are over; each is told the round, and returns what it came to."""

    prepare: Callable[[Stage], object]
    first: Callable[[Stage], object]
    second: Callable[[Stage], object]
    verify: Callable[[Stage, str, str], None]


class Stage:
    """A store that a pair of changes is made in, again and again."""

    def __init__(self, directory: Path) -> None:
        self.sources = [write_source(directory / "sources" / str(seed), seed=seed) for seed in range(3)]
        self.store = open_store(directory / "store", creates=True, lock_timeout_s=0)
        self.round = 0
        self.publish(0, "0.1")
        self.store.move_label("stable", "0.1")

    def publish(self, seed: int, version: str) -> None:
        self.store.publish(self.sources[seed], name="ranker", version=version)

    def open_and_read(self, version: str) -> None:
        with self.store.open_release(version) as release:
            release.verify()

    def try_out(self, version: str) -> None:
        with self.store.open_release(version) as release, self.store.service("api").begin(release) as trial:
            trial.confirm()

    def begin_all(self, version: str) -> None:
        """Have an unnamed release of this round in the store, and a newer one."""
        self.store.collect_garbage(keep_newest=1)
        for refusal in self.store.service("api").read().refused:
            self.store.service("api").forgive(refusal.release.digest)
        self.publish(1, f"{version}.1")
        self.publish(2, f"{version}.2")

    @property
    def version(self) -> str:
        return f"1.{self.round}"


def outcome(act: Callable[[], object]) -> str:
    """Return "done", or the code of the refusal."""
    try:
        act()
    except HotglmError as error:
        return error.code
    return "done"


class Meddler:
    """A hook that acts once, at the `number`th call of any kind, and not at the calls that it makes itself."""

    def __init__(self, number: int, act: Callable[[], str]) -> None:
        self.found: str | None = None
        self._left = number
        self._act = act

    def __call__(self, kind: str, _: int, __: tuple[Any, ...]) -> None:
        if kind != "reach":
            self._left -= 1
            if self._left == 0:
                self.found = self._act()


def interleave(pair: Pair, directory: Path, *, step: int) -> int:
    """Make the second change inside the first, at every `step`th call of it; return how many calls there were."""
    stage = Stage(directory)
    for number in range(1, 10_000, step):
        stage.round += 1
        pair.prepare(stage)
        meddler = Meddler(number, lambda: outcome(lambda: pair.second(stage)))
        with hooked(meddler):
            first = outcome(lambda: pair.first(stage))
        second = meddler.found
        if second is None:
            return number - 1
        if second == StoreBusyError.code:
            second = outcome(lambda: pair.second(stage))
        try:
            pair.verify(stage, first, second)
        except BaseException as error:
            error.add_note(f"the second change inside call {number} of the first: {first}, {second}")
            raise
    raise AssertionError("Expected the first change to end, got no end.")


# -- pairs -------------------------------------------------------------------------------------------------------------


def collect(stage: Stage) -> object:
    return stage.store.collect_garbage(keep_newest=1)


def verify_one_version(stage: Stage, first: str, second: str) -> None:
    """D18: exactly one of two who publish one version wins, and the other is told."""
    assert sorted((first, second)) == ["VERSION_REUSED", "done"]
    verify_numbers(stage)


def verify_both_published(stage: Stage, first: str, second: str) -> None:
    """S2: two versions are published side by side."""
    assert (first, second) == ("done", "done")
    assert {f"{stage.version}.1", f"{stage.version}.2"} <= set(verify_numbers(stage))


def verify_numbers(stage: Stage) -> list[str]:
    numbers = [one.sequence for one in stage.store.find_releases()]
    assert len(set(numbers)) == len(numbers)
    found = verify_store(stage.store)
    assert len(set(found)) == len(found)
    assert os.listdir(stage.store.join("tmp")) == []
    return found


def verify_one_moved(stage: Stage, first: str, second: str) -> None:
    """S4: of two who expect the label at one place exactly one moves it."""
    assert sorted((first, second)) == ["LABEL_MOVED", "done"]
    label = stage.store.read_labels()["stable"]
    assert label.release.version == f"{stage.version}.{1 if first == 'done' else 2}"
    verify_store(stage.store)


def move_from_first(stage: Stage) -> None:
    stage.begin_all(stage.version)
    stage.store.move_label("stable", "0.1")


def verify_named_stays(stage: Stage, first: str, second: str) -> None:
    """S7, D17: who names a release keeps it, or is told that it is gone."""
    assert second == "done"
    assert first in ("done", "NOT_IN_STORE")
    assert (f"{stage.version}.1" in verify_store(stage.store)) == (first == "done")
    if first == "done":
        confirmed = stage.store.service("api").start()
        label = stage.store.read_labels().get("canary")
        named = (confirmed, None if label is None else label.release)
        assert any(one is not None and one.version == f"{stage.version}.1" for one in named)


def verify_read(stage: Stage, first: str, second: str) -> None:
    """S8: an open release is whole to its end, or was never opened."""
    assert second == "done"
    assert first in ("done", "NOT_IN_STORE")


def verify_confirmed(stage: Stage, first: str, second: str) -> None:
    """S10, S11: a trial of a process that lives is refused by nobody."""
    assert (first, second) == ("done", "done")
    state = stage.store.service("api").read()
    assert (state.refused, state.trials) == ((), ())
    assert state.confirmed is not None
    assert state.confirmed.version in (f"{stage.version}.1", f"{stage.version}.2")


def verify_published_beside_collector(stage: Stage, first: str, second: str) -> None:
    """S6, S9: what is being made is not collected, nor the contents it shares."""
    assert (first, second) == ("done", "done")
    assert stage.version in verify_numbers(stage)


def forget_canary(stage: Stage) -> None:
    stage.store.remove_label("canary")
    stage.begin_all(stage.version)


PAIRS: Mapping[str, Pair] = {
    "publish one version": Pair(
        prepare=collect,
        first=lambda stage: stage.publish(1, stage.version),
        second=lambda stage: stage.publish(2, stage.version),
        verify=verify_one_version,
    ),
    "publish two versions": Pair(
        prepare=collect,
        first=lambda stage: stage.publish(1, f"{stage.version}.1"),
        second=lambda stage: stage.publish(2, f"{stage.version}.2"),
        verify=verify_both_published,
    ),
    "move one label": Pair(
        prepare=move_from_first,
        first=lambda stage: stage.store.move_label("stable", f"{stage.version}.1", expected="0.1"),
        second=lambda stage: stage.store.move_label("stable", f"{stage.version}.2", expected="0.1"),
        verify=verify_one_moved,
    ),
    "publish beside a collector": Pair(
        prepare=collect,
        first=lambda stage: stage.publish(1, stage.version),
        second=collect,
        verify=verify_published_beside_collector,
    ),
    "label beside a collector": Pair(
        prepare=forget_canary,
        first=lambda stage: stage.store.move_label("canary", f"{stage.version}.1"),
        second=collect,
        verify=verify_named_stays,
    ),
    "try beside a collector": Pair(
        prepare=forget_canary,
        first=lambda stage: stage.try_out(f"{stage.version}.1"),
        second=collect,
        verify=verify_named_stays,
    ),
    "read beside a collector": Pair(
        prepare=lambda stage: stage.begin_all(stage.version),
        first=lambda stage: stage.open_and_read(f"{stage.version}.1"),
        second=collect,
        verify=verify_read,
    ),
    "try beside a start": Pair(
        prepare=lambda stage: stage.begin_all(stage.version),
        first=lambda stage: stage.try_out(f"{stage.version}.1"),
        second=lambda stage: stage.store.service("api").start(),
        verify=verify_confirmed,
    ),
    "try beside a trial": Pair(
        prepare=lambda stage: stage.begin_all(stage.version),
        first=lambda stage: stage.try_out(f"{stage.version}.1"),
        second=lambda stage: stage.try_out(f"{stage.version}.2"),
        verify=verify_confirmed,
    ),
}


# -- planted bugs ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unlocked(_: StoreReader) -> Iterator[None]:
    yield


def _open_unlocked(path: str) -> int:
    return seam.active.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _create_unlocked(path: str) -> int:
    return seam.active.create(path, 0o644)


_STORE_LOCK = "hotglm.release.store_reading.StoreReader.locked"

PLANTS: Mapping[str, tuple[str, object, str]] = {
    "the store has no lock, numbers": (_STORE_LOCK, _unlocked, "publish two versions"),
    "the store has no lock, versions": (_STORE_LOCK, _unlocked, "publish one version"),
    "the store has no lock, labels": (_STORE_LOCK, _unlocked, "move one label"),
    "what is being made has no lock": (
        "hotglm.release.workspace.lock_directory",
        _open_unlocked,
        "publish two versions",
    ),
    "an open release has no lock": (
        "hotglm.release.directory.lock_directory",
        _open_unlocked,
        "read beside a collector",
    ),
    "a trial has no lock": ("hotglm.release.services.lock_holder", _create_unlocked, "try beside a start"),
}
"""What is taken away, where, and by what; and the pair that finds it."""


def plant(name: str) -> Any:
    """Return the patch of a planted bug, to be used in a `with`."""
    target, replacement, _ = PLANTS[name]
    return mock.patch(target, replacement)
