"""Contracts are values, and read call interfaces and configs as their users see them."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import typing
from dataclasses import InitVar, dataclass
from dataclasses import field as dataclass_field
from typing import Any

import pytest
from hypothesis import given

from hotglm.call_spec import ArgumentSpec, CallSpec, pair_arguments
from hotglm.config_spec import ConfigSpec
from hotglm.contract import Contract, StateSpec
from support.contracts import call, contract, contracts, field, tensor


class Model:
    def forward(self, x: object, *, scale: float = 1.0) -> object:
        return x

    def __call__(self, x: object, mask: object = None, *rest: object, **more: object) -> object:
        return x


# -- a contract is a value ---------------------------------------------------------------------------------------------


@given(contracts())
def test_a_contract_survives_pickle_and_copy(one: Contract) -> None:
    """A contract compares and hashes by value, also after pickling and copying."""
    for other in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert other == one
        assert hash(other) == hash(one)


def test_a_contract_keeps_its_own_state() -> None:
    """Changing the mapping a contract was made from, or the contract's own, changes nothing."""
    state = {"w": tensor("w")}
    one = Contract(state=state)
    state["v"] = tensor("v")
    assert list(one.state) == ["w"]
    with pytest.raises(TypeError):
        one.state["v"] = tensor("v")  # type: ignore[index]


def test_registration_order_is_kept() -> None:
    """State is listed in the order it was registered."""
    assert list(contract(tensor("z"), tensor("a")).state) == ["z", "a"]


@given(contracts())
def test_a_contract_is_written_as_json(one: Contract) -> None:
    """to_dict holds JSON values only, with every tensor by name."""
    document = json.loads(json.dumps(one.to_dict()))
    assert [spec["name"] for spec in document["state"]] == list(one.state)
    assert (document["call"] is None) == (one.call is None)


def test_a_file_knows_only_names_shapes_and_dtypes() -> None:
    """A file's view says nothing about kinds, calls or configs."""
    view = Contract.of_tensors({"w": ("bfloat16", (4,))})
    assert view.state["w"] == StateSpec(name="w", shape=(4,), dtype="bfloat16", kind=None)
    assert view.call is None
    assert view.config is None


# -- call interfaces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [Model.forward, Model().forward], ids=["unbound", "bound"])
def test_self_is_no_argument(function: Any) -> None:
    """The call interface of a method has no `self`, bound or not."""
    assert CallSpec.of(function) == CallSpec(
        arguments=(
            ArgumentSpec(name="x", kind="POSITIONAL_OR_KEYWORD", has_default=False),
            ArgumentSpec(name="scale", kind="KEYWORD_ONLY", has_default=True, default="1.0"),
        )
    )


def test_arguments_are_labelled_as_in_a_signature() -> None:
    """Variadic arguments carry their stars, and can never be left without a value."""
    spec = call(Model().__call__)
    assert [argument.label for argument in spec.arguments] == ["x", "mask", "*rest", "**more"]
    assert [argument.is_variadic for argument in spec.arguments] == [False, False, True, True]


def test_a_decorated_function_shows_what_it_wraps() -> None:
    """A decorator that uses functools.wraps does not hide the call interface."""

    def plain(x: object, y: object = None) -> object:
        return x

    @functools.wraps(plain)
    def wrapped(*args: object, **kwargs: object) -> object:
        return plain(*args, **kwargs)

    assert CallSpec.of(wrapped) == CallSpec.of(plain)


@pytest.mark.parametrize("opaque", [min, dict, 3], ids=repr)
def test_what_python_cannot_tell_is_unknown(opaque: Any) -> None:
    """A built-in or anything else without a signature has an unknown call interface, not an empty one."""
    assert CallSpec.of(opaque) is None


def test_arguments_are_paired_by_name_then_by_place() -> None:
    """Same names pair wherever they stand; of the rest, only positional ones at the same place do."""
    old, new = call(lambda a, b, *args, k=1, gone=2: 0), call(lambda b, z, *rest, new=1, k=2: 0)
    assert [(one.label, other.label) for one, other in pair_arguments(old, new)] == [
        ("b", "b"),
        ("*args", "*rest"),
        ("k", "k"),
    ]
    assert [(one.name, other.name) for one, other in pair_arguments(call(lambda a: 0), call(lambda z: 0))] == [
        ("a", "z")
    ]


# -- config schemas ----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    width: int
    depth: int | None = None
    names: list[str] = dataclass_field(default_factory=list)
    seed: InitVar[int] = 0
    cached: int = dataclass_field(default=0, init=False)


def test_a_config_schema_is_what_its_dataclass_takes() -> None:
    """Fields come in order, with defaults and factories alike optional, and without what cannot be passed."""
    schema = ConfigSpec.of(Config)
    assert schema is not None
    assert [(f.name, f.has_default) for f in schema.fields] == [
        ("width", False),
        ("depth", True),
        ("names", True),
        ("seed", True),
    ]
    assert schema.fields[0].type == "int"


def test_a_config_may_be_any_callable() -> None:
    """A function that takes fields by name is as good as a dataclass; what it swallows is no field."""
    schema = ConfigSpec.of(lambda width, *, depth=2, **more: None)
    assert schema == ConfigSpec(fields=(field("width", ""), field("depth", "", default="2")))


def test_no_config_is_unknown() -> None:
    """None, and a callable that Python cannot read, have an unknown schema."""
    assert ConfigSpec.of(None) is None
    assert ConfigSpec.of(dict) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Optional[int]", "int | None"),
        ("None | int", "int|None"),
        ("typing.Optional[int]", typing.Optional[int]),  # noqa: UP045 - the old spelling is what is tested
        ("Union[str, int]", int | str),
        ("dict[str, t.Optional[int]]", dict[str, int | None]),
        ("int", int),
        ("Config", Config),
        ("Literal['a', 'b']", typing.Literal["a", "b"]),
    ],
)
def test_two_spellings_of_a_type_are_one_type(one: object, other: object) -> None:
    """Rewriting an annotation without changing its meaning is not a change of type."""

    def make(annotation: object) -> ConfigSpec | None:
        def config(x: object) -> None: ...

        config.__annotations__["x"] = annotation
        return ConfigSpec.of(config)

    assert make(one) == make(other)
    assert make(one) != make("bytes")


def test_annotations_are_never_evaluated() -> None:
    """Text that would raise or run is compared as text."""

    def config(x: object, y: object) -> None: ...

    config.__annotations__.update(x="no (type", y="print('ran')")
    schema = ConfigSpec.of(config)
    assert schema is not None
    assert [f.type for f in schema.fields] == ["no (type", "print('ran')"]
