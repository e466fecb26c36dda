"""Clients that keep asking, and the judge who says which version each answer came from.

Rules this module keeps:

- Every request leaves one record, whatever became of it.
- An answer is compared bit for bit with what each version, loaded cold and alone, says about the same sheet. One that
  is of no version is torn: it saw weights of both.
- Judging happens between two requests of a client, so it is in nobody's latency.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from hotglm.demo.releases import Release, load_model
from hotglm.demo.training import Data

__all__ = ["NUM_CLIENTS", "PAUSE_S", "RETRY_S", "TORN", "Answer", "Exam", "Traffic", "find_version", "make_exam"]

NUM_CLIENTS = 4
PAUSE_S = 0.004
"""How long a client waits after an answer before it asks again."""
RETRY_S = 0.02
"""How long a client waits after a request that failed."""

TORN = "torn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The sheets that clients ask about, and what each version says about them.

    Attributes:
        sheets: images, each [16, 64].
        answers: the right digits, each [16].
        logits: by version, its exact output for each sheet, each [16, 10].
    """

    sheets: Sequence[torch.Tensor]
    answers: Sequence[torch.Tensor]
    logits: Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request and what became of it.

    Attributes:
        client: number of the client, from 0.
        began_s: when it asked, in seconds of `time.perf_counter`.
        ended_s: when it had the answer, or gave up.
        version: whose answer it is, `TORN` if nobody's; None if there was none.
        num_right: digits of the sheet that are right.
        failure: what was raised instead of an answer, else empty.
    """

    client: int
    began_s: float
    ended_s: float
    version: str | None
    num_right: int = 0
    failure: str = ""


def make_exam(data: Data, releases: Sequence[Release]) -> Exam:
    """Ask each version, loaded cold and alone, about every held-out sheet."""
    logits = {}
    for release in releases:
        model = load_model(release.path)
        with torch.inference_mode():
            logits[release.version] = [model(sheet) for sheet in data.sheets]
    return Exam(sheets=data.sheets, answers=data.answers, logits=logits)


def find_version(logits: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> str:
    """Return whose answer `logits` are, bit for bit; `TORN` if nobody's.

    >>> old, new = torch.zeros(2), torch.ones(2)
    >>> [find_version(x, {"1": old, "2": new}) for x in (old, new, torch.tensor([0.0, 1.0]))]
    ['1', '2', 'torn']
    """
    return next((version for version, exact in expected.items() if torch.equal(logits, exact)), TORN)


class Traffic:
    """Clients, each in a thread of its own, that keep asking while the `with` block runs.

    Attributes:
        began_s: when the first request could be made.
        ended_s: when the last one was over.
    """

    def __init__(self, ask: Callable[[torch.Tensor], torch.Tensor], exam: Exam) -> None:
        """Take what is asked, from every client's thread alike; asks nothing yet."""
        self._ask = ask
        self._exam = exam
        self._stopped = threading.Event()
        self._logs: list[list[Answer]] = [[] for _ in range(NUM_CLIENTS)]
        self._threads = [
            threading.Thread(target=self._run, args=(client,), name=f"client-{client}") for client in range(NUM_CLIENTS)
        ]
        self.began_s = self.ended_s = 0.0

    @property
    def answers(self) -> tuple[Answer, ...]:
        """All records so far, in the order in which they ended."""
        return tuple(sorted(itertools.chain(*self._logs), key=lambda answer: answer.ended_s))

    def __enter__(self) -> Self:
        """Start the clients."""
        self.began_s = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let every client finish its request, and wait for them."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self.ended_s = time.perf_counter()

    def _run(self, client: int) -> None:
        num_sheets = len(self._exam.sheets)
        with torch.inference_mode():
            for turn in itertools.count(client * num_sheets // NUM_CLIENTS):
                answer = self._request(client, turn % num_sheets)
                self._logs[client].append(answer)
                if self._stopped.wait(RETRY_S if answer.failure else PAUSE_S):
                    return

    def _request(self, client: int, sheet: int) -> Answer:
        images = self._exam.sheets[sheet]
        began_s = time.perf_counter()
        try:
            logits = self._ask(images)
        except Exception as error:  # noqa: BLE001  # whatever the service raises, the request has failed
            ended_s = time.perf_counter()
            return Answer(client=client, began_s=began_s, ended_s=ended_s, version=None, failure=type(error).__name__)
        ended_s = time.perf_counter()
        version = find_version(logits, {name: exact[sheet] for name, exact in self._exam.logits.items()})
        num_right = int((logits.argmax(1) == self._exam.answers[sheet]).sum())
        return Answer(client=client, began_s=began_s, ended_s=ended_s, version=version, num_right=num_right)
