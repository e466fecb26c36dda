"""Commands run in this process, and the document that one of them printed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hotglm import cli

__all__ = ["read_json", "run"]


def run(*words: object) -> int:
    """Run a command and return its exit code."""
    return cli.main([str(word) for word in words])


def read_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the one document that was printed."""
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document
