"""Passes that stop half way until they are let go, and threads that run beside a test, with their results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import hotglm

__all__ = ["Beside", "Held", "is_closing", "wait_until"]


class Held:
    """A boundary at which passes of threads called `held` wait until they are let go."""

    def __init__(self) -> None:
        self.arrived, self.release = threading.Semaphore(0), threading.Event()

    def __call__(self, layer: int) -> None:
        if layer == 1 and threading.current_thread().name.startswith("held"):
            self.arrived.release()
            assert self.release.wait(30)


class Beside:
    """A function that runs in a thread of its own, with its result."""

    def __init__(self, function: Callable[[], Any], *, name: str = "beside") -> None:
        self._outcome: list[Any] = []
        self.thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=True)
        self.thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again in `result`
            self._outcome.append(error)

    def result(self) -> Any:
        self.thread.join(30)
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def wait_until(condition: Callable[[], object]) -> None:
    pause = threading.Event()
    for _ in range(30_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came to be")


def is_closing(slot: hotglm.ModuleSlot) -> bool:
    return slot._admission.gate.closing is not None  # type: ignore[attr-defined]
