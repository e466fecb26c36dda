"""Watching against a model, whatever happens in whatever order; and planted bugs, each of which that must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from hotglm.watching import engine
from hotglm.watching.deciding import Decision, Situation, Task, decide
from hotglm.watching.judging import Fault, judge
from hotglm.watching.ranking import Ranking
from hotglm.watching.refusals import Refusals
from hotglm.watching.retries import Retries
from hotglm.watching.scanning import Found, Scanner, Target
from support.watch_machine import LabelMachine, ShelfMachine

SHORT = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(SHORT, max_examples=400, stateful_step_count=40)
HUNT = settings(SHORT, max_examples=300, stateful_step_count=25, phases=(Phase.generate,), report_multiple_bugs=False)


@pytest.mark.parametrize("machine", [ShelfMachine, LabelMachine])
def test_a_watcher_agrees_with_its_model(machine: type[RuleBasedStateMachine]) -> None:
    """Copied, half copied, broken, replaced, removed or labelled: what is live is what the model says."""
    run_state_machine_as_test(machine, settings=SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [ShelfMachine, LabelMachine])
def test_a_watcher_agrees_with_its_model_for_long(machine: type[RuleBasedStateMachine]) -> None:
    """The long form of the same."""
    run_state_machine_as_test(machine, settings=LONG)


# -- planted bugs ------------------------------------------------------------------------------------------------------


def retries_bad_bytes(error: BaseException) -> Fault:
    fault = judge(error)
    return Fault.TIME if fault is Fault.BYTES else fault


def follows_removals(situation: Situation) -> Decision:
    decision = decide(situation)
    target = situation.found.target
    is_lower = decision.task is Task.REST and target is not None and target is not situation.applied
    is_other = target is not None and situation.applied is not None and target.digest != situation.applied.digest
    return Decision(task=Task.TRY, target=target) if is_lower and is_other else decision


def never_goes_back(situation: Situation) -> Decision:
    return decide(replace(situation, is_label=False))


def refuses_names(refusals: Refusals, target: Target) -> Any:
    return next((one for one in refusals.list_all() if one.version == str(target.version)), None)


def compares_text(ranking: Ranking) -> Any:
    return iter(sorted(ranking._all.items(), key=lambda item: item[0], reverse=True))


def is_content_with_the_first(scanner: Scanner, is_refused: Callable[[Target], bool], **more: Any) -> Found:
    return real_scan(scanner, lambda target: False, **more)


def believes_the_manifest(scanner: Scanner, path: str, key: str) -> bool:
    return True


def steps_over_nothing(retries: Retries, target: Target, now_s: float) -> bool:
    return False


real_scan = Scanner.scan

BUGS: list[tuple[type[RuleBasedStateMachine], Any, str, Any]] = [
    (ShelfMachine, engine, "judge", retries_bad_bytes),
    (ShelfMachine, engine, "decide", follows_removals),
    (ShelfMachine, Refusals, "find", refuses_names),
    (ShelfMachine, Ranking, "descend", compares_text),
    (ShelfMachine, Scanner, "scan", is_content_with_the_first),
    (ShelfMachine, Scanner, "_is_whole", believes_the_manifest),
    (ShelfMachine, Retries, "is_waiting", steps_over_nothing),
    (LabelMachine, engine, "decide", never_goes_back),
]


@pytest.mark.parametrize(("machine", "owner", "name", "bug"), BUGS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_bug_is_found(
    machine: type[RuleBasedStateMachine], owner: Any, name: str, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad bytes tried again, removals or moves followed wrongly, names believed: the model says no."""
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(BaseException):  # noqa: B017 - an assertion, alone or in a group
        run_state_machine_as_test(machine, settings=HUNT)
