"""The blocks of device memory that hotglm took from torch's allocator, and which streams may still use them.

Rules this module keeps:

- A block is noted as used on every stream, those included that hotglm is told of later, so that torch's allocator gives
  its memory to nobody before they are done with it.
- A block never goes where the driver cannot record events any more: at the end of the process, in a forked child, after
  an error that ended the context. Torch's allocator would raise in a destructor, which ends the process by a signal
  (`terminate called ... insert_events`). It is kept for ever instead; the memory goes with the process.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Blocks", "keep_for_ever"]


class Blocks:
    """The blocks of one device. Any thread may call any method, without a lock."""

    def __init__(self) -> None:
        """Know none."""
        self._storages: dict[int, StorageWeakRef] = {}  # changed by one atomic step at a time
        self._numbers = itertools.count()
        _all.append(self)

    def add(self, block: torch.Tensor, find_streams: Callable[[], Iterable[torch.cuda.Stream]]) -> None:
        """Note a block, and that it may be used on all streams that are known once it is noted."""
        self._storages[next(self._numbers)] = StorageWeakRef(block.untyped_storage())  # type: ignore[no-untyped-call]
        for number, known in list(self._storages.items()):
            if known.expired():  # type: ignore[no-untyped-call]
                self._storages.pop(number, None)
        _record(block, find_streams())

    def note(self, stream: torch.cuda.Stream) -> None:
        """Note that every block may be used on a further stream."""
        for storage in self.find():
            _record(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), [stream])

    def find(self) -> Iterator[torch.UntypedStorage]:
        """Yield the memory of each block that still exists."""
        for reference in list(self._storages.values()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                yield storage


def keep_for_ever() -> None:
    """Let no block go any more, in this process."""
    for blocks in tuple(_all):
        for storage in blocks.find():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(storage))  # no list: that would be emptied in the end


def _record(block: torch.Tensor, streams: Iterable[torch.cuda.Stream]) -> None:
    for stream in streams:
        block.record_stream(stream)


_all: list[Blocks] = []

atexit.register(keep_for_ever)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=keep_for_ever)
