"""Contracts are kept in files: as JSON values and back, strictly."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.contract import Contract
from hotglm.errors import ArgumentError
from support.contracts import contract, contracts, field, named, output, recording, tensor

WHOLE = contract(
    tensor("w"),
    tensor("v", tied="w"),
    call=lambda x, *, scale=1.0: x,
    config=(field("n", default="1"),),
    capabilities=("embed",),
    requires=("torch>=2.6",),
    outputs=recording(named(logits=output(None, 8))),
)


@given(contracts())
def test_reading_is_the_inverse_of_writing(one: Contract) -> None:
    """Contract.from_dict(c.to_dict()) == c, through JSON text too, and the order of the state is kept."""
    assert Contract.from_dict(one.to_dict()) == one
    again = Contract.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again == one
    assert list(again.state) == list(one.state)
    assert again.to_dict() == one.to_dict()


def change(path: str, value: object) -> dict[str, Any]:
    """Return the document of `WHOLE` with one place replaced."""
    document = copy.deepcopy(WHOLE.to_dict())
    *parents, last = path.split(".")
    place: Any = document
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("schema", "hotglm.contract/9", "'hotglm.contract/1' at 'schema', got 'hotglm.contract/9'"),
        ("extra", 1, "only the members schema, "),
        ("state", {}, "an array at 'state'"),
        ("state.0", 7, "an object at 'state[0]', got 7"),
        ("state.0.name", None, "text at 'state[0].name', got None"),
        ("state.0.shape.1", True, "an integer at 'state[0].shape[1]', got True"),
        ("state.0.shape.1", -1, "a size of 0 or more"),
        ("state.0.shape", "23", "an array at 'state[0].shape'"),
        ("state.0.kind", "thing", "one of parameter, buffer"),
        ("state.0.persistent", 1, "true or false"),
        ("state.1.name", "w", "each name once at 'state', got 'w'"),
        ("state.0.note", "", "only the members name, "),
        ("call.0.kind", "ANY", "one of POSITIONAL_ONLY, "),
        ("call.1.name", "x", "each name once at 'call'"),
        ("config", 3, "an array at 'config'"),
        ("capabilities", ["a", "a"], "each name once"),
        ("requires.0", 3, "text at 'requires[0]'"),
        ("outputs.0.output.parts.0", ["logits"], "2 elements"),
        ("outputs.0.output.parts.0.1.shape", [-2], "a size of 0 or more at 'outputs[0].output.logits.shape'"),
        ("outputs.0.output.kind", [], "one of tensor, "),
    ],
)
def test_whatever_is_not_written_so_is_refused(path: str, value: object, text: str) -> None:
    """Each thing that `to_dict` would not write is one problem, which says where it stands."""
    with pytest.raises(ArgumentError) as caught:
        Contract.from_dict(change(path, value))
    assert [problem.code for problem in caught.value.problems] == ["BAD_CONTRACT"]
    assert text in caught.value.problems[0].message
    assert str(caught.value).endswith("Remedy: write it again with Contract.to_dict().")


@pytest.mark.parametrize("key", sorted(WHOLE.to_dict()))
def test_a_missing_part_is_refused(key: str) -> None:
    """A part that is missing is not taken for unknown."""
    document = WHOLE.to_dict()
    del document[key]
    with pytest.raises(ArgumentError, match=f"Expected a member '{key}'"):
        Contract.from_dict(document)


@pytest.mark.parametrize("document", [None, [], "text", 3], ids=repr)
def test_what_is_no_object_is_refused(document: object) -> None:
    """A document that is no object is one error like the others."""
    with pytest.raises(ArgumentError, match="Expected an object at 'contract'"):
        Contract.from_dict(document)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    """All problems are in one error."""
    document = {**WHOLE.to_dict(), "schema": 0, "requires": None, "capabilities": [1, 2], "call": [{}]}
    with pytest.raises(ArgumentError) as caught:
        Contract.from_dict(document)
    assert len(caught.value.problems) == 1 + 1 + 2 + 4


def test_a_bomb_is_a_refusal() -> None:
    """Outputs nested without end are refused, and names from outside are escaped."""
    deep: Any = {"kind": "value", "type": "int", "shape": None, "parts": []}
    for _ in range(200):
        deep = {"kind": "tuple", "type": "", "shape": None, "parts": [["\x1b[31m", deep]]}
    document = {**WHOLE.to_dict(), "outputs": [{"inputs": deep, "output": deep}], "\x1b": 1}
    with pytest.raises(ArgumentError, match="Expected at most 64 levels") as caught:
        Contract.from_dict(document)
    assert "\x1b" not in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda s: st.lists(s) | st.dictionaries(st.sampled_from(sorted(WHOLE.to_dict())), s),
        max_leaves=8,
    )
)
def test_no_document_is_another_error(document: object) -> None:
    """Whatever JSON values come in, a contract comes out or the one typed error does."""
    try:
        Contract.from_dict(document)
    except ArgumentError as error:
        assert error.problems  # noqa: PT017 - either outcome is right
