"""How required bumps add up over several steps, and which way round they are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotglm.breakage import Breakage, required_bump
from hotglm.call_spec import CallSpec
from hotglm.comparison import find_breakages
from hotglm.contract import Contract
from hotglm.version import Bump, Version
from support.contracts import call_specs, contract, contracts, field


def needed(old: Contract, new: Contract) -> Bump:
    return required_bump(find_breakages(old, new))


def part(one: Contract, name: str) -> Contract:
    """Return a contract of one part alone."""
    return replace(Contract(), **{name: getattr(one, name)})


@settings(max_examples=50)
@given(contracts(), contracts(), st.data())
def test_the_bump_is_that_of_the_worst_breakage(old: Contract, new: Contract, data: st.DataObject) -> None:
    """Monotone: no subset of the breakages calls for more than all of them, and one alone calls for as much."""
    found = list(find_breakages(old, new))
    some: list[Breakage] = data.draw(st.lists(st.sampled_from(found), unique_by=id)) if found else []
    assert required_bump(some) <= required_bump(found)
    assert required_bump(found) in {Bump.NONE, *(one.bump for one in found)}


@settings(max_examples=50)
@given(contracts(), contracts())
def test_parts_are_judged_apart(old: Contract, new: Contract) -> None:
    """The bump of two contracts is the biggest of those of their parts: state, call, outputs, config, capabilities."""
    parts = [needed(part(old, n), part(new, n)) for n in ("state", "call", "outputs", "config", "capabilities")]
    assert needed(old, new) is max(parts)


KNOWN = {
    "state": contracts(parts=("state",)),
    "call": call_specs().map(lambda spec: Contract(call=spec)),
    "config": contracts(parts=("config",)).filter(lambda one: one.config is not None),
    "capabilities": contracts(parts=("words",)),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
@settings(max_examples=150)
@given(data=st.data())
def test_one_step_never_needs_more_than_the_steps_it_is_made_of(name: str, data: st.DataObject) -> None:
    """needed(a, c) <= max(needed(a, b), needed(b, c)) where every version knows the part and its defaults.

    So whoever numbers each step honestly has numbered every longer one honestly too.
    """
    a, b, c = (known(one) for one in data.draw(st.tuples(*[KNOWN[name]] * 3)))
    assert needed(a, c) <= max(needed(a, b), needed(b, c))


def known(one: Contract) -> Contract:
    """Return the contract with a default wherever there may be one, and every kind of tensor known."""
    call = one.call and CallSpec(
        arguments=tuple(replace(a, default=a.default or "0") if a.has_default else a for a in one.call.arguments)
    )
    config = one.config and replace(
        one.config,
        fields=tuple(replace(f, default=f.default or "0") if f.has_default else f for f in one.config.fields),
    )
    state = {name: replace(spec, kind=spec.kind or "parameter") for name, spec in one.state.items()}
    return replace(one, call=call, config=config, state=state)


def test_a_step_through_the_unknown_may_hide_what_it_needs() -> None:
    """Where the version between does not know a part, each step needs nothing and both together a major one."""
    a, b, c = contract(config=(field("n"),)), contract(), contract(config=())
    assert (needed(a, b), needed(b, c), needed(a, c)) == (Bump.NONE, Bump.NONE, Bump.MAJOR)


@given(*[contracts(parts=("state",))] * 3, st.sampled_from(["1.0.0", "0.3.0", "2.1.4", "1.0.0rc1"]))
def test_honest_numbers_stay_honest_over_many_steps(a: Contract, b: Contract, c: Contract, start: str) -> None:
    """Bumping for each step claims enough for the whole way: claimed(v, v'') >= needed(a, c), for known states."""
    a, b, c = (known(one) for one in (a, b, c))
    first = Version(start)
    last = first.bumped(needed(a, b)).bumped(needed(b, c))
    assert first.bump_to(last) >= needed(a, c)


@settings(max_examples=50)
@given(contracts(), contracts())
def test_what_is_symmetric_and_what_is_not(old: Contract, new: Contract) -> None:
    """State, and renaming or retyping what is there, needs the same both ways; adding is minor and removing major.

    Precisely: MINOR and above of the state is symmetric, and a capability, optional argument, optional field or output
    that is added one way is lost the other way.
    """
    assert needed(part(old, "state"), part(new, "state")) is needed(part(new, "state"), part(old, "state"))
    there, back = (list(find_breakages(*pair)) for pair in ((old, new), (new, old)))
    mirrored = {
        "CAPABILITY_GAINED": "CAPABILITY_LOST",
        "OPTIONAL_CONFIG_FIELD_ADDED": "CONFIG_FIELD_REMOVED",
        "REQUIRED_CONFIG_FIELD_ADDED": "CONFIG_FIELD_REMOVED",
        "CONFIG_FIELD_TYPE_CHANGED": "CONFIG_FIELD_TYPE_CHANGED",
        "CONFIG_DEFAULT_CHANGED": "CONFIG_DEFAULT_CHANGED",
        "TENSOR_MISSING": "TENSOR_UNEXPECTED",
        "SHAPE_CHANGED": "SHAPE_CHANGED",
        "DTYPE_CHANGED": "DTYPE_CHANGED",
        "OUTPUT_ADDED": "OUTPUT_REMOVED",
        "OUTPUT_DTYPE_CHANGED": "OUTPUT_DTYPE_CHANGED",
        "OUTPUT_SHAPE_CHANGED": "OUTPUT_SHAPE_CHANGED",
    }
    found_back = {(one.code, one.subject) for one in back}
    for one in there:
        if one.code in mirrored:
            assert (mirrored[one.code], one.subject) in found_back
