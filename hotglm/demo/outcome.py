"""What the demo claims, whether it came true, and the exit code that says so.

Rules this module keeps:

- The claims are about hotglm alone. What the peers did is measured and shown, and fails nothing.
- A claim is judged by what clients saw and what was raised; none is taken from what hotglm says about itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hotglm
from hotglm.demo.releases import NEW, OLD, BadRelease, load_model
from hotglm.demo.tally import Kind, Run, Tally, measure_accuracy
from hotglm.demo.traffic import Exam
from hotglm.demo.updates import overwrite

__all__ = ["Check", "Refusal", "Side", "SlotRun", "compare_sides", "exit_code", "measure_jump", "verify"]

MIN_JUMP = 0.10
"""How much better the new version must be at least, of all digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What became of a bad release; `error` is None if it went live."""

    release: BadRelease
    error: hotglm.HotglmError | None

    @property
    def is_as_expected(self) -> bool:
        """Whether it was refused with the error that says so."""
        return type(self.error) is self.release.error


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRun:
    """The run with hotglm, and what only it has.

    Attributes:
        run: the run.
        refusals: one for each bad release.
        is_restored: whether the old version, after the rollback, gave the very bits it had given at the start.
    """

    run: Run
    refusals: Sequence[Refusal]
    is_restored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim, whether it came true, and what was found."""

    claim: str
    is_met: bool
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What two ways of updating made of the same bad release, in words."""

    title: str
    slot: str
    peer: str


def verify(slot_run: SlotRun, tally: Tally) -> list[Check]:
    """Judge every claim about the run with hotglm."""
    before, after = measure_jump(slot_run.run)
    total = f"{tally.num_requests:,}"
    return [
        Check(
            claim="every request was answered",
            is_met=tally.num_failed == 0 < tally.num_requests,
            found=f"{tally.num_failed:,} of {total} failed",
        ),
        Check(
            claim="every answer is of one version, bit for bit",
            is_met=tally.num_torn == 0,
            found=f"{tally.num_torn:,} of {total} torn",
        ),
        Check(
            claim="every answer is of a version that was live",
            is_met=tally.num_stale == 0,
            found=f"{tally.num_stale:,} of {total} stale",
        ),
        Check(
            claim=f"{NEW} made the service better",
            is_met=after - before >= MIN_JUMP,
            found=f"{before:.1%} of the digits right before, {after:.1%} after",
        ),
        *(_verify_refusal(refusal) for refusal in slot_run.refusals),
        Check(
            claim=f"the rollback brought {OLD} back",
            is_met=slot_run.is_restored,
            found="the outputs are the same bits as before" if slot_run.is_restored else "the outputs differ",
        ),
    ]


def _verify_refusal(refusal: Refusal) -> Check:
    expected, error = refusal.release.error.__name__, refusal.error
    found = "it went live" if error is None else f"{type(error).__name__} [{error.code}]"
    return Check(claim=f"{refusal.release.title}: refused with {expected}", is_met=refusal.is_as_expected, found=found)


def measure_jump(run: Run) -> tuple[float, float]:
    """Return the share of digits that clients got right before the first update, and from it to the rollback."""
    update = next(moment for moment in run.moments if moment.kind is Kind.UPDATE)
    rollback = next(moment for moment in run.moments if moment.kind is Kind.ROLLBACK)
    before = measure_accuracy(run, begin_s=run.began_s, end_s=update.began_s)
    return before, measure_accuracy(run, begin_s=update.ended_s, end_s=rollback.began_s)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 if every claim came true, else 1.

    >>> exit_code([Check(claim="it is so", is_met=False, found="it is not")])
    1
    """
    return 0 if checks and all(check.is_met for check in checks) else 1


# -- the same bad releases, given to a peer ----------------------------------------------------------------------------


def compare_sides(refusals: Sequence[Refusal], exam: Exam, live: Path) -> list[Side]:
    """Give each bad release to `load_state_dict` on a model that holds `live`, and say what happened on both sides."""
    return [
        Side(
            title=refusal.release.title,
            slot="went live" if refusal.error is None else f"refused, {type(refusal.error).__name__}",
            peer=_overwrite_with(refusal.release, exam, live),
        )
        for refusal in refusals
    ]


def _overwrite_with(release: BadRelease, exam: Exam, live: Path) -> str:
    model = load_model(live)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raised = ""
    try:
        overwrite(model, release.path)
    except Exception as error:  # noqa: BLE001  # whatever it raises is what is told
        raised = type(error).__name__
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if not raised:
        return f"no error, goes live; {_describe_quality(model, exam)}"
    if not changed:
        return f"{raised}, model unchanged"
    return f"{raised}, with {changed} of {len(before)} tensors overwritten; {_describe_quality(model, exam)}"


def _describe_quality(model: torch.nn.Module, exam: Exam) -> str:
    with torch.inference_mode():
        logits = torch.cat([model(sheet) for sheet in exam.sheets])
    if logits.isnan().any():
        return f"{logits.isnan().any(1).float().mean().item():.0%} of the answers are NaN"
    right = (logits.argmax(1) == torch.cat(list(exam.answers))).float().mean().item()
    exact = torch.equal(logits, torch.cat(list(exam.logits[NEW])))
    return f"{right:.1%} right" + ("" if exact else f", not the outputs of {NEW}")
