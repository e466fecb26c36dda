"""The command line: parses the words, runs the command they name, and turns its errors into exit codes.

Rules this module keeps:

- Nothing here imports torch; see `hotglm.commands.command` for the rules that every command keeps.
- Exit codes: 0 is yes, 1 is no, 2 is an error, which goes to standard error without a traceback, and 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from hotglm import __version__
from hotglm.commands.collect import COLLECT
from hotglm.commands.command import ERROR, INTERRUPTED, Command
from hotglm.commands.delta import DELTA
from hotglm.commands.diff import DIFF
from hotglm.commands.doctor import DOCTOR
from hotglm.commands.golden import GOLDEN
from hotglm.commands.inspect import INSPECT
from hotglm.commands.keygen import KEYGEN
from hotglm.commands.label import LABEL
from hotglm.commands.log import LOG
from hotglm.commands.materialize import MATERIALIZE
from hotglm.commands.migrate import MIGRATE
from hotglm.commands.pack import PACK
from hotglm.commands.services import SERVICES
from hotglm.commands.show import SHOW
from hotglm.commands.sign import SIGN
from hotglm.commands.stamp import STAMP
from hotglm.commands.trust import TRUST
from hotglm.commands.verify import VERIFY
from hotglm.errors import HotglmError
from hotglm.problem import describe_exception

__all__ = ["main"]

_DEMO_MODULE = "hotglm.demo.main"

COMMANDS: tuple[Command, ...] = (
    INSPECT,
    DIFF,
    MIGRATE,
    STAMP,
    DOCTOR,
    GOLDEN,
    PACK,
    DELTA,
    MATERIALIZE,
    SHOW,
    LOG,
    LABEL,
    SERVICES,
    COLLECT,
    KEYGEN,
    SIGN,
    VERIFY,
    TRUST,
)
"""Every command but `demo`, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; those of this process when None.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None or sys.stdout.closed:  # started with `>&-`
        _complain("standard output is closed.")
        return ERROR
    try:
        try:
            return _run(words)
        except HotglmError as error:
            _complain(f"{type(error).__name__}: {error}")
            return ERROR
        finally:
            sys.stdout.flush()  # here, so that what stands in its way is met inside of this `try`
    except BrokenPipeError:  # whoever read the answer has enough of it (`| head`)
        _discard(sys.stdout)
        return ERROR
    except KeyboardInterrupt:
        _complain("interrupted.")
        return INTERRUPTED
    except OSError as error:  # a full disk, most likely: of what was to be written, or of standard output
        _discard_if_stuck(sys.stdout)
        _complain(describe_exception(error))
        return ERROR


def _complain(text: str) -> None:
    """Say what went wrong, if there is anybody to say it to."""
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        print(f"hotglm: {text}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard_if_stuck(stream: TextIO) -> None:
    """Do so with a stream that still does not take what is left in it; any other is whoever called's."""
    try:
        stream.flush()
    except OSError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Lead a stream that failed to nowhere, so that what is left in it does not fail again at exit."""
    with contextlib.suppress(OSError):  # one that has no descriptor of its own needs nothing
        fd = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)


def _run(words: list[str]) -> int:
    if words[:1] == ["demo"]:  # it has options of its own, and its own --help
        # By name, because the demo imports torch, which everything else here does without.
        code: int = importlib.import_module(_DEMO_MODULE).main(words[1:])
        return code
    arguments = _parse(words)
    command: Command = arguments.command
    return command.run(arguments)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _make_parser()
    arguments, rest = parser.parse_known_args(words)
    # argparse takes a DST that may be left out for left out as soon as an option follows SRC.
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(arguments, "target", "") is None:
        arguments.target, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotglm", description="Look into model weights, compare them, and watch a live model being swapped."
    )
    parser.add_argument("--version", action="version", version=f"hotglm {__version__}")
    commands = parser.add_subparsers(dest="word", required=True, metavar="COMMAND")
    for command in COMMANDS:
        inner = commands.add_parser(command.name, help=command.summary, epilog=command.epilog)
        command.add_arguments(inner)
        inner.set_defaults(command=command)
    commands.add_parser(
        "demo", help="swap a live classifier under load (demo --help lists its options)", add_help=False
    )
    return parser
