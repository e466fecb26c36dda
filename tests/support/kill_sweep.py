"""Ends a process at each of its calls to the operating system, and looks at what is on disk then (P11, D09, D10).

Run as a program, in a process without torch and threads, so that a fork is cheap: `python -m support.kill_sweep NAME
HOW STEP DIRECTORY`. HOW is `kill` (SIGKILL in front of the call), `torn` (a write is done by half, then SIGKILL) or the
name of an errno that the call fails with. STEP is the distance of the calls that are tried: 1 is all of them.

Every scenario is one change of a store. After each try the old state or the new one must be there, and the same change
must work when it is made again. It prints how many calls the change makes.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

from hotglm.errors import HotglmError
from hotglm.release import environment
from hotglm.testing.seams import hooked
from support.kill_scenarios import SCENARIOS, Scenario, verify_store
from support.kill_trust import TRUST_SCENARIOS

__all__ = ["Killer", "sweep", "verify_store"]

_FAILED = 7


class Killer:
    """A hook that ends the process, or fails the call, at the `number`th call of any kind."""

    def __init__(self, number: int, how: str) -> None:
        self._left = number
        self._how = how
        self.num_calls = 0

    def __call__(self, kind: str, _: int, args: tuple[Any, ...]) -> object:
        if kind == "reach" or (self._how == "torn" and kind != "pwrite"):
            return None
        self.num_calls += 1
        self._left -= 1
        if self._left:
            return None
        if self._how not in ("kill", "torn"):
            if kind == "close":
                os.close(args[0])  # as Linux does, whatever it reports
            number = getattr(errno, self._how)
            raise OSError(number, os.strerror(number))
        if self._how == "torn":
            fd, chunk, offset = args
            os.pwrite(fd, chunk[: len(chunk) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def run_killed(scenario: Scenario, number: int, how: str) -> bool:
    """Make the change in a child that is killed at a call; tell whether it was."""
    child = os.fork()
    if child == 0:
        try:
            with hooked(Killer(number, how)):
                scenario.change()
            os._exit(0)
        finally:
            os._exit(_FAILED)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"call {number}: status {status}"
    return status != 0


def run_failing(scenario: Scenario, number: int, how: str) -> bool:
    """Make the change with one call that fails; tell whether there was such a call. Nothing stays open after it."""
    before = set(os.listdir("/proc/self/fd"))
    killer = Killer(number, how)
    try:
        with hooked(killer):
            scenario.change()
    except HotglmError:
        pass  # typed, whatever it is; a call that may fail without harm raises nothing
    assert set(os.listdir("/proc/self/fd")) == before, f"call {number}: something stays open"
    return killer.num_calls >= number


def sweep(name: str, how: str, step: int, directory: Path) -> int:
    """Try every call of a scenario, or every `step`th; return how many there are, about."""
    scenario = {**SCENARIOS, **TRUST_SCENARIOS}[name](directory)
    run = run_killed if how in ("kill", "torn") else run_failing
    for number in range(1, 100_000, step):
        scenario.round += 1
        scenario.prepare()
        goes_on = run(scenario, number, how)
        try:
            scenario.verify()
        except BaseException as error:
            error.add_note(f"after call {number} of {name}, {how}")
            raise
        if not goes_on:
            return number - 1
    raise AssertionError("Expected the change to end, got no end.")


if __name__ == "__main__":
    # Reading what is installed takes longer than all the rest.
    environment._read_version = functools.cache(environment._read_version)
    gc.freeze()
    print(sweep(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
