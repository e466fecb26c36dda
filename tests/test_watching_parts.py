"""The parts of watching that are pure: judging, deciding, waiting, preconditions, policies."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotglm
from hotglm import errors
from hotglm.errors import ArgumentError, HotglmError, Problem
from hotglm.version import Version
from hotglm.watching.backoff import plan_pause_s
from hotglm.watching.deciding import Situation, Task, decide, select_target
from hotglm.watching.judging import Fault, judge
from hotglm.watching.ranking import Ranking
from hotglm.watching.retries import Retries, Retry
from hotglm.watching.scanning import Found, Target

# -- judging -----------------------------------------------------------------------------------------------------------

HALF = Problem(code="MISSING_FILE", message="")
TIME = [
    errors.SourceReadError("EIO"),
    errors.SourceChangedError("cut"),
    errors.MemoryPlanError("no room"),
    errors.ThreadStartError("no thread"),
    errors.StoreBusyError("held"),
    errors.StoreWriteError("full"),
    errors.StoreError("no label"),
    errors.StageTimeoutError("slow"),
    errors.ConflictError("another"),
    errors.SupersededError("newer"),
    errors.SignatureError("unsigned"),
    errors.ReplayedError("older"),
    errors.ExpiredError("old"),
    errors.TrustStateError("damaged"),
    errors.WrongBaseError("other base"),
    errors.DeltaChainError("no base", code="CHAIN_BASE_MISSING"),
    errors.ReleaseError("half", code="INCOMPLETE"),
    errors.ReleaseError("half", problems=[HALF, Problem(code="SIZE_MISMATCH", message="")]),
    OSError("anything else"),
]
BYTES = [
    errors.DigestMismatchError("flipped"),
    errors.HeaderError("garbage"),
    errors.ShardIndexError("garbage"),
    errors.TensorValueError("garbage"),
    errors.NonFiniteError("NaN"),
    errors.GoldenMismatchError("other outputs"),
    errors.CallableCheckError("no"),
    errors.ReleaseError("bad", code="MANIFEST_NOT_CANONICAL"),
    errors.ReleaseError("bad", problems=[HALF, Problem(code="NOT_REGULAR", message="")]),
    errors.DeltaChainError("circle", code="CHAIN_LOOP"),
    errors.DeltaError("bad", code="DELTA_TOO_LARGE"),
]
HOST = [
    errors.IncompatibleError("major"),
    errors.NoPathError("no way"),
    errors.StaleStateError("stale"),
    errors.StageFailedError("raised"),
]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        *((error, Fault.TIME) for error in TIME),
        *((error, Fault.BYTES) for error in BYTES),
        *((error, Fault.HOST) for error in HOST),
        (errors.SlotClosedError("closed"), Fault.CLOSED),
    ],
    ids=lambda value: getattr(value, "code", None) if isinstance(value, HotglmError) else None,
)
def test_every_failure_has_somebody_to_blame(error: BaseException, fault: Fault) -> None:
    """K09 and others: slow machines, reads and signatures are tried again; bad bytes never, nor what the host lacks."""
    assert judge(error) is fault


# -- deciding ----------------------------------------------------------------------------------------------------------


def make_target(version: str) -> Target:
    return Target(version=Version(version), sequence=1, path=version, digest=version, key=version)


def retry(version: str, *, attempt: int, at_s: float) -> Retry:
    return Retry(key=version, version=Version(version), attempt=attempt, at_s=at_s)


OLD, NEW = make_target("1.0"), make_target("2.0")


@pytest.mark.parametrize(
    ("task", "found", "more"),
    [
        (Task.NOTHING, None, {}),
        (Task.TRY, NEW, {}),
        (Task.TRY, NEW, {"applied": OLD}),
        (Task.TRY, OLD, {"applied": NEW}),
        (Task.REST, NEW, {"applied": NEW}),
        (Task.REST, NEW, {"applied": NEW, "is_refused": True}),
        (Task.AWAIT_TRIAL, NEW, {"applied": NEW, "is_on_trial": True}),
        (Task.AWAIT_TRIAL, NEW, {"applied": OLD, "is_on_trial": True}),
        (Task.AWAIT_TRIAL, NEW, {"applied": OLD, "is_on_trial": True, "before": make_target("1.5")}),
        (Task.GO_BACK, OLD, {"applied": NEW, "is_on_trial": True, "before": OLD}),
        (Task.AWAIT_TRIAL, OLD, {"applied": NEW, "is_on_trial": True, "before": OLD, "is_label": False}),
        (Task.LEAVE, NEW, {"applied": OLD, "is_refused": True}),
        (Task.REST, OLD, {"applied": NEW, "is_label": False}),
        (Task.TRY, NEW, {"applied": OLD, "is_label": False}),
        (Task.AWAIT_RETRY, NEW, {"retry": retry("2.0", attempt=1, at_s=11.0)}),
        (Task.TRY, NEW, {"retry": retry("2.0", attempt=1, at_s=10.0)}),
        (Task.TRY, NEW, {"retry": retry("1.0", attempt=1, at_s=11.0)}),
    ],
)
def test_what_is_done_in_each_situation(task: Task, found: Target | None, more: dict[str, object]) -> None:
    """Every rule of deciding, one by one."""
    situation = Situation(now_s=10.0, found=Found(target=found), **more)  # type: ignore[arg-type]  # its own fields
    assert decide(situation).task is task


@pytest.mark.parametrize(
    ("found", "waiting", "applied", "live", "expected"),
    [
        ("1.0", None, None, "0", "1.0"),
        (None, "2.0", "1.0", "1.0", "2.0"),
        ("1.5", "2.0", "1.0", "1.0", "1.5"),
        ("1.0", "2.0", "1.0", "1.0", "2.0"),
        ("1.5", "2.0", "1.0", "1.7", "2.0"),
        ("1.5", "2.0", "1.7", "1.0", "2.0"),
        ("1.5", "2.0", None, "1.7", "2.0"),
        ("1.0", "2.0", "3.0", "3.0", "1.0"),
    ],
)
def test_what_waits_is_the_target_where_nothing_lower_is_newer_than_live(
    found: str | None, waiting: str | None, applied: str | None, live: str, expected: str
) -> None:
    """Stepping over goes up only, from what the watcher applied as from what the host did."""
    one, other, last = (None if version is None else make_target(version) for version in (found, waiting, applied))
    selected = select_target(Found(target=one, waiting=other), applied=last, live=Version(live))
    assert selected.target == make_target(expected)


def test_only_so_much_is_remembered() -> None:
    """Of more than 64 that wait the oldest is forgotten; with a label one is remembered."""
    many, one = Retries(is_label=False), Retries(is_label=True)
    for number in range(100):
        for retries in (many, one):
            retries.add(make_target(f"1.{number}"), attempt=1, at_s=number, error=errors.SourceReadError("EIO"))
    kept = [number for number in range(100) if many.find(make_target(f"1.{number}"))]
    assert kept == list(range(36, 100))
    assert [number for number in range(100) if one.find(make_target(f"1.{number}"))] == [99]
    assert (many.find_next_s(), many.left_s(90.5), many.left_s(99)) == (36, 0.5, float("inf"))


# -- waiting and ranking -----------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(1e-3, 10), st.floats(1, 1000), st.text(max_size=5))
def test_pauses_grow_to_their_bound(attempt: int, first_s: float, factor: float, seed: str) -> None:
    """A pause lies between half and all of first * 2^(n-1), or of the limit; the same arguments give the same one."""
    limit_s = first_s * factor
    pause_s = plan_pause_s(attempt, first_s=first_s, limit_s=limit_s, seed=seed)
    bound_s = min(limit_s, first_s * 2.0 ** min(attempt - 1, 60))
    assert 0.5 * bound_s <= pause_s <= bound_s
    assert pause_s == plan_pause_s(attempt, first_s=first_s, limit_s=limit_s, seed=seed)


def test_processes_do_not_try_again_at_one_moment() -> None:
    """A hundred seeds spread over the half of the pause that is left to them."""
    pauses = {round(plan_pause_s(3, first_s=1, limit_s=60, seed=f"ranker/{pid}"), 1) for pid in range(100)}
    assert len(pauses) > 15


@given(st.lists(st.tuples(st.sampled_from("ar"), st.integers(0, 30)), max_size=40))
def test_a_ranking_is_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    """Whatever is added and removed, descending gives the versions sorted; asked twice, or only in part, the same."""
    ranking, model = Ranking(), dict[str, Version]()
    for step, number in steps:
        name, version = f"{number}", Version(f"1.{number * 7 % 31}")
        if step == "a":
            ranking.add(name, number, version)
            model[name] = version
        else:
            ranking.remove(name)
            model.pop(name, None)
        next(ranking.descend(), None)
    expected = sorted(model, key=lambda name: model[name], reverse=True)
    assert [name for name, _ in ranking.descend()] == [name for name, _ in ranking.descend()] == expected
    assert len(ranking) == len(model)


# -- preconditions and policies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "hour", "is_open"),
    [(("22:00", "06:00"), h, h >= 22 or h < 6) for h in range(24)]
    + [(("09:00", "17:00"), h, 9 <= h < 17) for h in range(24)],
)
def test_a_window_may_go_past_midnight(window: tuple[str, str], hour: int, is_open: bool) -> None:
    """From the first minute on, and no more from the last one on."""
    start, end = window
    now = datetime(2026, 11, 20, hour, 0)  # noqa: DTZ001 - local time is what is meant
    assert (hotglm.TimeWindow(start=start, end=end, read=lambda: now)() is None) == is_open


def test_load_and_memory_are_compared_with_their_limits() -> None:
    """Below the limit of load, and from the needed memory on, there is no reason to wait; what is unknown is none."""

    def unknown() -> tuple[float, float, float]:
        raise OSError

    assert hotglm.LoadBelow(limit=1.0, read=lambda: (0.0, 9.0, 9.0))() is None
    assert hotglm.LoadBelow(limit=1.0, read=unknown)() is None
    assert "per core" in (hotglm.LoadBelow(limit=1.0, read=lambda: (1e6, 0.0, 0.0))() or "")
    assert hotglm.FreeMemory(nbytes=10, read=lambda: 10)() is None
    assert hotglm.FreeMemory(nbytes=10, read=lambda: 9)() == "9 bytes of memory available, 10 needed"
    assert hotglm.FreeMemory(nbytes=1)() is None


@pytest.mark.parametrize(
    "options",
    [
        {"interval_s": 0},
        {"interval_s": "2"},
        {"debounce_s": None},
        {"trial_s": "10"},
        {"retry_s": "1"},
        {"max_retry_s": "300"},
        {"interval_s": float("inf")},
        {"interval_s": float("nan")},
        {"debounce_s": -1},
        {"trial_s": -1.0},
        {"trial_s": float("nan")},
        {"probe": 3},
        {"preconditions": (3,)},
        {"preconditions": "busy"},
        {"retry_s": 0},
        {"retry_s": 2, "max_retry_s": 1},
        {"stage": "quick"},
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(options: dict[str, object]) -> None:
    """The field is named when the policy is made."""
    with pytest.raises(ArgumentError, match=list(options)[-1]):
        hotglm.WatchPolicy(**options)  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize(("start", "end"), [("22", "x"), ("25:00", "06:00"), ("06:00", "06:00"), (None, "06:00")])
def test_a_window_that_cannot_be_meant_is_refused(start: object, end: str) -> None:
    """Hours that do not parse, or an empty window, are named when it is made."""
    with pytest.raises(ArgumentError, match="two hours"):
        hotglm.TimeWindow(start=start, end=end)  # type: ignore[arg-type]  # that is what is tested


def test_a_list_of_preconditions_is_taken() -> None:
    """Whoever writes brackets instead of parentheses is understood."""
    window = hotglm.TimeWindow(start="22:00", end="06:00")
    assert hotglm.WatchPolicy(preconditions=[window]).preconditions == (window,)  # type: ignore[arg-type]  # a list
