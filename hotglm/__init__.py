"""Swap a live PyTorch model between two forward passes.

Rules this module keeps:

- It imports neither torch nor any module of hotglm: each public name is fetched from its module on first use (PEP 562),
  so that `--help`, release tools and the pytest plugin start at once.
- A public name is written three times, in `_EXPORTS`, in `__all__` and, for type checkers, under `TYPE_CHECKING`;
  `tests/test_architecture.py` holds the three equal.
- Nothing inside hotglm imports through this face.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotglm.breakage import Breakage, required_bump
    from hotglm.call_spec import CallSpec
    from hotglm.comparison import find_breakages
    from hotglm.config_spec import ConfigSpec
    from hotglm.contract import Contract, StateSpec
    from hotglm.errors import (
        ArgumentError,
        CallableCheckError,
        CheckError,
        ConflictError,
        DefinitionError,
        DigestMismatchError,
        DiscardedError,
        DrainTimeoutError,
        GoldenMismatchError,
        HeaderError,
        HotglmError,
        IncompatibleError,
        MemoryPlanError,
        MissingExtraError,
        ModuleError,
        NonFiniteError,
        NoRollbackError,
        NotMaterializedError,
        Problem,
        ReentrantError,
        RefreshError,
        ShardIndexError,
        SlotClosedError,
        SlotStateError,
        SourceChangedError,
        SourceError,
        SourceReadError,
        StageFailedError,
        StageTimeoutError,
        StaleStateError,
        SupersededError,
        TensorValueError,
        ThreadStartError,
        UncopyableError,
        VersionSyntaxError,
        WarmUpError,
    )
    from hotglm.events import Event
    from hotglm.model.derived import refresh
    from hotglm.model.inspection import contract_of
    from hotglm.model.registry import versioned
    from hotglm.model.save import save_weights
    from hotglm.slot.admission import HistoryEntry
    from hotglm.slot.checks import Golden, StagePolicy
    from hotglm.slot.generation import Generation, State
    from hotglm.slot.holders import Holder, Session
    from hotglm.slot.memory import MemoryPolicy
    from hotglm.slot.receipt import Progress, Receipt
    from hotglm.slot.slot import ModuleSlot
    from hotglm.slot.staged import Staged
    from hotglm.slot.status import Status
    from hotglm.verdict import Verdict
    from hotglm.version import Bump, Version, VersionRange

__version__ = "0.1.0.dev0"

__all__ = [
    "ArgumentError",
    "Breakage",
    "Bump",
    "CallSpec",
    "CallableCheckError",
    "CheckError",
    "ConfigSpec",
    "ConflictError",
    "Contract",
    "DefinitionError",
    "DigestMismatchError",
    "DiscardedError",
    "DrainTimeoutError",
    "Event",
    "Generation",
    "Golden",
    "GoldenMismatchError",
    "HeaderError",
    "HistoryEntry",
    "Holder",
    "HotglmError",
    "IncompatibleError",
    "MemoryPlanError",
    "MemoryPolicy",
    "MissingExtraError",
    "ModuleError",
    "ModuleSlot",
    "NoRollbackError",
    "NonFiniteError",
    "NotMaterializedError",
    "Problem",
    "Progress",
    "Receipt",
    "ReentrantError",
    "RefreshError",
    "Session",
    "ShardIndexError",
    "SlotClosedError",
    "SlotStateError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "StageFailedError",
    "StagePolicy",
    "StageTimeoutError",
    "Staged",
    "StaleStateError",
    "State",
    "StateSpec",
    "Status",
    "SupersededError",
    "TensorValueError",
    "ThreadStartError",
    "UncopyableError",
    "Verdict",
    "Version",
    "VersionRange",
    "VersionSyntaxError",
    "WarmUpError",
    "contract_of",
    "find_breakages",
    "refresh",
    "required_bump",
    "save_weights",
    "versioned",
]

_EXPORTS: dict[str, str] = {
    "ArgumentError": "hotglm.errors",
    "Breakage": "hotglm.breakage",
    "Bump": "hotglm.version",
    "CallSpec": "hotglm.call_spec",
    "CallableCheckError": "hotglm.errors",
    "CheckError": "hotglm.errors",
    "ConfigSpec": "hotglm.config_spec",
    "ConflictError": "hotglm.errors",
    "Contract": "hotglm.contract",
    "DefinitionError": "hotglm.errors",
    "DigestMismatchError": "hotglm.errors",
    "DiscardedError": "hotglm.errors",
    "DrainTimeoutError": "hotglm.errors",
    "Event": "hotglm.events",
    "Generation": "hotglm.slot.generation",
    "Golden": "hotglm.slot.checks",
    "GoldenMismatchError": "hotglm.errors",
    "HeaderError": "hotglm.errors",
    "HistoryEntry": "hotglm.slot.admission",
    "Holder": "hotglm.slot.holders",
    "HotglmError": "hotglm.errors",
    "IncompatibleError": "hotglm.errors",
    "MemoryPlanError": "hotglm.errors",
    "MemoryPolicy": "hotglm.slot.memory",
    "MissingExtraError": "hotglm.errors",
    "ModuleError": "hotglm.errors",
    "ModuleSlot": "hotglm.slot.slot",
    "NoRollbackError": "hotglm.errors",
    "NonFiniteError": "hotglm.errors",
    "NotMaterializedError": "hotglm.errors",
    "Problem": "hotglm.errors",
    "Progress": "hotglm.slot.receipt",
    "Receipt": "hotglm.slot.receipt",
    "ReentrantError": "hotglm.errors",
    "RefreshError": "hotglm.errors",
    "Session": "hotglm.slot.holders",
    "ShardIndexError": "hotglm.errors",
    "SlotClosedError": "hotglm.errors",
    "SlotStateError": "hotglm.errors",
    "SourceChangedError": "hotglm.errors",
    "SourceError": "hotglm.errors",
    "SourceReadError": "hotglm.errors",
    "StageFailedError": "hotglm.errors",
    "StagePolicy": "hotglm.slot.checks",
    "StageTimeoutError": "hotglm.errors",
    "Staged": "hotglm.slot.staged",
    "StaleStateError": "hotglm.errors",
    "State": "hotglm.slot.generation",
    "StateSpec": "hotglm.contract",
    "Status": "hotglm.slot.status",
    "SupersededError": "hotglm.errors",
    "TensorValueError": "hotglm.errors",
    "ThreadStartError": "hotglm.errors",
    "UncopyableError": "hotglm.errors",
    "Verdict": "hotglm.verdict",
    "Version": "hotglm.version",
    "VersionRange": "hotglm.version",
    "VersionSyntaxError": "hotglm.errors",
    "WarmUpError": "hotglm.errors",
    "contract_of": "hotglm.model.inspection",
    "find_breakages": "hotglm.comparison",
    "refresh": "hotglm.model.derived",
    "required_bump": "hotglm.breakage",
    "save_weights": "hotglm.model.save",
    "versioned": "hotglm.model.registry",
}
"""The module that each public name is fetched from."""

if not TYPE_CHECKING:  # a type checker that saw this would take every misspelt name for a public one

    def __getattr__(name: str) -> object:
        """Fetch a public name from its module, and keep it."""
        module = _EXPORTS.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, fetched or not."""
    return sorted({*globals(), *__all__})
