"""A new version published to a store as a delta of a release that is there, or in full where that is better.

Rules this module keeps:

- What is published is what the source holds: its digests are those of a full release, and so is its result (D5).
- Chains stay short and deltas small: past the limits of an `DeltaPolicy` the release is published in full.
- The base is open while a delta of it is made, so that a collection leaves it alone (S8); it appears whole or not at
  all, and where the version is there already, in whatever form, that one is returned (S14, C14).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from hotglm.delta_fields import BaseRelease
from hotglm.delta_plan import MAX_CHAIN
from hotglm.deltas.making import Payload, PayloadOverrun, name_payload, write_payload
from hotglm.deltas.reading import DraftReader, ResultReader
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import Manifest
from hotglm.progress import Progress
from hotglm.release.chains import Chain, open_chain
from hotglm.release.drafts import Draft, open_draft
from hotglm.release.filling import Filled, verify_promised
from hotglm.release.packing import ReleaseDetails, Stated, read_stated, verify_stated
from hotglm.release.side_files import copy_side_files
from hotglm.release.store import Store
from hotglm.release.store_publishing import STORED_MODE, make_store_workspace, publish_workspace
from hotglm.release.store_reading import StoredRelease
from hotglm.version import Version

__all__ = ["DeltaPolicy", "publish_delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPolicy:
    """What a delta is made against, and when a release is published in full instead.

    A full release now and then is an anchor: whoever starts late, or lost one delta, need not read much.

    Attributes:
        base: a label, version or sequence number of the store; the newest release if None.
        max_chain: how many deltas a chain may have, 1 to 64; one more begins a new chain.
        max_ratio: how large the payload of a delta may be, as a part of the weights that it leads to.
    """

    base: str | int | Version | None = None
    max_chain: int = 16
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Refuse limits that cannot be meant."""
        if type(self.max_chain) is not int or not 1 <= self.max_chain <= MAX_CHAIN:
            raise ArgumentError(
                f"Expected a chain of 1 to {MAX_CHAIN} deltas, got {shorten_repr(self.max_chain)}.",
                remedy="give max_chain= a number of them.",
            )
        if not isinstance(self.max_ratio, int | float) or not 0 < self.max_ratio <= 1:
            raise ArgumentError(
                f"Expected a ratio above 0 and up to 1, got {shorten_repr(self.max_ratio)}.",
                remedy="give max_ratio= a part of the full size.",
            )


def publish_delta(
    store: Store,
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: str | Version | None = None,
    details: ReleaseDetails | None = None,
    policy: DeltaPolicy | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> StoredRelease:
    """Make a release of new weights in a store as a delta of one that is there, whole or not at all.

    It is published in full where the store is empty, where there are no weights on either side, and where `policy` says
    so. Publishing the same again changes nothing and returns the release that is there, in whatever form. A tensor
    whose digest the source carries itself, and the base has, is not read.

    Args:
        store: an open store.
        source: a safetensors file, a shard index, a directory of either, or a full release.
        name: name of the model; if None, what the weights say.
        version: version of the weights; if None, what they say.
        details: whatever else the release is to say.
        policy: what it is made against, and when it is published in full instead.
        progress: told how far it is; what it raises ends the publishing.

    Returns:
        The release that is there now; its manifest says in which form.

    Raises:
        ArgumentError: no name or version is known, or one that cannot be meant.
        StoreConflictError: the version is taken by something else (VERSION_REUSED), or the store holds another model
            (NAME_MISMATCH).
        StoreBusyError: another process holds the store's lock. StoreWriteError: it cannot be written.
        StoreError: there is no such base.
        DeltaError: the base cannot be read, being a delta itself whose chain is broken.
        DigestMismatchError: the source, or the base, is not what it promises.
        ReleaseError, SourceError: the source cannot be used. ThreadStartError: no thread could be started.
    """
    policy = policy or DeltaPolicy()
    with contextlib.suppress(PayloadOverrun), ExitStack() as stack:
        draft = open_draft(source, stack=stack)
        details = details or ReleaseDetails()
        stated = read_stated(draft, name=name, version=version, details=details)
        verify_stated(stated, sequence=1)
        chain = _open_base(store, policy, stack=stack)
        if chain is not None and draft.files is not None:
            new = DraftReader(draft, draft.files)
            workspace = stack.enter_context(make_store_workspace(store))
            made = _make(ResultReader(chain, stack=stack), new, draft, workspace, policy=policy, progress=progress)
            return publish_workspace(
                store,
                workspace,
                made.files,
                lambda sequence: made.make_manifest(stated, sequence),
                sign=details.sign,
            )
    return store.publish(source, name=name, version=version, details=details, progress=progress)


def _open_base(store: Store, policy: DeltaPolicy, *, stack: ExitStack) -> Chain | None:
    """Open the release that a delta is made against; None where there can be none."""
    base = policy.base
    if base is None:
        releases = store.find_releases()
        if not releases:
            return None
        base = releases[-1].sequence
    release = stack.enter_context(store.open_release(base))
    if release.manifest.weights is None:
        return None
    chain = stack.enter_context(open_chain(release))
    num_deltas = sum(one.manifest.delta is not None for one in chain.releases)
    return chain if num_deltas < policy.max_chain else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What stands in a workspace, and what it leads to."""

    base: BaseRelease
    name: str
    payload: Payload
    files: dict[str, FileEntry]
    full: Filled

    def make_manifest(self, stated: Stated, sequence: int) -> Manifest:
        full = stated.make_manifest(self.full, sequence=sequence)
        return replace(full, files=self.files, delta=self.payload.make_fields(self.base, self.name))


def _make(
    old: ResultReader,
    new: DraftReader,
    draft: Draft,
    workspace: str,
    *,
    policy: DeltaPolicy,
    progress: Callable[[Progress], object] | None,
) -> _Made:
    sides = {name: path for name, path in draft.sources.items() if name not in new.paths}
    limit = int(sum(one.nbytes for one in new.tensors.values()) * policy.max_ratio)
    files = copy_side_files(sides, workspace, mode=STORED_MODE)
    name = name_payload(draft.sources)
    path = os.path.join(workspace, name)
    payload = write_payload(old, new, path, mode=STORED_MODE, max_nbytes=limit, progress=progress)
    full = Filled(files=files | dict(payload.files), tensors=payload.tensors)
    verify_promised(draft, full)
    files[name] = payload.entry
    before = old.release.manifest
    base = BaseRelease(version=before.version, sequence=before.sequence, digest=old.release.result_digest)
    return _Made(base=base, name=name, payload=payload, files=files, full=full)
