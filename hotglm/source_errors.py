"""The errors about bytes, releases, their trust, and stores; part of the tree of `hotglm.errors`, which names them all.

Nobody imports them from here: `hotglm.errors` is where errors are looked for.
"""

from __future__ import annotations

from hotglm.problem import HotglmError

__all__ = [
    "DeltaChainError",
    "DeltaError",
    "DigestMismatchError",
    "ExpiredError",
    "HeaderError",
    "ReleaseError",
    "ReplayedError",
    "ShardIndexError",
    "SignatureError",
    "SourceChangedError",
    "SourceError",
    "SourceReadError",
    "StoreBusyError",
    "StoreConflictError",
    "StoreError",
    "StoreWriteError",
    "TensorValueError",
    "TrustError",
    "TrustStateError",
    "WrongBaseError",
]


class SourceError(HotglmError):
    """The bytes that were offered cannot be used."""

    code = "BAD_SOURCE"


class DigestMismatchError(SourceError):
    """The bytes are not the ones that were promised."""

    code = "DIGEST_MISMATCH"


class HeaderError(SourceError):
    """A safetensors header breaks the format or our caps."""

    code = "BAD_HEADER"


class ReleaseError(SourceError):
    """A release whose manifest breaks the format, or a directory that is not what its manifest says."""

    code = "BAD_RELEASE"


class DeltaError(ReleaseError):
    """A delta that cannot be applied: it breaks the format, or what it leads to is not what it promises."""

    code = "DELTA"


class DeltaChainError(DeltaError):
    """The releases that a delta builds on are not there, lead in a circle, or are too many."""

    code = "CHAIN"


class WrongBaseError(DeltaError):
    """A delta was made against something else than what is there; it names both."""

    code = "DELTA_WRONG_BASE"


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


class TrustError(HotglmError):
    """The host's own trust policy refuses a release, or cannot be consulted; nothing of it was used."""

    code = "TRUST"


class ExpiredError(TrustError):
    """The release, or the roots of trust, must not be taken for new any more."""

    code = "EXPIRED"


class ReplayedError(TrustError):
    """The release is older than one that was accepted before, or reuses its number, or leaps too far ahead."""

    code = "ROLLBACK"


class SignatureError(TrustError):
    """No signatures, or none that the roots of trust allow for this; somebody should be alerted."""

    code = "BAD_SIGNATURE"


class TrustStateError(TrustError):
    """What is remembered of accepted releases is missing, damaged or cannot be written; everything is refused."""

    code = "TRUST_STATE"


class StoreError(HotglmError):
    """A store of releases cannot do that; it is as it was."""

    code = "STORE"


class StoreBusyError(StoreError, TimeoutError):
    """Another process held the store's lock for longer than the caller was ready to wait."""

    code = "STORE_BUSY"


class StoreConflictError(StoreError):
    """Another came first: the version is taken, the label was moved, or the release is refused meanwhile."""

    code = "STORE_CONFLICT"


class StoreWriteError(StoreError, OSError):
    """The operating system refused to write; what is on disk is the old state or, after a late failure, the new."""

    code = "STORE_WRITE"
