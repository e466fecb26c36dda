"""Engines with a planted bug each: the ways people swap a live model today, which `support.torn` must catch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

import hotglm
from hotglm.slot.admission import Admission
from hotglm.slot.closing import Closing
from hotglm.slot.gate import Gate
from hotglm.slot.generation import Retired
from hotglm.slot.in_place import InPlaceAdmission
from hotglm.slot.memory import ArenaPool
from hotglm.slot.spare import Spares
from hotglm.weights.arena import Arena, Lease
from hotglm.weights.layout import Region
from hotglm.weights.workers import Cancellation
from support.torn import Oracle, SlotEngine, weights


class InPlaceCopy:
    """Bug: every tensor of the live module is overwritten with `copy_`, as `load_state_dict` does."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        self.module = Oracle(version, boundary=boundary)
        self.call: Callable[[torch.Tensor], torch.Tensor] = self.module

    def swap(self, version: int) -> None:
        live = self.module.state_dict()
        for name, value in weights(version).items():
            live[name].copy_(value)

    def abandon(self) -> None:
        return


class DataAssignment(InPlaceCopy):
    """Bug: every tensor of the live module gets new memory through `.data`."""

    def swap(self, version: int) -> None:
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, value in weights(version).items():
            tensors[name].data = value


class TwoBuffers:
    """Bug: two modules take turns, and the one that was replaced is overwritten while passes still run in it."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        self._live = Oracle(version, boundary=boundary)
        self._spare = Oracle(version, boundary=boundary)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._live(x)
        return output

    def swap(self, version: int) -> None:
        state = self._spare.state_dict()
        for name, value in weights(version).items():
            state[name].copy_(value)
        self._live, self._spare = self._spare, self._live

    def abandon(self) -> None:
        return


class LateSwap:
    """Bug: a swap returns before what it made can be seen; no pass is torn, but passes are in an older version."""

    def __init__(self, version: int) -> None:
        self._live = self._next = Oracle(version)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._live(x)
        return output

    def swap(self, version: int) -> None:
        self._live, self._next = self._next, Oracle(version)

    def abandon(self) -> None:
        return


class ForgottenPin(SlotEngine):
    """Bug: hotglm's own slot, but an arena is reused as soon as no publication names it, whoever still runs in it."""

    def __init__(
        self,
        version: int,
        *,
        boundary: Callable[[int], object] | None = None,
        after_update: Callable[[hotglm.ModuleSlot], object] | None = None,
    ) -> None:
        super().__init__(version, boundary=boundary, after_update=after_update)
        forget_pins(self.slot)


def forget_pins(slot: hotglm.ModuleSlot) -> None:
    """Make the arenas of a slot, which was not updated yet, forget to ask whether their lease is dead."""
    slot._core.spares.pool = _ForgetfulPool(slot._core.admission)
    slot._core.spares.__class__ = _ForgetfulSpares


class _ForgetfulSpares(Spares):
    __slots__ = ()

    def wait_until_free(self, retired: Retired, *, timeout_s: float, cancellation: Cancellation) -> bool:
        return True


class _ForgetfulArena(Arena):
    __slots__ = ()

    def lease(self) -> Lease:
        self._lease = None
        return super().lease()


class _ForgetfulPool(ArenaPool):
    def __init__(self, admission: Admission) -> None:
        super().__init__()
        self._admission = admission

    def find_free(self, nbytes: int, regions: tuple[Region, ...] = ()) -> Arena | None:
        live = self._admission.live
        named = [generation.arena for generation in (live.generation, *live.held)]
        return next((a for a in self._arenas if a.nbytes >= nbytes and all(a is not other for other in named)), None)

    def allocate(self, nbytes: int, regions: tuple[Region, ...] = ()) -> Arena:
        arena = super().allocate(nbytes)
        arena.__class__ = _ForgetfulArena
        return arena

    def give_up(self, arena: Arena) -> None:
        return


class ReaderPreferringLock:
    """Bug: a reader-writer lock that lets readers in while a writer waits; under steady load it waits for ever."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        self.module = Oracle(version, boundary=boundary)
        self._changed = threading.Condition()
        self._num_readers = 0
        self._abandoned = False

    def call(self, x: torch.Tensor) -> torch.Tensor:
        with self._changed:
            self._num_readers += 1
        try:
            output: torch.Tensor = self.module(x)
            return output
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    def swap(self, version: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num_readers == 0 or self._abandoned)
            if not self._abandoned:
                self.module.load_state_dict(weights(version))

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class PlainGate(Gate):
    """A gate without slots, whose methods can be replaced."""


def plant_gate(slot: hotglm.ModuleSlot) -> PlainGate:
    """Give a slot that swaps in place, before its first pass, a gate that can be broken; return it."""
    admission = slot._admission
    assert isinstance(admission, InPlaceAdmission)
    admission.gate = gate = PlainGate()
    admission.refresh_call()
    return gate


class OpenGate(SlotEngine):
    """Bug: the gate opens as soon as nobody is inside, and the bytes are written after that."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        super().__init__(version, boundary=boundary, swap=hotglm.InPlace())
        gate = plant_gate(self.slot)
        wait_empty = gate.wait_empty

        def wait_and_open(closing: Closing, *, timeout_s: float, give_up: Callable[[], bool]) -> bool:
            found = wait_empty(closing, timeout_s=timeout_s, give_up=give_up)
            gate.open(closing)
            return found

        gate.wait_empty = wait_and_open  # type: ignore[method-assign]


class NoWait(SlotEngine):
    """Bug: newcomers are held back, but nobody waits for those inside."""

    def __init__(self, version: int, *, boundary: Callable[[int], object] | None = None) -> None:
        super().__init__(version, boundary=boundary, swap=hotglm.InPlace())
        plant_gate(self.slot).wait_empty = lambda closing, **options: True  # type: ignore[method-assign]
