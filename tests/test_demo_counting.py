"""The demo counts what it says it counts, and its exit code tells the truth."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hotglm
from hotglm.demo import charts, main, outcome, page, releases, report, story, tally, traffic
from hotglm.demo.classifier import Digits
from hotglm.demo.releases import NEW, OLD
from hotglm.demo.tally import Kind, Moment, Run
from hotglm.demo.traffic import TORN, Answer, Exam


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread as the demo does, so that every thread computes the same bits."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exam() -> Exam:
    """Three sheets, two models that differ in every layer, and what each says about them."""
    sheets = torch.rand(3, 16, 64, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.inference_mode():
        logits = {version: [model(sheet) for sheet in sheets] for version, model in MODELS.items()}
    return Exam(sheets=sheets, answers=[logits[NEW][i].argmax(1) for i in range(3)], logits=logits)


def make_model(seed: int) -> Digits:
    torch.manual_seed(seed)
    return Digits().eval().requires_grad_(requires_grad=False)


MODELS = {OLD: make_model(1), NEW: make_model(2)}


def mix(num_new: int) -> Digits:
    """Return a model whose first `num_new` tensors are of the new version, the rest of the old: a half-done update."""
    model = make_model(3)
    states = [MODELS[OLD].state_dict(), MODELS[NEW].state_dict()]
    model.load_state_dict({name: states[place < num_new][name] for place, name in enumerate(states[0])})
    return model


@pytest.mark.parametrize("num_new", range(9))
def test_an_answer_of_neither_version_is_torn(exam: Exam, num_new: int) -> None:
    """An answer is torn exactly if some, but not all, tensors were of the new version."""
    with torch.inference_mode():
        logits = mix(num_new)(exam.sheets[0])
    found = traffic.find_version(logits, {version: exact[0] for version, exact in exam.logits.items()})
    assert found == {0: OLD, 8: NEW}.get(num_new, TORN)


def ask_in_turns(
    asks: Sequence[Callable[[torch.Tensor], torch.Tensor]], exam: Exam, num_turns: int
) -> tuple[Answer, ...]:
    """Let the clients ask `asks` in turns until each had `num_turns`; return every record."""
    lock, enough, turns = threading.Lock(), threading.Event(), iter(range(10**9))

    def ask(images: torch.Tensor) -> torch.Tensor:
        with lock:
            turn = next(turns)
            if turn >= num_turns * len(asks):
                enough.set()
        return asks[turn % len(asks) if turn < num_turns * len(asks) else 0](images)

    with traffic.Traffic(ask, exam) as clients:
        assert enough.wait(30)
    return clients.answers


def fail(images: torch.Tensor) -> torch.Tensor:
    """Answer as a service that is away."""
    raise ConnectionRefusedError(f"{len(images)} images for nobody")


def test_every_request_is_counted_for_what_it_is(exam: Exam) -> None:
    """Requests answered by the old, the new and a half-updated model, and not at all, are each counted as that."""
    answers = ask_in_turns([MODELS[OLD], MODELS[NEW], mix(4), fail], exam, num_turns=10)
    run = make_run(answers, [])
    counted = tally.tally(run)
    assert counted.num_requests == len(answers) >= 40
    assert (counted.num_failed, counted.num_torn) == (10, 10)
    assert sum(answer.version == NEW for answer in answers) == 10
    assert {answer.failure for answer in answers} == {"", "ConnectionRefusedError"}
    assert {answer.num_right for answer in answers if answer.version == NEW} == {16}


def make_answer(ended_s: float, version: str | None, *, took_s: float = 0.001) -> Answer:
    failure = "" if version else "OSError"
    right = 16 if version == NEW else 8
    return Answer(
        client=0, began_s=ended_s - took_s, ended_s=ended_s, version=version, num_right=right, failure=failure
    )


def make_moment(
    kind: Kind, began_s: float, ended_s: float, serving: str, *, title: str = "it happens", text: str = ""
) -> Moment:
    return Moment(kind=kind, title=title, began_s=began_s, ended_s=ended_s, serving=serving, text=text)


def make_run(answers: Sequence[Answer], moments: Sequence[Moment]) -> Run:
    began_s = min((answer.began_s for answer in answers), default=0.0)
    ended_s = max((answer.ended_s for answer in answers), default=0.0)
    return Run(name="hotglm", began_s=began_s, ended_s=ended_s, answers=answers, moments=moments)


def test_time_without_answers_is_beyond_the_steady_one() -> None:
    """The longest time between answers, less the longest before the first update; failures answer nothing."""
    ticks = [make_answer(t / 100, OLD) for t in range(1, 101)]
    away = [make_answer(1.0 + t / 100, None) for t in range(1, 50)]
    run = make_run([*ticks, *away, make_answer(1.5, NEW)], [make_moment(Kind.UPDATE, 1.0, 1.5, NEW)])
    counted = tally.tally(run)
    assert counted.longest_gap_ms == pytest.approx(500)
    assert counted.steady_gap_ms == pytest.approx(10)
    assert counted.silent_ms == pytest.approx(490)
    assert counted.num_failed == 49
    assert list(tally.find_gaps(run, longer_than_s=0.1)) == [(1.0, 1.5)]


def test_a_service_that_never_comes_back_is_without_answers_to_the_end() -> None:
    """The time from the last answer to the end of the traffic counts."""
    ticks = [make_answer(t / 100, OLD) for t in range(1, 101)]
    run = replace(make_run(ticks, [make_moment(Kind.UPDATE, 1.0, 1.1, NEW)]), ended_s=3.0)
    assert tally.tally(run).silent_ms == pytest.approx(2000 - 10)


def test_an_answer_of_a_version_that_was_not_live_is_stale() -> None:
    """Asked after the update and answered by the old version is stale; asked before it ended may be either."""
    update = make_moment(Kind.UPDATE, 1.0, 1.2, NEW)
    early, between, late = make_answer(0.9, OLD), make_answer(1.1, NEW), make_answer(1.3, OLD, took_s=0.2)
    assert tally.tally(make_run([early, between, late], [update])).num_stale == 0
    assert tally.tally(make_run([early, make_answer(1.3, OLD)], [update])).num_stale == 1
    back = make_moment(Kind.ROLLBACK, 2.0, 2.1, OLD)
    answers = [early, make_answer(1.5, NEW), make_answer(2.5, NEW)]
    assert tally.tally(make_run(answers, [update, back])).num_stale == 1


# -- the exit code -----------------------------------------------------------------------------------------------------


def make_slot_run(*, answers: Sequence[Answer] = (), error: Exception | None = None) -> outcome.SlotRun:
    """Return a run with hotglm in which all went well, with `answers` beside its own."""
    good = [make_answer(0.5, OLD), make_answer(1.5, NEW), make_answer(2.5, OLD)]
    moments = [make_moment(Kind.UPDATE, 1.0, 1.1, NEW), make_moment(Kind.ROLLBACK, 2.0, 2.1, OLD)]
    bad = releases.BadRelease(title="bad", path=Path("bad"), error=hotglm.HeaderError)
    raised = hotglm.HeaderError("Expected a header.") if error is None else error
    refusal = outcome.Refusal(release=bad, error=raised if isinstance(raised, hotglm.HotglmError) else None)
    return outcome.SlotRun(run=make_run([*good, *answers], moments), refusals=[refusal], is_restored=True)


def judge(slot_run: outcome.SlotRun) -> tuple[int, list[str]]:
    """Return the exit code, and the claims that did not come true."""
    checks = outcome.verify(slot_run, tally.tally(slot_run.run))
    return outcome.exit_code(checks), [check.claim for check in checks if not check.is_met]


def test_a_good_run_ends_with_0() -> None:
    """The exit code is 0 when every claim came true."""
    assert judge(make_slot_run()) == (0, [])


@pytest.mark.parametrize(
    ("slot_run", "claim"),
    [
        (make_slot_run(answers=[make_answer(1.7, None)]), "every request was answered"),
        (make_slot_run(answers=[make_answer(1.7, TORN)]), "every answer is of one version"),
        (make_slot_run(answers=[make_answer(1.7, OLD)]), "every answer is of a version that was live"),
        (make_slot_run(error=hotglm.NonFiniteError("NaN")), "bad: refused with HeaderError"),
        (make_slot_run(error=ValueError("not refused")), "bad: refused with HeaderError"),
        (replace(make_slot_run(), is_restored=False), "the rollback brought"),
    ],
)
def test_one_claim_that_fails_is_exit_code_1(slot_run: outcome.SlotRun, claim: str) -> None:
    """A failed, torn or stale request, a wrong error, no error, a rollback to other bits: each fails the demo."""
    code, failed = judge(slot_run)
    assert code == 1
    assert any(found.startswith(claim) for found in failed)


def test_no_requests_and_no_gain_are_failures_too() -> None:
    """A demo in which nobody asked, or in which the new version is no better, does not succeed."""
    good = make_slot_run()
    silent = replace(good, run=replace(good.run, answers=()))
    assert judge(silent)[0] == 1
    no_better = [replace(answer, num_right=8) for answer in good.run.answers]
    assert judge(replace(good, run=replace(good.run, answers=no_better))) == (1, [f"{NEW} made the service better"])
    assert outcome.exit_code([]) == 1


def test_main_returns_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exam: Exam) -> None:
    """When one claim fails, `hotglm demo` says FAIL, still writes the page, and ends with 1."""
    slot_run = make_slot_run(answers=[make_answer(1.7, TORN)])
    counted = tally.tally(slot_run.run)
    found = report.Report(
        machine="a machine",
        releases=[releases.Release(version=v, path=tmp_path, accuracy=0.5) for v in (OLD, NEW)],
        exam=exam,
        runs=[slot_run.run],
        tallies=[counted],
        sides=[outcome.Side(title="bad", slot="refused", peer="goes live")],
        checks=outcome.verify(slot_run, counted),
        duration_s=1.0,
    )
    monkeypatch.setattr(main, "_run", lambda *_: found)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main.main(["--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "report.json")]) == 1
    assert "FAIL  every answer is of one version" in printed.getvalue()
    assert "unmet" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["ok"] is False


# -- showing -----------------------------------------------------------------------------------------------------------


def test_the_page_escapes_what_it_shows() -> None:
    """Text from outside, such as an error's, cannot become markup."""
    moment = make_moment(Kind.REFUSAL, 1.0, 1.1, NEW, title="<b>bad</b>", text="<script>x</script>")
    run = make_run([make_answer(0.5, OLD), make_answer(1.5, NEW)], [moment])
    html = page._show_run(run, [run]) + "".join(page._show_receipts(run))
    assert "<script>" not in html
    assert "<b>bad" not in html


def test_the_story_of_a_moment_is_cut_to_its_first_lines() -> None:
    """A long error is told by its first lines, in ASCII."""
    moment = make_moment(Kind.REFUSAL, 1.0, 1.1, NEW, text="one \u00e9\ntwo\nthree\nfour")
    text = story.describe_moment(moment, began_s=0.0, with_code=False)
    assert text.splitlines()[1:] == [f"{' ' * 9}{line}" for line in ("one \\xe9", "two", "three")]


def test_all_runs_are_drawn_to_one_scale() -> None:
    """The scale holds the longest run and every latency, in whole powers of ten."""
    short = make_run([make_answer(0.5, OLD, took_s=0.0004)], [])
    long = make_run([make_answer(0.1, OLD), make_answer(4.0, NEW, took_s=0.2)], [])
    scale = charts.make_scale([short, long])
    assert scale.decades_ms == [0.1, 1.0, 10.0, 100.0, 1000.0]
    assert scale.duration_s == pytest.approx(long.ended_s - long.began_s)
