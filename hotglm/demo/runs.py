"""The three runs: the same traffic, and three ways of bringing the next version in.

Rules this module keeps:

- Each run is told by the moments it returns; what is printed and drawn is made from them alone.
- The service is the same classifier each time, asked by the same clients about the same sheets.
- The garbage of earlier runs is collected before the clients start, so that no run pays for another.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import hotglm
from hotglm.demo.console import Console
from hotglm.demo.outcome import Refusal, SlotRun
from hotglm.demo.releases import NEW, OLD, BadRelease, Release, load_model
from hotglm.demo.service import Service
from hotglm.demo.story import describe_moment
from hotglm.demo.tally import Kind, Moment, Run
from hotglm.demo.traffic import Exam, Traffic
from hotglm.demo.updates import go_back, open_slot, overwrite, read_code, restart, swap, try_update

Returned = TypeVar("Returned")

__all__ = ["FULL", "QUICK", "Material", "Schedule", "run_overwrite", "run_restart", "run_slot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long the parts of a run last, and how often the update is repeated.

    Attributes:
        steady_s: traffic before the first update.
        look_s: traffic after a change that is looked at.
        refusal_s: traffic after each refusal.
        repeat_s: traffic after each repeated update.
        num_repeats: updates beyond the first two, there and back again; an even number.
        expected_s: what the whole demo should take, for the progress bar.
    """

    steady_s: float
    look_s: float
    refusal_s: float
    repeat_s: float
    num_repeats: int
    expected_s: float


FULL = Schedule(steady_s=1.0, look_s=0.6, refusal_s=0.25, repeat_s=0.06, num_repeats=22, expected_s=20.0)
QUICK = Schedule(steady_s=0.4, look_s=0.25, refusal_s=0.05, repeat_s=0.03, num_repeats=10, expected_s=9.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What the runs are made of."""

    old: Release
    new: Release
    bad: Sequence[BadRelease]
    exam: Exam
    folder: Path


class _Recorder:
    """Does things to a service, notes when and what, and tells it at once."""

    def __init__(self, console: Console, began_s: float, folder: Path) -> None:
        self.moments: list[Moment] = []
        self._console = console
        self._folder = folder
        self._began_s = began_s

    def note(
        self,
        kind: Kind,
        title: str,
        serving: str,
        act: Callable[..., Returned],
        *subjects: object,
        is_repeat: bool = False,
    ) -> Returned:
        """Call `act(*subjects)` and return what it returned."""
        began_s = time.perf_counter()
        returned = act(*subjects)
        moment = Moment(
            kind=kind,
            title=title,
            began_s=began_s,
            ended_s=time.perf_counter(),
            serving=serving,
            text=_explain(returned).replace(f"{self._folder}/", ""),
            code=read_code(act),
            is_repeat=is_repeat,
        )
        is_new = moment.code not in {earlier.code for earlier in self.moments}
        self.moments.append(moment)
        if not is_repeat:
            self._console.say(describe_moment(moment, began_s=self._began_s, with_code=is_new))
        return returned


def _explain(returned: object) -> str:
    if isinstance(returned, hotglm.Receipt):
        return returned.explain()
    return f"{type(returned).__name__}: {returned}" if isinstance(returned, hotglm.HotglmError) else ""


def run_slot(material: Material, schedule: Schedule, console: Console) -> SlotRun:
    """Update, refuse, roll back and update again with hotglm, while clients ask."""
    exam = material.exam
    slot = open_slot(load_model(material.old.path), exam.sheets[0])
    before = _ask_all(slot, exam)
    gc.collect()
    with Traffic(slot, exam) as traffic:
        recorder = _Recorder(console, traffic.began_s, material.folder)
        console.wait(schedule.steady_s)
        recorder.note(Kind.UPDATE, f"{NEW} goes live", NEW, swap, slot, material.new.path)
        console.wait(schedule.look_s)
        refusals = []
        for bad in material.bad:
            error = recorder.note(Kind.REFUSAL, f"{bad.title}: refused", NEW, try_update, slot, bad.path)
            refusals.append(Refusal(release=bad, error=error))
            console.wait(schedule.refusal_s)
        console.wait(schedule.look_s)
        recorder.note(Kind.ROLLBACK, f"back to {OLD}", OLD, go_back, slot)
        after = _ask_all(slot, exam)
        console.wait(schedule.look_s)
        _repeat(recorder, material, schedule, console, swap, slot)
    slot.close()
    is_restored = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return SlotRun(run=_finish("hotglm", traffic, recorder), refusals=refusals, is_restored=is_restored)


def run_overwrite(material: Material, schedule: Schedule, console: Console) -> Run:
    """Update with `load_state_dict` on the live model, as often, while clients ask."""
    model = load_model(material.old.path)
    gc.collect()
    with Traffic(model, material.exam) as traffic:
        recorder = _Recorder(console, traffic.began_s, material.folder)
        console.wait(schedule.steady_s)
        for release in (material.new, material.old):
            title = f"{release.version} is written into the live model"
            recorder.note(Kind.UPDATE, title, release.version, overwrite, model, release.path)
            console.wait(schedule.look_s)
        _repeat(recorder, material, schedule, console, overwrite, model)
    return _finish("load_state_dict", traffic, recorder)


def run_restart(material: Material, schedule: Schedule, console: Console) -> Run:
    """Update with a restart of the process, once, while clients ask."""
    with Service(material.folder) as service:
        service.start(material.old.path)
        gc.collect()
        with Traffic(service.ask, material.exam) as traffic:
            recorder = _Recorder(console, traffic.began_s, material.folder)
            console.wait(schedule.steady_s)
            recorder.note(Kind.UPDATE, f"restart with {NEW}", NEW, restart, service, material.new.path)
            console.wait(schedule.look_s)
    return _finish("process restart", traffic, recorder)


def _ask_all(slot: hotglm.ModuleSlot, exam: Exam) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [slot(sheet) for sheet in exam.sheets]


def _repeat(
    recorder: _Recorder,
    material: Material,
    schedule: Schedule,
    console: Console,
    act: Callable[..., object],
    service: object,
) -> None:
    """Bring the new version in and the old one back, again and again, so that chance has many tries."""
    console.say(f"         and {schedule.num_repeats} more, there and back again")
    for turn in range(schedule.num_repeats):
        release = material.old if turn % 2 else material.new
        recorder.note(Kind.UPDATE, release.version, release.version, act, service, release.path, is_repeat=True)
        console.wait(schedule.repeat_s)
    console.wait(schedule.look_s / 2)


def _finish(name: str, traffic: Traffic, recorder: _Recorder) -> Run:
    return Run(
        name=name,
        began_s=traffic.began_s,
        ended_s=traffic.ended_s,
        answers=traffic.answers,
        moments=tuple(recorder.moments),
    )
