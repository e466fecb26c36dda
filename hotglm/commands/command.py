"""What a command of the command line is, and what it returns.

Rules that every module of this package keeps:

- It can be imported without torch; a command that needs torch imports it, or what needs it, by name when it runs.
- Exit codes: 0 is yes, 1 is no, 2 is an error, 130 is Ctrl-C. An error is raised as a `HotglmError` and printed
  by `hotglm.cli`.
- Text is for people and may change; it is plain ASCII, with names from files quoted and escaped. `--json` is for
  programs: one document on standard output, whose `schema` changes when its meaning does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ERROR", "INTERRUPTED", "NO", "OK", "Command"]

OK, NO, ERROR = 0, 1, 2
INTERRUPTED = 130
"""As shells have it: 128 and the number of SIGINT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        name: the word it is called by.
        summary: what the list of commands says about it.
        epilog: what its help ends with.
        add_arguments: tells a parser what the command takes.
        run: does it and returns the exit code.
    """

    name: str
    summary: str
    epilog: str = ""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
