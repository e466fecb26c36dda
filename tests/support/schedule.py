"""A deterministic scheduler: every order in which a few threads can reach their stopping points, one order at a time.

An actor is a function that runs in a thread of its own and stops wherever `Schedule.point` is called on its behalf.
Only one actor ever runs, and the explorer chooses which goes on. A schedule is the list of these choices. `explore`
replays the program from its start for each schedule, depth first, until there is no choice left untried (stateless
model checking, as loom and CHESS do it).

Actors that are said to be independent of each other (here: readers, which only read what the swapper writes) are
explored in one order where they follow each other directly, because both orders lead to the same states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["Actor", "Outcome", "Schedule", "explore"]

_LIMIT_S = 30.0


@dataclass(slots=True)
class Actor:
    """One thread of the program under test; what other threads do for it counts as its own steps.

    Attributes:
        name: what to call it in a trace.
        body: what it does.
        independent_of: actors whose steps commute with its own.
        twin_of: an actor that does the same and begins first, so that no schedule runs twice with the names exchanged.
    """

    name: str
    body: Callable[[], object]
    independent_of: frozenset[str] = frozenset()
    twin_of: str | None = None
    go: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    at: str = "start"
    failure: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One schedule that was run: whose steps, where each stopped, and what went wrong."""

    order: tuple[str, ...]
    trace: tuple[str, ...]
    failures: tuple[BaseException, ...]


class Schedule:
    """One run of a program along a prefix of choices; beyond the prefix, the first actor that may run does."""

    def __init__(self, actors: Sequence[Actor], prefix: Sequence[int]) -> None:
        self._actors = list(actors)
        self._prefix = list(prefix)
        self._back = threading.Lock()
        self._current: Actor | None = None
        self.choices: list[tuple[int, int]] = []  # which of how many
        self.order: list[str] = []
        self.trace: list[str] = []

    def point(self, name: str) -> None:
        """Stop the actor that is running until it is chosen again; a call from outside every actor is ignored."""
        actor = self._current
        if actor is None:
            return
        actor.at = name
        self._back.release()
        if not actor.go.acquire(timeout=_LIMIT_S):
            raise TimeoutError(f"{actor.name} was not chosen again at {name}")

    def run(self) -> Outcome:
        """Run every actor to its end."""
        self._back.acquire()
        threads = []
        for actor in self._actors:
            actor.go.acquire()
            threads.append(threading.Thread(target=self._play, args=(actor,), daemon=True))
        for thread in threads:
            thread.start()
        while candidates := self._find_candidates():
            index = self._prefix[len(self.choices)] if len(self.choices) < len(self._prefix) else 0
            self.choices.append((index, len(candidates)))
            self._step(candidates[index])
        for thread in threads:
            thread.join(_LIMIT_S)
        failures = tuple(actor.failure for actor in self._actors if actor.failure is not None)
        return Outcome(order=tuple(self.order), trace=tuple(self.trace), failures=failures)

    def _find_candidates(self) -> list[Actor]:
        ready = [a for a in self._actors if not a.done and (a.twin_of is None or a.twin_of in self.order)]
        if not self.order:
            return ready
        last = self.order[-1]
        position = next(index for index, actor in enumerate(self._actors) if actor.name == last)
        # Of two independent actors that follow each other directly, only the order of `_actors` is explored.
        kept = [a for a in ready if last not in a.independent_of or self._actors.index(a) > position]
        return kept or ready

    def _step(self, actor: Actor) -> None:
        self.order.append(actor.name)
        self._current = actor
        actor.go.release()
        if not self._back.acquire(timeout=_LIMIT_S):
            raise TimeoutError(f"{actor.name} neither stopped nor ended after {actor.at}: {self.trace}")
        self._current = None
        self.trace.append(f"{actor.name}: {actor.at}")

    def _play(self, actor: Actor) -> None:
        if not actor.go.acquire(timeout=_LIMIT_S):
            return
        try:
            actor.body()
        except BaseException as failure:  # noqa: BLE001 - it is the finding
            actor.failure = failure
        actor.done, actor.at = True, "end"
        self._back.release()


def explore(build: Callable[[], tuple[Sequence[Actor], Callable[[Schedule], None]]]) -> Iterator[Outcome]:
    """Yield the outcome of every schedule of a program.

    Args:
        build: makes the program anew: its actors, and a function that is told the schedule before it runs.
    """
    prefix: list[int] | None = []
    while prefix is not None:
        actors, use = build()
        schedule = Schedule(actors, prefix)
        use(schedule)
        yield schedule.run()
        prefix = _next_prefix(schedule.choices)


def _next_prefix(choices: list[tuple[int, int]]) -> list[int] | None:
    while choices:
        index, count = choices.pop()
        if index + 1 < count:
            return [*(index for index, _ in choices), index + 1]
    return None
