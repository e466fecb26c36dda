"""Low-priority threads for staging: they take the cores that the service leaves.

Rules this module keeps:

- Threads live as long as one piece of work and are joined before it returns or raises; none is left behind (P9).
- The first failure stops the others at their next task; it is the one that is raised.
- A worker lowers its own priority, never anybody else's, and computes in its own thread alone.
- Python code in a worker runs in short pieces between calls that release the GIL. Where a stretch of plain Python
  cannot be avoided, `yield_gil_when_due` cuts it: a thread that computes in Python holds the GIL for a whole switch
  interval (5 ms), and the service's pass would wait that long at every torch call.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from hotglm import seam
from hotglm.errors import ThreadStartError
from hotglm.problem import describe_exception

__all__ = [
    "Cancellation",
    "computing_alone",
    "count_cores",
    "find_owner",
    "lower_priority",
    "run_tasks",
    "start_thread",
    "yield_gil",
    "yield_gil_when_due",
]


class Cancellation:
    """A flag that stops a stage at its next task, with the error it is to raise."""

    __slots__ = ("_reason",)

    def __init__(self) -> None:
        """Start uncancelled."""
        self._reason: BaseException | None = None

    def cancel(self, reason: BaseException) -> None:
        """Ask for a stop. The first reason stays."""
        if self._reason is None:
            self._reason = reason

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for a stop."""
        return self._reason is not None

    def raise_if_cancelled(self) -> None:
        """Raise the reason, if there is one."""
        if self._reason is not None:
            raise self._reason


def count_cores() -> int:
    """Return how many cores this process may use (its affinity, not the machine's size)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def yield_gil() -> None:
    """Let a waiting thread have the GIL now."""
    # Not `sched_yield` or an empty `poll`: those give the GIL back before a waiting thread has woken up, which then
    # waits for another switch interval. `sleep(0)` lasts as long as the kernel's timer slack, some 50 us.
    time.sleep(0)


_QUANTUM_S = 0.0005
_latest = threading.local()


def yield_gil_when_due() -> None:
    """Let a waiting thread have the GIL if this one may have held it for half a millisecond; cheap to call often."""
    if time.perf_counter() - getattr(_latest, "yielded_s", 0.0) >= _QUANTUM_S:
        yield_gil()
        _latest.yielded_s = time.perf_counter()


def lower_priority(nice: int) -> None:
    """Raise the calling thread's nice value by `nice` where the system has one per thread (Linux); else do nothing."""
    if nice <= 0 or not hasattr(os, "setpriority"):
        return
    try:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + nice))
    except OSError:  # a sandbox that forbids it: staging is then as loud as any thread, not wrong
        pass


@contextlib.contextmanager
def computing_alone() -> Iterator[None]:
    """Have torch compute in the calling thread alone; change nothing for any other thread.

    A worker is one of several, and the teams of threads that each would have would wait for each other, spinning, on
    the cores of the service. `torch.set_num_threads` is process-wide; OpenMP's own setting is the thread's. Where
    torch was built without OpenMP, or hides it, nothing happens.
    """
    if _omp is None:
        yield
        return
    num_threads = torch.get_num_threads()  # first: torch sets OpenMP up for a thread when it is first asked
    _omp(1)
    try:
        yield
    finally:
        _omp(num_threads)


def _find_omp() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).omp_set_num_threads
    except (OSError, AttributeError):
        return None


_omp = _find_omp()


_START_S = 10.0
"""How long a thread may take to begin before it is taken for one that died on the way."""


class _Began(threading.Event):
    """Set by a thread as it begins. One without memory for its first frame dies before it can, and says so nowhere.

    `Thread.start` waits for this without end (CPython 3.11 to 3.14), and so would the service; here the wait ends.
    """

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(_START_S if timeout is None else timeout):
            return True
        raise RuntimeError("the thread did not begin")


class Worker(threading.Thread):
    """A daemon thread that knows for whom it works; a thread that it starts works for the same."""

    def __init__(self, target: Callable[[], None], *, name: str, owner: object | None) -> None:
        """Take what to run; `owner` is that of the calling thread where it is None."""
        super().__init__(target=target, name=name, daemon=True)
        self.owner = owner if owner is not None else find_owner()
        self.is_given_up = False
        if isinstance(getattr(self, "_started", None), threading.Event):
            self._started = _Began()

    def run(self) -> None:
        """Work, unless whoever started it has given it up because it did not begin in time."""
        if not self.is_given_up:
            super().run()


def find_owner() -> object | None:
    """Return for whom the calling thread works, None for a thread that is not ours."""
    return getattr(threading.current_thread(), "owner", None)


def start_thread(target: Callable[[], None], *, name: str, owner: object | None = None) -> threading.Thread:
    """Start a daemon thread that works for `owner`, or for the same as the calling one.

    Raises:
        ThreadStartError: the system has no thread to give.
    """
    thread = Worker(target, name=name, owner=owner)
    try:
        seam.active.start_thread(thread)
    except (RuntimeError, OSError, MemoryError) as error:
        thread.is_given_up = True
        raise ThreadStartError(
            f"Expected to start thread {name!r}, got {describe_exception(error)}.",
            remedy="raise the limit on threads (RLIMIT_NPROC, the container's pids limit) and stage again.",
        ) from error
    return thread


def run_tasks(
    tasks: Iterable[Callable[[], None]],
    *,
    num_threads: int,
    nice: int,
    cancellation: Cancellation,
    name: str,
    within: Callable[[Cancellation], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Run `tasks` on `num_threads` threads and return when all have ended.

    Tasks start in order. On failure no further task starts, the running ones finish, and the first failure is raised.
    Without `nice`, the calling thread is one of them; with it, it waits, because its own priority is not lowered.
    Each of them works in a context of its own, made by `within`.

    Raises:
        ThreadStartError: not even one thread could be started, or those that were died.
        BaseException: whatever a task raised first, or the cancellation's reason.
    """
    work = _Work(tasks, cancellation=cancellation, within=within)
    threads: list[threading.Thread] = []
    try:
        for index in range(0 if nice else 1, min(max(1, num_threads), work.num_tasks)):
            thread = start_thread(functools.partial(work.run, nice=nice), name=f"{name}-{index}")
            threads.append(thread)  # one by one, so that those that did start are joined
    except ThreadStartError as failure:
        work.failures.append(failure)
    if not nice:
        work.run(nice=0)
    for thread in threads:
        thread.join()
    work.raise_unless_done(name)


class _Work:
    """Tasks that several threads take in order, until they are done or one has failed.

    Methods and no closures: `clear_frames` cannot reach what the function of a frame has captured, and a failure that
    somebody keeps would keep tasks, and with them memory that they were to write.
    """

    def __init__(
        self,
        tasks: Iterable[Callable[[], None]],
        *,
        cancellation: Cancellation,
        within: Callable[[Cancellation], contextlib.AbstractContextManager[object]],
    ) -> None:
        self.failures: list[BaseException] = []
        self.done: list[None] = []  # one for each task; a thread that dies unheard of leaves some out
        self._cancellation = cancellation
        self._within = within
        self._todo = collections.deque(tasks)
        self.num_tasks = len(self._todo)

    def raise_unless_done(self, name: str) -> None:
        if self.failures:
            raise self.failures[0]
        if len(self.done) < self.num_tasks:
            raise ThreadStartError(
                f"Expected threads {name!r} to do {self.num_tasks} tasks, got {len(self.done)} before they died.",
                remedy="look at the standard error of this process, which says how; memory has most likely run out.",
            )

    def run(self, *, nice: int) -> None:
        """Run tasks until there are none, or one has failed."""
        try:
            lower_priority(nice)
            with computing_alone(), self._within(self._cancellation):
                while not self.failures and (task := self._take()) is not None:
                    self._cancellation.raise_if_cancelled()
                    task()
                    self.done.append(None)
        except BaseException as failure:  # noqa: BLE001 - raised again by run_tasks, in its caller's thread
            self.failures.append(failure)

    def _take(self) -> Callable[[], None] | None:
        try:
            return self._todo.popleft()
        except IndexError:
            return None
