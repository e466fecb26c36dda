# The public names, for type checkers; `hotglm/__init__.py` fetches them on first use.
# tests/test_architecture.py holds the two equal.

from hotglm.breakage import (
    Breakage as Breakage,
)
from hotglm.breakage import (
    required_bump as required_bump,
)
from hotglm.call_spec import (
    CallSpec as CallSpec,
)
from hotglm.comparison import (
    find_breakages as find_breakages,
)
from hotglm.compatibility import (
    CompatibilityMode as CompatibilityMode,
)
from hotglm.compatibility import (
    Incompatibility as Incompatibility,
)
from hotglm.compatibility import (
    Released as Released,
)
from hotglm.compatibility import (
    find_incompatibilities as find_incompatibilities,
)
from hotglm.config_spec import (
    ConfigSpec as ConfigSpec,
)
from hotglm.contract import (
    Contract as Contract,
)
from hotglm.contract import (
    StateSpec as StateSpec,
)
from hotglm.deltas.making import (
    make_delta as make_delta,
)
from hotglm.deltas.materializing import (
    materialize as materialize,
)
from hotglm.deltas.publishing import (
    DeltaPolicy as DeltaPolicy,
)
from hotglm.deltas.publishing import (
    publish_delta as publish_delta,
)
from hotglm.errors import (
    AmbiguousPathError as AmbiguousPathError,
)
from hotglm.errors import (
    ArgumentError as ArgumentError,
)
from hotglm.errors import (
    CallableCheckError as CallableCheckError,
)
from hotglm.errors import (
    CheckError as CheckError,
)
from hotglm.errors import (
    ConflictError as ConflictError,
)
from hotglm.errors import (
    DefinitionError as DefinitionError,
)
from hotglm.errors import (
    DeltaChainError as DeltaChainError,
)
from hotglm.errors import (
    DeltaError as DeltaError,
)
from hotglm.errors import (
    DigestMismatchError as DigestMismatchError,
)
from hotglm.errors import (
    DiscardedError as DiscardedError,
)
from hotglm.errors import (
    DrainTimeoutError as DrainTimeoutError,
)
from hotglm.errors import (
    ExpiredError as ExpiredError,
)
from hotglm.errors import (
    GoldenMismatchError as GoldenMismatchError,
)
from hotglm.errors import (
    HeaderError as HeaderError,
)
from hotglm.errors import (
    HotglmError as HotglmError,
)
from hotglm.errors import (
    IncompatibleError as IncompatibleError,
)
from hotglm.errors import (
    LiveMismatchError as LiveMismatchError,
)
from hotglm.errors import (
    MemoryPlanError as MemoryPlanError,
)
from hotglm.errors import (
    MigrationError as MigrationError,
)
from hotglm.errors import (
    MigrationGraphError as MigrationGraphError,
)
from hotglm.errors import (
    MigrationStepError as MigrationStepError,
)
from hotglm.errors import (
    MissingExtraError as MissingExtraError,
)
from hotglm.errors import (
    ModuleError as ModuleError,
)
from hotglm.errors import (
    NonFiniteError as NonFiniteError,
)
from hotglm.errors import (
    NoPathError as NoPathError,
)
from hotglm.errors import (
    NoRollbackError as NoRollbackError,
)
from hotglm.errors import (
    NotMaterializedError as NotMaterializedError,
)
from hotglm.errors import (
    Problem as Problem,
)
from hotglm.errors import (
    ReentrantError as ReentrantError,
)
from hotglm.errors import (
    RefreshError as RefreshError,
)
from hotglm.errors import (
    ReleaseError as ReleaseError,
)
from hotglm.errors import (
    ReplayedError as ReplayedError,
)
from hotglm.errors import (
    ShardIndexError as ShardIndexError,
)
from hotglm.errors import (
    SignatureError as SignatureError,
)
from hotglm.errors import (
    SlotClosedError as SlotClosedError,
)
from hotglm.errors import (
    SlotStateError as SlotStateError,
)
from hotglm.errors import (
    SourceChangedError as SourceChangedError,
)
from hotglm.errors import (
    SourceError as SourceError,
)
from hotglm.errors import (
    SourceReadError as SourceReadError,
)
from hotglm.errors import (
    StageFailedError as StageFailedError,
)
from hotglm.errors import (
    StageTimeoutError as StageTimeoutError,
)
from hotglm.errors import (
    StaleStateError as StaleStateError,
)
from hotglm.errors import (
    StoreBusyError as StoreBusyError,
)
from hotglm.errors import (
    StoreConflictError as StoreConflictError,
)
from hotglm.errors import (
    StoreError as StoreError,
)
from hotglm.errors import (
    StoreWriteError as StoreWriteError,
)
from hotglm.errors import (
    SupersededError as SupersededError,
)
from hotglm.errors import (
    TensorValueError as TensorValueError,
)
from hotglm.errors import (
    ThreadStartError as ThreadStartError,
)
from hotglm.errors import (
    TrustError as TrustError,
)
from hotglm.errors import (
    TrustStateError as TrustStateError,
)
from hotglm.errors import (
    UncopyableError as UncopyableError,
)
from hotglm.errors import (
    UnknownVersionError as UnknownVersionError,
)
from hotglm.errors import (
    UnswappableError as UnswappableError,
)
from hotglm.errors import (
    VersionSyntaxError as VersionSyntaxError,
)
from hotglm.errors import (
    WarmUpError as WarmUpError,
)
from hotglm.errors import (
    WrongBaseError as WrongBaseError,
)
from hotglm.events import (
    Event as Event,
)
from hotglm.manifest_fields import (
    Manifest as Manifest,
)
from hotglm.migration.config import (
    AddField as AddField,
)
from hotglm.migration.config import (
    DropField as DropField,
)
from hotglm.migration.config import (
    MapField as MapField,
)
from hotglm.migration.config import (
    RenameField as RenameField,
)
from hotglm.migration.initialisers import (
    Constant as Constant,
)
from hotglm.migration.initialisers import (
    Copy as Copy,
)
from hotglm.migration.initialisers import (
    Normal as Normal,
)
from hotglm.migration.initialisers import (
    Ones as Ones,
)
from hotglm.migration.initialisers import (
    Zeros as Zeros,
)
from hotglm.migration.operations import (
    Add as Add,
)
from hotglm.migration.operations import (
    Apply as Apply,
)
from hotglm.migration.operations import (
    Drop as Drop,
)
from hotglm.migration.operations import (
    Rename as Rename,
)
from hotglm.migration.operations import (
    Tie as Tie,
)
from hotglm.migration.operations import (
    Untie as Untie,
)
from hotglm.migration.part_operations import (
    Concatenate as Concatenate,
)
from hotglm.migration.part_operations import (
    Split as Split,
)
from hotglm.migration.part_operations import (
    Stack as Stack,
)
from hotglm.migration.part_operations import (
    Unstack as Unstack,
)
from hotglm.migration.plan import (
    MigrationPath as MigrationPath,
)
from hotglm.migration.plan import (
    StatePlan as StatePlan,
)
from hotglm.migration.registry import (
    Migrations as Migrations,
)
from hotglm.migration.tensor_spec import (
    TensorSpec as TensorSpec,
)
from hotglm.migration.value_operations import (
    Cast as Cast,
)
from hotglm.migration.value_operations import (
    Pad as Pad,
)
from hotglm.migration.value_operations import (
    Permute as Permute,
)
from hotglm.migration.value_operations import (
    Reshape as Reshape,
)
from hotglm.migration.value_operations import (
    Scale as Scale,
)
from hotglm.migration.value_operations import (
    Slice as Slice,
)
from hotglm.migration.value_operations import (
    Transpose as Transpose,
)
from hotglm.model.derived import (
    refresh as refresh,
)
from hotglm.model.inspection import (
    contract_of as contract_of,
)
from hotglm.model.migrated_file import (
    migrate_weights as migrate_weights,
)
from hotglm.model.registry import (
    migrations_of as migrations_of,
)
from hotglm.model.registry import (
    versioned as versioned,
)
from hotglm.model.save import (
    save_weights as save_weights,
)
from hotglm.output_spec import (
    OutputSpec as OutputSpec,
)
from hotglm.progress import (
    Progress as Progress,
)
from hotglm.release.directory import (
    Release as Release,
)
from hotglm.release.directory import (
    open_release as open_release,
)
from hotglm.release.packing import (
    ReleaseDetails as ReleaseDetails,
)
from hotglm.release.packing import (
    pack as pack,
)
from hotglm.release.store import (
    Store as Store,
)
from hotglm.release.store_opening import (
    open_store as open_store,
)
from hotglm.roots import (
    PublicKey as PublicKey,
)
from hotglm.roots import (
    Role as Role,
)
from hotglm.roots import (
    Roots as Roots,
)
from hotglm.slot.checks import (
    Golden as Golden,
)
from hotglm.slot.checks import (
    StagePolicy as StagePolicy,
)
from hotglm.slot.generation import (
    Generation as Generation,
)
from hotglm.slot.generation import (
    State as State,
)
from hotglm.slot.holders import (
    Holder as Holder,
)
from hotglm.slot.live_proof import (
    LiveProof as LiveProof,
)
from hotglm.slot.memory import (
    MemoryPolicy as MemoryPolicy,
)
from hotglm.slot.policies import (
    Flip as Flip,
)
from hotglm.slot.policies import (
    InPlace as InPlace,
)
from hotglm.slot.policies import (
    InPlaceRecord as InPlaceRecord,
)
from hotglm.slot.publication import (
    HistoryEntry as HistoryEntry,
)
from hotglm.slot.receipt import (
    Receipt as Receipt,
)
from hotglm.slot.requantize import (
    QuantizedFrom as QuantizedFrom,
)
from hotglm.slot.requantize import (
    Requantize as Requantize,
)
from hotglm.slot.sessions import (
    AsyncSession as AsyncSession,
)
from hotglm.slot.sessions import (
    Session as Session,
)
from hotglm.slot.slot import (
    ModuleSlot as ModuleSlot,
)
from hotglm.slot.staged import (
    Staged as Staged,
)
from hotglm.slot.status import (
    Status as Status,
)
from hotglm.trust.keys import (
    SigningKey as SigningKey,
)
from hotglm.trust.keys import (
    read_public_key as read_public_key,
)
from hotglm.trust.keys import (
    write_public_key as write_public_key,
)
from hotglm.trust.opening import (
    create_trust as create_trust,
)
from hotglm.trust.opening import (
    open_trust as open_trust,
)
from hotglm.trust.policy import (
    Accepted as Accepted,
)
from hotglm.trust.policy import (
    Trust as Trust,
)
from hotglm.trust.signing import (
    sign_release as sign_release,
)
from hotglm.trust.signing import (
    sign_roots as sign_roots,
)
from hotglm.trust.signing import (
    write_roots as write_roots,
)
from hotglm.verdict import (
    Verdict as Verdict,
)
from hotglm.version import (
    Bump as Bump,
)
from hotglm.version import (
    Version as Version,
)
from hotglm.version import (
    VersionRange as VersionRange,
)
from hotglm.watching.policy import (
    WatchPolicy as WatchPolicy,
)
from hotglm.watching.preconditions import (
    FreeMemory as FreeMemory,
)
from hotglm.watching.preconditions import (
    LoadBelow as LoadBelow,
)
from hotglm.watching.preconditions import (
    TimeWindow as TimeWindow,
)
from hotglm.watching.status import (
    WatchStatus as WatchStatus,
)
from hotglm.watching.watcher import (
    Watcher as Watcher,
)
from hotglm.watching.watcher import (
    watch as watch,
)
from hotglm.weights.cuda import (
    note_stream as note_stream,
)
from hotglm.weights.yielding import (
    Yielding as Yielding,
)

__version__: str
__all__: list[str]  # noqa: PYI035 - a third copy of the names; those above are what is exported
_EXPORTS: dict[str, str]
