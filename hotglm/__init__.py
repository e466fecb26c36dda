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
    from hotglm.compatibility import CompatibilityMode, Incompatibility, Released, find_incompatibilities
    from hotglm.config_spec import ConfigSpec
    from hotglm.contract import Contract, StateSpec
    from hotglm.errors import (
        AmbiguousPathError,
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
        MigrationError,
        MigrationGraphError,
        MigrationStepError,
        MissingExtraError,
        ModuleError,
        NonFiniteError,
        NoPathError,
        NoRollbackError,
        NotMaterializedError,
        Problem,
        ReentrantError,
        RefreshError,
        ReleaseError,
        ShardIndexError,
        SlotClosedError,
        SlotStateError,
        SourceChangedError,
        SourceError,
        SourceReadError,
        StageFailedError,
        StageTimeoutError,
        StaleStateError,
        StoreBusyError,
        StoreConflictError,
        StoreError,
        StoreWriteError,
        SupersededError,
        TensorValueError,
        ThreadStartError,
        UncopyableError,
        UnknownVersionError,
        VersionSyntaxError,
        WarmUpError,
    )
    from hotglm.events import Event
    from hotglm.manifest_fields import Manifest
    from hotglm.migration.config import AddField, DropField, MapField, RenameField
    from hotglm.migration.initialisers import Constant, Copy, Normal, Ones, Zeros
    from hotglm.migration.operations import Add, Apply, Drop, Rename, Tie, Untie
    from hotglm.migration.part_operations import Concatenate, Split, Stack, Unstack
    from hotglm.migration.plan import MigrationPath, StatePlan
    from hotglm.migration.registry import Migrations
    from hotglm.migration.tensor_spec import TensorSpec
    from hotglm.migration.value_operations import Cast, Pad, Permute, Reshape, Scale, Slice, Transpose
    from hotglm.model.derived import refresh
    from hotglm.model.inspection import contract_of
    from hotglm.model.migrated_file import migrate_weights
    from hotglm.model.registry import migrations_of, versioned
    from hotglm.model.save import save_weights
    from hotglm.output_spec import OutputSpec
    from hotglm.progress import Progress
    from hotglm.release.directory import Release, open_release
    from hotglm.release.packing import ReleaseDetails, pack
    from hotglm.release.store import Store
    from hotglm.release.store_opening import open_store
    from hotglm.slot.admission import HistoryEntry
    from hotglm.slot.checks import Golden, StagePolicy
    from hotglm.slot.generation import Generation, State
    from hotglm.slot.holders import Holder, Session
    from hotglm.slot.memory import MemoryPolicy
    from hotglm.slot.receipt import Receipt
    from hotglm.slot.slot import ModuleSlot
    from hotglm.slot.staged import Staged
    from hotglm.slot.status import Status
    from hotglm.verdict import Verdict
    from hotglm.version import Bump, Version, VersionRange

__version__ = "0.1.0.dev0"

__all__ = [
    "Add",
    "AddField",
    "AmbiguousPathError",
    "Apply",
    "ArgumentError",
    "Breakage",
    "Bump",
    "CallSpec",
    "CallableCheckError",
    "Cast",
    "CheckError",
    "CompatibilityMode",
    "Concatenate",
    "ConfigSpec",
    "ConflictError",
    "Constant",
    "Contract",
    "Copy",
    "DefinitionError",
    "DigestMismatchError",
    "DiscardedError",
    "DrainTimeoutError",
    "Drop",
    "DropField",
    "Event",
    "Generation",
    "Golden",
    "GoldenMismatchError",
    "HeaderError",
    "HistoryEntry",
    "Holder",
    "HotglmError",
    "Incompatibility",
    "IncompatibleError",
    "Manifest",
    "MapField",
    "MemoryPlanError",
    "MemoryPolicy",
    "MigrationError",
    "MigrationGraphError",
    "MigrationPath",
    "MigrationStepError",
    "Migrations",
    "MissingExtraError",
    "ModuleError",
    "ModuleSlot",
    "NoPathError",
    "NoRollbackError",
    "NonFiniteError",
    "Normal",
    "NotMaterializedError",
    "Ones",
    "OutputSpec",
    "Pad",
    "Permute",
    "Problem",
    "Progress",
    "Receipt",
    "ReentrantError",
    "RefreshError",
    "Release",
    "ReleaseDetails",
    "ReleaseError",
    "Released",
    "Rename",
    "RenameField",
    "Reshape",
    "Scale",
    "Session",
    "ShardIndexError",
    "Slice",
    "SlotClosedError",
    "SlotStateError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "Split",
    "Stack",
    "StageFailedError",
    "StagePolicy",
    "StageTimeoutError",
    "Staged",
    "StaleStateError",
    "State",
    "StatePlan",
    "StateSpec",
    "Status",
    "Store",
    "StoreBusyError",
    "StoreConflictError",
    "StoreError",
    "StoreWriteError",
    "SupersededError",
    "TensorSpec",
    "TensorValueError",
    "ThreadStartError",
    "Tie",
    "Transpose",
    "UncopyableError",
    "UnknownVersionError",
    "Unstack",
    "Untie",
    "Verdict",
    "Version",
    "VersionRange",
    "VersionSyntaxError",
    "WarmUpError",
    "Zeros",
    "contract_of",
    "find_breakages",
    "find_incompatibilities",
    "migrate_weights",
    "migrations_of",
    "open_release",
    "open_store",
    "pack",
    "refresh",
    "required_bump",
    "save_weights",
    "versioned",
]

_EXPORTS: dict[str, str] = {
    "Add": "hotglm.migration.operations",
    "AddField": "hotglm.migration.config",
    "AmbiguousPathError": "hotglm.errors",
    "Apply": "hotglm.migration.operations",
    "ArgumentError": "hotglm.errors",
    "Breakage": "hotglm.breakage",
    "Bump": "hotglm.version",
    "CallSpec": "hotglm.call_spec",
    "CallableCheckError": "hotglm.errors",
    "Cast": "hotglm.migration.value_operations",
    "CheckError": "hotglm.errors",
    "CompatibilityMode": "hotglm.compatibility",
    "Concatenate": "hotglm.migration.part_operations",
    "ConfigSpec": "hotglm.config_spec",
    "ConflictError": "hotglm.errors",
    "Constant": "hotglm.migration.initialisers",
    "Contract": "hotglm.contract",
    "Copy": "hotglm.migration.initialisers",
    "DefinitionError": "hotglm.errors",
    "DigestMismatchError": "hotglm.errors",
    "DiscardedError": "hotglm.errors",
    "DrainTimeoutError": "hotglm.errors",
    "Drop": "hotglm.migration.operations",
    "DropField": "hotglm.migration.config",
    "Event": "hotglm.events",
    "Generation": "hotglm.slot.generation",
    "Golden": "hotglm.slot.checks",
    "GoldenMismatchError": "hotglm.errors",
    "HeaderError": "hotglm.errors",
    "HistoryEntry": "hotglm.slot.admission",
    "Holder": "hotglm.slot.holders",
    "HotglmError": "hotglm.errors",
    "Incompatibility": "hotglm.compatibility",
    "IncompatibleError": "hotglm.errors",
    "Manifest": "hotglm.manifest_fields",
    "MapField": "hotglm.migration.config",
    "MemoryPlanError": "hotglm.errors",
    "MemoryPolicy": "hotglm.slot.memory",
    "MigrationError": "hotglm.errors",
    "MigrationGraphError": "hotglm.errors",
    "MigrationPath": "hotglm.migration.plan",
    "MigrationStepError": "hotglm.errors",
    "Migrations": "hotglm.migration.registry",
    "MissingExtraError": "hotglm.errors",
    "ModuleError": "hotglm.errors",
    "ModuleSlot": "hotglm.slot.slot",
    "NoPathError": "hotglm.errors",
    "NoRollbackError": "hotglm.errors",
    "NonFiniteError": "hotglm.errors",
    "Normal": "hotglm.migration.initialisers",
    "NotMaterializedError": "hotglm.errors",
    "Ones": "hotglm.migration.initialisers",
    "OutputSpec": "hotglm.output_spec",
    "Pad": "hotglm.migration.value_operations",
    "Permute": "hotglm.migration.value_operations",
    "Problem": "hotglm.errors",
    "Progress": "hotglm.progress",
    "Receipt": "hotglm.slot.receipt",
    "ReentrantError": "hotglm.errors",
    "RefreshError": "hotglm.errors",
    "Release": "hotglm.release.directory",
    "ReleaseDetails": "hotglm.release.packing",
    "ReleaseError": "hotglm.errors",
    "Released": "hotglm.compatibility",
    "Rename": "hotglm.migration.operations",
    "RenameField": "hotglm.migration.config",
    "Reshape": "hotglm.migration.value_operations",
    "Scale": "hotglm.migration.value_operations",
    "Session": "hotglm.slot.holders",
    "ShardIndexError": "hotglm.errors",
    "Slice": "hotglm.migration.value_operations",
    "SlotClosedError": "hotglm.errors",
    "SlotStateError": "hotglm.errors",
    "SourceChangedError": "hotglm.errors",
    "SourceError": "hotglm.errors",
    "SourceReadError": "hotglm.errors",
    "Split": "hotglm.migration.part_operations",
    "Stack": "hotglm.migration.part_operations",
    "StageFailedError": "hotglm.errors",
    "StagePolicy": "hotglm.slot.checks",
    "StageTimeoutError": "hotglm.errors",
    "Staged": "hotglm.slot.staged",
    "StaleStateError": "hotglm.errors",
    "State": "hotglm.slot.generation",
    "StatePlan": "hotglm.migration.plan",
    "StateSpec": "hotglm.contract",
    "Status": "hotglm.slot.status",
    "Store": "hotglm.release.store",
    "StoreBusyError": "hotglm.errors",
    "StoreConflictError": "hotglm.errors",
    "StoreError": "hotglm.errors",
    "StoreWriteError": "hotglm.errors",
    "SupersededError": "hotglm.errors",
    "TensorSpec": "hotglm.migration.tensor_spec",
    "TensorValueError": "hotglm.errors",
    "ThreadStartError": "hotglm.errors",
    "Tie": "hotglm.migration.operations",
    "Transpose": "hotglm.migration.value_operations",
    "UncopyableError": "hotglm.errors",
    "UnknownVersionError": "hotglm.errors",
    "Unstack": "hotglm.migration.part_operations",
    "Untie": "hotglm.migration.operations",
    "Verdict": "hotglm.verdict",
    "Version": "hotglm.version",
    "VersionRange": "hotglm.version",
    "VersionSyntaxError": "hotglm.errors",
    "WarmUpError": "hotglm.errors",
    "Zeros": "hotglm.migration.initialisers",
    "contract_of": "hotglm.model.inspection",
    "find_breakages": "hotglm.comparison",
    "find_incompatibilities": "hotglm.compatibility",
    "migrate_weights": "hotglm.model.migrated_file",
    "migrations_of": "hotglm.model.registry",
    "open_release": "hotglm.release.directory",
    "open_store": "hotglm.release.store_opening",
    "pack": "hotglm.release.packing",
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
