"""The fixture of the universal post-conditions finds each planted violation, and nothing where there is none."""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hotglm.errors import HotglmError, SourceReadError
from hotglm.events import RefusedEvent
from support.universal import World, universal


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        yield made
        made.stop()
        made.failures.clear()  # planted


class Evil:
    def __reduce__(self) -> Any:
        return (len, ((),))


def change_version(world: World, keep: list[Any]) -> None:
    world.slot.rollback()


def write_weights(world: World, keep: list[Any]) -> None:
    with torch.no_grad():
        next(world.slot.parameters()).add_(1)
    world.wait_for_passes(0)


def leak_descriptor(world: World, keep: list[Any]) -> None:
    keep.append(os.open(os.devnull, os.O_RDONLY))


def leak_map(world: World, keep: list[Any]) -> None:
    path = world.directory / "mapped"
    path.write_bytes(b"x" * 4096)
    with path.open("rb") as file:
        keep.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def leak_file(world: World, keep: list[Any]) -> None:
    (world.directory / ".part").touch()


def leak_thread(world: World, keep: list[Any]) -> None:
    stop = threading.Event()
    keep.append(stop)
    threading.Thread(target=stop.wait, daemon=True).start()


def unpickle(world: World, keep: list[Any]) -> None:
    pickle.loads(pickle.dumps(Evil()))


def compile_text(world: World, keep: list[Any]) -> None:
    compile("1 + 1", "release", "eval")


def start_process(world: World, keep: list[Any]) -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)


def announce_twice(world: World, keep: list[Any]) -> None:
    world.slot._core.publish(RefusedEvent(slot="chain", version=None, code="NOT_FOUND", message=""))


def raise_other(world: World, keep: list[Any]) -> None:
    raise HotglmError("no code, no slot")


PLANTED: dict[str, Callable[[World, list[Any]], None]] = {
    "U1 version": change_version,
    "U3 torn": write_weights,
    "U4 untyped": raise_other,
    "U5 descriptor": leak_descriptor,
    "U5 map": leak_map,
    "U5 file": leak_file,
    "U5 thread": leak_thread,
    "U7 pickle": unpickle,
    "U7 compile": compile_text,
    "U7 process": start_process,
    "U8 events": announce_twice,
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_violation_is_found(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One violation of each post-condition, planted beside a real refusal, fails the fixture."""
    monkeypatch.setattr("support.universal.LEAK_WAIT_S", 0.05)
    keep: list[Any] = []

    def violate() -> None:
        with universal(world, SourceReadError):
            PLANTED[name](world, keep)
            world.slot.update(world.directory / "nothing")

    with pytest.raises(AssertionError):
        violate()
    for item in keep:
        if isinstance(item, int):
            os.close(item)
        elif isinstance(item, threading.Event):
            item.set()
        else:
            item.close()


def test_an_honest_refusal_passes(world: World) -> None:
    """Where nothing is planted nothing is found, however often; and a body that is not refused fails."""
    for _ in range(20):
        with universal(world, SourceReadError, code="NOT_FOUND", file=world.directory / "nothing"):
            world.slot.update(world.directory / "nothing")
    with pytest.raises(AssertionError, match="expected a refusal"), universal(world, SourceReadError):
        pass
    with pytest.raises(AssertionError), universal(world, SourceReadError, code="OTHER"):
        world.slot.update(world.directory / "nothing")
