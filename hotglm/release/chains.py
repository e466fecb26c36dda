"""The releases that a delta builds on, found beside it and opened one by one, as far as they are needed.

Rules this module keeps:

- A base is looked for beside the release: under the name that a store gives it, else among all siblings. It is known by
  its result digest (D5), whatever it is called.
- Every release of an open chain is under its lease, so that a store's collection leaves it alone (S8).
- A base that is not there, or not yet whole, is CHAIN_BASE_MISSING: who waits may try again (C09).
- Opening reads nothing but manifests. No release is opened whose base is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hotglm.delta_fields import BaseRelease
from hotglm.delta_plan import MAX_CHAIN, ChainPlan, ChainPlanner, Link, TensorIdentity, missing_base
from hotglm.errors import SourceError, SourceReadError
from hotglm.progress import Progress
from hotglm.release.closing import Closing
from hotglm.release.directory import STORE_MARKER, Release, is_release, open_release
from hotglm.release.reading import list_directory, read_status
from hotglm.release.store_reading import release_name

__all__ = ["Chain", "find_base", "open_chain", "verify_chain"]

_MAX_SIBLINGS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain(Closing):
    """A release with the releases that it builds on, open; a context manager that closes the latter.

    Attributes:
        releases: the release that is wanted, which stays its opener's, then its base, the base of that, and so on.
        plan: where each tensor comes from; its links are places in `releases`.
    """

    releases: tuple[Release, ...]
    plan: ChainPlan
    _leases: ExitStack = field(repr=False)

    def close(self) -> None:
        """Give up the leases of the bases. Again does nothing."""
        self._leases.close()


def open_chain(
    release: Release, *, known: Mapping[str, TensorIdentity] | None = None, max_length: int = MAX_CHAIN
) -> Chain:
    """Find and open what a release builds on, as far as tensors are not known otherwise.

    A full release is a chain of itself alone.

    Args:
        release: open; it stays the caller's.
        known: tensors that the caller has already, by name: for example those that are live.
        max_length: how many deltas the chain may have.

    Returns:
        The open chain; the caller closes it.

    Raises:
        DeltaChainError: a base is not there (CHAIN_BASE_MISSING), or the chain leads in a circle or is too long.
        WrongBaseError: what stands under the name of a base is something else.
        SourceError: a base is not what its manifest says, or cannot be read.
    """
    planner = ChainPlanner(known=known or {}, max_length=max_length)
    releases, siblings = [release], _Siblings(release.path)
    planner.add(_link(release))
    with ExitStack() as leases:
        while (link := planner.next_base) is not None:
            base = _open_base(link, siblings=siblings)
            leases.enter_context(base)
            planner.add(_link(base))
            releases.append(base)
        return Chain(releases=tuple(releases), plan=planner.finish(), _leases=leases.pop_all())


def find_base(release: Release) -> str | None:
    """Return where the base of a delta seems to stand; None where it is not beside it, or the release is full.

    Raises:
        SourceReadError: the directory cannot be listed.
    """
    delta = release.manifest.delta
    return None if delta is None else _Siblings(release.path).find(delta.base)


def verify_chain(release: Release, *, progress: Callable[[Progress], object] | None = None) -> None:
    """Read every byte of a release and of what it builds on; of a full release, its own alone.

    What follows from them, the tensors that deltas make, is verified when they are made (X7).

    Args:
        release: open.
        progress: told how far it is.

    Raises:
        DeltaChainError, WrongBaseError: what it builds on is not there, or is something else.
        DigestMismatchError, ReleaseError, HeaderError, ShardIndexError: a release is not what its manifest says.
        SourceReadError: something cannot be read. SourceChangedError: it changed meanwhile.
    """
    with open_chain(release) as chain:
        needed = [chain.releases[place] for place in sorted(chain.plan.links | {0})]
        total, done = sum(one.manifest.total_nbytes for one in needed), 0
        for one in needed:
            one.verify(progress=None if progress is None else _shift(progress, done=done, total=total))
            done += one.manifest.total_nbytes


def _shift(progress: Callable[[Progress], object], *, done: int, total: int) -> Callable[[Progress], object]:
    """Return what tells `progress` about one part of a whole, which begins when `done` bytes of `total` are done."""
    return lambda one: progress(replace(one, done_nbytes=done + one.done_nbytes, total_nbytes=total))


def _link(release: Release) -> Link:
    return Link(manifest=release.manifest, digest=release.result_digest, name=release.path)


def _open_base(link: Link, *, siblings: _Siblings) -> Release:
    delta = link.manifest.delta
    path = None if delta is None else siblings.find(delta.base)
    try:
        if path is not None:
            return open_release(path)
    except SourceReadError as error:
        if error.code != "NOT_FOUND":  # collected since it was found
            raise
    raise missing_base(link, looked_in=siblings.parent)


class _Siblings:
    """The directories beside a release, looked through once, and only where a base has not the name of a store."""

    def __init__(self, path: str) -> None:
        self.parent = os.path.dirname(path)
        self._by_digest: dict[str, str] | None = None

    def find(self, base: BaseRelease) -> str | None:
        """Return where a release of the right version and number, or of the right digest, stands; None if nowhere."""
        named = os.path.join(self.parent, release_name(base.sequence, base.version))
        if is_release(named):
            return named
        if self._by_digest is None:
            self._by_digest = {} if self._is_store() else dict(self._scan())
        return self._by_digest.get(base.digest)

    def _is_store(self) -> bool:
        """Tell whether the siblings are the releases of a store, where every release has its name (S1)."""
        try:
            read_status(os.path.join(os.path.dirname(self.parent), STORE_MARKER))
        except SourceReadError:
            return False
        return True

    def _scan(self) -> list[tuple[str, str]]:
        found = []
        for name in list_directory(self.parent)[:_MAX_SIBLINGS]:
            path = os.path.join(self.parent, name)
            if name.startswith(".") or not is_release(path):
                continue
            try:
                with open_release(path) as release:
                    found.append((release.result_digest, path))
            except SourceError:
                continue  # a broken sibling is nobody's base, and no reason to refuse another
        return found
