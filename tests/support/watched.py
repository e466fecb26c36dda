"""A watcher without its thread: rounds are run by hand, on a clock that only moves when a test moves it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import torch

import hotglm
from hotglm.events import Event
from hotglm.release.store import Store
from hotglm.watching.policy import Clock, WatchPolicy
from hotglm.watching.status import WatchState, WatchStatus
from hotglm.watching.watcher import Watcher
from support.universal import Chain, make_state

__all__ = ["ManualClock", "Watched", "break_release", "make_slot", "pack_shelf", "remove_tree", "write_weights"]

X = torch.arange(8.0)


class ManualClock(Clock):
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now_s(self) -> float:
        return self.at_s


def make_slot(**options: Any) -> hotglm.ModuleSlot:
    """Return a slot of version 1.0.0 that answers as `make_state(0)` does."""
    chain = Chain()
    chain.load_state_dict(make_state(0))
    return hotglm.ModuleSlot(chain, name="chain", version="1.0.0", **options)


def expected(number: int) -> torch.Tensor:
    """Return what the weights of `number` answer, computed without a slot."""
    chain = Chain()
    chain.load_state_dict(make_state(number))
    with torch.no_grad():
        answer: torch.Tensor = chain(X)
    return answer


def write_weights(directory: Path, number: int, *, version: str, is_bad: bool = False) -> Path:
    """Write the weights of `number`; bad ones hold NaN, which no slot takes."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{version}.safetensors"
    state = make_state(number)
    if is_bad:
        state["layers.0.bias"][0] = float("nan")
    hotglm.save_weights(state, path, version=version, name="chain")
    return path


def pack_shelf(shelf: Path, number: int, *, version: str, name: str | None = None, is_bad: bool = False) -> Path:
    """Make a release in a plain directory of releases; it appears whole."""
    source = write_weights(shelf.parent / "sources", number, version=version, is_bad=is_bad)
    shelf.mkdir(exist_ok=True)
    target = shelf / (name or version)
    hotglm.pack(source, target).close()
    return target


def break_release(path: Path | str) -> bytes:
    """Flip one bit of the weights of a release, keeping size and time; return what the file held."""
    file = next(Path(path).glob("*.safetensors"))
    status, content = file.stat(), file.read_bytes()
    replacement = file.with_name(f".{file.name}")
    replacement.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    replacement.replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return content


def remove_tree(path: Path | str) -> None:
    """Remove a tree, read-only files included."""
    for parent, names, _ in os.walk(path):
        for name in names:
            os.chmod(os.path.join(parent, name), stat.S_IRWXU)
    shutil.rmtree(path)


class Watched:
    """A store, a slot and a watcher whose rounds are run by hand."""

    def __init__(
        self,
        directory: Path,
        *,
        place: Path | Store | None = None,
        slot: hotglm.ModuleSlot | None = None,
        follow: str = "stable",
        service: str | None = None,
        kind: type[Watcher] = Watcher,
        **policy: Any,
    ) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.store = hotglm.open_store(directory / "store", creates=True)
        self.slot = slot or make_slot()
        self.events: list[Event] = []
        self.slot.subscribe(self.events.append)
        settings = WatchPolicy(**{"interval_s": 1.0, **policy})
        self.watcher = kind(
            self.slot, self.store if place is None else place, follow=follow, service=service, policy=settings,
            clock=self.clock,
        )  # fmt: skip
        self.slot.subscribe(self.watcher._hear)
        self.engine = self.watcher._engine

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(
        self, number: int, version: str | None = None, *, label: str | None = "stable", bad: bool = False
    ) -> str:
        """Publish the weights of `number` as a version, and let a label lead there; return the version."""
        version = version or f"1.0.{number}"
        path = write_weights(self.directory / "sources", number, version=version, is_bad=bad)
        self.store.publish(path, version=version, name="chain")
        if label is not None:
            self.store.move_label(label, version)
        return version

    def find_path(self, version: str) -> Path:
        """Return the directory of a version in the store."""
        return Path(self.store.find_release(version).path)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Run one round; return in how many seconds the next one is due."""
        return self.engine.step()

    def settle(self, *, limit: int = 10) -> WatchStatus:
        """Run rounds for as long as the next one is due at once; return the status then."""
        for _ in range(limit):
            if self.engine.step() > 0:
                return self.status
        raise AssertionError(f"the watcher does not come to rest: {self.status}")

    def wait(self, seconds: float, *, limit: int = 5000) -> WatchStatus:
        """Let time pass, with every round that falls due in it; return the status at its end."""
        end_s = self.clock.at_s + seconds
        for _ in range(limit):
            pause_s = self.engine.step()
            assert pause_s >= 0
            if self.clock.at_s + pause_s > end_s:
                self.clock.at_s = end_s
                return self.status
            self.clock.at_s += pause_s
        raise AssertionError(f"too many rounds: {self.status}")

    @property
    def status(self) -> WatchStatus:
        return self.watcher.status()

    @property
    def state(self) -> WatchState:
        return self.status.state

    # -- what serves ---------------------------------------------------------------------------------------------------

    def serves(self, number: int) -> bool:
        """Tell whether passes answer as the weights of `number` do, bit for bit."""
        with torch.no_grad():
            return torch.equal(self.slot(X), expected(number))

    def of(self, kind: type[Event]) -> list[Any]:
        """Return the events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]
