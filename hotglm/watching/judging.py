"""What a failed update means: try again, never try these bytes again, or never in this process.

Rules this module keeps:

- Pure: it looks at the class and the codes of an error alone.
- What time may heal is tried again: reading, writing, memory, threads, a base that is not there yet, a copy that is
  not whole, signatures that may still come, a machine that is slow (K09).
- What the bytes themselves are to blame for is refused for ever, by digest, for every process of the service.
- What this process's own code is to blame for (a class that is not there, a step of versions that it does not take) is
  refused by this process alone, as long as it runs the version it runs: the next deployment may be made for it.
"""

from __future__ import annotations

import enum

from hotglm.errors import (
    CheckError,
    DeltaChainError,
    HotglmError,
    IncompatibleError,
    MigrationError,
    ModuleError,
    ReleaseError,
    SlotClosedError,
    SourceChangedError,
    SourceError,
    SourceReadError,
    StageFailedError,
    WrongBaseError,
)

__all__ = ["Fault", "is_unfinished", "judge"]

_NOT_WHOLE = frozenset({"INCOMPLETE", "MISSING_FILE", "SIZE_MISMATCH", "EXTRA_FILE"})
"""Problems that a directory has while it is being copied; nothing of it was read."""

_CHAIN_BROKEN = frozenset({"CHAIN_LOOP", "CHAIN_SELF", "CHAIN_TOO_LONG"})
"""Problems of a chain of deltas that no further release can mend."""


class Fault(enum.Enum):
    """Who or what is to blame for a failed update."""

    TIME = "time"
    """It may go well later."""
    BYTES = "bytes"
    """The release is not what it says, or did not stand its proof."""
    HOST = "host"
    """This process cannot take it as it runs now."""
    CLOSED = "closed"
    """There is no slot any more."""


def judge(error: BaseException) -> Fault:
    """Return what an error of an update means.

    >>> from hotglm.errors import DigestMismatchError
    >>> judge(DigestMismatchError("other bytes")), judge(SourceReadError("EIO")), judge(IncompatibleError("no"))
    (<Fault.BYTES: 'bytes'>, <Fault.TIME: 'time'>, <Fault.HOST: 'host'>)
    """
    if isinstance(error, SlotClosedError):
        return Fault.CLOSED
    if isinstance(error, StageFailedError) and error.code == "EXCHANGE_FAILED":  # of a commit in place, and undone
        return Fault.TIME
    if isinstance(error, (IncompatibleError, MigrationError, ModuleError, StageFailedError)):
        return Fault.HOST
    if isinstance(error, CheckError):
        return Fault.BYTES
    if isinstance(error, SourceError) and not _can_heal(error):
        return Fault.BYTES
    return Fault.TIME  # all that asks the machine, the store, the trust of the host, or another thread


def _can_heal(error: HotglmError) -> bool:
    codes = {problem.code for problem in error.problems} or {error.code}
    if isinstance(error, (SourceReadError, SourceChangedError, WrongBaseError)):
        return True
    if isinstance(error, DeltaChainError):
        return not codes & _CHAIN_BROKEN
    return is_unfinished(error)


def is_unfinished(error: HotglmError) -> bool:
    """Tell whether an error says no more than that a release is not whole yet."""
    codes = {problem.code for problem in error.problems} or {error.code}
    return isinstance(error, ReleaseError) and codes <= _NOT_WHOLE
