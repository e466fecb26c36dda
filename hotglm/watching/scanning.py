"""Looking: what stands in a store or a directory of releases, and which of it is to be live.

Rules this module keeps:

- A scan is the truth; it starts from nothing but what is on disk. What is remembered between scans is only what names
  mean, so that 12 000 of them are read once.
- Names by rule only: in a store those that the store gave (S1), elsewhere a version in its normal form. All else is
  passed over: editors' files, dotfiles, `.partial`, `01.0`, `latest~` (E09).
- Only a directory with a manifest counts (R1), and of all that could win only the manifest of the winner is read, and
  of those above it that were refused or wait. The digest of those bytes decides, no time or number of an inode (E11).
- In a store a release is whole as soon as it has its name (S1). Elsewhere one counts when every file that its manifest
  lists is there in its size, so that an upload that stopped half way keeps no other release from going live (E01).
- No byte but those of a manifest is read, and the lock of a store is not taken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import (
    HotglmError,
    Problem,
    ReleaseError,
    SourceError,
    SourceReadError,
    StoreError,
    VersionSyntaxError,
    shorten_repr,
)
from hotglm.manifest import MAX_MANIFEST_NBYTES, parse_manifest
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.directory import open_release
from hotglm.release.ledger import ReleaseId
from hotglm.release.reading import list_directory, read_document, read_status
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from hotglm.release.store_reading import release_name
from hotglm.release.tree import find_entries
from hotglm.version import Version
from hotglm.watching.follow import Follow
from hotglm.watching.judging import is_unfinished
from hotglm.watching.ranking import Ranking
from hotglm.weights.workers import yield_gil_when_due

__all__ = ["Found", "Scanner", "Target"]

_MARKER = "hotglm-store.json"
_MAX_REMEMBERED = 256

_MAX_STEPPED_OVER = 16
"""How many releases that wait for their next try one look steps over: a machine that reads nothing does not try all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One release that could go live.

    Attributes:
        version: its version, by its name.
        sequence: its number in the store; 0 where there is no store.
        path: its directory.
        digest: of its manifest, which binds every other byte.
        key: what tells its bytes from all others: the digest, size and time of its signatures; and where somebody may
            still be copying into the directory, the sizes and times of its files as well.
    """

    version: Version
    sequence: int
    path: str
    digest: str
    key: str

    @property
    def release(self) -> ReleaseId:
        """It, as records on disk name it."""
        return ReleaseId(sequence=self.sequence, version=str(self.version), digest=self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one scan found.

    Attributes:
        target: what is to be live; None where nothing is eligible.
        waiting: the highest release that was stepped over because it waits for its next try; None for none.
        position: grows with each release that was eligible, or each move of the label; tells how many were skipped.
        reason: why there is no target; or, beside a target, why a newer one is not it.
    """

    target: Target | None
    waiting: Target | None = None
    position: int = 0
    reason: str = ""


class Scanner:
    """Looks at one place. Used by one thread at a time."""

    def __init__(self, place: Store | str, follow: Follow) -> None:
        """Remember where to look; nothing is read yet."""
        self._store = place if isinstance(place, Store) else None
        self.path = place.path if isinstance(place, Store) else place
        self._follow = follow
        self._ranking = Ranking()
        self._names: set[str] = set()
        self._names_in = ""
        self._whole: dict[str, bool] = {}

    def scan(
        self, is_refused: Callable[[Target], bool], *, is_waiting: Callable[[Target], bool] = lambda _: False
    ) -> Found:
        """Look once.

        Args:
            is_refused: whether a release must not be tried.
            is_waiting: whether a release must not be tried yet; asked only where a constraint is followed.

        Raises:
            SourceError: the place or a manifest cannot be read. StoreError: a label is damaged, or leads nowhere.
        """
        store = self.find_store()
        if self._follow.label is None:
            where = self.path if store is None else store.join("releases")
            self._name_all(where, is_stored=store is not None)
            return self._scan_versions(where, is_stored=store is not None, is_refused=is_refused, is_waiting=is_waiting)
        if store is None:
            return self._scan_link(self._follow.label)
        return self._scan_label(store, self._follow.label)

    def find_store(self) -> Store | None:
        """Return the store that stands at the place; None for a directory of releases.

        Raises:
            SourceError: it cannot be read. StoreError: it is a store of a later format.
        """
        if self._store is None and _exists(os.path.join(self.path, _MARKER)):
            return open_store(self.path)
        return self._store

    def find_watched(self) -> list[str]:
        """Return the directories whose events are worth a look."""
        inside = [os.path.join(self.path, name) for name in ("labels", "releases", "services")]
        return [path for path in (self.path, *inside) if os.path.isdir(path)]

    # -- labels --------------------------------------------------------------------------------------------------------

    def _scan_label(self, store: Store, name: str) -> Found:
        label = store.read_label(name)
        if label is None:
            return Found(target=None, reason=f"the store has no label {name!r}")
        one = label.release
        target = self.read_target(store.join("releases", release_name(one.sequence, one.version)), one)
        if target is None or target.digest != one.digest:
            found = "nothing that is whole" if target is None else f"digest {target.digest}"
            message = f"Expected release {one.version} of digest {one.digest}, got {found}."
            raise StoreError(
                f"The label {name!r} leads to a release that is not there.",
                problems=[Problem(code="NOT_IN_STORE", message=message, file=self.path)],
                remedy="move the label to a release of the store; what is live serves on.",
            )
        return Found(target=target, position=label.revision)

    def _scan_link(self, name: str) -> Found:
        """Look at a directory or link of that name, which somebody replaces."""
        path = os.path.realpath(os.path.join(self.path, name))
        target = self._read(path, version=None, sequence=0, is_stored=False)
        reason = "" if target else f"there is no release {shorten_repr(os.path.join(self.path, name))}"
        return Found(target=target, reason=reason)

    # -- constraints ---------------------------------------------------------------------------------------------------

    def _scan_versions(
        self,
        where: str,
        *,
        is_stored: bool,
        is_refused: Callable[[Target], bool],
        is_waiting: Callable[[Target], bool],
    ) -> Found:
        position, reason, waiting = len(self._ranking), "", list[Target]()
        for version, target, obstacle in self._descend(where, is_stored=is_stored):
            if target is None or is_refused(target):
                reason = obstacle or f"{version} was refused"
            elif is_waiting(target):
                waiting.append(target)
                reason = f"{version} waits for its next try"
                if len(waiting) == _MAX_STEPPED_OVER:
                    return Found(target=None, waiting=waiting[0], position=position, reason=reason)
            else:
                first = waiting[0] if waiting else None
                return Found(target=target, waiting=first, position=position - len(waiting), reason=reason)
        reason = reason or f"none of {len(self._names)} names is a release that fits {self._follow.text!r}"
        return Found(target=None, waiting=waiting[0] if waiting else None, position=position, reason=reason)

    def _descend(self, where: str, *, is_stored: bool) -> Iterator[tuple[Version, Target | None, str]]:
        """Yield what stands there, the highest version first; with the reason where it is no target."""
        for name, (sequence, version) in self._ranking.descend():
            path = os.path.join(where, name)
            try:
                target = self._read(path, version=version, sequence=sequence, is_stored=is_stored)
            except SourceError as error:
                if not _concerns_one(error):
                    raise
                yield version, None, f"{version} cannot be read ({error.code})"
            else:
                yield version, target, "" if target else f"{version} is not whole"

    def _name_all(self, where: str, *, is_stored: bool) -> None:
        """Bring what names mean up to date; only those that are new are read."""
        if self._names_in != where:
            self._ranking, self._names, self._names_in = Ranking(), set(), where
        names = set(list_directory(where))
        for name in self._names - names:
            self._ranking.remove(name)
        for name in names - self._names:
            parsed = self._parse(name, is_stored=is_stored)
            if parsed is not None:
                self._ranking.add(name, *parsed)
            yield_gil_when_due()
        self._names = names

    def _parse(self, name: str, *, is_stored: bool) -> tuple[int, Version] | None:
        """Return number and version that a name stands for; None where it is none, or the constraint says no."""
        number, _, text = name.partition("-") if is_stored else ("0", "", name)
        try:
            sequence, version = int(number), Version(text)
        except (ValueError, VersionSyntaxError):
            return None
        is_given = name == (release_name(sequence, version) if is_stored else str(version))
        return (sequence, version) if is_given and self._follow.admits(version) else None

    # -- manifests -----------------------------------------------------------------------------------------------------

    def read_target(self, path: str, release: ReleaseId) -> Target | None:
        """Return what stands at the path of a release of the store; None where it is not whole.

        Raises:
            SourceError: it cannot be read.
        """
        return self._read(path, version=Version(release.version), sequence=release.sequence, is_stored=True)

    def _read(self, path: str, *, version: Version | None, sequence: int, is_stored: bool) -> Target | None:
        text = _read_manifest(path)
        if text is None or not text.endswith(b"}\n"):  # half of a manifest: that is its only newline (M2)
            return None
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        if version is None:
            version = _read_version(text)
        key = f"{digest}{_tag_signatures(path)}" if is_stored else f"{digest}/{_take_fingerprint(path)}"
        if not is_stored and not self._is_whole(path, key):
            return None
        return Target(version=version, sequence=sequence, path=path, digest=digest, key=key)

    def _is_whole(self, path: str, key: str) -> bool:
        """Tell whether a directory that is no store's holds what its manifest lists; looked at once for each key."""
        if key not in self._whole:
            while len(self._whole) >= _MAX_REMEMBERED:
                del self._whole[next(iter(self._whole))]
            is_whole = True
            try:
                open_release(path).close()
            except ReleaseError as error:  # whatever else is wrong with it is said when it is loaded
                is_whole = not is_unfinished(error)
            self._whole[key] = is_whole
        return self._whole[key]


def _exists(path: str) -> bool:
    try:
        read_status(path)
    except SourceReadError as error:
        if error.code == "NOT_FOUND":
            return False
        raise
    return True


def _read_manifest(directory: str) -> bytes | None:
    at = os.path.join(directory, MANIFEST_NAME)
    try:
        return read_document(at, limit=MAX_MANIFEST_NBYTES, error=ReleaseError, code="MANIFEST_TOO_LARGE")
    except SourceReadError as error:
        if error.code == "NOT_FOUND":
            return None
        raise


def _read_version(manifest: bytes) -> Version:
    try:
        return parse_manifest(manifest, file=MANIFEST_NAME).version
    except HotglmError:  # it is refused when it is opened, with every reason
        return Version("0")


def _tag_signatures(directory: str) -> str:
    """Return what tells signatures from others: they may come later than what they sign; empty where none are."""
    try:
        status = read_status(os.path.join(directory, ENVELOPE_NAME))
    except SourceReadError:
        return ""
    return f"/{status.st_size}.{status.st_mtime_ns}.{status.st_ctime_ns}"


def _take_fingerprint(directory: str) -> str:
    """Return a digest of names, sizes, times and inodes of the files: another one means that something was copied."""
    found = hashlib.sha256(_tag_signatures(directory).encode())
    try:
        for name, status in find_entries(directory):
            seen = (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            found.update(ascii(seen).encode())
    except (
        HotglmError
    ) as error:  # it changes under our eyes, or holds too much: another look, or its opening, will tell
        found.update(error.code.encode())
    return found.hexdigest()[:16]


def _concerns_one(error: SourceError) -> bool:
    """Tell whether the next release can be looked at all the same: the machine itself is in order."""
    return error.code in ("PERMISSION", "NOT_REGULAR", "MANIFEST_TOO_LARGE", "BAD_PATH")
