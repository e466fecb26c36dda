"""Threads that call a slot without a pause while a test changes it, and hold every answer against what may be live.

Rules this module keeps:

- An answer is right if it is that of a version that was live at some time during the pass, to the last bit (or within
  the tolerances asked for). Any other is counted as torn, with what it looked like; a pass that raises counts as well.
- Nothing here sleeps for a fixed time: a change is made between passes that were seen to begin and end.
- The threads end with the `with`, whatever the body does.

The model must answer the same inputs alike: put it in `eval()` mode, and seed what draws random numbers.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from hotglm.model.grad_mode import GradMode
from hotglm.model.recording import call_with
from hotglm.problem import describe_exception
from hotglm.slot.checks import Golden, Inputs, find_differences
from hotglm.testing.waiting import wait_until
from hotglm.weights.workers import yield_gil

__all__ = ["Tolerance", "Traffic", "describe_differences"]

_MAX_FAILURES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far two outputs may be apart; the default, 0 and 0, is not at all.

    Attributes:
        rtol: relative tolerance, 0 or more.
        atol: absolute tolerance, 0 or more.
    """

    rtol: float = 0.0
    atol: float = 0.0


EXACT = Tolerance()


def describe_differences(expected: Any, found: Any, *, tolerance: Tolerance = EXACT, name: str = "output") -> list[str]:
    """Return where two outputs (tensors, or containers of them) differ by more than the tolerance, in words."""
    golden = Golden(inputs=(), outputs=None, rtol=tolerance.rtol, atol=tolerance.atol)
    return [f"{name}{where}: {text}" for where, text in find_differences(expected, found, golden)]


class Traffic:
    """Threads that call `slot` with `inputs` until the `with` ends, in the grad mode of the thread that made it.

    Example:
        >>> import torch, hotglm
        >>> slot = hotglm.ModuleSlot(torch.nn.Linear(2, 2), name="ranker", version="1.0.0")
        >>> cold = torch.nn.Linear(2, 2)
        >>> x = torch.ones(2)
        >>> with Traffic(slot, x) as traffic:
        ...     traffic.announce(cold(x))           # from here on passes may give this answer too
        ...     receipt = slot.update(cold.state_dict(), version="1.0.1")
        ...     traffic.settle()                    # from here on a pass that begins must give it
        >>> traffic.num_passes > 4
        True
    """

    def __init__(
        self,
        slot: nn.Module,
        inputs: Inputs,
        *,
        num_threads: int = 2,
        tolerance: Tolerance = EXACT,
        timeout_s: float = 60,
    ) -> None:
        """Take what to call; the threads start when the `with` is entered.

        Args:
            slot: a `ModuleSlot`, or any module.
            inputs: arguments of every pass; only read.
            num_threads: threads that call, each as fast as it can.
            tolerance: how far an answer may be from the one expected.
            timeout_s: how long to wait for a pass to begin and end, in seconds.
        """
        self._slot = slot
        self.inputs = inputs
        self._tolerance = tolerance
        self._timeout_s = timeout_s
        self._mode = GradMode.current()
        self._answers: list[Any] = []
        self._oldest = 0
        self._passes = [0] * num_threads
        self._failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(index,), name=f"hotglm-traffic-{index}", daemon=True)
            for index in range(num_threads)
        ]

    @property
    def num_passes(self) -> int:
        """How many passes have ended."""
        return sum(self._passes)

    @property
    def failures(self) -> tuple[str, ...]:
        """What was wrong with passes, in words."""
        return tuple(self._failures)

    def ask(self) -> Any:
        """Run one pass in the calling thread and return the answer."""
        return call_with(self._slot, self.inputs)

    def announce(self, answer: Any) -> None:
        """Let passes give `answer` from now on, beside those they may give already; call it before the change."""
        self._answers.append(answer)

    def settle(self) -> None:
        """Let passes that begin from now on give the answer announced last only; waits until some have.

        Raises:
            AssertionError: a pass was torn or raised, or passes do not come to their end.
        """
        self._oldest = len(self._answers) - 1
        self.wait_for_passes()

    def wait_for_passes(self, num: int = 2) -> None:
        """Wait until each thread has ended `num` more passes.

        Raises:
            AssertionError: as for `settle`.
        """
        targets = [count + num for count in self._passes]
        came = wait_until(
            lambda: bool(self._failures) or all(a >= b for a, b in zip(self._passes, targets, strict=True)),
            timeout_s=self._timeout_s,
        )
        self.verify()
        if not came:
            raise AssertionError(
                f"Expected {num} more passes of each thread within {self._timeout_s} s, got none that ended. "
                "Remedy: look where the model waits, or raise timeout_s."
            )

    def verify(self) -> None:
        """Return if every pass so far was right.

        Raises:
            AssertionError: naming the first ones that were not.
        """
        if self._failures:
            wrong = "".join(f"\n  - {text}" for text in self._failures)
            raise AssertionError(
                f"Expected every pass to be of one version that was live, got, in {self.num_passes} passes:{wrong}\n"
                "Remedy: put the model in eval() mode if it draws random numbers; else passes saw two versions at once."
            )

    def __enter__(self) -> Self:
        """Take the live version's answer, start the threads and wait for their first passes."""
        self.announce(self.ask())
        for thread in self._threads:
            thread.start()
        try:
            self.wait_for_passes(1)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the threads; may be called twice."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._timeout_s)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop, and raise what was wrong unless the body has raised already."""
        self.stop()
        if kind is None:
            self.verify()

    def _call(self, index: int) -> None:
        try:
            with self._mode.applied():
                while not self._stop.is_set():
                    first = self._oldest
                    found = self.ask()
                    allowed = self._answers[first:]
                    differences = [self._compare(answer, found) for answer in allowed]
                    if all(differences):
                        self._fail("; or ".join(texts[0] for texts in differences))
                        return
                    self._passes[index] += 1  # judged first: whoever waits for it must not miss that it was wrong
                    yield_gil()  # or every step of the update would wait a switch interval for each thread
        except BaseException as error:  # noqa: BLE001 - a pass must not raise anything at all
            self._fail(f"raised {describe_exception(error)}")

    def _compare(self, answer: Any, found: Any) -> list[str]:
        return describe_differences(answer, found, tolerance=self._tolerance)

    def _fail(self, text: str) -> None:
        if len(self._failures) < _MAX_FAILURES:
            self._failures.append(text)
