"""Arenas: one block of private, pre-faulted memory that holds all tensors of a generation as views.

Rules this module keeps:

- The memory is anonymous and private: nothing that happens to a file can reach it (P5).
- Memory is lent by **lease**. Every tensor made from a lease holds it, through its storage; so does everything that
  torch derives from such a tensor: views, outputs that alias it, autograd graphs. The lease dies when the last of
  them does, and not before, and then the arena is free. That is the whole reuse rule; there is no count to forget
  (`[Note: lease]`).
- A lease is never revoked. An arena whose lease outlives its use is dropped by its owner, and unmaps itself when the
  last holder lets go.

[Note: lease]
A lease is a ctypes array laid over the arena's memory; `torch.frombuffer` takes a strong reference to it and gives it
back when the storage is destroyed. A weak reference to the lease is therefore dead exactly when no storage over the
memory is left, whoever held it: a pass in a C++ frame, a session, a kept module, parameter or bound method, an output
view, a saved tensor of a backward pass. CPython drops the last reference at once; nothing here needs the garbage
collector unless the holder itself is part of a reference cycle. Each tensor has a storage of its own, of exactly its
size, so that `torch.save`, `deepcopy` and `safetensors` treat it as an ordinary tensor and not as a window into a
large one. Guarded by `tests/test_arena.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from hotglm import seam
from hotglm.errors import MemoryPlanError
from hotglm.problem import describe_exception
from hotglm.weights.layout import Region

if TYPE_CHECKING:
    from hotglm.weights.seals import Seal

__all__ = ["ALIGNMENT", "Arena", "Lease", "tie"]

ALIGNMENT = 64
"""Bytes to which every tensor in an arena is aligned: a cache line, and the widest vector load of a CPU."""


class Lease:
    """The right to make tensors over one arena; lives as long as any of them.

    The object itself is only a handle for making views. What keeps the arena taken is `_memory`.
    """

    __slots__ = ("_memory", "nbytes")

    def __init__(self, memory: ctypes.Array[ctypes.c_char], *, nbytes: int) -> None:
        """Wrap the ctypes array that overlays the arena."""
        self._memory = memory
        self.nbytes = nbytes

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds this lease any more; holding the function holds nothing."""
        return weakref.ref(self._memory)

    def tie_to(self, holder: object) -> None:
        """Keep the lease for as long as `holder` lives, too.

        Storages can be moved out of the arena under a pass that reads them: `share_memory_`, `set_`, and so everything
        that sends a tensor to another process. The pass holds its module, and so the memory it began in.
        """
        tie(self._memory, holder)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a writable window of `nbytes` from `offset`; it holds the lease like a tensor does."""
        return memoryview(self._memory).cast("B")[offset : offset + nbytes]

    def settle(self) -> None:
        """Wait until what was submitted to devices for this lease is done: on the CPU there is nothing to wait for."""

    def settle_passes(self) -> None:
        """Wait until all that was submitted to those devices by anybody is done, passes of a stage included."""

    def submitting(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which torch's own writes to this memory come after what was queued over it before."""
        return contextlib.nullcontext()

    def view(
        self, offset: int, *, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a tensor over the arena from byte `offset`, with a storage of its own.

        Args:
            offset: first byte; a multiple of the item size.
            dtype: element type.
            shape: sizes; a zero among them gives an empty tensor that holds no memory.
            stride: in elements; contiguous where None.

        Returns:
            A CPU tensor without gradient. Its storage holds the lease.
        """
        numel = 1
        for size in shape:
            numel *= size
        if numel == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if stride is None:
            return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset).view(tuple(shape))
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        flat = torch.frombuffer(self._memory, dtype=dtype, count=extent, offset=offset)
        return flat.as_strided(tuple(shape), tuple(stride))


class _Tie(weakref.ref[object]):
    """A weak reference to a holder, which keeps a lease's memory until the holder dies and `_ties` forgets it.

    No `weakref.finalize`: that is Python, and a Ctrl-C that arrives as it begins makes it keep its arguments for ever
    (tests/test_commit_faults.py). From the holder's death to `set.discard` everything here is C.
    """

    __slots__ = ("memory",)
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    memory: object


_ties: set[_Tie] = set()


def tie(memory: object, holder: object) -> None:
    """Keep `memory` for as long as `holder` lives."""
    made = _Tie(holder, _ties.discard)
    made.memory = memory
    _ties.add(made)


class Arena:
    """One block of private memory, lent to one generation at a time.

    Attributes:
        nbytes: its size.
        left: what the last load left where, by offset: a hint, to be held against the bytes that are there.
    """

    __slots__ = ("__weakref__", "_lease", "_memory", "left", "nbytes")

    def __init__(self, nbytes: int) -> None:
        """Map `nbytes`, at least one page. The pages are faulted in by `populate`, or by the first write.

        Raises:
            MemoryPlanError: the system has no such memory to give.
        """
        self.nbytes = nbytes
        self.left: Mapping[int, Seal] = {}
        self._lease: weakref.ref[ctypes.Array[ctypes.c_char]] | None = None
        try:
            self._memory = seam.active.map_anonymous(max(nbytes, 1))
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise MemoryPlanError(
                f"Expected {nbytes} bytes of memory for the spare, got none: {describe_exception(error)}.",
                remedy="free memory, raise the process's limit, or lower MemoryPolicy.max_copies.",
            ) from error

    @property
    def address(self) -> int:
        """Address of the first byte, for naming what lies in it."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    @property
    def watch(self) -> Callable[[], object | None]:
        """A function that returns None once nobody holds the latest lease any more; see `Lease.watch`."""
        return self._lease if self._lease is not None else lambda: None

    @property
    def is_free(self) -> bool:
        """Whether no tensor over this memory is left anywhere in the process."""
        return self._lease is None or self._lease() is None

    def populate(self, start: int, nbytes: int) -> None:
        """Fault a range in now; it is clipped to whole pages inside the arena."""
        page = 4096
        first = start // page * page
        stop = min(-(-(start + nbytes) // page) * page, len(self._memory))
        if stop > first:
            seam.active.populate(self._memory, first, stop - first)

    def fits(self, nbytes: int, regions: Sequence[Region]) -> bool:
        """Tell whether a layout of `nbytes`, all of it the processor's, has room in it."""
        return not regions and self.nbytes >= nbytes

    def lend(self, regions: Sequence[Region]) -> Lease:
        """Lend the memory for a layout that fits; see `lease`."""
        if regions:
            raise RuntimeError("an arena of the processor has no regions")
        return self.lease()

    def lease(self) -> Lease:
        """Lend the memory; what stood in it is anybody's to overwrite from now on.

        Raises:
            RuntimeError: it is lent already (a bug in the caller, never a user's mistake).
        """
        if not self.is_free:
            raise RuntimeError("the arena is still lent; wait until it is free or take another")
        memory = self._overlay()
        self._lease = weakref.ref(memory)
        return Lease(memory, nbytes=self.nbytes)

    def _overlay(self) -> ctypes.Array[ctypes.c_char]:
        """Return an array over the memory, which holds it; see `[Note: lease]`."""
        return (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
