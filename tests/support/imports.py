"""Read which module imports which, from source text alone.

- Nothing is imported to find out: a module that does not even load is read all the same.
- An import inside a function is a dependency like any other; one under `TYPE_CHECKING` exists for type checkers only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Where = Literal["module", "function", "typing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module.

    Attributes:
        importer: dotted name of the importing module.
        target: dotted name of the imported module.
        name: what `from target import name` takes out of it; None when the module itself is imported.
        line: line number in the importer.
        where: at module level, inside a function, or for type checkers only.
        level: number of leading dots.
    """

    importer: str
    target: str
    name: str | None
    line: int
    where: Where
    level: int

    def __str__(self) -> str:
        """Format as a line of a failure report."""
        taken = f" ({self.name})" if self.name else ""
        return f"{self.importer}:{self.line} imports {self.target}{taken}"


def find_modules(package: Path) -> dict[str, Path]:
    """Return every module of the package at `package`, by dotted name, sorted."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(modules: Mapping[str, Path]) -> Iterator[Import]:
    """Yield every import in `modules`; `from package import submodule` counts as an import of the submodule."""
    for importer, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node, where in _find_statements(tree, "module"):
            for target, name in _find_targets(node, modules):
                level = node.level if isinstance(node, ast.ImportFrom) else 0
                yield Import(importer=importer, target=target, name=name, line=node.lineno, where=where, level=level)


def find_cycle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return the nodes of one cycle in order, or nothing when the graph has none."""
    following: dict[str, set[str]] = {}
    for start, end in edges:
        following.setdefault(start, set()).add(end)
    finished: set[str] = set()
    for start in sorted(following):
        if cycle := _walk(start, following, [], finished):
            return cycle
    return []


def _walk(node: str, following: Mapping[str, set[str]], path: list[str], finished: set[str]) -> list[str]:
    if node in path:
        return [*path[path.index(node) :], node]
    if node in finished:
        return []
    for end in sorted(following.get(node, ())):
        if cycle := _walk(end, following, [*path, node], finished):
            return cycle
    finished.add(node)
    return []


def _find_statements(node: ast.AST, where: Where) -> Iterator[tuple[ast.Import | ast.ImportFrom, Where]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, where
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        where = "function"
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(node, ast.If) and _is_type_checking(node.test) and child in node.body
        yield from _find_statements(child, "typing" if typing_only else where)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _find_targets(node: ast.Import | ast.ImportFrom, modules: Mapping[str, Path]) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
        return
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        yield (submodule, None) if submodule in modules else (node.module or "", alias.name)
