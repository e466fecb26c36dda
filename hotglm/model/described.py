"""What a word of the command line names: a class, module or contract in somebody's code, as `package.module:Name`.

Rules this module keeps:

- The user named it on his own command line, so it is imported and, if it is a class or function, called without
  arguments; nothing that a release says ever comes here (P6).
- A class is built without memory for its weights where that works (torch's meta device), else as it is.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hotglm.compatibility import Released
from hotglm.contract import Contract
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.registry import Migrations
from hotglm.model.inspection import describe_module
from hotglm.model.registry import find_definition, migrations_of
from hotglm.problem import describe_exception
from hotglm.version import Version

__all__ = ["Described", "read_described"]

_REMEDY = "name a module class, a module, a contract, or a function without arguments that returns one of these."


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What was named.

    Attributes:
        name: name of the model, where it is declared.
        version: its version, where it is declared.
        contract: what it promises.
        migrations: those of the model's name, where it is declared.
    """

    name: str | None = None
    version: Version | None = None
    contract: Contract
    migrations: Migrations | None = None


def read_described(text: str) -> Described:
    """Return what `text`, e.g. `"models.ranker:Ranker"`, names; modules are found from the current directory too.

    Raises:
        ArgumentError: it cannot be imported or built, or is nothing that has a contract.
        ModuleError: it holds tensors that no slot can hold.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:  # as under `python -m`
        sys.path.insert(0, os.getcwd())
    module_name, _, path = text.partition(":")
    found: Any = _attempt(lambda: importlib.import_module(module_name), text)
    for part in path.split("."):
        found = _attempt(lambda part=part, found=found: getattr(found, part), text)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return _describe(_attempt(lambda: _build(found), text))
    if callable(found) and not isinstance(found, nn.Module):
        found = _attempt(found, text)
    if isinstance(found, nn.Module):
        return _describe(found)
    if isinstance(found, Released):
        return Described(version=found.version, contract=found.contract)
    if isinstance(found, Contract):
        return Described(contract=found)
    raise ArgumentError(f"Expected something with a contract at {text!a}, got {shorten_repr(found)}.", remedy=_REMEDY)


def _attempt(action: Any, text: str) -> Any:
    try:
        return action()
    except Exception as error:
        raise ArgumentError(f"Expected to build {text!a}, got {describe_exception(error)}.", remedy=_REMEDY) from error


def _build(model: type[nn.Module]) -> nn.Module:
    definition = find_definition(model)
    make = model if definition is None else definition.build
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # noqa: BLE001 - a constructor that computes with its tensors; it may be able to in memory
        return make()


def _describe(module: nn.Module) -> Described:
    definition = find_definition(type(module))
    return Described(
        name=None if definition is None else definition.name,
        version=None if definition is None else definition.version,
        contract=_attempt(lambda: describe_module(module), type(module).__qualname__),
        migrations=None if definition is None else migrations_of(type(module)),
    )
