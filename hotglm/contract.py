"""What a version promises: the state it holds, the call it answers, the config it reads and what it can do.

Rules this module keeps:

- Contracts are values: immutable, hashable, comparable, picklable, and the same on every machine.
- Names of dtypes are torch's without the prefix (`"float32"`); this module knows neither torch nor files.
- A part that nobody knows is `None`, never an empty part: an empty call interface is a promise, an unknown one is not.
- Annotations are compared as text and are never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

__all__ = [
    "ArgumentSpec",
    "CallSpec",
    "ConfigSpec",
    "Contract",
    "FieldSpec",
    "StateKind",
    "StateSpec",
    "pair_arguments",
]

StateKind = Literal["parameter", "buffer"]
"""What a module registers a tensor as."""

_WAYS = {
    "POSITIONAL_ONLY": frozenset({"position"}),
    "POSITIONAL_OR_KEYWORD": frozenset({"position", "name"}),
    "KEYWORD_ONLY": frozenset({"name"}),
    "VAR_POSITIONAL": frozenset({"position"}),
    "VAR_KEYWORD": frozenset({"name"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """One tensor of a module's state.

    Attributes:
        name: dotted name, as in a state dict.
        shape: sizes of its dimensions; `()` for a scalar.
        dtype: torch's name without the prefix, e.g. `"bfloat16"`.
        kind: what the module registers it as; None where that is unknown, as in a file. Where it is unknown,
            `persistent` and `tied` are unknown too.
        persistent: whether a state dict holds it.
        tied: first name, in registration order, of the group of names that share this tensor; None when not shared.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: StateKind | None = None
    persistent: bool = True
    tied: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentSpec:
    """One argument of a call interface.

    Attributes:
        name: its name, without stars.
        kind: name of the `inspect.Parameter` kind, e.g. `"KEYWORD_ONLY"`.
        has_default: whether a caller may leave it out; False for `*args` and `**kwargs`.
    """

    name: str
    kind: str
    has_default: bool

    @property
    def ways(self) -> frozenset[str]:
        """The ways to pass a value to it: `"position"`, `"name"` or both."""
        return _WAYS[self.kind]

    @property
    def is_variadic(self) -> bool:
        """Whether it is `*args` or `**kwargs`."""
        return self.kind.startswith("VAR_")

    @property
    def label(self) -> str:
        """Its name as it is written in a signature: `x`, `*args`, `**kwargs`."""
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        return stars.get(self.kind, "") + self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSpec:
    """How a module is called: the arguments of its `forward`, in order."""

    arguments: tuple[ArgumentSpec, ...]

    @classmethod
    def of(cls, function: Callable[..., object]) -> CallSpec | None:
        """Return the call interface of `function`, without `self`; None where Python cannot tell it.

        >>> CallSpec.of(lambda x, *, scale=1.0: x).arguments[1]
        ArgumentSpec(name='scale', kind='KEYWORD_ONLY', has_default=True)
        """
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # built-in or otherwise opaque: unknown, which is never compared
            return None
        # A bound method has lost its `self` already; a function taken from a class still carries it first.
        if parameters and parameters[0].name == "self" and not inspect.ismethod(function):
            del parameters[0]
        return cls(
            arguments=tuple(
                ArgumentSpec(name=p.name, kind=p.kind.name, has_default=p.default is not inspect.Parameter.empty)
                for p in parameters
            )
        )


def pair_arguments(old: CallSpec, new: CallSpec) -> tuple[tuple[ArgumentSpec, ArgumentSpec], ...]:
    """Return each argument of `old` with the one that takes its place in `new`, in the order of `old`.

    Two arguments are the same when they have the same name, or are both `*args` or both `**kwargs`. Else a positional
    one was renamed if a positional one that is new stands at its place.
    """
    known = {_identify(argument) for argument in old.arguments}
    same = {_identify(argument): argument for argument in new.arguments}
    renamed = {
        place: argument
        for place, argument in enumerate(new.arguments)
        if "position" in argument.ways and not argument.is_variadic and _identify(argument) not in known
    }
    pairs = []
    for place, before in enumerate(old.arguments):
        after = same.get(_identify(before))
        if after is None and "position" in before.ways and not before.is_variadic:
            after = renamed.get(place)
        if after is not None:
            pairs.append((before, after))
    return tuple(pairs)


def _identify(argument: ArgumentSpec) -> tuple[str, str]:
    return (argument.kind, "") if argument.is_variadic else ("", argument.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSpec:
    """One field of a config.

    Attributes:
        name: its name.
        type: its annotation as normalised text, empty for none; `Optional[int]`, `None | int` and `int | None` are one.
        has_default: whether a config may leave it out.
    """

    name: str
    type: str
    has_default: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSpec:
    """The fields of a config, in the order declared."""

    fields: tuple[FieldSpec, ...]

    @classmethod
    def of(cls, config: Callable[..., object] | None) -> ConfigSpec | None:
        """Return what `config`, a dataclass or any callable that takes fields by name, can be made from.

        None for None and for a callable whose signature Python cannot tell: both mean unknown.

        >>> ConfigSpec.of(lambda width, depth=2: None).fields[1]
        FieldSpec(name='depth', type='', has_default=True)
        """
        if config is None:
            return None
        try:
            parameters = inspect.signature(config).parameters.values()
        except (TypeError, ValueError):
            return None
        module = getattr(config, "__module__", None)
        return cls(
            fields=tuple(
                FieldSpec(
                    name=parameter.name,
                    type=_spell_type(parameter.annotation, module=module),
                    has_default=parameter.default is not inspect.Parameter.empty,
                )
                for parameter in parameters
                if not parameter.kind.name.startswith("VAR_")
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Everything about a version that a file, a caller or an operator can notice, apart from its values.

    Attributes:
        state: every tensor by name, in registration order; a read-only mapping.
        call: the call interface; None where unknown.
        config: the config schema; None where unknown.
        capabilities: words for what the version can do, chosen by its author.
        requires: PEP 508 requirements of the code, e.g. `"torch>=2.6"`.
    """

    state: Mapping[str, StateSpec] = field(default_factory=dict)
    call: CallSpec | None = None
    config: ConfigSpec | None = None
    capabilities: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Take a private read-only copy of the state mapping."""
        object.__setattr__(self, "state", MappingProxyType(dict(self.state)))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Contract:
        """Return a file's view: `tensors` maps each name to its dtype and shape; all else is unknown.

        >>> Contract.of_tensors({"w": ("float32", (2, 3))}).state["w"].shape
        (2, 3)
        """
        return cls(
            state={
                name: StateSpec(name=name, shape=tuple(shape), dtype=dtype) for name, (dtype, shape) in tensors.items()
            }
        )

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values, in a fixed order."""
        return {
            "state": [dataclasses.asdict(spec) for spec in self.state.values()],
            "call": None if self.call is None else [dataclasses.asdict(a) for a in self.call.arguments],
            "config": None if self.config is None else [dataclasses.asdict(f) for f in self.config.fields],
            "capabilities": sorted(self.capabilities),
            "requires": list(self.requires),
        }

    def __hash__(self) -> int:
        """Hash by value; the order of the state counts no more than it does for `==`."""
        state = frozenset(self.state.values())
        return hash((state, self.call, self.config, self.capabilities, self.requires))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by value: a read-only mapping view can be neither."""
        values = (dict(self.state), self.call, self.config, self.capabilities, self.requires)
        return (_rebuild, values)


def _rebuild(
    state: dict[str, StateSpec],
    call: CallSpec | None,
    config: ConfigSpec | None,
    capabilities: frozenset[str],
    requires: tuple[str, ...],
) -> Contract:
    return Contract(state=state, call=call, config=config, capabilities=capabilities, requires=requires)


def _spell_type(annotation: object, *, module: str | None) -> str:
    """Return an annotation as normalised text, so that a rewrite by a formatter is not a change of type."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation, base_module=module)
    try:
        return ast.unparse(_UnionSpelling().visit(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return " ".join(text.split())


class _UnionSpelling(ast.NodeTransformer):
    """Spell `typing.X` as `X`, and every union as `A | B` in alphabetical order with None last."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(value=None) if node.id == "NoneType" else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        is_typing = isinstance(node.value, ast.Name) and node.value.id in ("typing", "t")
        return ast.Name(id=node.attr, ctx=ast.Load()) if is_typing else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        match node.value, node.slice:
            case ast.Name(id="Optional"), inner:
                return _union([inner, ast.Constant(value=None)])
            case ast.Name(id="Union"), ast.Tuple(elts=members):
                return _union(members)
            case ast.Name(id="Union"), inner:
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
