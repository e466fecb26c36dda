"""The demo as plain text: what happened, the lines that did it, the table and the verdict.

Rules this module keeps: plain ASCII, 100 columns but for code; nothing is told that was not recorded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from hotglm.demo.outcome import Check, Side
from hotglm.demo.tally import Moment, Tally

__all__ = [
    "DEFINITIONS",
    "HEADINGS",
    "describe_checks",
    "describe_moment",
    "describe_sides",
    "describe_table",
    "format_ms",
    "row_of",
]

HEADINGS = ("", "changes", "requests", "failed", "torn", "median", "worst latency", "time without answers")

DEFINITIONS = (
    "changes: updates and rollbacks while clients asked. Each asks about 16 digits, waits, pauses, and asks again.",
    "failed: requests without an answer. torn: answers that are, bit for bit, of neither version alone.",
    "median: latency before the first update. worst latency: of any answered request of the run.",
    "time without answers: longest time between two successive answers to any client, less that before any update.",
)

_INDENT = " " * 9
_WIDTH = 100
_NUM_LINES = 3


def describe_moment(moment: Moment, *, began_s: float, with_code: bool) -> str:
    """Return what happened, the first lines of what came back, and the lines that did it."""
    took = f"{1e3 * (moment.ended_s - moment.began_s):.1f} ms"
    lines = [f"{moment.began_s - began_s:6.2f} s {moment.title} ({took})"]
    for line in moment.text.splitlines()[:_NUM_LINES]:
        lines += textwrap.wrap(line.strip(), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT + "  ")
    if with_code:
        lines += [f"{_INDENT}  | {line}" for line in moment.code.splitlines()]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def format_ms(duration_ms: float) -> str:
    """Return a time for people.

    >>> format_ms(0.34), format_ms(12.3), format_ms(1912.4)
    ('0.3 ms', '12.3 ms', '1,912 ms')
    """
    return f"{duration_ms:,.0f} ms" if duration_ms >= 100 else f"{duration_ms:.1f} ms"


def row_of(tally: Tally) -> tuple[str, ...]:
    """Return a tally as the cells under `HEADINGS`."""
    return (
        tally.name,
        f"{tally.num_changes:,}",
        f"{tally.num_requests:,}",
        f"{tally.num_failed:,}",
        f"{tally.num_torn:,}",
        format_ms(tally.median_ms),
        format_ms(tally.worst_ms),
        format_ms(tally.silent_ms),
    )


def describe_table(tallies: Sequence[Tally]) -> str:
    """Return the table and what its columns mean."""
    rows = [HEADINGS, *map(row_of, tallies)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_align(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [textwrap.fill(text, _WIDTH, subsequent_indent="  ") for text in DEFINITIONS]
    return "\n".join([*lines, "", *notes])


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *numbers])


def describe_sides(sides: Sequence[Side]) -> str:
    """Return what each way of updating made of each bad release."""
    return "\n".join(_describe_sides(sides))


def _describe_sides(sides: Sequence[Side]) -> Iterator[str]:
    width = max(len(side.title) for side in sides)
    for side in sides:
        yield f"  {side.title.ljust(width)}  hotglm: {side.slot}"
        yield f"  {' ' * width}  load_state_dict: {side.peer}"


def describe_checks(checks: Sequence[Check]) -> str:
    """Return the verdict on every claim of the demo."""
    return "\n".join(f"  {'ok  ' if check.is_met else 'FAIL'}  {check.claim}: {check.found}" for check in checks)
