"""What a watcher does next, decided from what it knows; pure, so that every case can be listed.

Rules this module keeps:

- A release acts when it *becomes* the target: what was applied once and changed by hand since is left as it is, until
  the target moves. So a rollback by an operator is not undone by the next look.
- The digest says whether two releases are one; equal digest is nothing to do.
- A trial ends before anything else is staged, because staging takes the memory that going back needs. Only where the
  target is the very release that was live before does the trial end at once: somebody took the label back.
- A constraint leads up. That the highest version was removed is no reason to leave it (E10); to go down, narrow the
  constraint or follow a label.
- With a constraint, what waits for its next try is stepped over, as long as there is something that is newer than what
  is live: nobody can then keep a service from what is good by what is not there yet.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from hotglm.version import Version
from hotglm.watching.retries import Retry
from hotglm.watching.scanning import Found, Target

__all__ = ["RETRY_REASON", "Decision", "Situation", "Task", "decide", "select_target"]

RETRY_REASON = "it failed for a reason that may pass"


class Task(enum.Enum):
    """What is to be done."""

    REST = "rest"
    """Nothing: what should be live is, or was until somebody changed it by hand."""
    NOTHING = "nothing"
    """Nothing: there is nothing eligible."""
    TRY = "try"
    """Stage the target and commit it."""
    GO_BACK = "go back"
    """End the trial without a judgement and make the release before it live."""
    AWAIT_TRIAL = "await trial"
    """Wait: what is live is on trial."""
    AWAIT_RETRY = "await retry"
    """Wait: the target failed for a reason that may pass."""
    LEAVE = "leave"
    """Nothing: the target was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a decision is made from.

    Attributes:
        now_s: the time.
        found: what the latest scan found.
        applied: the release that was last made live by the watcher, if any.
        before: while a trial runs, the release that was live before it, if the watcher knows it.
        is_on_trial: whether what is live is on trial.
        is_refused: whether the target must not be tried.
        is_label: whether a label is followed.
        retry: when the target is tried again, if it failed.
    """

    now_s: float
    found: Found
    applied: Target | None = None
    before: Target | None = None
    is_on_trial: bool = False
    is_refused: bool = False
    is_label: bool = True
    retry: Retry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done, and why.

    Attributes:
        task: what.
        target: about which release.
        reason: why, in words; empty where the task says it all.
    """

    task: Task
    target: Target | None = None
    reason: str = ""


def select_target(found: Found, *, applied: Target | None, live: Version) -> Found:
    """Return what was found with the release as its target that waits for its next try, if nothing else is newer.

    Args:
        found: what a scan found.
        applied: the release that was last made live by the watcher, if any.
        live: the version that is live, whoever made it so.
    """
    waiting, target = found.waiting, found.target
    floor = live if applied is None else max(live, applied.version)
    is_over = waiting is None or (applied is not None and waiting.version <= applied.version)
    if is_over or (target is not None and floor < target.version):
        return found
    return replace(found, target=waiting, reason="")


def decide(now: Situation) -> Decision:
    """Return what is to be done."""
    target, found, applied = now.found.target, now.found, now.applied
    if target is None:
        return Decision(task=Task.NOTHING, reason=found.reason)
    if applied is not None and target.digest == applied.digest:
        task = Task.AWAIT_TRIAL if now.is_on_trial else Task.REST
        return Decision(task=task, target=target, reason=found.reason)
    if now.is_on_trial:
        is_back = now.before is not None and target.digest == now.before.digest and now.is_label
        reason = "" if is_back else "the version before it is on trial"
        return Decision(task=Task.GO_BACK if is_back else Task.AWAIT_TRIAL, target=target, reason=reason)
    return _decide_on(target, now)


def _decide_on(target: Target, now: Situation) -> Decision:
    """Return what is to be done about a target that is not live, while nothing is on trial."""
    if now.is_refused:
        return Decision(task=Task.LEAVE, target=target, reason="it was refused")
    if not now.is_label and now.applied is not None and target.version < now.applied.version:
        reason = f"{now.applied.version} is not there any more, and a constraint leads up only"
        return Decision(task=Task.REST, target=now.applied, reason=reason)
    if now.retry is not None and now.retry.key == target.key and now.now_s < now.retry.at_s:
        return Decision(task=Task.AWAIT_RETRY, target=target, reason=RETRY_REASON)
    return Decision(task=Task.TRY, target=target, reason=now.found.reason)
