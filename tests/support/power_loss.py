"""A file system that forgets: what a power cut may leave of a change, replayed (D11, after ALICE).

A `Recorder` runs a change on the real file system and writes down what it asks for. `replay` then makes the directory
that a power cut at some step could leave: what an `fsync` covered is there; of the rest any subset is, in order, and a
write may be torn. That is harsher than a journaling file system, which keeps the order of many of these calls.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hotglm import seam
from hotglm.seam import Seam

__all__ = ["Recorder", "cuts", "record", "replay"]

NUM_CUTS = 100
SHARES = (0.0, 0.3, 0.7, 0.95)


@dataclass
class Node:
    """A file or directory: its content before the change."""

    content: bytes | None = None
    entries: dict[str, int] = field(default_factory=dict)


@dataclass
class Operation:
    """One write, or one change of names, which is atomic; `synced` is the step of the `fsync` that covers it."""

    step: int
    write: tuple[int, int, bytes] | None = None
    names: tuple[tuple[int, str, int | None], ...] = ()
    synced: int | None = None

    def touches(self, node: int) -> bool:
        return (self.write is not None and self.write[0] == node) or any(node == parent for parent, _, _ in self.names)


class Recorder(Seam):
    """The real operating system, below one directory, with a record of what was changed and flushed."""

    def __init__(self, root: Path, *, forgets_files: bool = False) -> None:
        self.root = root
        self.nodes: dict[int, Node] = {}
        self.operations: list[Operation] = []
        self.step = 0
        self._forgets_files = forgets_files
        self._numbers = itertools.count()
        self._of_path: dict[str, int] = {}
        self._of_fd: dict[int, int] = {}
        self._scan(str(root), {})

    def _scan(self, path: str, inodes: dict[int, int]) -> int:
        status = os.stat(path)
        number = inodes.setdefault(status.st_ino, next(self._numbers))
        self._of_path[path] = number
        if os.path.isdir(path):
            entries = {name: self._scan(os.path.join(path, name), inodes) for name in os.listdir(path)}
            self.nodes[number] = Node(entries=entries)
        else:
            self.nodes[number] = Node(content=Path(path).read_bytes())
        return number

    def _change(self, *names: tuple[str, int | None]) -> None:
        self.step += 1
        changes = tuple((self._of_path[os.path.dirname(p)], os.path.basename(p), node) for p, node in names)
        self.operations.append(Operation(step=self.step, names=changes))

    def _add(self, path: str, node: Node) -> int:
        number = next(self._numbers)
        self.nodes[number] = node
        self._of_path[path] = number
        self._change((path, number))
        return number

    def open(self, path: str, flags: int) -> int:
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        fd = super().open(path, flags)
        if is_new:
            self._add(path, Node(content=b""))
        if path in self._of_path:
            self._of_fd[fd] = self._of_path[path]
        return fd

    def close(self, fd: int) -> None:
        self._of_fd.pop(fd, None)
        super().close(fd)

    def create(self, path: str, mode: int) -> int:
        fd = super().create(path, mode)
        self._of_fd[fd] = self._add(path, Node(content=b""))
        return fd

    def pwrite(self, fd: int, chunk: memoryview, offset: int) -> int:
        num = super().pwrite(fd, chunk, offset)
        self.step += 1
        self.operations.append(Operation(step=self.step, write=(self._of_fd[fd], offset, bytes(chunk[:num]))))
        return num

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.step += 1
        node = self._of_fd.get(fd)
        if node is None or (self._forgets_files and self.nodes[node].content is not None):
            return
        for operation in self.operations:
            if operation.synced is None and operation.touches(node):
                operation.synced = self.step

    def rename(self, path: str, target: str) -> None:
        super().rename(path, target)
        self._change((path, None), (target, self._of_path[path]))
        for old in [old for old in self._of_path if old == path or old.startswith(f"{path}/")]:
            self._of_path[target + old[len(path) :]] = self._of_path.pop(old)

    def link(self, path: str, target: str) -> None:
        super().link(path, target)
        self._of_path[target] = self._of_path[path]
        self._change((target, self._of_path[path]))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self._change((path, None))
        del self._of_path[path]

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._add(path, Node())

    def rmdir(self, path: str) -> None:
        super().rmdir(path)
        self._change((path, None))
        del self._of_path[path]


def replay(recorder: Recorder, target: Path, *, step: int, chance: random.Random, share: float) -> None:
    """Make at `target` what a power cut after `step` may leave; what was not flushed is there by `share`."""
    contents = {number: bytearray(node.content or b"") for number, node in recorder.nodes.items()}
    entries = {number: dict(node.entries) for number, node in recorder.nodes.items()}
    for operation in recorder.operations:
        if operation.step > step:
            break
        is_flushed = operation.synced is not None and operation.synced <= step
        if not is_flushed and chance.random() >= share:
            continue
        if operation.write is not None:
            node, offset, data = operation.write
            data = data if is_flushed or chance.random() < 0.5 else data[: len(data) // 2]
            contents[node].extend(bytes(max(0, offset - len(contents[node]))))  # a hole, where a write begins behind it
            contents[node][offset : offset + len(data)] = data
        for parent, name, number in operation.names:
            if number is None:
                entries[parent].pop(name, None)
            else:
                entries[parent][name] = number
    for path, node in _walk(0, target, entries):
        if recorder.nodes[node].content is None:
            path.mkdir()
        else:
            path.write_bytes(contents[node])


def _walk(node: int, path: Path, entries: dict[int, dict[str, int]]) -> Iterator[tuple[Path, int]]:
    yield path, node
    for name, inner in entries[node].items():
        yield from _walk(inner, path / name, entries)


def record(root: Path, change: Callable[[], object], *, forgets_files: bool = False) -> Recorder:
    """Make a change below `root` and return what it did."""
    recorder = Recorder(root, forgets_files=forgets_files)
    before, seam.active = seam.active, recorder
    try:
        change()
    finally:
        seam.active = before
    return recorder


def cuts(recorder: Recorder, directory: Path) -> Iterator[tuple[Path, bool]]:
    """Yield what a power cut may leave, with whether it came after the change had returned."""
    chance = random.Random(11)
    for number in range(NUM_CUTS):
        step = recorder.step if number % 5 == 0 else chance.randint(0, recorder.step)
        target = directory / "cut"
        replay(recorder, target, step=step, chance=chance, share=SHARES[number % len(SHARES)])
        yield target, step == recorder.step
        shutil.rmtree(target)
