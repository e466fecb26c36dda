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
    │   ├── ShardIndexError         a shard index that does not fit its shards
    │   ├── SourceChangedError      the source changed while it was being read
    │   ├── SourceReadError         the operating system refused to open or read it
    │   └── TensorValueError        a mapping or file holds a tensor that cannot be loaded
    ├── IncompatibleError           the verdict says no; `.verdict` has every reason
    ├── ModuleError                 the module cannot be held by a slot
    │   ├── DefinitionError         a decorator or declaration that contradicts itself
    │   ├── NotMaterializedError    lazy or meta tensors are left in it
    │   ├── StaleStateError         state that would silently keep its old value after a swap
    │   └── UncopyableError         a hook, attribute or tensor that cannot be carried over
    ├── CheckError                  a staged generation failed its proof
    │   ├── CallableCheckError      a check given by the user said no, or raised
    │   ├── GoldenMismatchError     outputs differ from the golden ones
    │   ├── NonFiniteError          NaN or infinity in the weights
    │   ├── RefreshError            a refresh of derived state raised
    │   └── WarmUpError             a warm-up pass raised
    ├── MemoryPlanError             the memory that is needed is not there; nothing was allocated
    ├── SlotStateError              the slot cannot do that now
    │   ├── ConflictError           another commit came first (compare-and-set)
    │   ├── DiscardedError          that stage was discarded, has failed or is committed already
    │   ├── ReentrantError          asked from inside a stage of the same slot
    │   ├── NoRollbackError         no earlier generation is held
    │   ├── SlotClosedError         the slot was closed
    │   └── SupersededError         a newer stage took this one's place
    ├── StageFailedError            something unforeseen, raised by the model's own code or by torch, ended a stage
    ├── StageTimeoutError           a stage took longer than its policy allows
    ├── DrainTimeoutError           passes or holders of an old generation outlived the wait
    ├── ThreadStartError            a worker thread could not be started
    └── MissingExtraError           an optional dependency is not installed; the text names the extra
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hotglm.problem import Problem, shorten_repr

if TYPE_CHECKING:
    from hotglm.slot.receipt import Receipt
    from hotglm.verdict import Verdict

__all__ = [
    "ArgumentError",
    "CallableCheckError",
    "CheckError",
    "ConflictError",
    "DefinitionError",
    "DigestMismatchError",
    "DiscardedError",
    "DrainTimeoutError",
    "GoldenMismatchError",
    "HeaderError",
    "HotglmError",
    "IncompatibleError",
    "MemoryPlanError",
    "MissingExtraError",
    "ModuleError",
    "NoRollbackError",
    "NonFiniteError",
    "NotMaterializedError",
    "Problem",
    "ReentrantError",
    "RefreshError",
    "ShardIndexError",
    "SlotClosedError",
    "SlotStateError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "StageFailedError",
    "StageTimeoutError",
    "StaleStateError",
    "SupersededError",
    "TensorValueError",
    "ThreadStartError",
    "UncopyableError",
    "VersionSyntaxError",
    "WarmUpError",
    "shorten_repr",
]

_NUM_PROBLEMS_SHOWN = 20
"""How many problems the text of an error spells out; `problems` always holds all of them."""


class HotglmError(Exception):
    """The root of all errors of this library.

    Attributes:
        code: stable upper-case word for logs and tests; that of the first problem where there is one.
        problems: everything that is wrong, in the order found.
        remedy: what to do about it; the last sentence of the text.
        slot: name of the slot concerned, where there is one.
        version: the version that was being staged, where there is one.
        serving: the version that still serves, where there is one.
        receipt: the record of the refused stage, where there was one.
    """

    code = "HOTGLM"

    def __init__(
        self,
        message: str,
        *,
        problems: Iterable[Problem] = (),
        remedy: str = "",
        code: str | None = None,
    ) -> None:
        """Take the headline, the problems under it and the remedy."""
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.remedy = remedy
        self.slot: str | None = None
        self.version: str | None = None
        self.serving: str | None = None
        self.receipt: Receipt | None = None
        if code is not None:
            self.code = code
        elif self.problems:
            self.code = self.problems[0].code

    @property
    def file(self) -> str | None:
        """Path of the file of the first problem that names one."""
        return next((p.file for p in self.problems if p.file is not None), None)

    @property
    def tensor(self) -> str | None:
        """Name of the tensor of the first problem that names one."""
        return next((p.tensor for p in self.problems if p.tensor is not None), None)

    @property
    def offset(self) -> int | None:
        """Byte offset of the first problem that names one."""
        return next((p.offset for p in self.problems if p.offset is not None), None)

    def with_slot(self, *, slot: str, version: str | None, serving: str | None) -> HotglmError:
        """Note which slot and versions this concerns, where that is not known yet; return the error itself."""
        self.slot = self.slot or slot
        self.version = self.version or version
        self.serving = self.serving or serving
        return self

    def __str__(self) -> str:
        """Format headline, problems, what still serves and the remedy."""
        head = self.message
        if self.slot is not None:
            staged = f", version {self.version}" if self.version else ""
            head = f"[slot {self.slot!r}{staged}] {head}"
        lines = [head]
        lines += [f"  - {problem}" for problem in self.problems[:_NUM_PROBLEMS_SHOWN]]
        if (more := len(self.problems) - _NUM_PROBLEMS_SHOWN) > 0:
            lines.append(f"  - and {more} more (see `.problems`)")
        if self.serving is not None:
            lines.append(f"Version {self.serving} still serves, unchanged.")
        if self.remedy:
            lines.append(f"Remedy: {self.remedy}")
        return "\n".join(lines) if len(lines) > 2 else " ".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by attributes, so that an error survives the way out of a worker process."""
        return (type(self), (self.message,), self.__dict__)


class ArgumentError(HotglmError, ValueError):
    """The caller passed something that cannot be meant."""

    code = "BAD_ARGUMENT"


class VersionSyntaxError(ArgumentError):
    """A version, range or requirement does not parse."""

    code = "BAD_VERSION"


class SourceError(HotglmError):
    """The bytes that were offered cannot be used."""

    code = "BAD_SOURCE"


class DigestMismatchError(SourceError):
    """The bytes are not the ones that were promised."""

    code = "DIGEST_MISMATCH"


class HeaderError(SourceError):
    """A safetensors header breaks the format or our caps."""

    code = "BAD_HEADER"


class ShardIndexError(SourceError):
    """A shard index does not fit its shards."""

    code = "BAD_INDEX"


class SourceChangedError(SourceError):
    """The source was truncated, overwritten or replaced while it was being read."""

    code = "SOURCE_CHANGED"


class SourceReadError(SourceError, OSError):
    """The operating system refused to open or read the source."""

    code = "IO_ERROR"


class TensorValueError(SourceError):
    """A mapping or file holds a tensor that cannot be loaded as it is."""

    code = "BAD_TENSOR"


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
