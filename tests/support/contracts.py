"""Contracts to test with: short spellings, and Hypothesis strategies that draw whole ones."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from hotglm.contract import ArgumentSpec, CallSpec, ConfigSpec, Contract, FieldSpec, StateKind, StateSpec

__all__ = ["call", "contract", "contracts", "field", "tensor"]


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


def field(name: str, type_text: str = "int", *, has_default: bool = False) -> FieldSpec:
    """Return a required int field, or what is asked for."""
    return FieldSpec(name=name, type=type_text, has_default=has_default)


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
) -> Contract:
    """Return the contract of these tensors, with the call interface of the function `call`."""
    return Contract(
        state={spec.name: spec for spec in specs},
        call=CallSpec.of(call) if call is not None else None,
        config=ConfigSpec(fields=config) if config is not None else None,
        capabilities=frozenset(capabilities),
        requires=requires,
    )


_NAMES = ("a", "b", "c", "d")
_ORDER = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


@st.composite
def _call_specs(draw: st.DrawFn) -> CallSpec:
    """Draw a signature that Python would accept, over few names so that two of them often share some."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True, max_size=4))
    kinds = sorted(
        (draw(st.sampled_from([k for k in _ORDER if not k.startswith("VAR")])) for _ in names), key=_ORDER.index
    )
    num_positional = sum(kind != "KEYWORD_ONLY" for kind in kinds)
    first_default = draw(st.integers(0, num_positional))
    arguments = [
        ArgumentSpec(
            name=name,
            kind=kind,
            has_default=place >= first_default if kind != "KEYWORD_ONLY" else draw(st.booleans()),
        )
        for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    if draw(st.booleans()):
        arguments.insert(num_positional, ArgumentSpec(name="rest", kind="VAR_POSITIONAL", has_default=False))
    if draw(st.booleans()):
        arguments.append(ArgumentSpec(name="more", kind="VAR_KEYWORD", has_default=False))
    return CallSpec(arguments=tuple(arguments))


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    """Draw a contract over few names, so that two of them often share some."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True))
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
        field(name, draw(st.sampled_from(["int", "str"])), has_default=draw(st.booleans()))
        for name in draw(st.lists(st.sampled_from(_NAMES), unique=True))
    ]
    return Contract(
        state={spec.name: spec for spec in specs},
        call=draw(st.none() | _call_specs()),
        config=draw(st.none() | st.just(ConfigSpec(fields=tuple(fields)))),
        capabilities=draw(st.frozensets(st.sampled_from(["generate", "embed"]))),
    )
