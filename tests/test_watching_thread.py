"""Watching in its thread: supervised, closed in bounded time, forked, with events that are lost or cannot be had."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import MissingExtraError, SlotStateError
from hotglm.events import CommittedEvent, Event
from hotglm.release.store import Store
from hotglm.testing.seams import hooked
from hotglm.testing.waiting import wait_until
from hotglm.watching.hints import Hints, find_watch
from hotglm.watching.scanning import Scanner
from hotglm.watching.status import WatchState
from support.scripts import run_script
from support.watched import X, break_release, expected, make_slot, write_weights

FAST = hotglm.WatchPolicy(interval_s=0.02, retry_s=0.02, max_retry_s=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store of 1.0.1 to 1.0.3, of which the first is stable."""
    made = hotglm.open_store(tmp_path / "store", creates=True)
    for number in (1, 2, 3):
        made.publish(write_weights(tmp_path / "sources", number, version=f"1.0.{number}"))
    made.move_label("stable", "1.0.1")
    return made


@pytest.fixture
def slot() -> Iterator[hotglm.ModuleSlot]:
    made = make_slot()
    yield made
    made.close()


def find_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hotglm-watch")]


def test_a_watcher_follows_shows_itself_and_ends(store: Store, slot: hotglm.ModuleSlot) -> None:
    """The function starts it, the slot's status shows it, and when it is closed no thread is left (P9)."""
    with hotglm.watch(slot, store, policy=FAST) as watcher:
        assert watcher.wait_until(version="1.0.1", timeout_s=30)
        store.move_label("stable", "1.0.3")
        assert watcher.wait_until(version="1.0.3", timeout_s=30)
        assert wait_until(lambda: watcher.status().state is WatchState.FOLLOWING)
        assert "following, live 1.0.3" in str(slot.status())
        (shown,) = slot.status().to_dict()["watchers"]
        assert (shown["state"], shown["target"], shown["is_alive"]) == ("following", "1.0.3", True)
    assert find_threads() == []
    assert slot.status().watchers == ()
    assert watcher.status().state is WatchState.CLOSED
    assert not watcher.wait_until(version="1.0.1", timeout_s=30)
    store.move_label("stable", "1.0.1")
    assert str(slot.version) == "1.0.3"


def test_the_constructor_starts_nothing(store: Store, slot: hotglm.ModuleSlot, tmp_path: Path) -> None:
    """A watcher that was only made reads nothing and has no thread; one that was closed does not start."""
    with hooked(lambda kind, _, args: pytest.fail(kind)):
        watcher = hotglm.Watcher(slot, store)
        assert watcher.status().state is WatchState.IDLE
        assert not watcher.status().is_alive
    watcher.close()
    watcher.close()
    with pytest.raises(SlotStateError):
        watcher.start()


def test_a_watcher_starts_once(store: Store, slot: hotglm.ModuleSlot) -> None:
    """E13: started twice it has one thread."""
    watcher = hotglm.watch(slot, store, policy=FAST)
    assert watcher.start() is watcher
    assert len(find_threads()) == 1
    watcher.close()


@pytest.mark.parametrize("failure", [ValueError("surprise"), SystemExit(1), MemoryError(), KeyboardInterrupt()])
def test_a_round_that_raises_is_survived(store: Store, slot: hotglm.ModuleSlot, failure: BaseException) -> None:
    """E12: whatever a round raises, the watcher says so, starts again, and follows."""
    watcher = hotglm.Watcher(slot, store, policy=FAST)
    scan, raising = watcher._engine.scanner.scan, threading.Event()
    raising.set()

    def fail(*args: Any, **more: Any) -> Any:
        if raising.is_set():
            raise failure
        return scan(*args, **more)

    watcher._engine.scanner.scan = fail  # type: ignore[method-assign]  # the planted fault
    with watcher:
        assert wait_until(lambda: watcher.status().counts.crashes >= 3)
        assert watcher.status().is_alive
        raising.clear()
        assert watcher.wait_until(version="1.0.1", timeout_s=30)


def test_closing_while_it_loads_ends_in_bounded_time(store: Store, slot: hotglm.ModuleSlot) -> None:
    """E13: a load that is in the middle of a read is left behind, and nothing of it goes live."""
    reached, wakes = threading.Event(), threading.Event()

    def pause(kind: str, _: int, args: tuple[Any, ...]) -> None:
        if kind == "preadv":
            reached.set()
            wakes.wait(30)

    events: list[Event] = []
    slot.subscribe(events.append)
    with hooked(pause):
        watcher = hotglm.watch(slot, store, policy=FAST)
        assert reached.wait(30)
        watcher.close(timeout_s=0.05)
        wakes.set()
        assert wait_until(lambda: find_threads() == [])
    assert [event for event in events if isinstance(event, CommittedEvent)] == []
    assert str(slot.version) == "1.0.0"


def test_closing_from_inside_a_callback(store: Store, slot: hotglm.ModuleSlot) -> None:
    """E13: a subscriber that closes the watcher in the watcher's own thread does not wait for itself."""
    watcher = hotglm.Watcher(slot, store, policy=FAST)
    slot.subscribe(lambda event: watcher.close() if isinstance(event, CommittedEvent) else None)
    watcher.start()
    assert wait_until(lambda: find_threads() == [], timeout_s=30)
    assert watcher.status().state is WatchState.CLOSED
    assert str(slot.version) == "1.0.1"


def test_a_slot_that_is_closed_ends_its_watcher(store: Store) -> None:
    """Where there is no slot to update, there is nothing to watch."""
    slot = make_slot()
    watcher = hotglm.watch(slot, store, policy=FAST)
    assert watcher.wait_until(version="1.0.1", timeout_s=30)
    slot.close()
    assert wait_until(lambda: not watcher.status().is_alive, timeout_s=30)
    assert watcher.status().state is WatchState.CLOSED


def test_passes_go_on_while_it_fails(store: Store, slot: hotglm.ModuleSlot) -> None:
    """P2: bad bytes, a store that vanishes and a label that leads nowhere change no answer, bit for bit."""
    answers: list[bool] = []
    stop = threading.Event()

    def serve() -> None:
        right = expected(1)
        with torch.no_grad():
            while not stop.wait(0.001):
                answers.append(slot(X).equal(right))

    with hotglm.watch(slot, store, policy=FAST) as watcher:
        assert watcher.wait_until(version="1.0.1", timeout_s=30)
        server = threading.Thread(target=serve)
        server.start()
        watcher.pause()
        store.move_label("stable", "1.0.2")
        break_release(store.find_release("1.0.2").path)
        watcher.resume()
        assert wait_until(lambda: watcher.status().state is WatchState.REFUSED, timeout_s=30)
        os.rename(store.path, f"{store.path}-away")
        assert wait_until(lambda: watcher.status().state is WatchState.WAITING, timeout_s=30)
        os.rename(f"{store.path}-away", store.path)
        assert wait_until(lambda: watcher.status().state is WatchState.REFUSED, timeout_s=30)
        stop.set()
        server.join()
    assert len(answers) > 10
    assert all(answers)


# -- events of the operating system ------------------------------------------------------------------------------------


def test_events_make_it_look_at_once(store: Store, slot: hotglm.ModuleSlot) -> None:
    """With events a move is followed long before the next interval, also where the store was replaced (E06)."""
    pytest.importorskip("watchfiles")
    policy = hotglm.WatchPolicy(interval_s=3000, uses_events=True, debounce_s=0.02)
    with hotglm.watch(slot, store.path, policy=policy) as watcher:
        assert watcher.wait_until(version="1.0.1", timeout_s=30)
        assert wait_until(lambda: watcher.status().events == "on")
        store.move_label("stable", "1.0.2")
        assert watcher.wait_until(version="1.0.2", timeout_s=30)
        os.rename(store.path, f"{store.path}-away")
        os.symlink(f"{store.path}-away", store.path)
        store.move_label("stable", "1.0.3")
        assert watcher.wait_until(version="1.0.3", timeout_s=30)


def test_a_flood_of_events_is_a_hint_like_another(store: Store, slot: hotglm.ModuleSlot) -> None:
    """E02: thousands of renames, whose events overflow any queue, end at the newest version."""
    pytest.importorskip("watchfiles")
    policy = hotglm.WatchPolicy(interval_s=0.2, uses_events=True, debounce_s=0.01)
    with hotglm.watch(slot, store, policy=policy) as watcher:
        assert watcher.wait_until(version="1.0.1", timeout_s=30)
        where = Path(store.path, "releases")
        for number in range(3000):
            (where / f"{number}.tmp").mkdir()
            (where / f"{number}.tmp").rename(where / f".{number}")
        store.move_label("stable", "1.0.3")
        assert watcher.wait_until(version="1.0.3", timeout_s=30)


def refuse_to_watch(*paths: str, **options: object) -> Any:
    raise OSError(28, "OS file watch limit reached")


def test_where_events_cannot_be_had_it_polls_and_says_so(store: Store, slot: hotglm.ModuleSlot) -> None:
    """E14: the limit of inotify is reached: the status says why there are no events, and polling goes on."""
    watcher = hotglm.Watcher(slot, store, policy=hotglm.WatchPolicy(interval_s=0.02, uses_events=True))
    watcher._listen = refuse_to_watch
    with watcher:
        assert watcher.wait_until(version="1.0.1", timeout_s=30)
        assert wait_until(lambda: "watch limit reached" in watcher.status().events)
        assert watcher.status().events.startswith("polling only")
    assert find_threads() == []


def test_without_watchfiles_events_are_refused_by_name(
    store: Store, slot: hotglm.ModuleSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for events without the extra is told which one, when the watcher is made."""
    monkeypatch.setitem(__import__("sys").modules, "watchfiles", None)
    with pytest.raises(MissingExtraError, match=r"hotglm\[watch\]"):
        hotglm.Watcher(slot, store, policy=hotglm.WatchPolicy(uses_events=True))


def test_hints_look_again_where_a_directory_was_replaced(tmp_path: Path) -> None:
    """E06: a directory that is another one than it was is a hint by itself, and is listened to anew."""
    heard: list[list[str]] = []
    hinted = threading.Semaphore(0)
    go_on = threading.Event()

    def watch(*paths: str, **options: Any) -> Iterator[set[object]]:
        heard.append(list(paths))
        while not options["stop_event"].is_set() and go_on.wait(0.01) is not None:
            yield set()

    place = tmp_path / "place"
    place.mkdir()
    hints = Hints(lambda: [str(place)] if place.exists() else [], hinted.release, debounce_s=0.01, watch=watch)
    hints.start()
    assert hinted.acquire(timeout=30)  # it begins to listen
    place.rename(tmp_path / "old")
    place.mkdir()
    assert hinted.acquire(timeout=30)
    assert hinted.acquire(timeout=30)
    hints.stop(timeout_s=30)
    assert len(heard) >= 2


def test_watchfiles_is_found_where_it_is_installed(store: Store) -> None:
    """The directories whose events count are the store's own, and its labels, releases and services."""
    pytest.importorskip("watchfiles")
    assert callable(find_watch())
    scanner = Scanner(store, hotglm.Watcher(make_slot(), store)._engine.scanner._follow)
    assert [os.path.basename(path) for path in scanner.find_watched()] == ["store", "labels", "releases", "services"]


# -- processes ---------------------------------------------------------------------------------------------------------

CHILD = """
    import os, signal, sys
    import hotglm
    from support.watched import X, expected, make_slot
    import torch
    torch.set_num_threads(1)
    store = hotglm.open_store(sys.argv[1])
    policy = hotglm.WatchPolicy(interval_s=0.02, trial_s=0.0)
"""


def run(text: str, store: Store) -> str:
    done = run_script(CHILD + text, store.path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_workers_start_their_own_and_converge(store: Store) -> None:
    """K01, K03: forked while the watcher runs and its locks are held, children are idle, start anew, and converge."""
    text = """
    slot = make_slot()
    watcher = hotglm.watch(slot, store, service="api", policy=policy)
    assert watcher.wait_until(version="1.0.1", timeout_s=30)
    with watcher._changed, watcher._gate:
        for _ in range(4):
            if os.fork() == 0:
                signal.alarm(30)
                try:
                    assert watcher.status().state.value == "idle" and not watcher.status().is_alive
                    watcher.start()
                    assert watcher.wait_until(version="1.0.3", timeout_s=25)
                    with torch.no_grad():
                        assert slot(X).equal(expected(3))
                    watcher.close()
                except BaseException as failure:
                    os.write(2, f"child: {failure!r} {watcher.status()}".encode())
                    os._exit(1)
                os._exit(0)
    store.move_label("stable", "1.0.3")
    assert watcher.wait_until(version="1.0.3", timeout_s=25)
    print([os.wait()[1] for _ in range(4)])
    watcher.close()
    """
    assert run(text, store) == "[0, 0, 0, 0]"


@pytest.mark.parametrize(
    ("ending", "refused"), [("", 0), ("raise ValueError('crash')", 1), ("os.kill(os.getpid(), 9)", 1)]
)
def test_the_end_of_a_process_on_trial(store: Store, ending: str, refused: int) -> None:
    """K04, I04: an end in good order judges nothing; a process that crashes or is killed has died on the release."""
    text = f"""
    slot = make_slot()
    watcher = hotglm.watch(slot, store, service="api", policy=hotglm.WatchPolicy(interval_s=0.02, trial_s=1000.0))
    assert watcher.wait_until(version="1.0.1", timeout_s=30)
    {ending}
    """
    done = run_script(CHILD + text, store.path)
    assert (done.returncode == 0) == (ending == ""), done.stderr
    service = store.service("api")
    assert service.start() is None
    state = service.read()
    assert (len(state.refused), state.trials) == (refused, ())
