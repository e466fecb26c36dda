"""The universal post-conditions of FAULTS.md: what must be true after every refusal, asserted in one place.

- U1 version, number, epoch and history of the slot are as before; U2 its outputs are, bit for bit.
- U3 two threads ran passes throughout: none raised, and every output is that of exactly one published version.
- U4 the error is typed: class, code, slot, version, what serves, and file, tensor and offset where the row names them.
- U5 descriptors, maps, threads and files are back at the baseline. Maps of files must be the same ones; the number of
  all maps may sway by `_MAPS_SLACK`, because glibc caches stacks of threads that ended and gives threads malloc arenas.
  That a map is lost per refusal shows when a `World` ends: the same slack then counts for all refusals together.
  The worlds' tensors are too small for torch to open an OpenMP team, so native threads must come back exactly.
- U6 a good release loads right after.
- U7 an audit hook saw nothing unpickled, compiled, executed, started or connected. Python compiles and executes when it
  imports, so what runs under an import of an installed module does not count; nothing under the release's directory
  ever may. The hook stays installed for the life of the process, as audit hooks do, and is idle between refusals.
- U8 exactly one `RefusedEvent` with the error's code was announced.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError
from hotglm.events import Event, RefusedEvent
from hotglm.testing.waiting import wait_until

__all__ = ["Chain", "Outcome", "World", "make_state", "universal"]

_MAPS_SLACK = 32
LEAK_WAIT_S = 10.0
"""How long threads that were joined may take to vanish from /proc."""

_WATCHED = frozenset({"pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen", "socket.connect"})


class Chain(nn.Module):
    """Layers that all carry the version's number, so that a pass through two versions gives what neither gives."""

    def __init__(self, *, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make_state(number: int, *, width: int = 8, depth: int = 3) -> dict[str, torch.Tensor]:
    """Return the weights of version `number` of a `Chain`; exact in float32, and other than those of its neighbours."""
    value = 1 + number % 13
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(depth):
        tensors[f"layers.{layer}.weight"] = torch.full((width, width), value / width)
        tensors[f"layers.{layer}.bias"] = torch.full((width,), float(value))
    return tensors


class World:
    """A slot, two threads that run passes in it all the time, and good releases of it; a context manager."""

    def __init__(self, directory: Path, *, width: int = 8, depth: int = 3, **options: Any) -> None:
        self.directory = directory
        self.width, self.depth = width, depth
        self._numbers = itertools.count(1)
        module = Chain(width=width, depth=depth)
        module.load_state_dict(self.state(0))
        self.slot = hotglm.ModuleSlot(module, name="chain", version="1.0.0", **options)
        self.x = torch.arange(float(width))
        self.failures: list[str] = []
        self._expected: dict[int, torch.Tensor] = {}
        self._published = [self.expected(0)]
        self.num_passes = [0, 0]
        self._stop = threading.Event()
        self._readers = [threading.Thread(target=self._read, args=(index,), name=f"reader-{index}") for index in (0, 1)]

    # -- releases ------------------------------------------------------------------------------------------------------

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """Return the weights of version `number`."""
        return make_state(number, width=self.width, depth=self.depth)

    def expected(self, number: int) -> torch.Tensor:
        """Return what version `number` answers, computed without a slot."""
        value = 1 + number % 13
        if value not in self._expected:
            plain = Chain(width=self.width, depth=self.depth)
            plain.load_state_dict(self.state(number))
            with torch.no_grad():
                self._expected[value] = plain(self.x)
        return self._expected[value]

    def write(self, *, name: str = "", **metadata: Any) -> tuple[int, Path]:
        """Write the next version's weights; return its number and the file. A pass must not see it before `publish`."""
        number = next(self._numbers)
        path = self.directory / (name or f"release-{number % 4}.safetensors")
        hotglm.save_weights(self.state(number), path, version=f"1.0.{number}", name="chain", **metadata)
        return number, path

    def publish(self, number: int) -> None:
        """Let passes see version `number` from now on."""
        self._published = [*self._published, self.expected(number)]

    def update(self) -> None:
        """Load a good release and see that it serves (U6)."""
        number, path = self.write()
        self.publish(number)
        receipt = self.slot.update(path)
        assert str(receipt.new_version) == f"1.0.{number}"
        assert torch.equal(self.answer(), self.expected(number))
        self.wait_for_passes()
        self._published = [self.expected(number)]

    def rollback(self) -> None:
        """Go back to the version before, which passes may see from now on."""
        before = self.slot.status().generations[1]
        self.publish(int(str(before.version).rsplit(".", 1)[1]))
        self.slot.rollback()

    # -- passes --------------------------------------------------------------------------------------------------------

    def answer(self) -> torch.Tensor:
        """Run one pass without gradients."""
        with torch.no_grad():
            output: torch.Tensor = self.slot(self.x)
        return output

    def _read(self, index: int) -> None:
        try:
            while not self._stop.wait(0.001):
                before = self._published
                output = self.answer()
                if not any(torch.equal(output, good) for good in (*before, *self._published)):
                    self.failures.append(f"torn: {output.tolist()}")
                self.num_passes[index] += 1
        except BaseException as failure:  # noqa: BLE001 - a pass must not raise anything at all
            self.failures.append(f"raised: {failure!r}")

    def wait_for_passes(self, num: int = 2) -> None:
        """Wait until each of the two threads has run `num` more passes."""
        targets = [count + num for count in self.num_passes]
        assert wait_until(
            lambda: bool(self.failures) or all(a >= b for a, b in zip(self.num_passes, targets, strict=True))
        )
        assert self.failures == []

    def __enter__(self) -> Self:
        _install_audit_hook()
        for reader in self._readers:
            reader.start()
        for _ in range(4):  # every arena taken once, every lazy import done
            self.update()
        with contextlib.suppress(HotglmError):
            self.slot.update(self.directory / "nothing.safetensors")
        self._first = _Process.look(self.directory)
        return self

    def stop(self) -> None:
        """End the two threads that run passes."""
        self._stop.set()
        for reader in self._readers:
            reader.join(10)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            assert self.failures == []
            assert wait_until(lambda: _Process.look(self.directory).num_maps <= self._first.num_maps + _MAPS_SLACK)


# -- what a process has ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    descriptors: tuple[str, ...]
    file_maps: frozenset[str]
    num_maps: int
    python_threads: frozenset[str]
    num_tasks: int
    files: frozenset[str]

    @classmethod
    def look(cls, directory: Path) -> _Process:
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        paths = {parts[5] for parts in maps if len(parts) == 6}
        return cls(
            descriptors=tuple(sorted(_read_descriptors())),
            file_maps=frozenset(p for p in paths if "(deleted)" in p or str(directory) in p or "memfd" in p),
            num_maps=len(maps),
            python_threads=frozenset(f"{thread.name} {thread.ident}" for thread in threading.enumerate()),
            num_tasks=len(os.listdir("/proc/self/task")),
            files=frozenset(str(path) for path in directory.rglob("*")),
        )

    def find_leaks(self, before: _Process) -> list[str]:
        return [
            *([f"descriptors {before.descriptors} -> {self.descriptors}"] * (self.descriptors != before.descriptors)),
            *([f"maps of files {self.file_maps}"] * (self.file_maps != before.file_maps)),
            *([f"maps {before.num_maps} -> {self.num_maps}"] * (self.num_maps > before.num_maps + _MAPS_SLACK)),
            *([f"threads {self.python_threads}"] * (self.python_threads != before.python_threads)),
            *([f"tasks {before.num_tasks} -> {self.num_tasks}"] * (self.num_tasks > before.num_tasks)),
            *([f"files {self.files ^ before.files}"] * bool(self.files - before.files)),
        ]


def _read_descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            yield f"{name} {os.readlink(f'/proc/self/fd/{name}')}"


# -- what the interpreter was asked to do ------------------------------------------------------------------------------

_recording: list[str] | None = None
_recorded_directory = ""
_is_installed = False


def _install_audit_hook() -> None:
    global _is_installed  # noqa: PLW0603 - a hook cannot be taken away, so there must be one only
    if not _is_installed:
        sys.addaudithook(_audit)
        _is_installed = True


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _recording is not None and event in _WATCHED and not (event in ("exec", "compile") and _is_import()):
        _recording.append(f"{event} {args!r:.200}")


def _is_import() -> bool:
    frame = sys._getframe(2)
    files: list[str] = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]  # ends the loop
    imports = any(file.startswith("<frozen importlib") for file in files)
    return imports and not any(file.startswith(_recorded_directory) for file in files)


@contextlib.contextmanager
def _audited(directory: Path) -> Iterator[list[str]]:
    global _recording, _recorded_directory  # noqa: PLW0603 - the hook has no other way to know
    _recorded_directory, _recording = str(directory), []
    try:
        yield _recording
    finally:
        _recording = None


# -- the fixture -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the body: the error that refused it, or None."""

    error: HotglmError | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def refusal(self) -> HotglmError:
        """The error, where there must be one."""
        assert self.error is not None
        return self.error


@contextlib.contextmanager
def universal(
    world: World,
    error: type[HotglmError] | tuple[type[HotglmError], ...],
    *,
    code: str | tuple[str, ...] | None = None,
    version: str | None = None,
    file: str | os.PathLike[str] | None = None,
    tensor: str | None = None,
    offset: int | None = None,
    may_pass: bool = False,
    num_refused: int = 1,
) -> Iterator[Outcome]:
    """Expect the body to be refused, and nothing else to have happened: U1 to U8.

    Args:
        world: what must not change.
        error: class of the refusal.
        code: its code, or the codes it may have.
        version: version that the error must name.
        file: file that the error must name.
        tensor: tensor that the error must name.
        offset: byte offset that the error must name.
        may_pass: whether the update may also succeed, entirely; then only U3, U5, U6 and U7 are asserted.
        num_refused: `RefusedEvent`s that must have been announced; 0 for what stages and commits nothing (a rollback).
    """
    slot, outcome = world.slot, Outcome()
    world.wait_for_passes(1)
    state, answer = _state_of(slot), world.answer()
    before = _Process.look(world.directory)
    unsubscribe = slot.subscribe(outcome.events.append)
    with _audited(world.directory) as audited:
        try:
            yield outcome
        except HotglmError as refusal:
            outcome.error = refusal
    unsubscribe()
    world.wait_for_passes()  # U3
    assert audited == []  # U7
    assert _find_leaks(world.directory, before) == []  # U5
    assert outcome.error is not None or may_pass, "expected a refusal"
    if outcome.error is not None:
        assert _state_of(slot) == state  # U1
        assert torch.equal(world.answer(), answer)  # U2
        _verify_typed(outcome.error, slot, error, code, version)  # U4
        _verify_places(outcome.error, file, tensor, offset)
        refused = [event for event in outcome.events if isinstance(event, RefusedEvent)]
        codes = [event.code for event in refused]
        assert (len(codes), codes[-1:]) == (num_refused, [outcome.error.code][:num_refused])  # U8
    world.update()  # U6


def _find_leaks(directory: Path, before: _Process) -> list[str]:
    wait_until(lambda: not _Process.look(directory).find_leaks(before), timeout_s=LEAK_WAIT_S)
    return _Process.look(directory).find_leaks(before)


def _state_of(slot: hotglm.ModuleSlot) -> tuple[object, ...]:
    live = slot._admission.live  # not `status()`, which looks at every thread's frames
    return (slot.version, slot.live.number, slot.live.digest, live.epoch, live.trial, slot.history)


def _verify_typed(
    found: HotglmError,
    slot: hotglm.ModuleSlot,
    error: type[HotglmError] | tuple[type[HotglmError], ...],
    code: str | tuple[str, ...] | None,
    version: str | None,
) -> None:
    assert isinstance(found, error), f"{found!r}, caused by {found.__cause__!r}"
    assert code is None or found.code in ((code,) if isinstance(code, str) else code), found
    assert found.code != HotglmError.code
    assert found.slot == slot.name
    assert version is None or found.version == version, found.version
    assert found.serving == str(slot.version)
    assert found.remedy
    assert f"Version {slot.version} still serves" in str(found)


def _verify_places(
    found: HotglmError, file: str | os.PathLike[str] | None, tensor: str | None, offset: int | None
) -> None:
    assert file is None or found.file == os.fspath(file), found
    assert tensor is None or found.tensor == tensor, found
    assert offset is None or found.offset == offset, found
