"""A progress bar of plain ASCII on standard error, where that is a terminal; else nothing."""

from __future__ import annotations

import contextlib
import time
from typing import Self, TextIO

from hotglm.progress import Progress

__all__ = ["ProgressBar"]

_WIDTH = 30
_LINE = 79
_INTERVAL_S = 0.1


class ProgressBar:
    """One line that is written over; a context manager that leaves the line clean."""

    def __init__(self, stream: TextIO | None) -> None:
        """Write to `stream` if it is a terminal."""
        self._stream = stream if stream is not None and not stream.closed and stream.isatty() else None
        self._shown_s = 0.0
        self._part, self._began_s = "", 0.0

    def tell(self, progress: Progress) -> None:
        """Show how far it is, as a release or a stage tells it, with the part that it is at."""
        if progress.part != self._part:
            self._part, self._began_s = progress.part, time.monotonic()
        self.show(progress.done_nbytes, progress.total_nbytes)

    def show(self, done: int, total: int) -> None:
        """Show how far it is; ten times a second at most, and when all is done."""
        now = time.monotonic()
        if self._stream is None or (now - self._shown_s < _INTERVAL_S and done < total):
            return
        self._shown_s = now
        share = min(1.0, done / total) if total else 1.0
        filled = round(share * _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        text = f"{self._part:<8}[{bar}] {share:4.0%} of {total / 2**20:.1f} MiB"
        rate = done / 2**20 / max(now - self._began_s, 1e-9) if self._part else 0.0
        self._write(f"\r{text}{f', {rate:.0f} MiB/s' if rate else ''}".ljust(_LINE)[: _LINE + 1])

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # whoever looked has gone; the work goes on
            self._stream = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the line."""
        with contextlib.suppress(ValueError):
            self._write("\r" + " " * _LINE + "\r")
