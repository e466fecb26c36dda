"""Every error that hotglm raises, and the rules they keep.

- One root, `HotglmError`. The class says whose fault it is, the attributes carry the data.
- All problems of one document or one stage are in one error (`problems`), never only the first.
- The text reads: what failed, each problem, what still serves, and last the remedy.
- Names that come from a file are printed with `repr`, so that no byte in them reaches a terminal or a log line raw.

The tree (`tests/test_errors.py` holds it equal to the classes):

    HotglmError
    ├── ArgumentError               the caller passed something that cannot be meant
    │   └── VersionSyntaxError      a version, range or requirement that does not parse
    ├── SourceError                 the bytes that were offered
    │   ├── DigestMismatchError     the bytes are not the ones that were promised
    │   ├── HeaderError             a safetensors header that breaks the format or our caps
    │   ├── ReleaseError            a release whose manifest breaks the format, or that is not what its manifest says
    │   │   └── DeltaError          a delta that cannot be applied
    │   │       ├── DeltaChainError  the releases that it builds on are not there, in a circle, or too many
    │   │       └── WrongBaseError   it was made against something else than what is there
    │   ├── ShardIndexError         a shard index that does not fit its shards
    │   ├── SourceChangedError      the source changed while it was being read
    │   ├── SourceReadError         the operating system refused to open or read it
    │   └── TensorValueError        a mapping or file holds a tensor that cannot be loaded
    ├── IncompatibleError           the verdict says no; `.verdict` has every reason
    ├── ModuleError                 the module cannot be held by a slot
    │   ├── DefinitionError         a decorator or declaration that contradicts itself
    │   ├── NotMaterializedError    lazy or meta tensors are left in it
    │   ├── StaleStateError         state that would silently keep its old value after a swap
    │   ├── UncopyableError         a hook, attribute or tensor that cannot be carried over
    │   └── UnswappableError        compiled, frozen or captured code that holds copies of the weights
    ├── CheckError                  a staged generation failed its proof
    │   ├── CallableCheckError      a check given by the user said no, or raised
    │   ├── GoldenMismatchError     outputs differ from the golden ones
    │   ├── NonFiniteError          NaN or infinity in the weights
    │   ├── RefreshError            a refresh of derived state raised
    │   └── WarmUpError             a warm-up pass raised
    ├── MigrationError              no way from one version's config or state to another's
    │   ├── AmbiguousPathError      two shortest paths; both are named
    │   ├── MigrationGraphError     steps that contradict each other: a cycle, two heads, a second definition
    │   ├── MigrationStepError      one step failed, in the dry run or on real tensors; nothing was changed
    │   ├── NoPathError             no path; the nearest known versions are named
    │   └── UnknownVersionError     what was found fits no known layout, or several
    ├── MemoryPlanError             the memory that is needed is not there; nothing was allocated
    ├── SlotStateError              the slot cannot do that now
    │   ├── ConflictError           another commit came first (compare-and-set)
    │   ├── DiscardedError          that stage was discarded, has failed or is committed already
    │   ├── ReentrantError          asked from inside a stage of the same slot
    │   ├── NoRollbackError         no earlier generation is held
    │   ├── SlotClosedError         the slot was closed
    │   └── SupersededError         a newer stage took this one's place
    ├── TrustError                  the host's own trust policy refuses a release
    │   ├── ExpiredError            it, or the roots of trust, must not be taken for new any more
    │   ├── ReplayedError           it is older than one accepted before, reuses its number, or leaps too far ahead
    │   ├── SignatureError          no signatures, or none that the roots allow for this
    │   └── TrustStateError         what is remembered of accepted releases is missing or damaged
    ├── StoreError                  a store of releases cannot do that
    │   ├── StoreBusyError          another process held the store's lock for too long
    │   ├── StoreConflictError      another came first: a version that is taken, a label that was moved
    │   └── StoreWriteError         the operating system refused to write; the store is as it was
    ├── LiveMismatchError           live weights are not the ones that were committed
    ├── StageFailedError            something unforeseen, raised by the model's own code or by torch, ended a stage
    ├── StageTimeoutError           a stage took longer than its policy allows
    ├── DrainTimeoutError           passes or holders of an old generation outlived the wait
    ├── ThreadStartError            a worker thread could not be started
    └── MissingExtraError           an optional dependency is not installed; the text names the extra
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotglm.problem import HotglmError, Problem, shorten_repr
from hotglm.source_errors import (
    DeltaChainError,
    DeltaError,
    DigestMismatchError,
    ExpiredError,
    HeaderError,
    ReleaseError,
    ReplayedError,
    ShardIndexError,
    SignatureError,
    SourceChangedError,
    SourceError,
    SourceReadError,
    StoreBusyError,
    StoreConflictError,
    StoreError,
    StoreWriteError,
    TensorValueError,
    TrustError,
    TrustStateError,
    WrongBaseError,
)

if TYPE_CHECKING:
    from hotglm.verdict import Verdict

__all__ = [
    "AmbiguousPathError",
    "ArgumentError",
    "CallableCheckError",
    "CheckError",
    "ConflictError",
    "DefinitionError",
    "DeltaChainError",
    "DeltaError",
    "DigestMismatchError",
    "DiscardedError",
    "DrainTimeoutError",
    "ExpiredError",
    "GoldenMismatchError",
    "HeaderError",
    "HotglmError",
    "IncompatibleError",
    "LiveMismatchError",
    "MemoryPlanError",
    "MigrationError",
    "MigrationGraphError",
    "MigrationStepError",
    "MissingExtraError",
    "ModuleError",
    "NoPathError",
    "NoRollbackError",
    "NonFiniteError",
    "NotMaterializedError",
    "Problem",
    "ReentrantError",
    "RefreshError",
    "ReleaseError",
    "ReplayedError",
    "ShardIndexError",
    "SignatureError",
    "SlotClosedError",
    "SlotStateError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "StageFailedError",
    "StageTimeoutError",
    "StaleStateError",
    "StoreBusyError",
    "StoreConflictError",
    "StoreError",
    "StoreWriteError",
    "SupersededError",
    "TensorValueError",
    "ThreadStartError",
    "TrustError",
    "TrustStateError",
    "UncopyableError",
    "UnknownVersionError",
    "UnswappableError",
    "VersionSyntaxError",
    "WarmUpError",
    "WrongBaseError",
    "shorten_repr",
]


class ArgumentError(HotglmError, ValueError):
    """The caller passed something that cannot be meant."""

    code = "BAD_ARGUMENT"


class VersionSyntaxError(ArgumentError):
    """A version, range or requirement does not parse."""

    code = "BAD_VERSION"


class IncompatibleError(HotglmError):
    """The verdict says no; nothing was read into the spare.

    Attributes:
        verdict: the whole decision, with every reason.
    """

    code = "INCOMPATIBLE"
    verdict: Verdict | None = None


class ModuleError(HotglmError):
    """The module cannot be held by a slot."""

    code = "BAD_MODULE"


class DefinitionError(ModuleError):
    """A decorator or declaration contradicts itself or another one."""

    code = "BAD_DEFINITION"


class NotMaterializedError(ModuleError):
    """Lazy or meta tensors are left in the module."""

    code = "NOT_MATERIALIZED"


class StaleStateError(ModuleError):
    """Some state would silently keep its old value after a swap."""

    code = "STALE_STATE"


class UncopyableError(ModuleError):
    """A hook, attribute or tensor cannot be carried over to the next generation."""

    code = "UNCOPYABLE"


class UnswappableError(ModuleError):
    """Compiled, frozen or captured code holds copies of the weights, which no swap would reach."""

    code = "CANNOT_SWAP"


class CheckError(HotglmError):
    """A staged generation failed its proof and was discarded."""

    code = "CHECK_FAILED"


class CallableCheckError(CheckError):
    """A check given by the user said no, or raised."""

    code = "GATE_FAILED"


class GoldenMismatchError(CheckError):
    """Outputs differ from the golden ones by more than the tolerance."""

    code = "GOLDEN_MISMATCH"


class NonFiniteError(CheckError):
    """The weights hold NaN or infinity."""

    code = "NONFINITE"


class RefreshError(CheckError):
    """A refresh of derived state raised."""

    code = "REFRESH_FAILED"


class WarmUpError(CheckError):
    """A warm-up pass raised."""

    code = "WARM_UP_FAILED"


class MigrationError(HotglmError):
    """There is no way from one version's config or state to another's, or it failed; nothing was changed."""

    code = "MIGRATION"


class AmbiguousPathError(MigrationError):
    """Two different shortest paths lead from one version to the other; the problems name both."""

    code = "AMBIGUOUS_PATH"


class MigrationGraphError(MigrationError):
    """The steps contradict each other: a cycle, two heads, a gap, or a second definition of one step."""

    code = "MIGRATION_GRAPH"


class MigrationStepError(MigrationError):
    """One step failed, in the dry run on names and shapes or on real tensors.

    Attributes:
        step: the step, as `"1.4 -> 2.0"` (`"2.0 -> 1.4"` on the way down); None where an operation was used alone.
        operation: the operation or function that failed, as it was written.
    """

    code = "MIGRATION_STEP"
    step: str | None = None
    operation: str | None = None


class NoPathError(MigrationError):
    """No path of steps leads from one version to the other; the problems name the nearest known versions."""

    code = "NO_PATH"


class UnknownVersionError(MigrationError):
    """What was found fits the layout of no known version, or of several; none is guessed."""

    code = "UNKNOWN_VERSION"


class MemoryPlanError(HotglmError, MemoryError):
    """The memory that a stage needs is not there; nothing was allocated for it."""

    code = "MEMORY"


class SlotStateError(HotglmError):
    """The slot cannot do that now."""

    code = "SLOT_STATE"


class ConflictError(SlotStateError):
    """Another commit came first: the live generation is not the expected one."""

    code = "CONFLICT"


class DiscardedError(SlotStateError):
    """The stage was discarded, has failed, or is committed already."""

    code = "DISCARDED"


class ReentrantError(SlotStateError):
    """An update was asked for from inside a stage of the same slot, which it would wait for for ever."""

    code = "REENTRANT"


class NoRollbackError(SlotStateError):
    """No earlier generation is held, so there is nothing to go back to."""

    code = "NO_ROLLBACK"


class SlotClosedError(SlotStateError):
    """The slot was closed; passes still run, updates do not."""

    code = "CLOSED"


class SupersededError(SlotStateError):
    """A newer stage took the place of this one before it was committed."""

    code = "SUPERSEDED"


class DrainTimeoutError(HotglmError, TimeoutError):
    """Passes or holders of an old generation outlived the wait."""

    code = "DRAIN_TIMEOUT"


class LiveMismatchError(HotglmError):
    """Live weights are not the ones that were committed: memory has failed, or something has written them."""

    code = "LIVE_MISMATCH"


class StageFailedError(HotglmError):
    """Something unforeseen ended a stage: an error raised by the model's own code, or by torch; it is the cause."""

    code = "STAGE_FAILED"


class StageTimeoutError(HotglmError, TimeoutError):
    """A stage took longer than its policy allows; its thread is left to end by itself and its result is dropped."""

    code = "LOAD_TIMEOUT"


class ThreadStartError(HotglmError, RuntimeError):
    """A worker thread could not be started."""

    code = "THREAD_START"


class MissingExtraError(HotglmError, ImportError):
    """An optional dependency is not installed; the text names the extra."""

    code = "MISSING_EXTRA"
