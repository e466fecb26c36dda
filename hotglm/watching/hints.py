"""Events of the operating system, as hints that a look may be worth it (extra `watch`).

Rules this module keeps:

- A hint says nothing but "look". What it was about, whether it came twice, late or not at all, does not matter: queues
  overflow and file systems are silent (E02 to E04).
- Where events cannot be had, the watcher goes on by polling, and its status says why (E14).
- Directories that are removed, replaced or come back are heard again: what is watched is compared every second (E06).
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from hotglm.errors import MissingExtraError
from hotglm.problem import describe_exception
from hotglm.weights.workers import start_thread

__all__ = ["Hints", "find_watch"]

_LOOK_MS = 1000
_STEP_MS = 50
_PAUSE_S = 30.0
"""How long after events could not be had they are asked for again."""


def find_watch() -> Callable[..., Iterable[Any]]:
    """Return the function of `watchfiles` that yields changes.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        watch: Callable[..., Iterable[Any]] = importlib.import_module("watchfiles").watch
    except ImportError as error:
        raise MissingExtraError(
            f"Expected the package watchfiles, got {describe_exception(error)}.",
            remedy="install it: pip install 'hotglm[watch]'; or leave uses_events off, polling works everywhere.",
        ) from error
    return watch


class Hints:
    """Hears events in a thread of its own.

    Attributes:
        state: `"off"`, `"on"`, or why no events are heard.
    """

    def __init__(
        self,
        find_paths: Callable[[], list[str]],
        hint: Callable[[], object],
        *,
        debounce_s: float,
        watch: Callable[..., Iterable[Any]],
    ) -> None:
        """Remember what to hear and whom to tell; nothing starts yet."""
        self._find_paths = find_paths
        self._hint = hint
        self._debounce_s = debounce_s
        self._watch = watch
        self._stop = threading.Event()
        self.state = "off"

    def start(self) -> None:
        """Start to listen.

        Raises:
            ThreadStartError: the system has no thread to give.
        """
        self.state = "starting"
        self._thread = start_thread(self._run, name="hotglm-watch-events")

    def stop(self, *, timeout_s: float) -> None:
        """Stop listening, and wait for the thread to end."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            paths = self._find_paths()
            try:
                if paths:
                    self._listen(paths)
                    continue
                self.state = "polling only: the directory is not there"
            except Exception as error:  # noqa: BLE001 - a limit of inotify comes as one of many classes
                self.state = f"polling only: {describe_exception(error, limit=200)}"
            self._stop.wait(_PAUSE_S if paths else _LOOK_MS / 1000)

    def _listen(self, paths: list[str]) -> None:
        """Pass events on until one of the directories is another one than it was."""
        seen = _identify(paths)
        changes = self._watch(
            *paths,
            watch_filter=None,
            debounce=max(1, round(self._debounce_s * 1000)),
            step=_STEP_MS,
            stop_event=self._stop,
            rust_timeout=_LOOK_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
            ignore_permission_denied=True,
        )
        self.state = "on"
        self._hint()  # for what happened before the system listened
        for change in changes:
            is_same = _identify(self._find_paths()) == seen
            if change or not is_same:
                self._hint()
            if not is_same:
                return


def _identify(paths: list[str]) -> list[tuple[str, int, int]]:
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path, status.st_dev, status.st_ino))
    return found
