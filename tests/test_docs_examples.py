"""Every example that a reader can copy runs: the Python blocks of README and docs, and the doctests of the modules."""

from __future__ import annotations

import doctest
import importlib
import re
import textwrap
from pathlib import Path

import pytest

from support.imports import find_modules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [name for name in find_modules(ROOT / "hotglm") if not name.endswith("__main__")]

# A fence may be indented (inside a list). A block is left out by the comment on the line before it, with its reason.
BLOCK = re.compile(r"^(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run(: [^\n]+)? -->\s*\Z")


def find_blocks(text: str) -> list[tuple[int, str]]:
    """Return the blocks of a page that are to be run: (line number of the first line of code, code)."""
    return [
        (text.count("\n", 0, block.start("code")) + 1, textwrap.dedent(block["code"]))
        for block in BLOCK.finditer(text)
        if not NOT_RUN.search(text[: block.start()])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run from top to bottom, in one namespace and one empty directory."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for line, code in find_blocks(page.read_text(encoding="utf-8")):
        compiled = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)  # not this file's __future__
        exec(compiled, namespace)  # noqa: S102  # our own pages


@pytest.mark.parametrize("name", MODULES)
def test_doctests_hold(name: str) -> None:
    """The examples in the docstrings of a module give what they show."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0


def test_blocks_are_found_where_they_stand() -> None:
    """A block is run unless the line before it says not; indented blocks count, other languages do not."""
    page = textwrap.dedent(
        """\
        # Title
        ```python
        one = 1
        ```
        - item
          ```python
          two = 2
          ```
        <!-- not run: needs a GPU -->
        ```python
        three = 3
        ```
        ```console
        four
        ```
        """
    )
    assert find_blocks(page) == [(3, "one = 1\n"), (7, "two = 2\n")]
