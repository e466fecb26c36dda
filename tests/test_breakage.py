"""Each kind of difference between two contracts is found, named and weighed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm import breakage, output_breakage
from hotglm.breakage import (
    ArgumentKindChanged,
    ArgumentRemoved,
    ArgumentRenamed,
    ArgumentsReordered,
    Breakage,
    CapabilityGained,
    CapabilityLost,
    ConfigDefaultChanged,
    ConfigDefaultRemoved,
    ConfigFieldRemoved,
    ConfigFieldTypeChanged,
    ConfigFieldTypeWidened,
    DefaultChanged,
    DefaultRemoved,
    DtypeChanged,
    KindChanged,
    OptionalArgumentAdded,
    OptionalConfigFieldAdded,
    PersistenceChanged,
    RequiredArgumentAdded,
    RequiredConfigFieldAdded,
    ShapeChanged,
    TensorMissing,
    TensorUnexpected,
    TieChanged,
    required_bump,
)
from hotglm.call_spec import ArgumentSpec, CallSpec
from hotglm.comparison import find_breakages
from hotglm.contract import Contract
from hotglm.output_breakage import (
    OutputAdded,
    OutputDtypeChanged,
    OutputRemoved,
    OutputRenamed,
    OutputShapeChanged,
    OutputStructureChanged,
)
from hotglm.output_spec import ValueSpec
from hotglm.version import Bump
from support.contracts import contract, contracts, field, named, output, recording, tensor

Function = Callable[..., object]


def find(old: Contract, new: Contract) -> list[Breakage]:
    return list(find_breakages(old, new))


def find_in_call(old: Function, new: Function) -> list[Breakage]:
    return find(contract(call=old), contract(call=new))


W = tensor("w")
ANY = object()
K, KO, PO = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "POSITIONAL_ONLY"

STATE = [
    (contract(W), contract(), TensorMissing(subject="w", old=W), "tensor 'w' ('float32', shape [2, 3]) is missing"),
    (
        contract(),
        contract(W),
        TensorUnexpected(subject="w", new=W),
        "'w' ('float32', shape [2, 3]) was not there before",
    ),
    (
        contract(W),
        contract(tensor("w", (2, 4))),
        ShapeChanged(subject="w", old=(2, 3), new=(2, 4)),
        "tensor 'w' went from shape [2, 3] to [2, 4]",
    ),
    (
        contract(W),
        contract(tensor("w", dtype="bfloat16")),
        DtypeChanged(subject="w", old="float32", new="bfloat16"),
        "tensor 'w' went from 'float32' to 'bfloat16'",
    ),
    (
        contract(W),
        contract(tensor("w", persistent=False)),
        PersistenceChanged(subject="w", old=True, new=False),
        "tensor 'w' went from persistent=True to persistent=False",
    ),
    (
        contract(W),
        contract(tensor("w", tied="emb")),
        TieChanged(subject="w", old=None, new="emb"),
        "tensor 'w' went from tied=None to tied='emb'",
    ),
    (
        contract(W),
        contract(tensor("w", kind="buffer")),
        KindChanged(subject="w", old="parameter", new="buffer"),
        "tensor 'w' went from 'parameter' to 'buffer'",
    ),
]

CALL: list[tuple[Function, Function, list[Breakage]]] = [
    (lambda x, y: 0, lambda x: 0, [ArgumentRemoved(subject="y")]),
    (
        lambda x, *, y: 0,
        lambda x, **more: 0,
        [ArgumentRemoved(subject="y", swallowed_by="**more"), OptionalArgumentAdded(subject="**more")],
    ),
    (
        lambda x, y: 0,
        lambda x, *rest: 0,
        [ArgumentRemoved(subject="y", swallowed_by="*rest"), OptionalArgumentAdded(subject="*rest")],
    ),
    (lambda x, *rest: 0, lambda x: 0, [ArgumentRemoved(subject="*rest")]),
    (lambda x, **more: 0, lambda x: 0, [ArgumentRemoved(subject="**more")]),
    (lambda x: 0, lambda ids: 0, [ArgumentRenamed(subject="x", new="ids")]),
    (lambda x=1: 0, lambda ids: 0, [ArgumentRenamed(subject="x", new="ids"), DefaultRemoved(subject="ids")]),
    (lambda x: 0, lambda x, y: 0, [RequiredArgumentAdded(subject="y")]),
    (lambda x: 0, lambda x, *, y: 0, [RequiredArgumentAdded(subject="y")]),
    (lambda x: 0, lambda x, y=1: 0, [OptionalArgumentAdded(subject="y")]),
    (lambda x: 0, lambda x, *, y=1: 0, [OptionalArgumentAdded(subject="y")]),
    (lambda x: 0, lambda x, *rest: 0, [OptionalArgumentAdded(subject="*rest")]),
    (lambda x: 0, lambda x, **more: 0, [OptionalArgumentAdded(subject="**more")]),
    (lambda x, y: 0, lambda x, *, y: 0, [ArgumentKindChanged(subject="y", old=K, new=KO)]),
    (lambda x: 0, lambda x, /: 0, [ArgumentKindChanged(subject="x", old=K, new=PO)]),
    (lambda x, /, **more: 0, lambda x, **more: 0, [ArgumentKindChanged(subject="x", old=PO, new=K)]),
    (lambda x, y=1: 0, lambda x, y: 0, [DefaultRemoved(subject="y")]),
    (lambda x, y: 0, lambda y, x: 0, [ArgumentsReordered(subject="x", old=("x", "y"), new=("y", "x"))]),
    (
        lambda x: 0,
        lambda new=1, x=2: 0,
        [ArgumentsReordered(subject="x", old=("x",), new=("new", "x")), OptionalArgumentAdded(subject="new")],
    ),
    (
        lambda x, *rest: 0,
        lambda x, y=1, *rest: 0,
        [
            ArgumentsReordered(subject="*rest", old=("x", "*rest"), new=("x", "y", "*rest")),
            OptionalArgumentAdded(subject="y"),
        ],
    ),
    # What no caller can notice:
    (lambda x, *, y: 0, lambda x, y: 0, []),
    (lambda x, /: 0, lambda x: 0, []),
    (lambda x, /: 0, lambda ids, /: 0, []),
    (lambda x: 0, lambda x=1: 0, []),
    (lambda x=ANY: 0, lambda x=2: 0, []),  # a default without a lasting text is unknown
    (lambda x=(1, None): 0, lambda x=(1, None): 0, []),
    (lambda x=1: 0, lambda x=1.0: 0, [DefaultChanged(subject="x", old="1", new="1.0")]),
    (lambda x, *, y=None: 0, lambda x, *, y="": 0, [DefaultChanged(subject="y", old="None", new="''")]),
    (
        lambda x=1: 0,
        lambda z=2: 0,
        [ArgumentRenamed(subject="x", new="z"), DefaultChanged(subject="z", old="1", new="2")],
    ),
    (lambda x, *rest, **more: 0, lambda x, *args, **kwargs: 0, []),
    (lambda *, x, y: 0, lambda *, y, x: 0, []),
]

CONFIG: list[tuple[Contract, Contract, Breakage]] = [
    (contract(config=(field("n"),)), contract(config=()), ConfigFieldRemoved(subject="n")),
    (
        contract(config=(field("n"),)),
        contract(config=(field("n", "str"),)),
        ConfigFieldTypeChanged(subject="n", old="int", new="str"),
    ),
    (
        contract(config=(field("n"),)),
        contract(config=(field("n", "int | None"),)),
        ConfigFieldTypeWidened(subject="n", old="int", new="int | None"),
    ),
    (contract(config=()), contract(config=(field("n"),)), RequiredConfigFieldAdded(subject="n")),
    (contract(config=()), contract(config=(field("n", has_default=True),)), OptionalConfigFieldAdded(subject="n")),
    (
        contract(config=(field("n", has_default=True),)),
        contract(config=(field("n"),)),
        ConfigDefaultRemoved(subject="n"),
    ),
    (
        contract(config=(field("n", default="1"),)),
        contract(config=(field("n", default="2"),)),
        ConfigDefaultChanged(subject="n", old="1", new="2"),
    ),
    (contract(capabilities=("embed",)), contract(), CapabilityLost(subject="embed")),
    (contract(), contract(capabilities=("embed",)), CapabilityGained(subject="embed")),
]

LOGITS = output(2, 32000)
OUTPUTS: list[tuple[ValueSpec, ValueSpec, Breakage, str]] = [
    (
        named(logits=LOGITS),
        named(logits=output(2, 32064)),
        OutputShapeChanged(subject="logits", old=(2, 32000), new=(2, 32064)),
        "output 'logits' went from 32000 to 32064 wide",
    ),
    (
        LOGITS,
        output(32000, 2),
        OutputShapeChanged(subject="result", old=(2, 32000), new=(32000, 2)),
        "output 'result' went from shape [2, 32000] to [32000, 2]",
    ),
    (
        LOGITS,
        output(2, 32000, dtype="bfloat16"),
        OutputDtypeChanged(subject="result", old="float32", new="bfloat16"),
        "output 'result' went from 'float32' to 'bfloat16'",
    ),
    (
        named(logits=LOGITS, loss=output()),
        named(logits=LOGITS),
        OutputRemoved(subject="loss"),
        "output 'loss' was removed",
    ),
    (named(logits=LOGITS), named(logits=LOGITS, loss=output()), OutputAdded(subject="loss"), "'loss' was added"),
    (
        named(out=named(logits=LOGITS)),
        named(out=named(scores=LOGITS)),
        OutputRenamed(subject="out.logits", new="scores"),
        "output 'out.logits' was renamed to 'scores'",
    ),
    (
        LOGITS,
        named(logits=LOGITS),
        OutputStructureChanged(subject="result", old="a tensor", new="a mapping"),
        "output 'result' went from a tensor to a mapping",
    ),
]

EVERY_FOUND = [
    *(expected for _, _, expected, _ in OUTPUTS),
    *(expected for _, _, expected, _ in STATE),
    *(one for _, _, expected in CALL for one in expected),
    *(expected for _, _, expected in CONFIG),
]


@pytest.mark.parametrize(("old", "new", "expected", "text"), STATE, ids=lambda value: type(value).__name__)
def test_a_changed_state_is_found_and_explained(old: Contract, new: Contract, expected: Breakage, text: str) -> None:
    """Each change of the state layout is one breakage, which says what changed; callers do not notice it."""
    assert find(old, new) == [expected]
    assert text in expected.explain()
    assert expected.bump is Bump.MINOR


@pytest.mark.parametrize(("old", "new", "expected"), CALL)
def test_a_changed_call_is_found(old: Function, new: Function, expected: list[Breakage]) -> None:
    """Each change of the call interface that a caller can notice is found, and no other."""
    assert find_in_call(old, new) == expected


@pytest.mark.parametrize(("old", "new", "expected", "text"), OUTPUTS, ids=lambda value: type(value).__name__)
def test_a_changed_output_is_found_and_explained(old: ValueSpec, new: ValueSpec, expected: Breakage, text: str) -> None:
    """Each change of what comes back for the same inputs is one breakage, which says what changed."""
    assert find(contract(outputs=recording(old)), contract(outputs=recording(new))) == [expected]
    assert text in expected.explain()


@pytest.mark.parametrize(("old", "new", "expected"), CONFIG, ids=lambda value: type(value).__name__)
def test_a_changed_config_or_capability_is_found(old: Contract, new: Contract, expected: Breakage) -> None:
    """Each change of the config schema and the capabilities is one breakage."""
    assert find(old, new) == [expected]


def test_every_class_is_found_by_some_test() -> None:
    """There is a case in this file for every public breakage."""
    public = {name for name in (*breakage.__all__, *output_breakage.__all__) if name[0].isupper()} - {"Breakage"}
    assert {type(found).__name__ for found in EVERY_FOUND} == public


@pytest.mark.parametrize("found", EVERY_FOUND, ids=lambda found: type(found).__name__)
def test_a_breakage_can_be_acted_on(found: Breakage) -> None:
    """A breakage explains itself in one clause that names its subject, and is written as JSON with a stable code."""
    text = found.explain()
    assert repr(found.subject) in text
    assert "{" not in text
    assert not text.endswith(".")
    document = json.loads(json.dumps(found.to_dict()))
    assert document["code"] == found.code
    assert document["bump"] == found.bump.value
    assert document["message"] == text
    assert found.remedy
    assert not found.remedy.endswith(".")


def test_codes_are_upper_snake_words() -> None:
    """The code of a breakage is its class's name as an upper-case word."""
    assert ShapeChanged(subject="w", old=(), new=(1,)).code == "SHAPE_CHANGED"
    assert ArgumentsReordered(subject="x", old=(), new=()).code == "ARGUMENTS_REORDERED"


@pytest.mark.parametrize("kind", [CapabilityGained, OptionalArgumentAdded, OptionalConfigFieldAdded, OutputAdded])
def test_what_is_only_added_is_minor(kind: type[Breakage]) -> None:
    """An optional addition calls for a minor step."""
    assert kind.bump is Bump.MINOR


@pytest.mark.parametrize(
    "kind",
    [
        ArgumentKindChanged,
        ArgumentRemoved,
        ArgumentRenamed,
        ArgumentsReordered,
        CapabilityLost,
        ConfigDefaultChanged,
        ConfigDefaultRemoved,
        ConfigFieldRemoved,
        ConfigFieldTypeChanged,
        DefaultChanged,
        DefaultRemoved,
        OutputDtypeChanged,
        OutputRemoved,
        OutputRenamed,
        OutputShapeChanged,
        OutputStructureChanged,
        RequiredArgumentAdded,
        RequiredConfigFieldAdded,
    ],
)
def test_what_callers_can_notice_is_major(kind: type[Breakage]) -> None:
    """What can make a call or a config fail calls for a major step."""
    assert kind.bump is Bump.MAJOR


def test_names_from_outside_are_never_printed_raw() -> None:
    """A tensor name with terminal escapes is printed escaped, and a long one is cut."""
    for name in ("\x1b[31mred\nline", "x" * 5000):
        for found in (TensorMissing(subject=name, old=tensor(name)), CapabilityLost(subject=name)):
            assert "\x1b" not in found.explain()
            assert "\n" not in found.explain()
            assert len(found.explain()) < 300


def test_a_swallowed_argument_says_where_its_value_goes() -> None:
    """A removed argument that `**kwargs` would take is still a breakage, and the text says so."""
    (found,) = find_in_call(lambda x, y, **kwargs: 0, lambda x, **kwargs: 0)
    assert found.explain() == "argument 'y' was removed, and **kwargs now swallows it silently"


def test_everything_is_found_at_once() -> None:
    """Differences in every part are listed together: state, call, config, capabilities."""
    old = contract(tensor("gone"), tensor("w"), call=lambda x: 0, config=(field("n"),), capabilities=("embed",))
    new = contract(tensor("w", (9,), dtype="int8"), tensor("new"), call=lambda y: 0, config=())
    assert [found.code for found in find(old, new)] == [
        "TENSOR_MISSING",
        "SHAPE_CHANGED",
        "DTYPE_CHANGED",
        "TENSOR_UNEXPECTED",
        "ARGUMENT_RENAMED",
        "CONFIG_FIELD_REMOVED",
        "CAPABILITY_LOST",
    ]


def test_what_one_side_does_not_know_is_not_compared() -> None:
    """A file's view differs from a module's contract in shapes and dtypes only."""
    module = contract(
        tensor("w", kind="buffer", tied="v"), tensor("v", tied="v"), call=lambda x: 0, config=(field("n"),)
    )
    view = Contract.of_tensors({"w": ("float32", (2, 3)), "v": ("float32", (2, 3))})
    assert find(module, view) == find(view, module) == []


# -- laws --------------------------------------------------------------------------------------------------------------


@given(contracts())
def test_nothing_differs_from_itself(one: Contract) -> None:
    """find_breakages(c, c) is empty."""
    assert find(one, one) == []


@given(contracts(parts=("state",)), contracts(parts=("state",)))
def test_contracts_without_breakages_hold_the_same_state(old: Contract, new: Contract) -> None:
    """No breakage implies equal names, shapes and dtypes."""
    if not find(old, new):
        layouts = [{name: (s.shape, s.dtype) for name, s in one.state.items()} for one in (old, new)]
        assert layouts[0] == layouts[1]


@given(contracts(parts=("state",)), contracts(parts=("state",)))
def test_a_state_layout_differs_equally_in_both_directions(old: Contract, new: Contract) -> None:
    """For contracts of state alone, required_bump(old to new) == required_bump(new to old)."""
    old, new = Contract(state=old.state), Contract(state=new.state)
    assert required_bump(find(old, new)) is required_bump(find(new, old))


@given(st.lists(st.sampled_from(EVERY_FOUND)), st.lists(st.sampled_from(EVERY_FOUND)))
def test_more_breakages_never_call_for_a_smaller_step(some: list[Breakage], more: list[Breakage]) -> None:
    """required_bump(a + b) == max(required_bump(a), required_bump(b)), and NONE for none."""
    assert required_bump(some + more) is max(required_bump(some), required_bump(more))
    assert required_bump([]) is Bump.NONE


def find_signatures() -> Iterator[CallSpec]:
    """Yield every signature over at most the two names `a` and `b`, with and without stars."""
    kinds = (PO, K, KO)
    for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
        for chosen in itertools.combinations_with_replacement(kinds, len(names)):
            for defaults in itertools.product((False, True), repeat=len(names)):
                if defaults == (True, False) and chosen[1] != KO:
                    continue  # Python refuses a positional argument without a default after one that has one
                arguments = [
                    ArgumentSpec(name=name, kind=kind, has_default=has_default)
                    for name, kind, has_default in zip(names, chosen, defaults, strict=True)
                ]
                place = sum(kind != KO for kind in chosen)
                rest = ArgumentSpec(name="rest", kind="VAR_POSITIONAL", has_default=False)
                more = ArgumentSpec(name="more", kind="VAR_KEYWORD", has_default=False)
                for stars in ([], [rest]):
                    with_rest = [*arguments[:place], *stars, *arguments[place:]]
                    yield CallSpec(arguments=tuple(with_rest))
                    yield CallSpec(arguments=(*with_rest, more))


def compile_function(spec: CallSpec) -> Callable[..., dict[str, object]]:
    """Return a function with that signature, which returns its arguments by name."""
    parts, kinds = list[str](), ["", *(a.kind for a in spec.arguments), ""]
    for argument, before, after in zip(spec.arguments, kinds, kinds[2:], strict=False):
        if argument.kind == KO and before not in (KO, "VAR_POSITIONAL"):
            parts.append("*")
        parts.append(f"{argument.label}=0" if argument.has_default else argument.label)
        if argument.kind == PO and after != PO:
            parts.append("/")
    function: Callable[..., dict[str, object]] = eval(f"lambda {', '.join(parts)}: locals()")  # noqa: S307
    return function


def call_with(function: Callable[..., dict[str, object]], arguments: tuple[tuple[int, ...], dict[str, int]]) -> object:
    """Return what `*args` took (`()` without one); None when Python refuses the call."""
    positional, named = arguments
    try:
        return function(*positional, **named).get("rest", ())
    except TypeError:
        return None


def test_a_step_below_major_breaks_no_call() -> None:
    """Over all pairs of small signatures: a call that Python took before a step below MAJOR, it takes after it.

    What `*args` took, it still takes.
    """
    functions = {spec: compile_function(spec) for spec in find_signatures()}
    named = [dict.fromkeys(names, 7) for n in range(3) for names in itertools.combinations(("a", "b", "other"), n)]
    calls = [(tuple(range(num)), names) for num in range(4) for names in named]
    taken = {spec: [call_with(function, arguments) for arguments in calls] for spec, function in functions.items()}
    num_checked = 0
    for old, new in itertools.product(functions, repeat=2):
        if required_bump(find(Contract(call=old), Contract(call=new))) is Bump.MAJOR:
            continue
        has_rest = any(argument.kind == "VAR_POSITIONAL" for argument in old.arguments)
        for arguments, before, after in zip(calls, taken[old], taken[new], strict=True):
            assert before is None or after is not None, (old, new, arguments)
            assert not has_rest or before is None or before == after, (old, new, arguments)
            num_checked += before is not None
    assert num_checked > 1000
