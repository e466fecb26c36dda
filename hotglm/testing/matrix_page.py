"""The matrices as one HTML page, which works offline, in the dark and on paper. No torch.

Rules this module keeps: one file, nothing fetched, no script (the page's own policy forbids both); every text that was
not written here is escaped; nothing is computed here.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from hotglm.testing.cells import CellResult, Outcome
from hotglm.testing.matrix import Grid, Matrix, label_of

__all__ = ["make_page"]

_STYLES = {Outcome.WORKS: "works", Outcome.REFUSED: "refused", Outcome.SKIPPED: "skipped"}


def make_page(matrices: Sequence[Matrix], *, made_on: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        matrices: what to show.
        made_on: names and versions of what they were made on.
    """
    bad = sum(result.outcome.is_bad for matrix in matrices for result in matrix.results)
    good = sum(result.outcome.is_good for matrix in matrices for result in matrix.results)
    total = sum(len(matrix.results) for matrix in matrices)
    return string.Template(_read("matrix.html")).substitute(
        style=_read("matrix.css"),
        headline=f"{good} of {total} cells are as declared",
        verdict="bad" if bad else "good",
        machine=escape(", ".join(f"{name} {version}" for name, version in made_on.items() if version)),
        matrices="\n".join(_show_matrix(matrix, f"m{number}") for number, matrix in enumerate(matrices)),
    )


def _read(name: str) -> str:
    return files("hotglm.testing").joinpath(name).read_text(encoding="utf-8")


def _show_matrix(matrix: Matrix, anchor: str) -> str:
    anchors = {id(result): f"{anchor}c{number}" for number, result in enumerate(matrix.results)}
    grids = "\n".join(_show_grid(matrix, grid, anchors) for grid in matrix.find_grids())
    rows = "\n".join(_show_row(result, anchors[id(result)]) for result in matrix.results)
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("incoming", "running", "axes", "outcome", "migrations", "reasons", "passes", "time")
    )
    return (
        f"<section><h2>{escape(matrix.model)}</h2>\n"
        f'<p class="sub"><code>{escape(matrix.name)}</code> {escape(matrix.headline)}</p>\n{grids}\n'
        "<details open><summary>Every cell</summary><div class='wide'><table class='cells'>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div></details></section>"
    )


def _show_grid(matrix: Matrix, grid: Grid, anchors: Mapping[int, str]) -> str:
    caption = f"<p class='axes'>{escape(grid.title)}</p>" if grid.title else ""
    head = "".join(f'<th scope="col">{escape(version)}</th>' for version in matrix.running)
    body = "".join(
        f'<tr><th scope="row">{escape(incoming)}</th>{"".join(_show_cell(result, anchors) for result in results)}</tr>'
        for incoming, results in grid.rows.items()
    )
    corner = "<th class='corner'>incoming &#8595; &nbsp; running &#8594;</th>"
    return (
        f"{caption}<div class='wide'><table class='grid'><thead><tr>{corner}{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _show_cell(result: CellResult | None, anchors: Mapping[int, str]) -> str:
    if result is None:
        return "<td class='none'></td>"
    reasons = result.codes or result.cell.expected if result.outcome is not Outcome.WORKS else ()
    small = " &#8594; ".join(map(escape, result.path)) or escape(", ".join(reasons))
    return (
        f'<td class="{_STYLES.get(result.outcome, "bad")}"><a href="#{anchors[id(result)]}">'
        f"<b>{escape(label_of(result))}</b>{f'<small>{small}</small>' if small else ''}</a></td>"
    )


def _show_row(result: CellResult, anchor: str) -> str:
    texts = (
        result.cell.incoming,
        result.cell.running,
        ", ".join(map("=".join, result.cell.axes)),
        result.outcome.value,
        " \N{RIGHTWARDS ARROW} ".join(result.path),
        ", ".join(result.codes),
        str(result.num_passes or ""),
        f"{1e3 * result.duration_s:.0f} ms",
    )
    style = _STYLES.get(result.outcome, "bad")
    row = f'<tr id="{anchor}" class="{style}">{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>'
    return row + "".join(_show_message(result, len(texts)))


def _show_message(result: CellResult, width: int) -> Iterator[str]:
    if result.message:
        yield f'<tr class="message"><td colspan="{width}"><pre>{escape(result.message)}</pre></td></tr>'
