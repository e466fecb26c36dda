"""Threads that work at a pace: pieces, the pauses between them, and what a thread can tell of itself while it works.

Rules this module keeps:

- A thread works at a pace or at will; at will, `rest` returns at once and looks at no clock.
- A piece that kept a core or a copy engine busy for `b` is followed by a pause, so that both last `b / share` in all
  ([Note: yielding] in weights/yielding.py). Pauses too short to sleep for are saved up.
- A pause ends when the stage is cancelled. Nobody rests with a lock in his hands.
- What is opened for a thread is closed when it ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from hotglm.weights.plan import CHUNK_NBYTES
from hotglm.weights.workers import Cancellation
from hotglm.weights.yielding import INTERVAL_S, PaceRecord, Share, Work, Yielding

__all__ = [
    "AT_WILL",
    "PIECE_NBYTES",
    "AtWill",
    "Pace",
    "Senses",
    "cut_work",
    "is_yielding",
    "limit_piece",
    "make_pace",
    "rest",
]

PIECE_NBYTES = 1 << 20
"""Largest piece of a load that yields: some 0.1 ms of copying, or 0.7 ms of hashing."""

_BY_ENGINES = frozenset({Work.UPLOAD, Work.FETCH})
"""What a copy engine does while its thread waits."""

_MIN_PAUSE_S = 0.0005
_SLICE_S = 0.05


# -- senses ------------------------------------------------------------------------------------------------------------


class QueueClock(Protocol):
    """How long one thread has stood in the queue for a core."""

    def read(self) -> float:
        """Return the time so far, in seconds."""
        ...

    def close(self) -> None:
        """Read no more."""
        ...


class _RunQueue:
    """The time that the thread which made this has been ready to run and did not, as Linux counts it; elsewhere 0."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._fd = -1

    def read(self) -> float:
        if self._fd < 0:
            return 0.0
        try:
            return int(os.pread(self._fd, 128, 0).split()[1]) * 1e-9
        except (OSError, ValueError, IndexError):  # a kernel without it, or one that hides it: nothing is sensed
            return 0.0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Senses:
    """What a pace knows of the world; those of the system, or a test's own.

    Attributes:
        now: a clock that only grows, in seconds.
        used: time that the calling thread has been on a core, in seconds.
        open_queue: makes the clock of the calling thread's waits for one.
        sleep: waits for some seconds.
    """

    now: Callable[[], float] = time.perf_counter
    used: Callable[[], float] = time.thread_time
    open_queue: Callable[[], QueueClock] = _RunQueue
    sleep: Callable[[float], object] = time.sleep


# -- pieces ------------------------------------------------------------------------------------------------------------


class AtWill:
    """The pace of a load that takes what it gets."""

    chunk_nbytes = CHUNK_NBYTES
    record: PaceRecord | None = None

    @contextlib.contextmanager
    def working(self, cancellation: Cancellation) -> Iterator[None]:
        """Have the calling thread work at will."""
        del cancellation
        yield


AT_WILL = AtWill()


class Pace:
    """The pace of one stage, shared by its threads.

    Attributes:
        chunk_nbytes: most bytes that are read, and then hashed, at once.
    """

    chunk_nbytes = PIECE_NBYTES

    def __init__(self, policy: Yielding, *, senses: Senses | None = None) -> None:
        """Begin at the smallest share."""
        self.senses = senses or Senses()
        self._lock = threading.Lock()
        self._share = Share(policy, now_s=self.senses.now())
        self._busy_s = self._yielded_s = 0.0

    @property
    def share(self) -> float:
        """The part of the time in which each thread works now."""
        return self._share.value

    @property
    def record(self) -> PaceRecord:
        """What came of it so far."""
        with self._lock:
            return PaceRecord(
                busy_s=self._busy_s,
                yielded_s=self._yielded_s,
                num_intervals=self._share.num_intervals,
                num_contended=self._share.num_contended,
                least_share=self._share.least,
                last_share=self._share.value,
            )

    @contextlib.contextmanager
    def working(self, cancellation: Cancellation) -> Iterator[None]:
        """Have the calling thread work at this pace until the context ends; contexts of one thread may nest."""
        before = getattr(_local, "worker", None)
        _local.worker = worker = _Worker(self, cancellation, self.senses.open_queue())
        try:
            yield
        finally:
            _local.worker = before
            worker.close()

    def note(self, work: Work, nbytes: int, *, wall_s: float, used_s: float, queued_s: float) -> float:
        """Take what a piece took; return how much longer it should have taken at this pace, or less than nothing."""
        busy_s = wall_s if work in _BY_ENGINES else used_s
        with self._lock:
            self._busy_s += busy_s
            self._share.add(work, nbytes, cost_s=busy_s, wall_s=wall_s, used_s=used_s, queued_s=queued_s)
            self._share.decide(self.senses.now())
            return busy_s / self._share.value - wall_s

    def note_pause(self, seconds: float) -> None:
        """Take what was paused."""
        with self._lock:
            self._yielded_s += seconds


class _Worker:
    """One thread, while it works at a pace."""

    def __init__(self, pace: Pace, cancellation: Cancellation, queue: QueueClock) -> None:
        self._pace = pace
        self._cancellation = cancellation
        self._queue = queue
        self._owed_s = 0.0
        self._heard_s = pace.senses.now()
        self._queued_s = queue.read()
        self._begin(Work.OTHER, 0)

    def rest(self, work: Work, nbytes: int) -> None:
        self._owed_s = max(0.0, self._owed_s + self._end_piece())
        if self._owed_s >= _MIN_PAUSE_S:
            self._pause()
        self._begin(work, nbytes)

    def close(self) -> None:
        self._heard_s = -INTERVAL_S  # listen once more
        self._end_piece()
        self._queue.close()

    def _end_piece(self) -> float:
        senses = self._pace.senses
        now_s, used_s = senses.now(), senses.used()
        return self._pace.note(
            self._work,
            self._nbytes,
            wall_s=now_s - self._at_s,
            used_s=used_s - self._used_s,
            queued_s=self._listen(now_s),
        )

    def _listen(self, now_s: float) -> float:
        """Return for how long the thread queued since it was last asked; not at every piece, as it costs the GIL."""
        if now_s - self._heard_s < INTERVAL_S / 2:
            return 0.0
        before, self._heard_s, self._queued_s = self._queued_s, now_s, self._queue.read()
        return self._queued_s - before

    def _begin(self, work: Work, nbytes: int) -> None:
        senses = self._pace.senses
        self._work, self._nbytes = work, nbytes
        self._at_s, self._used_s = senses.now(), senses.used()

    def _pause(self) -> None:
        senses = self._pace.senses
        started_s = now_s = senses.now()
        due_s = started_s + self._owed_s
        while now_s < due_s:
            self._cancellation.raise_if_cancelled()
            senses.sleep(min(due_s - now_s, _SLICE_S))
            now_s = senses.now()
        self._owed_s = 0.0
        self._pace.note_pause(now_s - started_s)


def make_pace(policy: Yielding | None) -> Pace | AtWill:
    """Return the pace that a policy asks for."""
    return AT_WILL if policy is None else Pace(policy)


_local = threading.local()


def is_yielding() -> bool:
    """Tell whether the calling thread works at a pace."""
    return getattr(_local, "worker", None) is not None


def limit_piece(nbytes: int) -> int:
    """Return the size of a piece that the calling thread may work on at once, at most `nbytes`."""
    return min(nbytes, PIECE_NBYTES) if is_yielding() else nbytes


def rest(work: Work = Work.OTHER, nbytes: int = 0) -> None:
    """End the piece of work that the calling thread is at, pause for it, and begin the next.

    Args:
        work: what the next piece is.
        nbytes: of it; 0 where it is not known.

    Raises:
        BaseException: the cancellation's reason.
    """
    worker: _Worker | None = getattr(_local, "worker", None)
    if worker is not None:
        worker.rest(work, nbytes)


_Data = TypeVar("_Data", memoryview, torch.Tensor)


def cut_work(data: _Data, work: Work) -> Iterator[_Data]:
    """Yield flat data, of bytes or elements, in the pieces in which it is worked on, and rest before each.

    A thread that works at no pace is given all of it at once.
    """
    if not is_yielding():
        yield data
        return
    step = max(1, PIECE_NBYTES // data.itemsize)
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        rest(work, piece.nbytes)
        yield piece
