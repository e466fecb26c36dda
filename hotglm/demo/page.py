"""The report as one HTML page: the table, a picture of each run, the lines that ran, and the receipts.

Rules this module keeps:

- One file, nothing fetched: style, script and pictures are inline, and the page's own policy forbids anything else.
- Every text that was not written here is escaped.
- Nothing is computed here: the page shows what the report holds.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch

import hotglm
from hotglm.demo.charts import draw_digit, draw_run, make_scale
from hotglm.demo.outcome import Side
from hotglm.demo.releases import NEW, OLD
from hotglm.demo.report import Report
from hotglm.demo.story import DEFINITIONS, HEADINGS, row_of
from hotglm.demo.tally import Moment, Run, Tally
from hotglm.demo.traffic import NUM_CLIENTS, PAUSE_S, RETRY_S, Exam
from hotglm.demo.updates import open_slot, read_code

__all__ = ["make_page", "write_page"]

_NUM_DIGITS = 14
_LOUD_MS = 100.0

_CAPTIONS = {
    "hotglm": "A release is staged beside the live version and committed between two passes. Bad ones are refused.",
    "load_state_dict": "The same files, written into the live model. A cross is an answer of neither version.",
    "process restart": "The same service in a process of its own, stopped and started again with the new file.",
}


def write_page(report: Report, path: Path) -> None:
    """Write the page to `path`."""
    path.write_text(make_page(report), encoding="utf-8")


def make_page(report: Report) -> str:
    """Return the page as HTML."""
    slot = report.tallies[0]
    return string.Template(_read("page.html")).substitute(
        style=_read("page.css"),
        script=_read("page.js"),
        headline=_write_headline(slot),
        machine=escape(f"hotglm {hotglm.__version__}, {report.machine}, {report.duration_s:.1f} s in all"),
        digits=_show_digits(report.exam),
        old=escape(OLD),
        new=escape(NEW),
        old_right=f"{report.releases[0].accuracy:.1%}",
        new_right=f"{report.releases[1].accuracy:.1%}",
        table=_show_table(report.tallies),
        panels="\n".join(_show_run(run, report.runs) for run in report.runs),
        sides=_show_sides(report.sides),
        checks="\n".join(_show_check(check.claim, check.found, is_met=check.is_met) for check in report.checks),
        code="\n".join(_show_codes(report.runs)),
        receipts="\n".join(_show_receipts(report.runs[0])),
        definitions="\n".join(f"<p>{escape(text)}</p>" for text in (*DEFINITIONS, _describe_method())),
    )


def _read(name: str) -> str:
    return files("hotglm.demo").joinpath(name).read_text(encoding="utf-8")


def _write_headline(slot: Tally) -> str:
    return (
        f"{slot.num_changes} changes of a live model under {slot.num_requests:,} requests: "
        f"{slot.num_failed:,} failed, {slot.num_torn:,} torn"
    )


def _describe_method() -> str:
    return (
        f"Traffic: {NUM_CLIENTS} clients, each in its own thread, pause {1e3 * PAUSE_S:.0f} ms after an answer and "
        f"{1e3 * RETRY_S:.0f} ms after a failure. torch computes each pass with one thread. hotglm and load_state_dict "
        "are asked in the process itself; the restarted service over a local socket, one connection for each request. "
        "Every answer is compared bit for bit with the outputs of both versions, each loaded cold and alone."
    )


def _show_digits(exam: Exam) -> str:
    """Return some digits that the old version gets wrong and the new one right."""
    images, labels = torch.cat(list(exam.sheets)), torch.cat(list(exam.answers))
    old, new = (torch.cat(list(exam.logits[version])).argmax(1) for version in (OLD, NEW))
    better = ((old != labels) & (new == labels)).nonzero().flatten().tolist()
    return "\n".join(
        f"<figure>{draw_digit(images[at])}<figcaption><s>{int(old[at])}</s> <b>{int(new[at])}</b></figcaption></figure>"
        for at in islice(better, _NUM_DIGITS)
    )


def _show_table(tallies: Sequence[Tally]) -> str:
    rows = []
    for tally in tallies:
        bad = {3: tally.num_failed > 0, 4: tally.num_torn > 0, 7: tally.silent_ms > _LOUD_MS}
        cells = [
            f'<td class="{"bad" if bad.get(place) else "good" if place in bad else ""}">{escape(cell)}</td>'
            for place, cell in enumerate(row_of(tally))
            if place
        ]
        rows.append(f'<tr><th scope="row">{escape(tally.name)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in HEADINGS)
    return f"<table class='tally'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _show_sides(sides: Iterable[Side]) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in ("release", "hotglm", "load_state_dict"))
    rows = ((side.title, side.slot, side.peer) for side in sides)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table class='sides'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _show_run(run: Run, runs: Sequence[Run]) -> str:
    items = "".join(
        f'<li data-moment="{number}"><b>{escape(moment.title)}</b> <span>{_describe_time(moment, run)}</span></li>'
        for number, moment in enumerate(_find_told(run), start=1)
    )
    return (
        f"<section class='panel'><h2>{escape(run.name)}</h2><p>{escape(_CAPTIONS.get(run.name, ''))}</p>\n"
        f"{draw_run(run, make_scale(runs))}\n<ol>{items}</ol></section>"
    )


def _find_told(run: Run) -> list[Moment]:
    return [moment for moment in run.moments if not moment.is_repeat]


def _describe_time(moment: Moment, run: Run) -> str:
    return f"at {moment.began_s - run.began_s:.2f} s, took {1e3 * (moment.ended_s - moment.began_s):,.1f} ms"


def _show_check(claim: str, found: str, *, is_met: bool) -> str:
    style, mark = ("met", "&#10003;") if is_met else ("unmet", "&#10007;")
    return f'<li class="{style}"><i>{mark}</i> {escape(claim)} <span>{escape(found)}</span></li>'


def _show_codes(runs: Sequence[Run]) -> Iterator[str]:
    yield f"<pre>{escape(read_code(open_slot))}</pre>"
    shown = set()
    for moment in (moment for run in runs for moment in run.moments):
        if moment.code not in shown:
            shown.add(moment.code)
            yield f"<pre>{escape(moment.code)}</pre>"


def _show_receipts(run: Run) -> Iterator[str]:
    for number, moment in enumerate(_find_told(run), start=1):
        title = f"{number}. {escape(moment.title)}"
        yield f"<details><summary>{title}</summary><pre>{escape(moment.text)}</pre></details>"
