"""Signed releases to test with: keys that are made once, roots of any shape, a host that believes in them, a clock."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from torch import nn

from hotglm.release.directory import open_release
from hotglm.release.packing import ReleaseDetails, pack
from hotglm.roots import Role, Roots
from hotglm.trust.keys import SigningKey
from hotglm.trust.opening import create_trust, open_trust
from hotglm.trust.policy import Accepted, Trust
from hotglm.trust.signing import sign_release, write_roots
from support.bytes_maker import layout, make_file

__all__ = ["START", "Clock", "Host", "Tiny", "make_key", "make_release", "make_role", "make_roots", "pack_tiny"]

START = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Tiny(nn.Module):
    """One parameter of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self) -> torch.Tensor:
        return self.w + 0


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def move(self, **step: float) -> None:
        self.now += timedelta(**step)


@functools.cache
def make_key(name: str, algorithm: str = "ed25519") -> SigningKey:
    """Return the key of this name, the same one each time."""
    with tempfile.TemporaryDirectory() as directory:
        return SigningKey.create(Path(directory) / f"{name}.pem", algorithm=algorithm)


def make_role(
    *keys: SigningKey, threshold: int = 1, models: Iterable[str] | None = None, slots: Iterable[str] | None = None
) -> Role:
    """Return a role of these keys."""
    return Role(
        keys=frozenset(key.public.id for key in keys),
        threshold=threshold,
        models=None if models is None else frozenset(models),
        slots=None if slots is None else frozenset(slots),
    )


def make_roots(
    *others: SigningKey, roles: Mapping[str, Role] | None = None, version: int = 1, expires_at: datetime | None = None
) -> Roots:
    """Return roots whose `root` key is the one of that name; by default the key `release` may sign everything."""
    keys = (make_key("root"), make_key("release"), *others)
    roles = {"release": make_role(make_key("release"))} if roles is None else roles
    return Roots(
        version=version,
        keys={key.public.id: key.public for key in keys},
        roles={"root": make_role(make_key("root")), **roles},
        expires_at=expires_at,
    )


def pack_tiny(
    directory: Path, *, model: str = "ranker", version: str = "1.0.0", sequence: int = 1, **more: object
) -> Path:
    """Write an unsigned release of some hundred bytes, with a weights file and a side file."""
    source = directory.with_name(f"{directory.name}.source")
    source.mkdir(parents=True)
    header, nbytes = layout({"w": ("F32", (2,))})
    (source / "model.safetensors").write_bytes(make_file(header, (version.encode() * 8)[:nbytes]))
    (source / "a.txt").write_text("side")
    details = ReleaseDetails(created_at=START, **more)  # type: ignore[arg-type]  # expires_at and the like
    pack(source, directory, name=model, version=version, sequence=sequence, details=details).close()
    return directory


def make_release(directory: Path, *keys: SigningKey, **more: object) -> Path:
    """Write a release signed by these keys, by `release` if there are none."""
    pack_tiny(directory, **more)  # type: ignore[arg-type]  # what it takes
    for key in keys or (make_key("release"),):
        sign_release(directory, key)
    return directory


class Host:
    """A directory with roots, memory and releases, and a clock."""

    def __init__(self, directory: Path, roots: Roots | None = None) -> None:
        self.directory = directory
        self.clock = Clock()
        self.roots_path = directory / "roots.json"
        self.state_path = directory / "state" / "trust.json"
        self.state_path.parent.mkdir()
        write_roots(self.roots_path, roots or make_roots(), keys=(make_key("root"),))
        create_trust(self.roots_path, state=self.state_path, clock=self.clock)

    def open(self, **options: object) -> Trust:
        """Open the trust anew, as a process that starts does."""
        return open_trust(self.roots_path, state=self.state_path, clock=self.clock, **options)  # type: ignore[arg-type]

    def offer(self, path: Path, trust: Trust | None = None) -> Accepted:
        """Judge a release, and remember it."""
        judged = trust or self.open()
        with open_release(path) as release:
            accepted = judged.verify(release)
        judged.accept(accepted)
        return accepted

    def put_roots(self, roots: Roots, *keys: SigningKey) -> None:
        """Put other roots in the place of the file, as an operator's deployment does."""
        self.roots_path.unlink()
        write_roots(self.roots_path, roots, keys=keys)
