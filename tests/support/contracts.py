"""Contracts to test with: short spellings, and Hypothesis strategies that draw whole ones."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hypothesis import strategies as st

from hotglm.call_spec import ArgumentSpec, CallSpec
from hotglm.config_spec import ConfigSpec, FieldSpec
from hotglm.contract import Contract, StateKind, StateSpec
from hotglm.output_spec import OutputSpec, Recording, ValueSpec

__all__ = [
    "call",
    "call_specs",
    "contract",
    "contracts",
    "counted",
    "field",
    "named",
    "output",
    "output_specs",
    "recording",
    "tensor",
    "values",
]


def tensor(
    name: str,
    shape: tuple[int, ...] = (2, 3),
    *,
    dtype: str = "float32",
    kind: StateKind | None = "parameter",
    persistent: bool = True,
    tied: str | None = None,
) -> StateSpec:
    """Return a parameter of shape (2, 3), or what is asked for."""
    return StateSpec(name=name, shape=shape, dtype=dtype, kind=kind, persistent=persistent, tied=tied)


def field(name: str, type_text: str = "int", *, has_default: bool = False, default: str | None = None) -> FieldSpec:
    """Return a required int field, or what is asked for; one with a default need not be said to have one."""
    return FieldSpec(name=name, type=type_text, has_default=has_default or default is not None, default=default)


def call(function: Callable[..., object]) -> CallSpec:
    """Return the call interface of `function`."""
    spec = CallSpec.of(function)
    assert spec is not None
    return spec


def contract(
    *specs: StateSpec,
    call: Callable[..., object] | None = None,
    config: tuple[FieldSpec, ...] | None = None,
    capabilities: tuple[str, ...] = (),
    requires: tuple[str, ...] = (),
    outputs: OutputSpec | None = None,
) -> Contract:
    """Return the contract of these tensors, with the call interface of the function `call`."""
    return Contract(
        state={spec.name: spec for spec in specs},
        call=CallSpec.of(call) if call is not None else None,
        config=ConfigSpec(fields=config) if config is not None else None,
        capabilities=frozenset(capabilities),
        requires=requires,
        outputs=outputs,
    )


def output(*shape: int | None, dtype: str = "float32") -> ValueSpec:
    """Return the layout of a tensor."""
    return ValueSpec(kind="tensor", type=dtype, shape=shape)


def named(**parts: ValueSpec) -> ValueSpec:
    """Return the layout of a dictionary."""
    return ValueSpec(kind="mapping", parts=tuple(parts.items()))


def counted(*parts: ValueSpec) -> ValueSpec:
    """Return the layout of a tuple."""
    return ValueSpec(kind="tuple", parts=tuple((str(place), part) for place, part in enumerate(parts)))


def recording(*outputs: ValueSpec, shapes: tuple[tuple[int, ...], ...] = ((2, 16), (3, 16))) -> OutputSpec:
    """Return a recording of each output: the first from a tensor of the first of `shapes`, and so on."""
    inputs = [counted(output(*shape, dtype="int64")) for shape in shapes]
    return OutputSpec(
        recordings=tuple(Recording(inputs=given, output=got) for given, got in zip(inputs, outputs, strict=False))
    )


_NAMES = ("a", "b", "c", "d")
_ORDER = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


_DEFAULTS = st.sampled_from([None, "1", "2"])


@st.composite
def call_specs(draw: st.DrawFn) -> CallSpec:
    """Draw a signature that Python would accept, over few names so that two of them often share some."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True, max_size=4))
    kinds = sorted(
        (draw(st.sampled_from([k for k in _ORDER if not k.startswith("VAR")])) for _ in names), key=_ORDER.index
    )
    num_positional = sum(kind != "KEYWORD_ONLY" for kind in kinds)
    first_default = draw(st.integers(0, num_positional))
    arguments = []
    for place, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        has_default = place >= first_default if kind != "KEYWORD_ONLY" else draw(st.booleans())
        default = draw(_DEFAULTS) if has_default else None
        arguments.append(ArgumentSpec(name=name, kind=kind, has_default=has_default, default=default))
    if draw(st.booleans()):
        arguments.insert(num_positional, ArgumentSpec(name="rest", kind="VAR_POSITIONAL", has_default=False))
    if draw(st.booleans()):
        arguments.append(ArgumentSpec(name="more", kind="VAR_KEYWORD", has_default=False))
    return CallSpec(arguments=tuple(arguments))


@st.composite
def contracts(draw: st.DrawFn, *, parts: Collection[str] = ("state", "call", "config", "words", "outputs")) -> Contract:
    """Draw a contract over few names, so that two of them often share some; parts that are not asked for are unknown.

    Drawing a part costs time; `outputs` costs as much as the rest.
    """
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True)) if "state" in parts else []
    specs = [
        tensor(
            name,
            draw(st.sampled_from([(), (2,), (2, 3)])),
            dtype=draw(st.sampled_from(["float32", "int8"])),
            kind=draw(st.sampled_from(["parameter", "buffer", None])),
            persistent=draw(st.booleans()),
            tied=draw(st.sampled_from([None, *names])),
        )
        for name in names
    ]
    fields = [
        field(name, draw(st.sampled_from(["int", "str"])), has_default=draw(st.booleans()), default=draw(_DEFAULTS))
        for name in (draw(st.lists(st.sampled_from(_NAMES), unique=True)) if "config" in parts else [])
    ]
    return Contract(
        state={spec.name: spec for spec in specs},
        call=draw(st.none() | call_specs()) if "call" in parts else None,
        config=draw(st.none() | st.just(ConfigSpec(fields=tuple(fields)))) if "config" in parts else None,
        capabilities=draw(st.frozensets(st.sampled_from(["generate", "embed"]))) if "words" in parts else frozenset(),
        requires=draw(st.sampled_from([(), ("torch>=2.6",), ("torch>=2.6", "numpy")])) if "words" in parts else (),
        outputs=draw(st.none() | output_specs()) if "outputs" in parts else None,
    )


_SIZES = st.sampled_from([None, 1, 2, 3])
_LEAVES = st.one_of(
    st.builds(
        ValueSpec,
        kind=st.sampled_from(["tensor", "array"]),
        type=st.sampled_from(["", "float32", "int8"]),
        shape=st.none() | st.lists(_SIZES, max_size=2).map(tuple),
    ),
    st.builds(ValueSpec, kind=st.just("value"), type=st.sampled_from(["NoneType", "int"])),
    st.just(ValueSpec(kind="unknown")),
)


def _structures(parts: st.SearchStrategy[ValueSpec]) -> st.SearchStrategy[ValueSpec]:
    return st.one_of(
        st.lists(parts, max_size=2).map(lambda drawn: counted(*drawn)),
        st.builds(
            lambda kind, drawn: ValueSpec(kind=kind, parts=tuple(drawn.items())),
            st.sampled_from(["mapping", "record", "mapping_record"]),
            st.dictionaries(st.sampled_from(_NAMES[:3]), parts, max_size=3),
        ),
        st.builds(
            lambda drawn: ValueSpec(kind="namedtuple", parts=tuple(zip(_NAMES, drawn, strict=False))),
            st.lists(parts, max_size=2),
        ),
    )


values: st.SearchStrategy[ValueSpec] = st.recursive(_LEAVES, _structures, max_leaves=4)
"""Layouts of anything that may come back."""


def _record(sizes: tuple[int, int], value: ValueSpec) -> Recording:
    return Recording(inputs=counted(output(*sizes, dtype="int64")), output=value)


def output_specs() -> st.SearchStrategy[OutputSpec]:
    """Draw recordings whose inputs often have the same layout, and often differ in sizes alone."""
    made = st.builds(_record, st.sampled_from([(1, 3), (2, 3), (1, 4)]), values)
    return st.lists(made, min_size=1, max_size=2, unique=True).map(lambda drawn: OutputSpec(recordings=tuple(drawn)))
