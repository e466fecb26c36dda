"""What a version gives back: how it is recorded, and what recordings prove about a change."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from torch import nn

import hotglm
from hotglm.breakage import Breakage
from hotglm.document import Report, parse_json
from hotglm.errors import SourceError
from hotglm.output_breakage import (
    OutputAdded,
    OutputRemoved,
    OutputRenamed,
    OutputShapeChanged,
    OutputStructureChanged,
)
from hotglm.output_comparison import find_in_outputs
from hotglm.output_spec import OutputSpec, ValueSpec, describe_inputs, describe_value
from support.contracts import counted, named, output, output_specs, recording


class Pair(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict[str, torch.Tensor]):
    """As transformers has them: a dataclass that is a mapping of what is not None."""

    logits: torch.Tensor


def find(old: OutputSpec, new: OutputSpec) -> list[Breakage]:
    return list(find_in_outputs(old, new))


X = torch.zeros(2, 3)
FLOAT = output(2, 3)

# -- recording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (X, FLOAT),
        (nn.Parameter(X), FLOAT),
        (X.half(), output(2, 3, dtype="float16")),
        ((X, [X]), counted(FLOAT, ValueSpec(kind="list", parts=(("0", FLOAT),)))),
        ({"a": X, 1: X}, ValueSpec(kind="mapping", parts=(("a", FLOAT), ("1", FLOAT)))),
        (Pair(X, X), ValueSpec(kind="namedtuple", parts=(("logits", FLOAT), ("loss", FLOAT)))),
        (
            Answer(X),
            ValueSpec(kind="record", parts=(("logits", FLOAT), ("loss", ValueSpec(kind="value", type="NoneType")))),
        ),
        (3.5, ValueSpec(kind="value", type="float")),
        (object, ValueSpec(kind="value", type="type")),
        (X.numpy(), ValueSpec(kind="array", type="float32", shape=(2, 3))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_described_by_its_layout(value: object, spec: ValueSpec) -> None:
    """Structure, names, dtypes and shapes are kept, and no value of an output is."""
    assert describe_value(value) == spec


def test_a_model_output_can_be_used_both_ways() -> None:
    """A mapping that is a dataclass too has its parts under its keys and as attributes."""
    made = ModelOutput(logits=X)
    made["logits"] = X
    assert describe_value(made) == ValueSpec(kind="mapping_record", parts=(("logits", FLOAT),))


def test_what_is_too_deep_or_a_circle_is_unknown() -> None:
    """A structure that contains itself is described as far as it goes, and ends."""
    circle: list[Any] = []
    circle.append(circle)
    spec = describe_value(circle)
    recorded = hotglm.Contract(outputs=recording(spec))
    assert hotglm.Contract.from_dict(recorded.to_dict()) == recorded
    text = json.dumps({"outermost": recorded.to_dict()}).encode()
    assert parse_json(text, report=Report(SourceError, headline="", remedy="", prefix="", file=None))
    for _ in range(13):
        (part,) = spec.parts
        spec = part[1]
    assert spec.kind == "unknown"
    assert describe_value([0] * 20_000).kind == "unknown"


def test_inputs_keep_what_decides_the_output() -> None:
    """Arguments are the same however they are passed in order, and `return_dict=False` is another call."""
    assert describe_inputs(X) == describe_inputs((X,)) == counted(FLOAT)
    assert describe_inputs({"a": X, "b": True}) == describe_inputs({"b": True, "a": X})
    assert describe_inputs({"b": True}) != describe_inputs({"b": False})


def test_the_same_recording_is_kept_once_and_none_is_unknown() -> None:
    """Calls of equal layout are one recording; no calls is an unknown output."""
    spec = OutputSpec.of([(X, X), (X + 1, X * 2), (torch.zeros(5, 3), torch.zeros(5, 3))])
    assert spec is not None
    assert len(spec.recordings) == 2
    assert OutputSpec.of([]) is None


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = {"logits": self.drop(self.norm(x)), "mean": x.mean()}
        return {"training only": x} if self.training else answer


def test_contract_of_records_what_a_module_gives_back() -> None:
    """`contract_of(module, inputs=...)` runs the module once for each, and leaves it and the generator as they were."""
    module = Tower()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    found = hotglm.contract_of(module, inputs=[torch.ones(2, 3), {"x": torch.ones(4, 3)}])
    assert found.outputs == OutputSpec.of(
        [
            (torch.ones(2, 3), {"logits": torch.ones(2, 3), "mean": torch.tensor(0.0)}),
            ({"x": torch.ones(4, 3)}, {"logits": torch.ones(4, 3), "mean": torch.tensor(0.0)}),
        ]
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.modules())
    assert hotglm.contract_of(module).outputs is None


def test_inputs_that_the_module_does_not_take_are_an_error() -> None:
    """Inputs that raise are named, every one of them."""
    with pytest.raises(hotglm.ArgumentError) as caught:
        hotglm.contract_of(Tower(), inputs=[torch.ones(2, 3), torch.ones(2, 4), {"y": X}])
    assert [problem.message[:8] for problem in caught.value.problems] == ["inputs 1", "inputs 2"]


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_with_inputs_of_the_same_shapes_every_size_counts() -> None:
    """The same call that gives another shape is a change, whichever size it is."""
    assert find(recording(output(2, 8)), recording(output(4, 8))) == [
        OutputShapeChanged(subject="result", old=(2, 8), new=(4, 8))
    ]


def test_a_size_that_follows_the_batch_otherwise_is_a_change() -> None:
    """Twice as many rows for the same inputs are found, although neither side's rows are fixed."""
    old, new = recording(output(2, 8), output(3, 8)), recording(output(4, 8), output(6, 8))
    assert find(old, new) == [
        OutputShapeChanged(subject="result", old=(2, 8), new=(4, 8)),
        OutputShapeChanged(subject="result", old=(3, 8), new=(6, 8)),
    ]


def test_a_dtype_that_varies_is_not_compared() -> None:
    """A dtype that differs between recordings of one version promises nothing."""
    varies = recording(output(2, 8), output(2, 8, dtype="int8"), shapes=((2, 16), (2, 16)))
    plain = recording(output(2, 8))
    assert find(varies, plain) == find(plain, varies) == []


BIGGER = ((5, 16), (7, 16))


def test_a_batch_of_another_size_is_no_change() -> None:
    """Recordings of other batch sizes do not differ by that; nothing was varied, so nothing is proved."""
    assert find(recording(output(2, 8)), recording(output(5, 8), shapes=BIGGER)) == []
    assert find(recording(output(2, 8)), recording(output(5, 9), shapes=BIGGER)) == []


def test_a_size_that_stayed_while_the_batch_varied_is_fixed() -> None:
    """Two recordings of different batches prove that the width does not follow the batch."""
    proved = recording(output(2, 8), output(3, 8))
    assert find(proved, recording(output(5, 8), shapes=BIGGER)) == []
    (found,) = find(proved, recording(output(5, 9), shapes=BIGGER))
    assert found.explain() == "output 'result' went from 8 to 9 wide"
    assert find(recording(output(5, 9), shapes=BIGGER), proved) != []


def test_images_of_another_size_prove_nothing_about_a_feature_map() -> None:
    """A size may follow an input's size that nobody varied, so that it is not compared where that one differs."""
    small = recording(output(2, 7), output(3, 7), shapes=((2, 224), (3, 224)))
    large = recording(output(2, 8), output(3, 8), shapes=((2, 256), (3, 256)))
    assert find(small, large) == []


def test_another_dtype_or_structure_is_found_under_any_shapes() -> None:
    """Dtypes and structure do not follow the sizes of the inputs."""
    old, new = recording(named(a=output(2, 8))), recording(counted(output(5, 8, dtype="int8")), shapes=BIGGER)
    assert [found.code for found in find(old, new)] == ["OUTPUT_STRUCTURE_CHANGED"]
    new = recording(named(a=output(5, 8, dtype="int8")), shapes=BIGGER)
    assert [found.code for found in find(old, new)] == ["OUTPUT_DTYPE_CHANGED"]


def test_another_argument_is_another_call() -> None:
    """What comes back for `return_dict=False` is not compared with what comes back without it."""
    old = OutputSpec.of([({"x": X, "return_dict": True}, {"a": X})])
    new = OutputSpec.of([({"x": X, "return_dict": False}, (X,))])
    assert old is not None
    assert new is not None
    assert find(old, new) == []


def test_recordings_that_disagree_prove_nothing() -> None:
    """Sizes that depend on the values of the inputs (as of `nonzero`) are not compared."""
    old = recording(output(2, 8), output(5, 8), shapes=((2, 16), (2, 16)))
    assert find(old, recording(output(9, 8))) == []
    assert len(find(old, recording(output(9, 7)))) == 1


def test_a_tuple_that_grows_breaks_whoever_unpacks_it() -> None:
    """A new element of a tuple is noticed; a new key of a dictionary is not."""
    one, two = counted(output(2)), counted(output(2), output(3))
    assert find(recording(one), recording(two)) == [
        OutputStructureChanged(subject="result", old="a tuple of 1", new="a tuple of 2")
    ]
    assert find(recording(named(a=output(2))), recording(named(a=output(2), b=output()))) == [OutputAdded(subject="b")]


def test_names_of_the_fields_of_a_namedtuple_count() -> None:
    """A field of a namedtuple is reached by name too."""
    old, new = (
        ValueSpec(kind="namedtuple", parts=((name, output(2)), ("loss", output()))) for name in ("logits", "scores")
    )
    assert find(recording(old), recording(new)) == [OutputRenamed(subject="[0]", new="scores")]


@pytest.mark.parametrize(
    ("old", "new", "is_fine"),
    [
        ("mapping", "mapping_record", True),
        ("record", "mapping_record", True),
        ("mapping_record", "mapping", False),
        ("mapping", "record", False),
    ],
)
def test_what_can_be_used_in_more_ways_breaks_nobody(old: Any, new: Any, *, is_fine: bool) -> None:
    """A dictionary may become a `ModelOutput`, not the other way round."""
    before, after = (ValueSpec(kind=kind, parts=(("a", output(2)),)) for kind in (old, new))
    assert (find(recording(before), recording(after)) == []) == is_fine


def test_an_output_that_is_none_is_not_there() -> None:
    """A field that was None and holds a tensor now was added; the other way round it was removed."""
    nothing = ValueSpec(kind="value", type="NoneType")
    empty, filled = named(a=output(2), loss=nothing), named(a=output(2), loss=output())
    assert find(recording(empty), recording(filled)) == [OutputAdded(subject="loss")]
    assert find(recording(filled), recording(empty)) == [OutputRemoved(subject="loss")]


def test_two_of_the_same_layout_are_not_taken_for_renamed() -> None:
    """Where it cannot be told which became which, names are removed and added."""
    old, new = named(a=output(2), b=output(2)), named(c=output(2), d=output(2))
    found = find(recording(old), recording(new))
    assert [one.code for one in found] == ["OUTPUT_REMOVED", "OUTPUT_REMOVED", "OUTPUT_ADDED", "OUTPUT_ADDED"]
    found = find(recording(named(a=output(2))), recording(new))
    assert [one.code for one in found] == ["OUTPUT_REMOVED", "OUTPUT_ADDED", "OUTPUT_ADDED"]


@given(output_specs())
def test_an_output_does_not_differ_from_itself(spec: OutputSpec) -> None:
    """find_in_outputs(s, s) is empty, also where recordings of one version disagree."""
    assert find(spec, spec) == []


@given(output_specs(), output_specs())
def test_an_order_of_recordings_means_nothing(one: OutputSpec, other: OutputSpec) -> None:
    """Recordings in another order prove the same."""
    turned = OutputSpec(recordings=one.recordings[::-1])
    assert set(find(one, other)) == set(find(turned, other))
    assert find(one, turned) == []


@given(output_specs(), output_specs())
def test_differences_of_outputs_can_be_acted_on(one: OutputSpec, other: OutputSpec) -> None:
    """Whatever differs explains itself, is written as JSON, and is found once."""
    found = find(one, other)
    assert len(set(found)) == len(found)
    for breakage in found:
        assert json.loads(json.dumps(breakage.to_dict()))["message"] == breakage.explain()
