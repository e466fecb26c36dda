"""Work on many tensors at once, the results in order, with a bound on how many are held.

Rules this module keeps: no thread outlives the loop over the results; what one task raises ends it, and no more are
started; tasks that are small together run in the caller's thread.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from hotglm.errors import ThreadStartError
from hotglm.release.hashing import num_hash_threads

__all__ = ["run_ordered"]

_SMALL_NBYTES = 16 * 2**20
"""Up to here threads cost more than they bring."""

T = TypeVar("T")
R = TypeVar("R")


def run_ordered(work: Callable[[T], R], tasks: Sequence[T], *, nbytes: int) -> Iterator[R]:
    """Yield `work(task)` for each task, in their order, computed on all cores.

    At most one result per core waits beside those that are being made, so memory is bounded by what
    `2 * num_hash_threads()` of them take.

    Args:
        work: any thread calls it.
        tasks: what it is called with.
        nbytes: how much all of it is, in bytes.

    Raises:
        ThreadStartError: no thread could be started.
    """
    num_threads = min(num_hash_threads(), len(tasks))
    if num_threads <= 1 or nbytes <= _SMALL_NBYTES:
        yield from map(work, tasks)
        return
    rest = iter(tasks)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="hotglm-delta") as pool:
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for task in itertools.islice(rest, 2 * num_threads):
                waiting.append(_submit(pool, work, task))
            while waiting:
                done = waiting.popleft().result()
                for task in itertools.islice(rest, 1):
                    waiting.append(_submit(pool, work, task))
                yield done
                del done  # before the next is waited for
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, work: Callable[[T], R], task: T) -> Future[R]:
    try:
        return pool.submit(work, task)
    except RuntimeError as error:
        raise ThreadStartError(
            "Expected threads to work on tensors with, got none.", remedy="free threads or memory, and try again."
        ) from error
