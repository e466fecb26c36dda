"""What a version promises: the state it holds, the call it answers, the config it reads and what it can do.

Rules this module keeps:

- Contracts are values: immutable, hashable, comparable, picklable, and the same on every machine.
- Names of dtypes are torch's without the prefix (`"float32"`); this module knows neither torch nor files.
- A part that nobody knows is `None`, never an empty part: an empty call interface is a promise, an unknown one is not.
- Annotations are compared as text and are never evaluated.
- As JSON values and back: `Contract.from_dict(contract.to_dict()) == contract`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from hotglm.call_spec import ARGUMENT_KINDS, ArgumentSpec, CallSpec
from hotglm.config_spec import ConfigSpec, FieldSpec
from hotglm.errors import ArgumentError
from hotglm.output_spec import OutputSpec, Recording, ValueSpec
from hotglm.record import RecordReader, write_record

__all__ = ["CONTRACT_SCHEMA", "Contract", "StateKind", "StateSpec"]

StateKind = Literal["parameter", "buffer"]
"""What a module registers a tensor as."""


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
class Contract:
    """Everything about a version that a file, a caller or an operator can notice, apart from its values.

    Attributes:
        state: every tensor by name, in registration order; a read-only mapping.
        call: the call interface; None where unknown.
        config: the config schema; None where unknown.
        capabilities: words for what the version can do, chosen by its author.
        requires: PEP 508 requirements of the code, e.g. `"torch>=2.6"`.
        outputs: what it gives back, as recorded from golden inputs; None where unknown.
    """

    state: Mapping[str, StateSpec] = field(default_factory=dict)
    call: CallSpec | None = None
    config: ConfigSpec | None = None
    capabilities: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    outputs: OutputSpec | None = None

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
            "schema": CONTRACT_SCHEMA,
            "state": write_record(tuple(self.state.values())),
            "call": None if self.call is None else write_record(self.call.arguments),
            "config": None if self.config is None else write_record(self.config.fields),
            "capabilities": sorted(self.capabilities),
            "requires": list(self.requires),
            "outputs": None if self.outputs is None else write_record(self.outputs.recordings),
        }

    @classmethod
    def from_dict(cls, document: object) -> Contract:
        """Return the contract that `to_dict` wrote; strict, because a contract that is misread proves nothing.

        Args:
            document: JSON values, as `json.loads` gives them.

        Raises:
            ArgumentError: `document` is not what `to_dict` writes; everything that is wrong is named.
        """
        return _read_contract(document)

    def __hash__(self) -> int:
        """Hash by value; the order of the state counts no more than it does for `==`."""
        state = frozenset(self.state.values())
        return hash((state, self.call, self.config, self.capabilities, self.requires, self.outputs))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by value: a read-only mapping view can be neither."""
        values = (dict(self.state), self.call, self.config, self.capabilities, self.requires, self.outputs)
        return (_rebuild, values)


def _rebuild(
    state: dict[str, StateSpec],
    call: CallSpec | None,
    config: ConfigSpec | None,
    capabilities: frozenset[str],
    requires: tuple[str, ...],
    outputs: OutputSpec | None,
) -> Contract:
    return Contract(
        state=state, call=call, config=config, capabilities=capabilities, requires=requires, outputs=outputs
    )


# -- as JSON values ----------------------------------------------------------------------------------------------------

CONTRACT_SCHEMA = "hotglm.contract/1"
"""What the document of a contract says it is; its number changes when its meaning does."""

_PARTS = ("schema", "state", "call", "config", "capabilities", "requires", "outputs")


def _read_contract(document: object) -> Contract:
    reader = RecordReader(code="BAD_CONTRACT")
    parts = reader.read_members(document, _PARTS, where="contract")
    if parts["schema"] != CONTRACT_SCHEMA:
        reader.add(f"{CONTRACT_SCHEMA!r}", parts["schema"], where="schema")
    state = reader.read_all(StateSpec, parts["state"], where="state")
    call = None if parts["call"] is None else reader.read_all(ArgumentSpec, parts["call"], where="call")
    config = None if parts["config"] is None else reader.read_all(FieldSpec, parts["config"], where="config")
    outputs = None if parts["outputs"] is None else reader.read_all(Recording, parts["outputs"], where="outputs")
    capabilities = reader.read_all(str, parts["capabilities"], where="capabilities")
    requires = reader.read_all(str, parts["requires"], where="requires")
    for place, spec in enumerate(state):
        _verify_sizes(spec.shape, reader, where=f"state[{place}].shape")
    for place, argument in enumerate(call or ()):
        if argument.kind not in ARGUMENT_KINDS:
            reader.add(f"one of {', '.join(ARGUMENT_KINDS)}", argument.kind, where=f"call[{place}].kind")
    for place, recording in enumerate(outputs or ()):
        for side in ("inputs", "output"):
            _verify_value(getattr(recording, side), reader, where=f"outputs[{place}].{side}")
    _verify_distinct([spec.name for spec in state], reader, where="state")
    _verify_distinct([argument.name for argument in call or ()], reader, where="call")
    _verify_distinct([one.name for one in config or ()], reader, where="config")
    _verify_distinct(capabilities, reader, where="capabilities")
    if reader.problems:
        raise ArgumentError(
            "Expected a contract as Contract.to_dict writes it.",
            problems=reader.problems,
            remedy="write it again with Contract.to_dict().",
        )
    return Contract(
        state={spec.name: spec for spec in state},
        call=None if call is None else CallSpec(arguments=call),
        config=None if config is None else ConfigSpec(fields=config),
        capabilities=frozenset(capabilities),
        requires=requires,
        outputs=None if outputs is None else OutputSpec(recordings=outputs),
    )


def _verify_distinct(names: Iterable[str], reader: RecordReader, *, where: str) -> None:
    for name, num in Counter(names).items():
        if num > 1:
            reader.add("each name once", name, where=where)


def _verify_sizes(shape: Iterable[int | None], reader: RecordReader, *, where: str) -> None:
    for size in shape:
        if size is not None and size < 0:
            reader.add("a size of 0 or more", size, where=where)


def _verify_value(spec: ValueSpec, reader: RecordReader, *, where: str) -> None:
    _verify_sizes(spec.shape or (), reader, where=f"{where}.shape")
    for name, part in spec.parts:
        _verify_value(part, reader, where=f"{where}.{name}")
