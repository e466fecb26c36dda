"""Changes of trust that are ended somewhere, and what must be true then (P11, B28). No torch, no threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import TrustStateError
from hotglm.release.directory import is_release, open_release
from hotglm.release.packing import ReleaseDetails, pack
from hotglm.trust.opening import create_trust, open_trust
from hotglm.trust.policy import Trust
from hotglm.trust.signing import sign_release, write_roots
from support.kill_scenarios import Scenario, replace_badly
from support.sources import write_source
from support.trusted import Host, make_key, make_release, make_roots

__all__ = ["TRUST_SCENARIOS"]


class Accept(Scenario):
    """A release is accepted, and confirmed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.host = Host(directory)
        self.version = "0"

    def prepare(self) -> None:
        self.old, self.version = self.version, f"{self.round}.0"
        self.path = make_release(self.directory / "releases" / str(self.round), version=self.version)

    def change(self) -> None:
        trust = self.host.open()
        trust.confirm(self.host.offer(self.path, trust))

    def verify(self) -> None:
        record = self.host.open().read()[0].find_record(slot=None, model="ranker")
        confirmed = "0" if record.confirmed is None else record.confirmed.version
        assert str(record.floor_version or "0") in (self.old, self.version)
        assert confirmed in (self.old, self.version)
        assert confirmed == self.old or str(record.floor_version) == self.version
        self.change()
        record = self.host.open().read()[0].find_record(slot=None, model="ranker")
        assert record.confirmed is not None
        assert (str(record.floor_version), record.confirmed.version) == (self.version, self.version)


class PlantedAccept(Accept):
    """A memory that is removed before it is written: the sweep must find that (a test of the test)."""

    def change(self) -> None:
        with mock.patch("hotglm.trust.files.replace_whole", replace_badly):
            super().change()


class Rotate(Scenario):
    """The next roots are taken, by a command or by finding them in the file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.host = Host(directory)
        self.version = 1

    def prepare(self) -> None:
        self.version = self.host.open().read()[1].version
        self.next = self.directory / f"roots-{self.round}.json"
        write_roots(self.next, make_roots(version=self.version + 1), keys=(make_key("root"),))

    def change(self) -> None:
        self.host.open().rotate(self.next)

    def verify(self) -> None:
        assert self.host.open().read()[1].version in (self.version, self.version + 1)
        self.change()
        assert self.host.open().read()[1].version == self.version + 1


class Init(Scenario):
    """A host begins to remember, or begins again."""

    replaces = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.host = Host(directory)

    def prepare(self) -> None:
        self.state = self.directory / f"state-{self.round}"
        if self.replaces:
            create_trust(self.host.roots_path, state=self.state, clock=self.host.clock)

    def change(self) -> None:
        create_trust(self.host.roots_path, state=self.state, clock=self.host.clock, replaces=self.replaces)

    def open(self) -> Trust | None:
        try:
            return open_trust(self.host.roots_path, state=self.state, clock=self.host.clock)
        except TrustStateError as error:
            if error.code != "TRUST_STATE_MISSING":
                raise
            return None

    def verify(self) -> None:
        if self.open() is None or self.replaces:
            self.change()
        assert self.open() is not None


class InitAgain(Init):
    """A host begins again, and what it remembered is put aside."""

    replaces = True


class Sign(Scenario):
    """A release that is signed by one key is signed by another one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.host = Host(directory)
        self.path = make_release(directory / "signed")
        self.envelope = (self.path / ENVELOPE_NAME).read_bytes()

    def prepare(self) -> None:
        (self.path / ENVELOPE_NAME).write_bytes(self.envelope)

    def change(self) -> None:
        sign_release(self.path, make_key("second"))

    def verify(self) -> None:
        with open_release(self.path) as release:
            self.host.open().verify(release)
        assert sign_release(self.path, make_key("second")) == 2


class PackSigned(Scenario):
    """Weights are packed with a key, to a directory and in place: what is a release is signed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.host = Host(directory)
        self.details = ReleaseDetails(signing_key=make_key("release"))

    def prepare(self) -> None:
        self.copied = self.directory / f"copied-{self.round}"
        self.stayed = write_source(self.directory / f"stayed-{self.round}")

    def change(self) -> None:
        self._pack(self.copied)
        self._pack(None)

    def _pack(self, target: Path | None) -> None:
        if not is_release(os.fspath(target or self.stayed)):
            pack(self.stayed, target, name="ranker", version="1.0", details=self.details).close()

    def verify(self) -> None:
        self._judge()
        self.change()
        self._judge()
        assert is_release(os.fspath(self.copied))
        assert is_release(os.fspath(self.stayed))

    def _judge(self) -> None:
        trust = self.host.open()
        for path in (self.copied, self.stayed):
            if is_release(os.fspath(path)):
                with open_release(path) as release:
                    trust.verify(release)


TRUST_SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "accept": Accept,
    "planted-accept": PlantedAccept,
    "rotate": Rotate,
    "init": Init,
    "init-again": InitAgain,
    "sign": Sign,
    "pack-signed": PackSigned,
}
