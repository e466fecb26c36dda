"""Pages about stores and releases: one file each, which works offline, in the dark and on paper.

Rules this module keeps: nothing is fetched and there is no script (the page's own policy forbids both); every text that
was not written here is escaped, whatever characters it has.
"""

from __future__ import annotations

import os
import re
import string
from html import escape
from importlib.resources import files

from hotglm.commands.console import show_size
from hotglm.release.writing import replace_whole

__all__ = ["make_page", "show_bar", "show_text", "show_tiles", "size_of", "write_page"]

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def make_page(*, brand: str, headline: str, sub: str, body: str) -> str:
    """Return a page.

    Args:
        brand: what it is, in a few words.
        headline: what it is about, as text.
        sub: more about that, as text.
        body: HTML.
    """
    return string.Template(_read("page.html")).substitute(
        style=_read("page.css"),
        title=show_text(f"{headline} - {brand}"),
        brand=show_text(brand),
        headline=show_text(headline),
        sub=show_text(sub),
        body=body,
    )


def _read(name: str) -> str:
    return files("hotglm.commands").joinpath(name).read_text(encoding="utf-8")


def show_text(text: object, *, limit: int = 300) -> str:
    r"""Return a text as HTML: cut, escaped, and with what cannot be seen or turns its direction spelt out.

    >>> show_text("<b>\u202egpj")
    '&lt;b&gt;\\u202egpj'
    """
    found = str(text)
    found = found if len(found) <= limit else f"{found[: limit // 2]}...{found[-limit // 2 :]}"
    return escape(_UNSEEN.sub(lambda match: match[0].encode("ascii", "backslashreplace").decode(), found))


def show_bar(part: int, whole: int, style: str = "") -> str:
    """Return a bar as long as the part is of the whole."""
    share = 100 * min(1.0, part / whole) if whole else 0.0
    inner = f'<i class="{style}" style="width:{share:.2f}%"></i>' if part else ""
    return f'<span class="bar">{inner}</span>'


def show_tiles(facts: list[tuple[object, object]]) -> str:
    """Return figures with what they are, side by side."""
    items = "".join(f"<li><b>{show_text(figure)}</b><span>{show_text(what)}</span></li>" for figure, what in facts)
    return f'<ul class="tiles">{items}</ul>'


def size_of(nbytes: int) -> str:
    """Return a size for people, rounded.

    >>> size_of(3 * 2**20)
    '3.00 MiB'
    """
    return show_size(nbytes).partition(" (")[0]


def write_page(path: str, text: str) -> None:
    """Put a page in the place of the file `path`, whole or not at all.

    Raises:
        StoreWriteError: it cannot be written.
    """
    replace_whole(os.path.abspath(path), text.encode("utf-8"))
