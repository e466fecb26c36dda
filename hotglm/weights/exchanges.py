"""One exchange of all that a swap in place exchanges, on whichever devices it lies.

Rules this module keeps: the parts lie in different memory, so no order holds between them; devices are given their work
first and are waited for last; what was begun anywhere is undone everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hotglm.weights import places
from hotglm.weights.arena import Arena
from hotglm.weights.device import Device, Event
from hotglm.weights.device_exchange import DeviceExchange, wait_for_work
from hotglm.weights.exchange import Exchange, Pair
from hotglm.weights.host_exchange import HostExchange
from hotglm.weights.pinned_arena import PinnedArena
from hotglm.weights.split_arena import SplitArena

__all__ = ["Exchanges", "make_exchanges"]


class _OnDevice(Protocol):
    """What is exchanged on one device."""

    device: Device
    nbytes: int
    buffer_nbytes: int

    def submit(self) -> Event: ...
    def undo(self) -> None: ...
    def settle(self) -> None: ...


class Exchanges:
    """An exchange by the processor, and one for each device."""

    def __init__(self, here: Exchange, devices: Sequence[_OnDevice]) -> None:
        """Take the parts; see `make_exchanges`."""
        self._here = here
        self._devices = tuple(devices)

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return self._here.nbytes + sum(part.nbytes for part in self._devices)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes held beside the tensors while it runs."""
        return self._here.buffer_nbytes + sum(part.buffer_nbytes for part in self._devices)

    def wait_for_work(self, *, timeout_s: float) -> None:
        """Wait until what devices were given so far is done, and the live tensors may be written.

        Raises:
            StageFailedError: it is not done in that time, or a graph is being captured, so that nobody can tell.
        """
        wait_for_work([part.device for part in self._devices], timeout_s=timeout_s)

    def run(self) -> None:
        """Exchange everything, and wait until it is done. Raises what fails; then `undo` it."""
        events = [part.submit() for part in self._devices]
        self._here.run()
        for event in events:
            event.wait()

    def undo(self) -> None:
        """Give each side back what it held, and wait until it has it; may be called again if it fails."""
        for part in self._devices:
            part.undo()
        self._here.undo()

    def settle(self) -> None:
        """After `run`, bring what was put aside home to the images; may be called again if it fails."""
        for part in self._devices:
            part.settle()


def make_exchanges(pairs: Sequence[Pair], *, arena: Arena | None, num_threads: int | None) -> Exchanges:
    """Return the exchange of all pairs, made ready to run.

    Args:
        pairs: which overlap each other nowhere; the images of those on devices are there, or all in one pinned arena.
        arena: that of the images.
        num_threads: of the processor's part; see `Exchange`.

    Raises:
        MemoryPlanError: a device has no memory for what is exchanged by way of a buffer.
    """
    here: list[Pair] = []
    parts: dict[str, tuple[Device, list[Pair]]] = {}
    for pair in pairs:
        device = places.active.find(pair.live)
        if device is None:
            here.append(pair)
        else:
            parts.setdefault(device.name, (device, []))[1].append(pair)
    if isinstance(arena, PinnedArena):
        hosted = [HostExchange(device, of_device, arena=arena) for device, of_device in parts.values()]
        return Exchanges(Exchange(here, num_threads=num_threads), hosted)
    blocks = {block.device.name: block for block in arena.blocks} if isinstance(arena, SplitArena) else {}
    devices = [DeviceExchange(device, of_device, block=blocks.get(name)) for name, (device, of_device) in parts.items()]
    return Exchanges(Exchange(here, num_threads=num_threads), devices)
