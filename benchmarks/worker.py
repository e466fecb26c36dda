"""Child processes that measure: a fresh interpreter, and so a fresh allocator, for each side that needs one.

Rules this module keeps:

- One line of JSON asks for one method of one object, one line answers. Requests are made one at a time, so that
  children that are measured against each other take turns and never run side by side.
- Nothing but answers is written to the pipe: what the child prints goes to standard error.
- A child that fails ends, and its parent raises with the child's words.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any, Self

__all__ = ["Stand", "Worker", "WorkerError"]

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class WorkerError(Exception):
    """A child failed; its traceback is on standard error."""


class Worker:
    """A child process that holds one object of a class; `ask` calls its methods. A context manager that ends it."""

    def __init__(self, kind: str, /, **arguments: Any) -> None:
        """Start the child.

        Args:
            kind: `"benchmarks.module:Class"`.
            arguments: of the class; what JSON can hold.
        """
        self._kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", kind, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_HERE,
            text=True,
        )

    def ask(self, method: str, /, **arguments: Any) -> Any:
        """Call a method of the child's object and return its answer.

        Raises:
            WorkerError: the child ended instead.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps([method, arguments]) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self._kind}.{method} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._process.communicate()


class Stand:
    """The same object in this very process: what the smoke test uses, which has no time for so many interpreters."""

    def __init__(self, kind: str, /, **arguments: Any) -> None:
        """Make the object."""
        self._target = _make(kind, arguments)

    def ask(self, method: str, /, **arguments: Any) -> Any:
        """Call a method of the object and return its answer, as JSON would bring it."""
        return json.loads(json.dumps(getattr(self._target, method)(**arguments)))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the object."""
        self._target = None


def _make(kind: str, arguments: dict[str, Any]) -> Any:
    module, _, name = kind.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def _serve(kind: str, arguments: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target = _make(kind, json.loads(arguments))
    for line in sys.stdin:
        method, options = json.loads(line)
        answers.write(json.dumps(getattr(target, method)(**options)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
