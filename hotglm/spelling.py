"""Annotations and default values as text, so that contracts can compare them without evaluating or keeping them.

Rules this module keeps:

- The text of an annotation does not change when it is rewritten or imported otherwise: `Optional[int]` is `int | None`,
  `typing.List` is `list`, quotes go, and of `pathlib.Path` only `Path` stays.
- The text of a value is the same in every process: sets are sorted, and what has no such text (an object that prints
  its address, a lambda) is None, which means unknown and is never compared.
- Nothing is evaluated. `repr` of a foreign type is foreign code; one that raises has no text.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["is_wider", "spell_type", "spell_value"]

_MAX_LENGTH = 200
"""Longest text that is kept whole; a longer one is cut and keeps the digest of the rest."""

_MAX_DEPTH = 8
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_BRACKETS: dict[type, str] = {tuple: "()", list: "[]", set: "{}", frozenset: "{}"}


def spell_value(value: object) -> str | None:
    """Return `value` as text that is the same in every process, or None where it has none.

    >>> spell_value({"b", "a"}), spell_value((1, [None])), spell_value(object())
    ("{'a', 'b'}", '(1, [None])', None)
    """
    text = _spell(value, depth=0)
    if text is None or len(text) <= _MAX_LENGTH:
        return text
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]
    return f"{text[: _MAX_LENGTH // 2]}... ({len(text)} characters, sha256 {digest})"


def _spell(value: object, *, depth: int) -> str | None:
    if type(value) in _PLAIN:
        return ascii(value)
    if depth < _MAX_DEPTH and type(value) in (*_BRACKETS, dict):
        return _spell_members(value, depth=depth)
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, type) or inspect.isroutine(value):
        name = getattr(value, "__qualname__", "<lambda>")
        return None if "<" in name else str(name)
    if type(value) in (*_BRACKETS, dict):
        return None
    return _spell_record(value, depth=depth) if _is_record(value) else _spell_foreign(value)


def _is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (*_BRACKETS, dict))


def _spell_record(value: Any, *, depth: int) -> str | None:
    """Spell what has parts of its own by these: in its `repr` a set would stand in the order of this process."""
    if depth >= _MAX_DEPTH:
        return None
    try:
        if isinstance(value, (*_BRACKETS, dict)) and not hasattr(value, "_fields"):
            plain = next(base for base in (*_BRACKETS, dict) if isinstance(value, base))(value)
            texts = [_spell_members(plain, depth=depth)]
        else:
            names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
            parts = [(name, _spell(getattr(value, name), depth=depth + 1)) for name in names]
            texts = [None if text is None else f"{name}={text}" for name, text in parts]
    except Exception:  # noqa: BLE001 - the parts of a foreign object are had by foreign code
        return None
    name = type(value).__qualname__
    return None if "<" in name else _join((f"{name}(", ")"), texts)


def _spell_members(value: Any, *, depth: int) -> str | None:
    if isinstance(value, dict):
        pairs = [(_spell(key, depth=depth + 1), _spell(member, depth=depth + 1)) for key, member in value.items()]
        return _join("{}", [None if key is None or text is None else f"{key}: {text}" for key, text in pairs])
    texts = [_spell(member, depth=depth + 1) for member in value]
    if isinstance(value, (set, frozenset)):
        texts.sort(key=str)
    if isinstance(value, tuple) and len(texts) == 1:
        return None if texts[0] is None else f"({texts[0]},)"
    return _join(_BRACKETS[type(value)], texts)


def _join(brackets: Sequence[str], texts: Iterable[str | None]) -> str | None:
    known = list(texts)
    return None if None in known else f"{brackets[0]}{', '.join(map(str, known))}{brackets[1]}"


def _spell_foreign(value: object) -> str | None:
    try:
        text = ascii(value)
    except Exception:  # noqa: BLE001 - the text of a foreign object is foreign code
        return None
    return None if _ADDRESS.search(text) else " ".join(text.split())


# -- annotations -------------------------------------------------------------------------------------------------------


def spell_type(annotation: object, *, module: str | None = None) -> str:
    """Return an annotation as normalised text, empty where there is none; `module` is the one it stands in.

    >>> spell_type("typing.Optional[int]"), spell_type(int | None), spell_type("None|int")
    ('int | None', 'int | None', 'int | None')
    """
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation, base_module=module)
    try:
        return ast.unparse(_Spelling().visit(_parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return " ".join(text.split())


def _parse(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


_BUILTINS = {
    "DefaultDict": "defaultdict",
    "Deque": "deque",
    "Dict": "dict",
    "FrozenSet": "frozenset",
    "List": "list",
    "Set": "set",
    "Tuple": "tuple",
    "Type": "type",
}
"""Names that `typing` has for classes that have one of their own."""


class _Spelling(ast.NodeTransformer):
    """Spell names without their modules and quotes, and every union as `A | B` in alphabetical order with None last."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "NoneType":
            return ast.Constant(value=None)
        return ast.Name(id=_BUILTINS.get(node.id, node.id), ctx=ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self.visit_Name(ast.Name(id=node.attr, ctx=ast.Load()))

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        spelled: ast.expr = self.visit(_parse(node.value)) if isinstance(node.value, str) else node
        return spelled

    def visit_Call(self, node: ast.Call) -> ast.expr:
        match node:
            case ast.Call(func=ast.Name(id="ForwardRef"), args=[ast.Constant(value=str()) as name, *_]):
                return self.visit_Constant(name)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node.value = self.visit(node.value)
        match node.value, node.slice:
            case ast.Name(id="Literal"), _:
                return node  # its members are values
            case ast.Name(id="Annotated"), ast.Tuple(elts=[inner, *_]):
                spelled: ast.expr = self.visit(inner)
                return spelled
        node.slice = self.visit(node.slice)
        match node.value, node.slice:
            case ast.Name(id="Optional"), inner:
                return _union([inner, ast.Constant(value=None)])
            case ast.Name(id="Union"), ast.Tuple(elts=members):
                return _union(members)
            case ast.Name(id="Union" | "Required" | "NotRequired" | "ReadOnly"), inner:
                return inner
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return _union([node.left, node.right]) if isinstance(node.op, ast.BitOr) else node


def _union(members: list[ast.expr]) -> ast.expr:
    flat = {ast.unparse(leaf): leaf for member in members for leaf in _flatten(member)}
    leaves = [flat[text] for text in sorted(flat, key=lambda text: (text == "None", text))]
    union = leaves[0]
    for leaf in leaves[1:]:
        union = ast.BinOp(left=union, op=ast.BitOr(), right=leaf)
    return union


def _flatten(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _flatten(node.left) + _flatten(node.right)
    return [node]


def is_wider(old: str, new: str) -> bool:
    """Tell whether a type, both spelled by `spell_type`, takes all that another one takes.

    >>> is_wider("int", "int | None"), is_wider("int | None", "int"), is_wider("int", "Any"), is_wider("int", "str")
    (True, False, True, False)
    """
    olds, news = _split(old), _split(new)
    return olds <= news or not news.isdisjoint({"Any", "object"})


def _split(text: str) -> frozenset[str]:
    """Return the members of a union; of a `Literal` each of its values."""
    try:
        leaves = _flatten(_parse(text))
    except (SyntaxError, ValueError, RecursionError):
        return frozenset({text})
    members: set[str] = set()
    for leaf in leaves:
        match leaf:
            case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=values)):
                members.update(f"Literal[{ast.unparse(value)}]" for value in values)
            case _:
                members.add(ast.unparse(leaf))
    return frozenset(members)
