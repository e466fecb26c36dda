"""Compatibility modes over the whole history of a name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hotglm
from hotglm.comparison import find_breakages, find_unfilled
from hotglm.compatibility import CompatibilityMode, Incompatibility, Released, find_incompatibilities
from hotglm.contract import Contract
from hotglm.version import Bump, Version
from support.contracts import contract, contracts, field, tensor

NONE, BACKWARD, FORWARD, FULL = (CompatibilityMode(word) for word in ("none", "backward", "forward", "full"))
TRANSITIVE = {mode: CompatibilityMode(f"{mode.value}_transitive") for mode in (BACKWARD, FORWARD, FULL)}


def release(version: str, one: Contract) -> Released:
    return Released(version=Version(version), contract=one)


def find(
    history: list[Released], candidate: Released, mode: CompatibilityMode, *, paths: object = ()
) -> list[Incompatibility]:
    known = set(paths) if isinstance(paths, tuple) else set()
    return find_incompatibilities(history, candidate, mode, has_path=lambda start, end: (str(start), str(end)) in known)


def codes(found: list[Incompatibility]) -> list[str]:
    return [f"{one.earlier} {one.direction} {one.code}" for one in found]


W, WIDE = contract(tensor("w")), contract(tensor("w", (2, 4)))
ONE = contract(call=lambda x: 0)
TWO = contract(call=lambda x, mask=None: 0)
THREE = contract(call=lambda x, mask: 0)

# -- what each mode means ----------------------------------------------------------------------------------------------


def test_a_new_argument_is_backward_compatible_only() -> None:
    """New code takes what callers of the old one pass; the old one does not take what callers of the new one may."""
    history, candidate = [release("1.0.0", ONE)], release("1.1.0", TWO)
    assert find(history, candidate, BACKWARD) == []
    (found,) = find(history, candidate, FORWARD)
    assert found.explain() == "1.0.0 cannot serve the callers of 1.1.0: argument 'mask' was removed."
    assert found.remedy == "take the argument and ignore it until the next major version"


def test_a_new_config_field_with_a_default_reads_old_configs() -> None:
    """Old configs need not set it; code that does not know it cannot read configs that do."""
    history = [release("1.0.0", contract(config=(field("n"),)))]
    candidate = release("1.1.0", contract(config=(field("n"), field("m", default="1"))))
    assert find(history, candidate, BACKWARD) == []
    assert codes(find(history, candidate, FORWARD)) == ["1.0.0 forward CONFIG_FIELD_REMOVED"]


def test_a_migration_carries_files_over_and_never_callers() -> None:
    """Tensors and configs count as compatible where a path leads from the one version to the other; calls never do."""
    old = contract(tensor("w"), call=lambda x: 0, config=(field("n"),))
    new = contract(tensor("w", (2, 4)), call=lambda y: 0, config=(field("m"),))
    history, candidate = [release("1.4.0", old)], release("2.0.0", new)
    assert codes(find(history, candidate, BACKWARD)) == [
        "1.4.0 backward SHAPE_CHANGED",
        "1.4.0 backward ARGUMENT_RENAMED",
        "1.4.0 backward CONFIG_FIELD_REMOVED",
        "1.4.0 backward REQUIRED_CONFIG_FIELD_ADDED",
    ]
    up = (("1.4.0", "2.0.0"),)
    assert codes(find(history, candidate, BACKWARD, paths=up)) == ["1.4.0 backward ARGUMENT_RENAMED"]
    assert len(find(history, candidate, FORWARD, paths=up)) == 4
    down = (("2.0.0", "1.4.0"),)
    assert codes(find(history, candidate, FULL, paths=up + down)) == [
        "1.4.0 backward ARGUMENT_RENAMED",
        "1.4.0 forward ARGUMENT_RENAMED",
    ]


def test_transitive_modes_look_at_every_earlier_version() -> None:
    """A step that is fine after the last version may not be after the ones before it; the newest come first."""
    history = [release("1.1.0", TWO), release("1.0.0", contract(call=lambda x, old: 0)), release("1.2.0", ONE)]
    candidate = release("1.3.0", ONE)
    assert find(history, candidate, BACKWARD) == []
    assert codes(find(history, candidate, TRANSITIVE[BACKWARD])) == [
        "1.1.0 backward ARGUMENT_REMOVED",
        "1.0.0 backward ARGUMENT_REMOVED",
    ]


def test_a_history_may_have_the_candidate_in_it() -> None:
    """A history that ends with the candidate hides nothing: the version before it is still the next earlier one."""
    candidate = release("1.1.0", THREE)
    history = [release("1.0.0", ONE)]
    assert find(history, candidate, BACKWARD)
    assert find([*history, candidate], candidate, BACKWARD) == find(history, candidate, BACKWARD)
    assert find([*history, release("1.1.0", ONE)], candidate, BACKWARD)  # the same number given twice


def test_versions_above_the_candidate_are_not_before_it() -> None:
    """A patch of an old line follows that line, not what came out meanwhile."""
    history = [release("1.4.2", ONE), release("2.0.0", THREE)]
    assert find(history, release("1.4.3", ONE), TRANSITIVE[FULL]) == []
    assert codes(find(history, release("2.0.0", ONE), BACKWARD)) == ["2.0.0 backward ARGUMENT_REMOVED"]


def test_a_path_is_asked_for_once_for_each_pair_and_only_if_it_matters() -> None:
    """The migrations are not searched for versions whose files can be read as they are."""
    asked: list[tuple[str, str]] = []

    def has_path(start: Version, end: Version) -> bool:
        asked.append((str(start), str(end)))
        return True

    history = [release("1.0.0", contract(tensor("w"), tensor("v"))), release("1.1.0", WIDE)]
    assert find_incompatibilities(history, release("1.2.0", WIDE), TRANSITIVE[BACKWARD], has_path=has_path) == []
    assert asked == [("1.0.0", "1.2.0")]


# -- what can be read as it is -----------------------------------------------------------------------------------------

A, B = tensor("a", tied="a"), tensor("b", tied="a")
BUFFER = tensor("w", kind="buffer")
HIDDEN = tensor("w", kind="buffer", persistent=False)


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        (contract(tensor("w")), contract(BUFFER), []),
        (contract(BUFFER), contract(HIDDEN), ["PERSISTENCE_CHANGED"]),
        (contract(HIDDEN), contract(), []),
        (contract(), contract(HIDDEN), []),
        (contract(A, B), contract(tensor("a")), ["TIE_CHANGED"]),
        (contract(A, B), contract(tensor("a"), tensor("b")), ["TIE_CHANGED", "TIE_CHANGED"]),
        (contract(A), contract(A, B), []),
        (contract(B), contract(A, B), []),
        (contract(tensor("w", dtype="int8")), W, ["DTYPE_CHANGED"]),
        (contract(tensor("v")), W, ["TENSOR_MISSING", "TENSOR_UNEXPECTED"]),
    ],
)
def test_only_what_hinders_reading_counts(written: Contract, read: Contract, expected: list[str]) -> None:
    """A difference of the state counts where files of the one do not fill the other."""
    found = find([release("1.0.0", written)], release("1.1.0", read), BACKWARD)
    assert [one.code for one in found] == expected
    assert all(one.is_stored for one in found)


# -- values ------------------------------------------------------------------------------------------------------------


def test_modes_are_parsed_from_the_words_of_the_registry() -> None:
    """Words may be in either case; another word is an error that lists them."""
    assert CompatibilityMode.parse("BACKWARD_TRANSITIVE") is TRANSITIVE[BACKWARD]
    assert CompatibilityMode.parse(FULL) is FULL
    with pytest.raises(hotglm.ArgumentError, match="'full_transitive'"):
        CompatibilityMode.parse("sideways")


def test_a_finding_is_written_as_json() -> None:
    """Each finding is data: who, which way round, what, why and what to do."""
    (found,) = find([release("1.0.0", W)], release("1.1.0", WIDE), BACKWARD)
    document = json.loads(json.dumps(found.to_dict()))
    assert (
        document["message"] == "1.1.0 cannot read what 1.0.0 has stored: tensor 'w' went from shape [2, 3] to [2, 4]."
    )
    assert (document["earlier"], document["later"], document["direction"]) == ("1.0.0", "1.1.0", "backward")
    assert document["breakage"]["code"] == "SHAPE_CHANGED"
    assert "migration" in document["remedy"]


# -- laws --------------------------------------------------------------------------------------------------------------

PLAIN = contracts(parts=("state", "call", "config", "words"))
histories = st.lists(PLAIN, max_size=3).map(
    lambda drawn: [release(f"1.{place}.0", one) for place, one in enumerate(drawn)]
)
modes = st.sampled_from(CompatibilityMode)


@settings(max_examples=60)
@given(histories, PLAIN)
def test_full_is_backward_and_forward(history: list[Released], new: Contract) -> None:
    """FULL finds exactly what BACKWARD and FORWARD find, and so do the transitive forms."""
    candidate = release("1.9.0", new)
    for full, parts in ((FULL, (BACKWARD, FORWARD)), (TRANSITIVE[FULL], (TRANSITIVE[BACKWARD], TRANSITIVE[FORWARD]))):
        both = [found for mode in parts for found in find(history, candidate, mode)]
        found = find(history, candidate, full)
        assert set(found) == set(both)
        assert len(found) == len(both)


@settings(max_examples=60)
@given(histories, PLAIN, st.sampled_from([BACKWARD, FORWARD, FULL]))
def test_transitive_finds_all_that_the_plain_form_finds(
    history: list[Released], new: Contract, mode: CompatibilityMode
) -> None:
    """What the next earlier version finds is found among all of them; a transitive yes is a plain yes."""
    candidate = release("1.9.0", new)
    plain, transitive = find(history, candidate, mode), find(history, candidate, TRANSITIVE[mode])
    assert transitive[: len(plain)] == plain
    assert all(one.earlier == history[-1].version for one in plain)


@settings(max_examples=60)
@given(PLAIN, PLAIN)
def test_forward_is_backward_the_other_way_round(one: Contract, other: Contract) -> None:
    """`b` after `a` is forward compatible if and only if `a` after `b` is backward compatible, for the same reasons."""
    forward = find([release("1.0.0", one)], release("1.1.0", other), FORWARD)
    backward = find([release("1.0.0", other)], release("1.1.0", one), BACKWARD)
    assert [found.breakage for found in forward] == [found.breakage for found in backward]


@settings(max_examples=60)
@given(PLAIN, PLAIN)
def test_full_does_not_know_which_came_first(one: Contract, other: Contract) -> None:
    """FULL finds the same breakages whichever of two versions is the later one."""
    found, turned = (
        {each.breakage for each in find([release("1.0.0", a)], release("1.1.0", b), FULL)}
        for a, b in ((one, other), (other, one))
    )
    assert found == turned


@settings(max_examples=60)
@given(PLAIN, modes)
def test_a_version_gets_along_with_itself(one: Contract, mode: CompatibilityMode) -> None:
    """find_incompatibilities([c], c, mode) is empty in every mode, and NONE finds nothing at all."""
    assert find([release("1.0.0", one)], release("1.0.0", one), mode) == []
    assert find([release("1.0.0", one)], release("1.0.0", Contract()), NONE) == []


@settings(max_examples=60)
@given(histories, PLAIN, modes)
def test_a_migration_never_adds_a_finding(history: list[Released], new: Contract, mode: CompatibilityMode) -> None:
    """With every path there, what remains is what callers notice, and nothing that was not found before."""
    candidate = release("1.9.0", new)
    without = find(history, candidate, mode)
    with_paths = find_incompatibilities(history, candidate, mode, has_path=lambda _start, _end: True)
    assert with_paths == [one for one in without if not one.is_stored]


@settings(max_examples=60)
@given(contracts(parts=("call", "words", "outputs")), contracts(parts=("call", "words", "outputs")))
def test_callers_are_judged_as_a_version_number_is(old: Contract, new: Contract) -> None:
    """Leaving what is stored aside, backward compatible means that no breakage calls for a major step."""
    found = find([release("1.0.0", old)], release("1.1.0", new), BACKWARD)
    major = [breakage for breakage in find_breakages(old, new) if breakage.bump is Bump.MAJOR]
    assert [one.breakage for one in found] == major


@settings(max_examples=60)
@given(contracts(parts=("state",)), contracts(parts=("state",)))
def test_what_is_said_to_be_readable_fills_the_code(old: Contract, new: Contract) -> None:
    """Where nothing stored is found, the tensors that files of the old version hold fill the new one exactly."""
    old, new = (
        Contract(state={n: replace(s, tied=None, kind=s.kind or "buffer") for n, s in one.state.items()})
        for one in (old, new)
    )
    files = Contract(state={name: spec for name, spec in old.state.items() if spec.persistent})
    fills = next(find_unfilled(new, files), None) is None
    found = find([release("1.0.0", old)], release("1.1.0", new), BACKWARD)
    assert fills == (found == [])
