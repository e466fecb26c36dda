"""Swap a live PyTorch model between two forward passes.

Rules this module keeps:

- It imports neither torch nor any module of hotglm: each public name is fetched from its module on first use (PEP 562),
  so that `--help`, release tools and the pytest plugin start at once.
- A public name is written twice: here, with the module that it is fetched from, and in `__init__.pyi`, for type
  checkers; `tests/test_architecture.py` holds the two equal.
- Nothing inside hotglm imports through this face.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0.dev0"

_EXPORTS: dict[str, str] = {
    "Accepted": "hotglm.trust.policy",
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
    "DeltaChainError": "hotglm.errors",
    "DeltaError": "hotglm.errors",
    "DigestMismatchError": "hotglm.errors",
    "DiscardedError": "hotglm.errors",
    "DrainTimeoutError": "hotglm.errors",
    "Drop": "hotglm.migration.operations",
    "DropField": "hotglm.migration.config",
    "Event": "hotglm.events",
    "ExpiredError": "hotglm.errors",
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
    "PublicKey": "hotglm.roots",
    "Receipt": "hotglm.slot.receipt",
    "ReentrantError": "hotglm.errors",
    "RefreshError": "hotglm.errors",
    "Release": "hotglm.release.directory",
    "ReleaseDetails": "hotglm.release.packing",
    "ReleaseError": "hotglm.errors",
    "Released": "hotglm.compatibility",
    "Rename": "hotglm.migration.operations",
    "RenameField": "hotglm.migration.config",
    "ReplayedError": "hotglm.errors",
    "Reshape": "hotglm.migration.value_operations",
    "Role": "hotglm.roots",
    "Roots": "hotglm.roots",
    "Scale": "hotglm.migration.value_operations",
    "Session": "hotglm.slot.holders",
    "ShardIndexError": "hotglm.errors",
    "SignatureError": "hotglm.errors",
    "SigningKey": "hotglm.trust.keys",
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
    "Trust": "hotglm.trust.policy",
    "TrustError": "hotglm.errors",
    "TrustStateError": "hotglm.errors",
    "UncopyableError": "hotglm.errors",
    "UnknownVersionError": "hotglm.errors",
    "Unstack": "hotglm.migration.part_operations",
    "UnswappableError": "hotglm.errors",
    "Untie": "hotglm.migration.operations",
    "Verdict": "hotglm.verdict",
    "Version": "hotglm.version",
    "VersionRange": "hotglm.version",
    "VersionSyntaxError": "hotglm.errors",
    "WarmUpError": "hotglm.errors",
    "WrongBaseError": "hotglm.errors",
    "Zeros": "hotglm.migration.initialisers",
    "contract_of": "hotglm.model.inspection",
    "create_trust": "hotglm.trust.opening",
    "find_breakages": "hotglm.comparison",
    "find_incompatibilities": "hotglm.compatibility",
    "make_delta": "hotglm.deltas.making",
    "materialize": "hotglm.deltas.materializing",
    "migrate_weights": "hotglm.model.migrated_file",
    "migrations_of": "hotglm.model.registry",
    "open_release": "hotglm.release.directory",
    "open_store": "hotglm.release.store_opening",
    "open_trust": "hotglm.trust.opening",
    "pack": "hotglm.release.packing",
    "read_public_key": "hotglm.trust.keys",
    "refresh": "hotglm.model.derived",
    "required_bump": "hotglm.breakage",
    "save_weights": "hotglm.model.save",
    "sign_release": "hotglm.trust.signing",
    "sign_roots": "hotglm.trust.signing",
    "versioned": "hotglm.model.registry",
    "write_public_key": "hotglm.trust.keys",
    "write_roots": "hotglm.trust.signing",
}
"""The module that each public name is fetched from."""

__all__ = list(_EXPORTS)


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
