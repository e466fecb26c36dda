"""How a module is called: the arguments of its `forward`, their kinds and their defaults.

Rules this module keeps:

- A signature that Python cannot tell is unknown (None), never empty.
- Defaults are kept as text (`hotglm.spelling`), never as objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from hotglm.spelling import spell_value

__all__ = ["ARGUMENT_KINDS", "ArgumentSpec", "CallSpec", "pair_arguments"]

_WAYS = {
    "POSITIONAL_ONLY": frozenset({"position"}),
    "POSITIONAL_OR_KEYWORD": frozenset({"position", "name"}),
    "KEYWORD_ONLY": frozenset({"name"}),
    "VAR_POSITIONAL": frozenset({"position"}),
    "VAR_KEYWORD": frozenset({"name"}),
}

ARGUMENT_KINDS = tuple(_WAYS)
"""Names of the kinds of `inspect.Parameter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentSpec:
    """One argument of a call interface.

    Attributes:
        name: its name, without stars.
        kind: name of the `inspect.Parameter` kind, e.g. `"KEYWORD_ONLY"`.
        has_default: whether a caller may leave it out; False for `*args` and `**kwargs`.
        default: the default as text, e.g. `"1.0"`; None where there is none, or none that has a lasting text.
    """

    name: str
    kind: str
    has_default: bool
    default: str | None = None

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
        ArgumentSpec(name='scale', kind='KEYWORD_ONLY', has_default=True, default='1.0')
        """
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # built-in or otherwise opaque: unknown, which is never compared
            return None
        # A bound method has lost its `self` already; a function taken from a class still carries it first.
        if parameters and parameters[0].name == "self" and not inspect.ismethod(function):
            del parameters[0]
        return cls(arguments=tuple(map(_describe, parameters)))


def _describe(parameter: inspect.Parameter) -> ArgumentSpec:
    has_default = parameter.default is not inspect.Parameter.empty
    return ArgumentSpec(
        name=parameter.name,
        kind=parameter.kind.name,
        has_default=has_default,
        default=spell_value(parameter.default) if has_default else None,
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
