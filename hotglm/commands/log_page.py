"""The history of a store as one HTML page: a picture of releases, deltas, labels and services.

Rules this module keeps: those of `hotglm.commands.page`; nothing is computed here but where things are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from hotglm.commands.console import show_count
from hotglm.commands.history import Entry, History, Row, plan_rows
from hotglm.commands.page import make_page, show_bar, show_text, show_tiles, size_of
from hotglm.release.ledger import Label, ReleaseId, ServiceState

__all__ = ["make_log_page"]

_STEP, _HEIGHT, _LEFT = 22, 44, 14
_RADIUS = 7
_MARKS: Mapping[str, str] = {
    "confirmed": "\u2713 confirmed by",
    "trial": "\u25d4 on trial by",
    "refused": "\u2717 refused by",
}


def make_log_page(history: History) -> str:
    """Return the page."""
    entries = history.entries
    num_deltas = sum(entry.facts is not None and entry.facts["kind"] != "full" for entry in entries)
    total = sum(entry.nbytes for entry in entries)
    names = sorted({str(entry.facts["name"]) for entry in entries if entry.facts is not None})
    older = f", {history.num_older} older ones not shown" if history.num_older else ""
    tiles: list[tuple[object, object]] = [
        (len(entries), f"releases, {num_deltas} of them deltas{older}"),
        (size_of(total), "in all of them; what they share is counted each time"),
    ]
    tiles += [
        (label.release.version, f"{name}, moved {show_count(label.revision, 'time')}")
        for name, label in sorted(history.labels.items())[:4]
    ]
    return make_page(
        brand="hotglm store",
        headline=", ".join(names) or os.path.basename(history.path),
        sub=history.path,
        body="\n".join([show_tiles(tiles), *_show_history(history), *_show_labels(history), *_show_services(history)]),
    )


def _show_history(history: History) -> Iterator[str]:
    rows = list(plan_rows(history.entries))
    if not rows:
        yield "<section><p class='soft'>No releases yet.</p></section>"
        return
    num_columns = 1 + max(max(row.column, *row.passes, *row.merges, 0) for row in rows)
    largest = max(row.entry.nbytes for row in rows)
    yield "<section><h2>History</h2><div class='card'><div class='history'>"
    for number, row in enumerate(rows):
        yield _show_row(row, history, num_columns=num_columns, largest=largest, is_last=number == len(rows) - 1)
    yield "</div></div>"
    yield (
        f"<p class='legend'>{_draw_sign('full')} full {_draw_sign('delta')} delta, above what it is made from "
        f"{_draw_sign('broken')} broken</p></section>"
    )


def _show_row(row: Row, history: History, *, num_columns: int, largest: int, is_last: bool) -> str:
    entry, last = row.entry, " last" if is_last else ""
    kind = _kind_of(entry)
    created = "" if entry.facts is None else str(entry.facts["created"]).replace("T", " ").removesuffix("Z")
    chips = "".join(f"<span class='chip label'>{show_text(name)}</span>" for name in history.find_labels(entry))
    chips += "".join(
        f"<span class='chip {mark}'>{_MARKS[mark]} {show_text(service)}</span>"
        for mark, service in history.find_marks(entry)
    )
    chips += "<span class='chip signed'>signed</span>" if entry.is_signed else ""
    style = "broken" if kind == "broken" else ""
    what = f"<span class='chip broken'>{show_text(entry.what)}</span>" if style else show_text(entry.what)
    return (
        f"<div class='lanes'>{_draw_lanes(row, num_columns)}</div>"
        f"<div class='version{last}'><b>{show_text(entry.stored.version)}</b>"
        f"<span class='soft'>#{entry.stored.sequence}</span>{chips}</div>"
        f"<div class='{last}'>{show_bar(entry.nbytes, largest, kind)}</div>"
        f"<div class='size{last}'>{size_of(entry.nbytes) if entry.facts is not None else ''}</div>"
        f"<div class='soft{last}'>{what}</div>"
        f"<div class='when{last}'>{show_text(created)}</div>"
    )


def _kind_of(entry: Entry) -> str:
    if entry.facts is None:
        return "broken"
    return "full" if entry.facts["kind"] == "full" else "delta"


def _draw_lanes(row: Row, num_columns: int) -> str:
    middle, x = _HEIGHT // 2, _place(row.column)
    lines = [f"M{_place(column)} 0V{_HEIGHT}" for column in row.passes]
    lines += [f"M{x} 0V{middle}"] if row.has_above else []
    lines += [f"M{x} {middle}V{_HEIGHT}"] if row.continues else []
    lines += [f"M{_place(at)} 0C{_place(at)} {middle} {x + _STEP} {middle} {x} {middle}" for at in row.merges]
    path = f'<path class="lane" d="{" ".join(lines)}"/>' if lines else ""
    width = _LEFT + _STEP * num_columns
    return (
        f'<svg width="{width}" height="{_HEIGHT}" viewBox="0 0 {width} {_HEIGHT}" aria-hidden="true">'
        f"{path}{_draw_node(_kind_of(row.entry), x, middle)}</svg>"
    )


def _draw_sign(kind: str) -> str:
    size = 2 * _RADIUS + 4
    return f'<svg width="{size}" height="{size}" aria-hidden="true">{_draw_node(kind, size // 2, size // 2)}</svg>'


def _draw_node(kind: str, x: int, y: int) -> str:
    node = f'<circle class="node {kind}" cx="{x}" cy="{y}" r="{_RADIUS - 1}"/>'
    if kind == "delta":
        return f'{node}<path class="plus" d="M{x - 3} {y}H{x + 3}M{x} {y - 3}V{y + 3}"/>'
    if kind == "broken":
        return f'{node}<path class="cross" d="M{x - 3} {y - 3}L{x + 3} {y + 3}M{x - 3} {y + 3}L{x + 3} {y - 3}"/>'
    return node


def _place(column: int) -> int:
    return _LEFT + _STEP * column


def _show_labels(history: History) -> Iterator[str]:
    if history.labels:
        yield "<section><h2>Labels</h2><div class='card'><table><thead><tr>"
        yield "<th>label</th><th>leads to</th><th>since</th><th>led to before</th></tr></thead><tbody>"
        yield from (_show_label(label) for _, label in sorted(history.labels.items()))
        yield "</tbody></table></div></section>"


def _show_label(label: Label) -> str:
    now, *before = label.moves
    earlier = " \u2190 ".join(show_text(move.release.version) for move in before) or "-"
    return (
        f"<tr><td><span class='chip label'>{show_text(label.name)}</span></td><td>{_name(now.release)}</td>"
        f"<td class='soft'>{_show_time(now.moved_at)}</td><td class='soft'>{earlier}</td></tr>"
    )


def _show_services(history: History) -> Iterator[str]:
    if history.services:
        yield "<section><h2>Services</h2><div class='card'><table><thead><tr>"
        yield "<th>service</th><th>state</th><th>release</th><th>since</th><th>why</th></tr></thead><tbody>"
        for _, state in sorted(history.services.items()):
            yield from _show_service(state)
        yield "</tbody></table></div></section>"


def _show_service(state: ServiceState) -> Iterator[str]:
    if state.confirmed is not None:
        yield _show_state(state.name, "confirmed", state.confirmed)
    for trial in state.trials:
        yield _show_state(state.name, "trial", trial.release, since=trial.began_at)
    for one in state.refused:
        yield _show_state(state.name, "refused", one.release, since=one.refused_at, why=one.reason)


def _show_state(service: str, mark: str, release: ReleaseId, *, since: str = "", why: str = "") -> str:
    return (
        f"<tr><td>{show_text(service)}</td><td><span class='chip {mark}'>{_MARKS[mark].rpartition(' ')[0]}</span></td>"
        f"<td>{_name(release)}</td><td class='soft'>{_show_time(since)}</td><td class='soft'>{show_text(why)}</td></tr>"
    )


def _show_time(text: str) -> str:
    return show_text(text.replace("T", " ").partition(".")[0])


def _name(release: ReleaseId) -> str:
    return f"<b>{show_text(release.version)}</b> <span class='soft'>#{release.sequence}</span>"
