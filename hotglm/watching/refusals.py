"""What must not be tried again, and why: in memory, and on disk where it outlives the process.

Rules this module keeps:

- Where there is a service, its record in the store is where refusals stand, for all of its processes (S11). Where there
  is none, a reason file in a directory of the host's choosing; never in the release itself.
- What is on disk counts as it is at each look: a reason file that an operator removes, or a release that is forgiven,
  is eligible again.
- What a service confirmed is eligible whatever was refused: it is what every new process starts on (S10).
- What cannot be written to disk is refused in memory all the same, and written when the disk is back.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
from dataclasses import dataclass, field, replace

from hotglm import seam
from hotglm.errors import HotglmError
from hotglm.release.ledger import Refusal, ReleaseId, now_text, read_record, write_ledger
from hotglm.release.reading import list_directory
from hotglm.release.services import Service
from hotglm.release.writing import writing
from hotglm.watching.scanning import Target

__all__ = ["Refusals", "Refused", "Scope"]

_MAX_REMEMBERED = 1024
_SUFFIX = ".refused.json"


class Scope(enum.Enum):
    """How long a refusal lasts."""

    BYTES = "bytes"
    """For ever: the bytes are bad."""
    HOST = "host"
    """While this process runs the version it runs: its code cannot take the release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A release that is not tried again, and why.

    Attributes:
        version: its version.
        digest: of its manifest.
        reason: why, in words.
        scope: how long.
        is_on_disk: whether other processes see it.
    """

    version: str
    digest: str
    reason: str
    scope: Scope = Scope.BYTES
    is_on_disk: bool = False


@dataclass(slots=True, kw_only=True)
class Refusals:
    """What must not be tried again. Used by the thread of one watcher.

    Attributes:
        has_service: whether it is a service's record that holds them.
        directory: where reason files stand otherwise; None for nowhere.
        confirmed: what the service confirmed last, as of the latest `read`.
    """

    has_service: bool = False
    directory: str | None = None
    confirmed: ReleaseId | None = None
    _service: Service | None = None
    _own: dict[str, Refused] = field(default_factory=dict)
    _on_disk: dict[str, Refused] = field(default_factory=dict)
    _unwritten: dict[str, Target] = field(default_factory=dict)

    def read(self, service: Service | None) -> None:
        """Take in what is on disk now, and write what could not be written before.

        Raises:
            StoreError, SourceReadError: it cannot be read.
        """
        self._service = service
        if service is not None:
            state = service.read()
            self.confirmed = state.confirmed
            self._on_disk = {one.release.digest: _as_refused(one) for one in state.refused}
        elif self.directory is not None:
            self._on_disk = self._read_files(self.directory)
        for key in [*self._unwritten]:
            self._write(key)

    def find(self, target: Target) -> Refused | None:
        """Return why a release must not be tried; None where it may be."""
        if self.is_confirmed(target):
            return None
        return self._own.get(target.key) or self._on_disk.get(self._name_on_disk(target))

    def is_confirmed(self, target: Target) -> bool:
        """Tell whether the service confirmed this very release, so that it needs no trial."""
        return self.confirmed is not None and self.confirmed.digest == target.digest

    def add(self, target: Target, reason: str, *, scope: Scope = Scope.BYTES) -> None:
        """Refuse a release from now on; never raises."""
        self._own[target.key] = Refused(version=str(target.version), digest=target.digest, reason=reason, scope=scope)
        while len(self._own) > _MAX_REMEMBERED:
            del self._own[next(iter(self._own))]
        if scope is Scope.BYTES and (self.has_service or self.directory is not None):
            self._unwritten[target.key] = target
            self._write(target.key)

    def forget_host(self) -> None:
        """Let this process try again what its code could not take: it runs another version now."""
        self._own = {key: one for key, one in self._own.items() if one.scope is Scope.BYTES}

    def list_all(self) -> tuple[Refused, ...]:
        """Return everything that is refused."""
        return (*self._own.values(), *self._on_disk.values())

    # -- disk ----------------------------------------------------------------------------------------------------------

    def _name_on_disk(self, target: Target) -> str:
        """Return what a refusal is found by: a service knows digests alone, a file whatever tells bytes from others."""
        return target.digest if self.has_service else _name_file(target.key)

    def _write(self, key: str) -> None:
        """Put a refusal on disk; what stands there counts from then on, so that taking it away there is heard."""
        target, refused = self._unwritten[key], self._own.get(key)
        try:
            if refused is not None and not self._put(target, refused.reason):
                return
        except HotglmError:  # it stays in memory, and is tried again at the next look
            return
        del self._unwritten[key]
        if refused is not None:
            self._on_disk[self._name_on_disk(target)] = replace(self._own.pop(key), is_on_disk=True)

    def _put(self, target: Target, reason: str) -> bool:
        """Write one refusal; return whether that was possible.

        Raises:
            StoreError: the record or file cannot be written.
        """
        if self._service is not None:
            self._service.refuse(target.release, reason)
        elif self.directory is not None and not self.has_service:
            with writing(self.directory), contextlib.suppress(FileExistsError):
                seam.active.mkdir(self.directory)
            refusal = Refusal(release=target.release, reason=reason[:1000], refused_at=now_text())
            write_ledger(os.path.join(self.directory, _name_file(target.key)), refusal)
        else:
            return False
        return True

    def _read_files(self, directory: str) -> dict[str, Refused]:
        try:
            names = {name for name in list_directory(directory) if name.endswith(_SUFFIX)}
        except HotglmError as error:
            if error.code != "NOT_FOUND":
                raise
            names = set()
        known = {name: one for name, one in self._on_disk.items() if name in names}
        for name in names - known.keys():
            refusal = read_record(os.path.join(directory, name), Refusal)
            if refusal is not None:
                known[name] = _as_refused(refusal)
        return known


def _name_file(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{_SUFFIX}"


def _as_refused(one: Refusal) -> Refused:
    return Refused(version=one.release.version, digest=one.release.digest, reason=one.reason, is_on_disk=True)
