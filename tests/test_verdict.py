"""One decision over version, contract, tensors and environment, with every reason at once."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.breakage import ShapeChanged
from hotglm.contract import Contract
from hotglm.environment import Environment
from hotglm.errors import IncompatibleError
from hotglm.verdict import Candidate, Verdict, decide
from hotglm.version import Bump, Version, VersionRange
from support.contracts import contract, contracts, named, output, recording, tensor

HERE = Environment(
    python="3.11.9",
    packages={"torch": "2.13.0+cpu", "My_Package": "1.0rc1", "odd": "unknown"},
    markers={"sys_platform": "linux", "os_name": "posix"},
)
LIVE = contract(tensor("w"), call=lambda x, *, scale=1.0: x)
GROWN = contract(tensor("w"), call=lambda x, *, scale=1.0, mask=None: x)
BROKEN = contract(tensor("w"), call=lambda x: x)


def judge(
    new: str = "2.4.0",
    *,
    live: str = "2.3.0",
    live_contract: Contract = LIVE,
    code: Contract = LIVE,
    offered: Contract | None = None,
    name: str | None = None,
    reads: str | None = None,
    requires: tuple[str, ...] = (),
    accept: Bump = Bump.MINOR,
) -> Verdict:
    candidate = Candidate(
        name=name,
        version=Version(new),
        contract=code,
        offered=offered,
        reads=VersionRange(reads) if reads is not None else None,
        requires=requires,
    )
    return decide(
        slot_name="ranker",
        live_version=Version(live),
        live_contract=live_contract,
        candidate=candidate,
        accept=accept,
        environment=HERE,
    )


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.reasons]


def notes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings if not finding.refuses]


# -- what is accepted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("live", "new", "code"),
    [
        ("2.3.0", "2.3.1", LIVE),
        ("2.3.0", "2.4.0", GROWN),
        ("2.3.0", "2.3.0", LIVE),
        ("2.3.0", "2.3.0+d3b07384d113", LIVE),
        ("2.3.0+abc", "2.3.0+def", LIVE),
        ("0.3.0", "0.3.1", GROWN),
        ("2.3.0rc1", "2.3.0", LIVE),
    ],
)
def test_an_honest_step_is_accepted(live: str, new: str, code: Contract) -> None:
    """Values, and what callers cannot notice, may be replaced without being asked; another label is values only."""
    verdict = judge(new, live=live, code=code)
    assert verdict.accepted
    assert verdict.reasons == ()
    assert verdict.remedy == ""
    verdict.raise_if_refused()


def test_new_values_alone_need_a_patch() -> None:
    """A candidate without breakages needs a patch step, whatever it claims."""
    assert judge("2.3.0").needed is Bump.PATCH
    assert judge("2.4.0").needed is Bump.PATCH
    assert judge("2.4.0").claimed is Bump.MINOR


def test_the_name_of_the_slot_or_no_name_is_accepted() -> None:
    """A candidate may leave its name out."""
    assert judge(name="ranker").accepted
    assert judge(name=None).accepted


def test_what_changed_is_noted_even_when_accepted() -> None:
    """Breakages that do not refuse are findings all the same, each with its breakage."""
    verdict = judge("2.4.0", code=GROWN)
    (finding,) = verdict.findings
    assert finding.code == "OPTIONAL_ARGUMENT_ADDED"
    assert finding.breakage is not None
    assert verdict.explain().splitlines() == [
        "Version 2.4.0 may take the place of 2.3.0 (claims a step of minor, needs minor).",
        "  - note OPTIONAL_ARGUMENT_ADDED: optional argument 'mask' was added.",
    ]


# -- each reason -------------------------------------------------------------------------------------------------------


def test_another_model_is_refused() -> None:
    """A candidate of another name is refused, with both names escaped."""
    verdict = judge(name="other\x1b[31m")
    assert codes(verdict) == ["NAME_MISMATCH"]
    assert "Expected model 'ranker', got 'other\\x1b[31m'." in verdict.explain()


@pytest.mark.parametrize(
    ("offered", "code", "text"),
    [
        ({}, "TENSOR_MISSING", "Expected tensor 'w' (float32, shape [2, 3]), got none"),
        ({"w": ("float32", (2, 4))}, "SHAPE_CHANGED", "Expected tensor 'w' of shape [2, 3], got [2, 4]"),
        ({"w": ("int8", (2, 3))}, "DTYPE_CHANGED", "Expected tensor 'w' of dtype float32, got 'int8'"),
        (
            {"w": ("float32", (2, 3)), "q": ("int8", ())},
            "TENSOR_UNEXPECTED",
            "Expected no tensor 'q', got one ('int8', shape [])",
        ),
    ],
)
@pytest.mark.parametrize("new", ["2.3.0", "2.4.0", "9.0.0"])
def test_tensors_that_no_code_holds_are_refused_under_every_version(
    new: str, offered: dict[str, tuple[str, tuple[int, ...]]], code: str, text: str
) -> None:
    """A misfit refuses whatever the version and whatever is accepted, and the message says so."""
    verdict = judge(new, offered=Contract.of_tensors(offered), accept=Bump.MAJOR)
    assert codes(verdict) == [code]
    (reason,) = verdict.reasons
    assert reason.message == f"{text}; the code cannot hold that, whatever the version."
    assert reason.breakage is not None
    assert "convert" in verdict.remedy


def test_a_version_that_the_code_does_not_read_is_refused() -> None:
    """A candidate outside of the code's `reads` is refused with the range."""
    verdict = judge("2.4.0", reads=">=1.4,<2.4")
    assert codes(verdict) == ["UNREADABLE_VERSION"]
    assert "'<2.4,>=1.4'" in verdict.explain()
    assert judge("2.4.0+abc", reads=">=1.4,<3").accepted


def test_a_version_that_claims_less_than_it_needs_is_refused() -> None:
    """A dishonest number is refused with what changed and the number that would be honest."""
    verdict = judge("2.4.0", code=BROKEN, accept=Bump.MAJOR)
    assert codes(verdict) == ["UNDERCLAIMED"]
    text = "claims 2.4.0 after 2.3.0, but argument 'scale' was removed: needs 3.0.0."
    assert verdict.reasons[0].message == text
    assert verdict.remedy == "number the later one 3.0.0 or above"


def test_a_wider_output_is_a_major_step() -> None:
    """The example of DESIGN section 7, word for word but for the quotes."""
    before, after = (contract(tensor("w"), outputs=recording(named(logits=output(2, n)))) for n in (32000, 32064))
    verdict = judge("2.4.0", live_contract=before, code=after, accept=Bump.MAJOR)
    assert codes(verdict) == ["UNDERCLAIMED"]
    text = "claims 2.4.0 after 2.3.0, but output 'logits' went from 32000 to 32064 wide: needs 3.0.0."
    assert verdict.reasons[0].message == text
    assert judge("3.0.0", live_contract=before, code=after, accept=Bump.MAJOR).accepted


def test_another_default_is_a_major_step() -> None:
    """Whoever left the argument out gets other behaviour, so a minor number is not honest."""
    verdict = judge("2.4.0", code=contract(tensor("w"), call=lambda x, *, scale=2.0: x), accept=Bump.MAJOR)
    assert codes(verdict) == ["UNDERCLAIMED"]
    assert "the default of argument 'scale' went from 1.0 to 2.0: needs 3.0.0" in verdict.explain()


@pytest.mark.parametrize(
    ("live", "new", "honest"),
    [("2.3.0", "2.3.1", "2.4.0"), ("2.3.0", "2.3.0+abc", "2.4.0"), ("2.3.0", "2.3.0", "2.4.0")],
)
def test_a_patch_that_adds_something_is_refused(live: str, new: str, honest: str) -> None:
    """A minor change under a patch number, or under a label, is refused."""
    verdict = judge(new, live=live, code=GROWN)
    assert codes(verdict) == ["UNDERCLAIMED"]
    assert f"needs {honest}." in verdict.explain()


def test_below_one_the_minor_number_plays_the_major_one() -> None:
    """0.3 to 0.4 may break callers when major steps are accepted; 0.3.0 to 0.3.1 may not."""
    assert codes(judge("0.3.1", live="0.3.0", code=BROKEN, accept=Bump.MAJOR)) == ["UNDERCLAIMED"]
    assert "needs 0.4.0" in judge("0.3.1", live="0.3.0", code=BROKEN).explain()
    assert judge("0.4.0", live="0.3.0", code=BROKEN, accept=Bump.MAJOR).accepted


@pytest.mark.parametrize("code", [LIVE, BROKEN])
def test_a_major_step_is_refused_unless_accepted(code: Contract) -> None:
    """A major step, claimed or needed, is refused until the slot accepts it."""
    verdict = judge("3.0.0", code=code)
    assert codes(verdict) == ["MAJOR_REFUSED"]
    assert "pass accept='major'" in verdict.remedy
    assert judge("3.0.0", code=code, accept=Bump.MAJOR).accepted


def test_a_slot_may_accept_patches_only() -> None:
    """What is refused is named by its own size."""
    assert codes(judge("2.4.0", code=GROWN, accept=Bump.PATCH)) == ["MINOR_REFUSED"]
    assert codes(judge("2.3.1", accept=Bump.NONE)) == ["PATCH_REFUSED"]
    assert judge("2.3.1", accept=Bump.PATCH).accepted


def test_going_back_is_a_note_and_not_a_reason() -> None:
    """A downgrade is judged by the same distances: fine when callers cannot notice, else a major step."""
    back = judge("2.3.0", live="2.3.1")
    assert back.accepted
    assert notes(back) == ["DOWNGRADE"]
    # 2.4.0 added an argument that callers may pass by now, so taking it away is a step that they can notice, ...
    lost = judge("2.3.0", live="2.4.0", live_contract=GROWN, code=LIVE)
    assert codes(lost) == ["MAJOR_REFUSED"]
    # ... but both numbers were honest.
    assert judge("2.3.0", live="2.4.0", live_contract=GROWN, code=LIVE, accept=Bump.MAJOR).accepted


def test_numbers_that_were_never_honest_are_refused_on_the_way_back_too() -> None:
    """The step from the lower to the higher number must be honest, in whichever direction it is taken."""
    verdict = judge("2.3.0", live="2.4.0", live_contract=BROKEN, code=LIVE, accept=Bump.MAJOR)
    assert codes(verdict) == ["UNDERCLAIMED"]
    assert "claims 2.4.0 after 2.3.0, but argument 'scale' was removed: needs 3.0.0." in verdict.explain()


def test_a_label_that_sorts_lower_is_no_downgrade() -> None:
    """Local labels have no order that means anything."""
    assert judge("2.3.0+aaa", live="2.3.0+zzz").findings == ()


# -- all at once -------------------------------------------------------------------------------------------------------


def judge_all_wrong() -> Verdict:
    return judge(
        "2.4.0",
        name="other",
        code=contract(tensor("w"), call=lambda x: x, requires=("torch>=99",)),
        offered=Contract.of_tensors({"w": ("int8", (9,))}),
        reads="<2",
        requires=("numpy", "torch>=99", "not a requirement"),
    )


def test_every_reason_is_given_at_once() -> None:
    """All reasons are listed together, in a fixed order, and none twice."""
    assert codes(judge_all_wrong()) == [
        "NAME_MISMATCH",
        "SHAPE_CHANGED",
        "DTYPE_CHANGED",
        "UNREADABLE_VERSION",
        "UNDERCLAIMED",
        "MAJOR_REFUSED",
        "REQUIREMENT_UNMET",
        "REQUIREMENT_UNMET",
        "BAD_REQUIREMENT",
    ]


def test_the_text_has_every_reason_and_ends_with_the_remedy() -> None:
    """explain() is a headline, one line for each finding, and last what to do about all of them."""
    verdict = judge_all_wrong()
    head, *lines, last = verdict.explain().splitlines()
    assert head == "Version 2.4.0 may not take the place of 2.3.0 (claims a step of minor, needs major)."
    assert len(lines) == len(verdict.findings)
    assert last.startswith("Remedy: ")
    for part in ("3.0.0", "accept='major'", "provide a class", "convert or migrate", "install"):
        assert part in last


def test_many_changes_are_counted_and_not_all_spelled_out() -> None:
    """One reason spells out three changes and counts the rest; each is a finding of its own."""
    old = contract(tensor("w"), call=lambda a, b, c, d, e: 0)
    verdict = judge("2.4.0", live_contract=old, code=contract(tensor("w"), call=lambda: 0), accept=Bump.MAJOR)
    assert "; and 2 more: needs 3.0.0." in verdict.reasons[0].message
    assert notes(verdict) == ["ARGUMENT_REMOVED"] * 5


def test_a_refusal_is_an_error_with_the_whole_verdict() -> None:
    """raise_if_refused raises one error with one problem for each reason, and survives a process boundary."""
    verdict = judge_all_wrong()
    with pytest.raises(IncompatibleError) as caught:
        verdict.raise_if_refused()
    error = caught.value
    assert error.verdict is verdict
    assert [problem.code for problem in error.problems] == codes(verdict)
    assert error.tensor == "w"
    assert (error.problems[1].expected, error.problems[1].found) == ((2, 3), (9,))
    assert str(error).endswith(f"Remedy: {verdict.remedy}.")
    again = pickle.loads(pickle.dumps(error))
    assert again.verdict == verdict
    assert str(again) == str(error)


# -- laws --------------------------------------------------------------------------------------------------------------

PLAIN = contracts(parts=("state", "call", "config", "words"))
version_texts = st.sampled_from(["0.3.0", "0.4.0", "1.0.0", "1.0.0+abc", "1.0.1", "1.1.0", "2.0.0"])


@given(contracts(), contracts(), version_texts, version_texts, st.sampled_from(Bump))
def test_deciding_never_raises_and_only_refuses_for_reasons(
    old: Contract, new: Contract, live: str, version: str, accept: Bump
) -> None:
    """Accepted if and only if nothing refuses; what is accepted is within `accept`; the text is never empty."""
    verdict = judge(version, live=live, live_contract=old, code=new, accept=accept)
    assert verdict.accepted == (verdict.reasons == ())
    assert not verdict.accepted or max(verdict.needed, verdict.claimed) <= accept
    assert version in verdict.explain()
    assert verdict.accepted == (not verdict.remedy)


@given(contracts(parts=("state",)), contracts(parts=("state",)), version_texts, version_texts)
def test_state_alone_is_judged_alike_in_both_directions(old: Contract, new: Contract, one: str, other: str) -> None:
    """For contracts of state alone, needed, claimed and the reasons are the same there and back."""
    old, new = Contract(state=old.state), Contract(state=new.state)
    there = judge(other, live=one, live_contract=old, code=new)
    back = judge(one, live=other, live_contract=new, code=old)
    assert (there.needed, there.claimed) == (back.needed, back.claimed)
    if Version(one).public != Version(other).public:
        assert codes(there) == codes(back)


@given(PLAIN, PLAIN, version_texts, version_texts, st.sampled_from(Bump), st.sampled_from(Bump))
def test_accepting_more_never_adds_a_reason(
    old: Contract, new: Contract, live: str, version: str, one: Bump, other: Bump
) -> None:
    """`accept` a <= b implies that b's reasons are no more than a's."""
    strict, lax = (
        judge(version, live=live, live_contract=old, code=new, accept=accept) for accept in sorted((one, other))
    )
    assert len(lax.reasons) <= len(strict.reasons)


def test_a_misfit_keeps_its_breakage() -> None:
    """The breakage behind a reason is there as data."""
    (reason,) = judge(offered=Contract.of_tensors({"w": ("float32", (9,))})).reasons
    assert reason.breakage == ShapeChanged(subject="w", old=(2, 3), new=(9,))
