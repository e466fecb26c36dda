"""What a call gives back: structure, names, dtypes and shapes, as recorded from golden inputs.

Rules this module keeps:

- A recording is evidence, kept as it was made: the layout of the inputs, and that of the output they gave. What it
  proves is decided when two versions are compared (`hotglm.output_comparison`), not when it is recorded.
- Values of tensors are never looked at. Of other values in an output only the type is kept; of those in the inputs the
  text too, because `return_dict=False` decides what comes back.
- Tensors are recognised by the name of their class; torch is not imported.
- What is too deep, too large or disagrees with itself is unknown, and never compared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hotglm.spelling import spell_value

__all__ = [
    "MAX_RECORDINGS",
    "VALUE_KINDS",
    "OutputSpec",
    "Recording",
    "ValueKind",
    "ValueSpec",
    "describe_inputs",
    "describe_value",
]

ValueKind = Literal[
    "tensor", "array", "tuple", "list", "namedtuple", "mapping", "record", "mapping_record", "value", "unknown"
]
"""What a value is to its caller.

A `record` has its parts as attributes (a dataclass), a `mapping_record` as attributes and as keys (the `ModelOutput` of
`transformers`); a `value` is any other object of Python, None included.
"""

VALUE_KINDS: tuple[str, ...] = get_args(ValueKind)

_MAX_DEPTH = 12
_MAX_PARTS = 10_000
"""Depth and number of parts of an output that is described; what is beyond them is unknown.

Each level is three levels of JSON, of which a document may have 64 (`hotglm.document`, `hotglm.record`).
"""

MAX_RECORDINGS = 64
"""How many recordings one version keeps; the first ones are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSpec:
    """The layout of one value: a tensor, or a structure of them.

    Attributes:
        kind: what it is to its caller.
        type: of a tensor or array its dtype (`"float32"`), empty where that varies; of a `value` the name of its type,
            or its text where it is an input.
        shape: of a tensor or array, None for a size that varies; None as a whole where even the number varies.
        parts: name and layout of each part; those of a tuple or list are named `"0"`, `"1"` and so on.
    """

    kind: ValueKind
    type: str = ""
    shape: tuple[int | None, ...] | None = None
    parts: tuple[tuple[str, ValueSpec], ...] = ()

    @property
    def is_sequence(self) -> bool:
        """Whether its parts are counted, not named."""
        return self.kind in ("tuple", "list", "namedtuple")

    @property
    def is_tensor(self) -> bool:
        """Whether it has a dtype and a shape."""
        return self.kind in ("tensor", "array")

    def describe(self) -> str:
        """Return it in a few words.

        >>> ValueSpec(kind="tuple", parts=(("0", ValueSpec(kind="tensor")),)).describe()
        'a tuple of 1'
        """
        match self.kind:
            case "tuple" | "list" | "namedtuple":
                return f"a {self.kind} of {len(self.parts)}"
            case "tensor" | "array":
                return f"{'an' if self.kind == 'array' else 'a'} {self.kind}"
            case "value":
                return self.type or "a value"
            case "unknown":
                return "something unknown"
        return f"a {self.kind.replace('_', ' ')}"


_UNKNOWN = ValueSpec(kind="unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One call: the layout of its arguments and of what came back.

    Attributes:
        inputs: the arguments; a `tuple` of positional ones or a `mapping` of those passed by name.
        output: what came back.
    """

    inputs: ValueSpec
    output: ValueSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """What a version gives back, as recorded; the order of the recordings does not matter, and each is kept once."""

    recordings: tuple[Recording, ...]

    @classmethod
    def of(cls, calls: Iterable[tuple[object, object]]) -> OutputSpec | None:
        """Return what `calls`, pairs of inputs and output, show; None for no calls, which means unknown.

        Inputs are one tensor, a tuple of positional arguments, or a mapping of keyword arguments.

        >>> OutputSpec.of([]) is None
        True
        """
        made = dict.fromkeys(
            Recording(inputs=describe_inputs(inputs), output=describe_value(output)) for inputs, output in calls
        )
        return cls(recordings=tuple(made)[:MAX_RECORDINGS]) if made else None

    def joined(self, other: OutputSpec | None) -> OutputSpec:
        """Return the recordings of both, each once; where the two disagree, they prove nothing together."""
        more = () if other is None else other.recordings
        return OutputSpec(recordings=tuple(dict.fromkeys((*self.recordings, *more)))[:MAX_RECORDINGS])


def describe_inputs(inputs: object) -> ValueSpec:
    """Return the layout of the arguments of a call, the text of what is no tensor included."""
    arguments = inputs if type(inputs) is tuple or isinstance(inputs, Mapping) else (inputs,)
    spec = _Description(with_text=True).describe(arguments, depth=0)
    # In which order arguments were passed by name is no part of the call.
    return dataclasses.replace(spec, parts=tuple(sorted(spec.parts))) if spec.kind == "mapping" else spec


def describe_value(value: object) -> ValueSpec:
    """Return the layout of what a call gave back."""
    return _Description(with_text=False).describe(value, depth=0)


class _Description:
    """One description on its way, which counts its parts."""

    def __init__(self, *, with_text: bool) -> None:
        self._with_text = with_text
        self._num_parts = 0

    def describe(self, value: object, *, depth: int) -> ValueSpec:
        self._num_parts += 1
        if depth > _MAX_DEPTH or self._num_parts > _MAX_PARTS:
            return _UNKNOWN
        kind = _find_kind(value)
        if kind in ("tensor", "array"):
            return _describe_tensor(value, kind)
        if kind == "value":
            text = (spell_value(value) if self._with_text else None) or type(value).__name__
            return ValueSpec(kind="value", type=text)
        parts = []
        for name, part in itertools.islice(_find_parts(value, kind), _MAX_PARTS):
            parts.append((name, self.describe(part, depth=depth + 1)))
        return ValueSpec(kind=kind, parts=tuple(parts)) if self._num_parts <= _MAX_PARTS else _UNKNOWN


def _find_kind(value: Any) -> ValueKind:
    if any(base.__name__ == "Tensor" and base.__module__ == "torch" for base in type(value).__mro__):
        return "tensor"
    if isinstance(value, (tuple, list)):
        return "list" if isinstance(value, list) else "namedtuple" if hasattr(value, "_fields") else "tuple"
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if isinstance(value, Mapping):
        return "mapping_record" if is_record else "mapping"
    if is_record:
        return "record"
    has_layout = isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")
    return "array" if has_layout and not isinstance(value, type) else "value"


def _find_parts(value: Any, kind: ValueKind) -> Iterator[tuple[str, object]]:
    if kind in ("mapping", "mapping_record"):
        return ((key if isinstance(key, str) else ascii(key), part) for key, part in value.items())
    if kind == "record":
        return ((part.name, getattr(value, part.name, None)) for part in dataclasses.fields(value))
    names = value._fields if kind == "namedtuple" else map(str, itertools.count())
    return zip(names, value, strict=False)


def _describe_tensor(value: Any, kind: ValueKind) -> ValueSpec:
    try:
        shape = tuple(int(size) for size in value.shape)
        return ValueSpec(kind=kind, type=str(value.dtype).removeprefix("torch."), shape=shape)
    except Exception:  # noqa: BLE001 - a nested tensor has no shape, and a foreign class may raise anything
        return ValueSpec(kind=kind)
