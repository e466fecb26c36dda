"""Files of weights that the benchmarks read, and what the page cache knows of them."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from benchmarks.bench import Bench

__all__ = ["WeightsOnDisk", "drop_cache", "make_weights", "touch_memory", "warm_cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsOnDisk:
    """One file of the weights of a `Stack`.

    Attributes:
        path: of the safetensors file; a pickled one, where there is one, is at `path` + `.pt`.
        nbytes: size that was asked for.
        num_tensors: number of tensors, all of one shape.
    """

    path: str
    nbytes: int
    num_tensors: int


def make_weights(
    bench: Bench, *, nbytes: int, num_tensors: int, seed: int = 1, pickled: bool = False, digested: bool = False
) -> WeightsOnDisk:
    """Write a file of weights, unless an earlier row has; return where it is.

    Args:
        bench: whose directory it goes to.
        nbytes: size of all tensors.
        num_tensors: how many.
        seed: of their values.
        pickled: write what `torch.load` reads as well.
        digested: have `hotglm.save_weights` write it, digests and all, not safetensors.
    """
    name = f"{nbytes}-{num_tensors}-{seed}{'-digested' if digested else ''}.safetensors"
    path = os.path.join(bench.directory, name)
    if not os.path.exists(path) or (pickled and not os.path.exists(f"{path}.pt")):
        with bench.start("benchmarks.models:FileMaker") as maker:
            options = {"seed": seed, "pickled": pickled, "digested": digested}
            maker.ask("make", path=path, nbytes=nbytes, num_tensors=num_tensors, **options)
    return WeightsOnDisk(path=path, nbytes=nbytes, num_tensors=num_tensors)


def touch_memory(nbytes: int) -> None:
    """Take memory, write to every page of it, and give it back.

    A virtual machine gets its memory from the host page by page, and the host takes back what lies free for some
    seconds (free page reporting). Whoever comes first then pays for it; this makes that nobody who is measured.
    """
    if not nbytes:
        return
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, nbytes, mmap.PAGESIZE):
            memory[start] = 1


def warm_cache(path: str) -> None:
    """Read a file once, so that the page cache has it."""
    buffer = bytearray(4 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_cache(path: str) -> None:
    """Make the page cache forget a file that was flushed to disk and that nobody maps."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
