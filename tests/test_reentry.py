"""Updates from where one does not expect them: inside passes, hooks, callbacks, checks and finalisers (F07, F20).

Every combination either works or is refused with a typed error; none may wait for itself. Each runs in a thread of its
own that must end.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import hotglm
from hotglm import seam
from hotglm.errors import ConflictError, DiscardedError, ReentrantError, SupersededError
from hotglm.seam import Seam
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, run_in_thread, weights

OLD, LIVE, NEW, LATER = PRIMES[:4]


class World:
    """A slot with a live version, one to go back to, and one staged; and what was done to it from inside."""

    def __init__(self) -> None:
        self.inside: Callable[[], object] | None = None
        self.outcome: object = None
        memory = hotglm.MemoryPolicy(max_copies=4, drain_timeout_s=0.01)
        self.slot = hotglm.ModuleSlot(
            Oracle(OLD, boundary=self.at_layer),
            name="oracle",
            version=name_version(OLD),
            policy=LEAN,
            memory=memory,
            refresh=self.at_refresh,
        )
        self.place = ""
        self.update(LIVE)
        self.staged: hotglm.Staged | None = None

    def update(self, prime: int, **options: Any) -> object:
        return self.slot.update(weights(prime), version=name_version(prime), **options)

    def stage(self, prime: int) -> hotglm.Staged:
        return self.slot.stage(weights(prime), version=name_version(prime))

    def at(self, place: str) -> None:
        """Do what is to be done inside, once, if this is the place for it."""
        if place == self.place and self.inside is not None:
            action, self.inside = self.inside, None
            try:
                self.outcome = action()
            except hotglm.HotglmError as error:
                self.outcome = error

    # Bound methods of somebody else's object: a copy of the module shares them.
    def at_layer(self, layer: int) -> None:
        self.at("layer" if layer == 2 else "")

    def at_hook(self, module: nn.Module, args: object) -> None:
        self.at("hook")

    def at_refresh(self, module: nn.Module) -> None:
        self.at("refresh")

    def at_check(self, module: nn.Module) -> None:
        self.at("check")

    def at_event(self, event: object) -> None:
        self.at("subscriber")

    def at_progress(self, progress: object) -> None:
        self.at("progress")


def enter(world: World, place: str) -> None:
    """Do what leads to `place`."""
    slot = world.slot
    match place:
        case "layer":
            slot(INPUT)
        case "hook":
            slot.live.module.register_forward_pre_hook(world.at_hook)
            slot(INPUT)
        case "session":
            with slot.acquire() as generation:
                world.at("session")
                assert read_version(generation.module(INPUT)) == LIVE
        case "subscriber":
            slot.subscribe(world.at_event)
            slot.confirm()
        case _:
            policy = replace(LEAN, checks=(world.at_check,))
            world.update(LATER, policy=policy, progress=world.at_progress, expected=slot.live.number)


def act(world: World, operation: str) -> object:
    slot = world.slot
    match operation:
        case "update":
            return world.update(NEW)
        case "stage":
            return world.stage(NEW)
        case "commit":
            assert world.staged is not None
            return slot.commit(world.staged)
        case "rollback":
            return slot.rollback()
        case "close":
            slot.close()
            return None
        case _:
            return (slot.status(), slot.confirm(), slot.find_holders(), slot(INPUT), slot.version, slot.history)


PLACES = ["layer", "hook", "session", "subscriber", "progress", "check", "refresh"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("operation", ["update", "stage", "commit", "rollback", "close", "look"])
def test_no_operation_waits_for_the_pass_or_stage_it_comes_from(place: str, operation: str) -> None:
    """F07: an operation from inside a pass or a callback works, or is refused with a typed error, and never hangs."""
    world = World()
    slot = world.slot
    if operation == "commit":
        world.staged = world.stage(NEW)
    world.place, world.inside = place, lambda: act(world, operation)

    def run() -> object:
        try:
            enter(world, place)
        except hotglm.HotglmError as error:
            return error
        return None

    outer = run_in_thread(run)
    assert world.inside is None, "the place was not reached"
    inner = world.outcome
    if place in ("layer", "hook", "session", "subscriber"):
        assert outer is None
        assert not isinstance(inner, BaseException)
        assert read_version(slot(INPUT)) == {"update": NEW, "commit": NEW, "rollback": OLD}.get(operation, LIVE)
    else:  # inside a stage: what would wait for that stage is refused, what changes what is live makes it conflict
        if operation in ("update", "stage", "close"):
            assert isinstance(inner, ReentrantError)
        if operation == "commit":  # the stage that it comes from took its place
            assert isinstance(inner, SupersededError | DiscardedError)
        if operation == "rollback":
            assert isinstance(outer, ConflictError)
            assert read_version(slot(INPUT)) == OLD
        else:
            assert outer is None or operation == "close"
            assert read_version(slot(INPUT)) == (LATER if outer is None else LIVE)
    if operation != "close":
        run_in_thread(lambda: world.update(PRIMES[5]))
        assert read_version(slot(INPUT)) == PRIMES[5]


def test_a_nested_pass_may_swap_again_and_again() -> None:
    """F07: passes that swap, nested eight deep, each end in the version they began in."""
    seen: list[int] = []

    def at_layer(layer: int) -> None:
        if layer == 1 and len(seen) < 8:
            prime = PRIMES[len(seen) + 1]
            seen.append(prime)
            slot.update(weights(prime), version=name_version(prime))
            assert read_version(slot(INPUT)) == prime

    memory = hotglm.MemoryPolicy(drain_timeout_s=0.0)
    slot = hotglm.ModuleSlot(
        Oracle(PRIMES[0], boundary=at_layer), name="oracle", version="1.0.0", policy=LEAN, memory=memory
    )
    assert run_in_thread(lambda: read_version(slot(INPUT))) == PRIMES[0]
    assert seen == list(PRIMES[1:9])


# -- F20: finalisers ---------------------------------------------------------------------------------------------------


class AtCollection:
    """Runs an action inside collections of the garbage collector, which run inside allocations, as finalisers do."""

    def __init__(self, action: Callable[[], object], *, num_actions: int, anywhere: bool) -> None:
        self.log: list[object] = []
        self._anywhere = anywhere
        self._thread: int | None = None
        self._action = action
        self._left = num_actions
        self._chance = random.Random(20)

    def __call__(self, phase: str, info: object) -> None:
        wanted = phase == "stop" and self._left > 0 and self._thread in (None, threading.get_ident())
        if wanted and self._chance.random() < 0.2:
            self._left -= 1
            try:
                self.log.append(self._action())
            except hotglm.HotglmError as error:
                self.log.append(error)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Collect the youngest generation at every allocation of a container, and act there."""
        thresholds = gc.get_threshold()
        self._thread = None if self._anywhere else threading.get_ident()
        gc.callbacks.append(self)
        gc.set_threshold(1, 10**6, 10**6)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(self)


OPERATIONS = ["pass", "session", "look", "rollback", "confirm", "commit", "discard", "stage", "update", "subscribe"]


def finalise(slot: hotglm.ModuleSlot, staged: list[hotglm.Staged], operation: str) -> object:
    source, version = weights(PRIMES[9]), name_version(PRIMES[9])
    actions: dict[str, Callable[[], object]] = {
        "pass": lambda: slot(INPUT),
        "session": lambda: slot.acquire().__exit__(),
        "look": lambda: (slot.status(), slot.history, slot.version),
        "rollback": slot.rollback,
        "confirm": slot.confirm,
        "commit": lambda: slot.commit(staged[-1]),
        "discard": lambda: [staged[-1].discard()],  # looked up when it is done, not now
        "subscribe": lambda: [slot.subscribe(print)()],
        "stage": lambda: slot.stage(source, version=version),
        "update": lambda: slot.update(source, version=version),
    }
    return actions[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_finaliser_may_run_anywhere(operation: str) -> None:
    """F20: whatever a finaliser asks of the slot, at any allocation inside any operation, nothing waits for itself."""
    memory = hotglm.MemoryPolicy(drain_timeout_s=0.0)
    slot = hotglm.ModuleSlot(Oracle(OLD), name="oracle", version=name_version(OLD), policy=LEAN, memory=memory)
    staged: list[hotglm.Staged] = []
    # In the stage's own threads a finaliser must not stage: see the test below.
    anywhere = operation not in ("stage", "update")
    action = functools.partial(finalise, slot, staged, operation)
    at_collection = AtCollection(action, num_actions=150 if anywhere else 40, anywhere=anywhere)

    def step(action: Callable[[], object]) -> None:
        try:
            action()
        except hotglm.HotglmError:
            pass  # a finaliser came in between: a conflict, a spent stage or no rollback target, typed
        with slot.acquire() as generation:
            assert str(generation.version) == name_version(read_version(generation.module(INPUT)))

    def work() -> None:
        staged.append(slot.stage(weights(NEW), version=name_version(NEW)))
        with at_collection.armed():
            for prime in PRIMES[1:5]:
                source, version = weights(prime), name_version(prime)
                step(functools.partial(lambda s, v: staged.append(slot.stage(s, version=v)), source, version))
                step(lambda: slot.commit(staged[-1]))
                step(functools.partial(slot.update, source, version=version))
                step(slot.rollback)
                step(slot.confirm)
                step(slot.subscribe(lambda event: None))

    run_in_thread(work, timeout_s=60)
    assert len(at_collection.log) >= 40
    staged.clear()
    slot.update(weights(PRIMES[20]), version=name_version(PRIMES[20]))
    assert read_version(slot(INPUT)) == PRIMES[20]


class FinaliserInStage(Seam):
    """Runs an action in the thread of the first stage before its work, as a finaliser that is collected there would."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.outcomes: list[object] = []
        self._action = action
        self._is_used = False

    def start_thread(self, thread: threading.Thread) -> None:
        run = thread.run

        def act() -> None:
            try:
                self.outcomes.append(self._action())
            except hotglm.HotglmError as error:
                self.outcomes.append(error)
            run()

        if thread.name.startswith("hotglm-stage") and not self._is_used:
            self._is_used = True
            thread.run = act  # type: ignore[method-assign]
        super().start_thread(thread)


def test_a_finaliser_in_the_stages_own_thread_may_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """F20: a finaliser that asks for a stage in a thread that a stage of its slot waits for is refused, not stuck."""
    slot = hotglm.ModuleSlot(Oracle(OLD), name="oracle", version=name_version(OLD), policy=LEAN)
    started = FinaliserInStage(lambda: slot.stage(weights(NEW), version=name_version(NEW)))
    monkeypatch.setattr(seam, "active", started)
    run_in_thread(lambda: slot.update(weights(LIVE), version=name_version(LIVE)), timeout_s=2)
    assert isinstance(started.outcomes[0], ReentrantError)
    assert read_version(slot(INPUT)) == LIVE


def test_a_weakref_callback_may_confirm() -> None:
    """F20: a callback that runs while an update drops the last reference to an old version may change the slot."""
    slot = hotglm.ModuleSlot(Oracle(OLD), name="oracle", version=name_version(OLD), policy=LEAN)
    called: list[object] = []
    references = []
    for prime in PRIMES[1:8]:
        references.append(weakref.ref(slot.live.module, lambda dead: called.append(slot.confirm())))
        run_in_thread(functools.partial(slot.update, weights(prime), version=name_version(prime)))
        assert read_version(slot(INPUT)) == prime
    assert len(called) >= 4


def test_a_collected_session_lets_its_generation_go() -> None:
    """F20: a session that is garbage in a circle keeps memory until it is collected, and no lock ever."""
    memory = hotglm.MemoryPolicy(drain_timeout_s=0.01)
    slot = hotglm.ModuleSlot(Oracle(OLD), name="oracle", version=name_version(OLD), policy=LEAN, memory=memory)
    circle: list[object] = [slot.acquire()]
    circle.append(circle)
    del circle
    for prime in PRIMES[1:5]:
        slot.update(weights(prime), version=name_version(prime))
        assert read_version(slot(INPUT)) == prime
    gc.collect()
    slot.wait_drained(timeout_s=10)
