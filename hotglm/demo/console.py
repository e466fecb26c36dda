"""What the demo prints: the story as plain text, and how far it is.

Rules this module keeps: plain ASCII; a bar is drawn only on a terminal, and is gone before the next line of the story.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Console"]

_BAR_WIDTH = 24
_TICK_S = 0.1


class Console:
    """Prints lines, and a progress bar under them on a terminal. One thread uses it."""

    def __init__(self, *, expected_s: float, stream: TextIO | None = None) -> None:
        """Note the time; `expected_s` is what the whole demo should take, for the bar."""
        self._stream = stream or sys.stdout
        self._expected_s = expected_s
        self._began_s = time.perf_counter()
        self._is_terminal = self._stream.isatty()
        self._bar = ""
        self._doing = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.perf_counter() - self._began_s

    def say(self, text: str = "") -> None:
        """Print a line, or several."""
        self._clear()
        print(text, file=self._stream, flush=True)
        self._draw()

    def step(self, doing: str) -> None:
        """Print how far the demo is: a line, or on a terminal a bar that later lines push down."""
        self._doing = doing
        if self._is_terminal:
            self._draw()
        else:
            print(f"[{self.elapsed_s:5.1f} s] {doing}", file=self._stream, flush=True)

    def wait(self, duration_s: float) -> None:
        """Let time pass, with the bar going on."""
        end_s = time.perf_counter() + duration_s
        while (left_s := end_s - time.perf_counter()) > 0:
            self._draw()
            time.sleep(min(left_s, _TICK_S) if self._is_terminal else left_s)

    def close(self) -> None:
        """Remove the bar."""
        self._clear()
        self._doing = ""

    def _draw(self) -> None:
        if self._is_terminal and self._doing:
            self._clear()
            done = min(self.elapsed_s / self._expected_s, 0.99)
            filled = int(done * _BAR_WIDTH)
            self._bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self.elapsed_s:4.1f} s  {self._doing}"
            print(self._bar, end="", file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._bar:
            print(f"\r{' ' * len(self._bar)}\r", end="", file=self._stream, flush=True)
            self._bar = ""
