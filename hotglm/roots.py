"""Roots of trust: which keys may sign what, as values and as canonical bytes.

Rules this module keeps:

- Pure: no IO, no cryptography. `parse_roots(format_roots(r)) == r`, and one spelling only (T4).
- The algorithm belongs to the key, here, and never to what was signed: nothing can be talked down (T3, B08).
- A key's id is the digest of the key itself; so no key can stand under two names and count twice (T3, B22).
- The roots are the host's. Nothing in a release can name, change or loosen them (B26).
- Clauses in parentheses are those of docs/release-format.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from hotglm.document import Report, parse_json, verify_utf8
from hotglm.envelope import read_base64
from hotglm.errors import TrustError, shorten_repr
from hotglm.field_reader import FieldReader
from hotglm.manifest_fields import MAX_SEQUENCE, floor_time

__all__ = ["ALGORITHMS", "MAX_ROOTS_NBYTES", "ROOT_ROLE", "PublicKey", "Role", "Roots", "format_roots", "parse_roots"]

ROOTS_FORMAT = "hotglm.roots/1"
ALGORITHMS = ("ecdsa-p256-sha256", "ed25519", "rsa-pss-sha256")
ROOT_ROLE = "root"
"""The role that signs the roots themselves. Every other role signs releases."""

MAX_ROOTS_NBYTES = 2**20
MAX_KEYS = 128
MAX_ROLES = 64
_MAX_NAMES = 1000
_MAX_SPKI_NBYTES = 4096
_ROLE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A public key, with what it is for.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        spki: its SubjectPublicKeyInfo in DER (RFC 5280).
    """

    algorithm: str
    spki: bytes

    @property
    def id(self) -> str:
        """`sha256:` and 64 hexadecimal digits over `spki` (T3)."""
        return f"sha256:{hashlib.sha256(self.spki).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Who may sign what.

    Attributes:
        keys: ids of its keys.
        threshold: how many of them, all different, must have signed.
        models: names of the models whose releases it may sign; None for any.
        slots: names of the slots that those may be staged in; None for any.
    """

    keys: frozenset[str]
    threshold: int = 1
    models: frozenset[str] | None = None
    slots: frozenset[str] | None = None

    def applies(self, *, model: str, slot: str | None) -> bool:
        """Tell whether it has a say about releases of this model, in this slot or in none."""
        return (self.models is None or model in self.models) and (self.slots is None or slot in self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """What a host believes in.

    Attributes:
        version: grows by one with every change.
        keys: every key by its id; one that stands in no role is revoked, and named as such in refusals. Read-only.
        roles: every role by its name; one is `root`. Read-only.
        expires_at: from when on nothing new is accepted under them, in UTC, to the second; None for never.
    """

    version: int = 1
    keys: Mapping[str, PublicKey]
    roles: Mapping[str, Role]
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        """Take private read-only copies, sorted and cut to the second as they are written."""
        object.__setattr__(self, "keys", MappingProxyType(dict(sorted(self.keys.items()))))
        object.__setattr__(self, "roles", MappingProxyType(dict(sorted(self.roles.items()))))
        if self.expires_at is not None:
            object.__setattr__(self, "expires_at", floor_time(self.expires_at))

    def find_roles(self, *, model: str, slot: str | None) -> Iterator[tuple[str, Role]]:
        """Yield name and role of those that have a say about releases of this model, in this slot or in none."""
        for name, role in self.roles.items():
            if name != ROOT_ROLE and role.applies(model=model, slot=slot):
                yield name, role


def format_roots(roots: Roots) -> bytes:
    """Return the canonical bytes of roots, as they are signed (T4).

    Raises:
        TrustError: reading them would be refused; `problems` has every reason.
    """
    text = _format(roots)
    if parse_roots(text) != roots:
        _report(None).stop("BAD_ROOTS", "Expected values that are given back as they are, got others.")
    return text


def parse_roots(text: bytes, *, file: str | None = None) -> Roots:
    """Return what roots of trust say, or refuse them with everything that is wrong.

    Args:
        text: the whole document: the payload of an envelope.
        file: its path, for the refusal.

    Raises:
        TrustError: it breaks the format or a cap.
    """
    report = _report(file)
    if len(text) > MAX_ROOTS_NBYTES:
        report.stop("ROOTS_TOO_LARGE", f"Expected at most {MAX_ROOTS_NBYTES} bytes, got {len(text)}.")
    verify_utf8(text, report=report)
    roots = _Reader(report=report).read(parse_json(text, report=report))
    report.raise_if_any()
    if _format(roots) != text:
        report.stop("ROOTS_NOT_CANONICAL", "Expected the canonical spelling, got another one.")
    return roots


def _report(file: str | None) -> Report:
    return Report(
        TrustError,
        headline=f"The roots of trust {'given' if file is None else shorten_repr(file)} were refused",
        remedy="make them with `hotglm trust new`, and sign them with `hotglm sign`.",
        prefix="ROOTS",
        file=file,
    )


def _format(roots: Roots) -> bytes:
    expires = roots.expires_at
    document = {
        "expires": None if expires is None else expires.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0"),
        "format": ROOTS_FORMAT,
        "keys": {
            name: {"algorithm": key.algorithm, "spki": base64.b64encode(key.spki).decode()}
            for name, key in roots.keys.items()
        },
        "roles": {
            name: {
                "keys": sorted(role.keys),
                "models": None if role.models is None else sorted(role.models),
                "slots": None if role.slots is None else sorted(role.slots),
                "threshold": role.threshold,
            }
            for name, role in roots.roles.items()
        },
        "version": roots.version,
    }
    return f"{json.dumps(document, sort_keys=True, separators=(',', ':'))}\n".encode()


class _Reader(FieldReader):
    """One walk through one document. What it returns is believed only when the report stayed empty."""

    def read(self, document: object) -> Roots:
        if isinstance(document, dict) and (found := document.get("format")) != ROOTS_FORMAT:
            message = f"Expected format {ROOTS_FORMAT!r}, got {shorten_repr(found)}; this hotglm reads no other."
            self.report.stop("FORMAT_UNKNOWN", message, expected=ROOTS_FORMAT)
        values = self.read_members(document, ("expires", "format", "keys", "roles", "version"), where="the roots")
        keys = self._read_keys(values["keys"])
        roles = {
            name: self._read_role(name, member, keys=keys)
            for name, member in self.read_object(values["roles"], limit=MAX_ROLES, where="roles").items()
        }
        if ROOT_ROLE not in roles:
            self.report.add("MISSING_FIELD", f"Expected a role {ROOT_ROLE!r}, got none.", expected=ROOT_ROLE)
        return Roots(
            version=self.read_integer(values["version"], 1, MAX_SEQUENCE, where="version"),
            keys=keys,
            roles=roles,
            expires_at=None if values["expires"] is None else self.read_time(values["expires"], where="expires"),
        )

    def _read_keys(self, value: object) -> dict[str, PublicKey]:
        keys = {}
        for name, member in self.read_object(value, limit=MAX_KEYS, where="keys").items():
            where = f"keys[{shorten_repr(name)}]"
            values = self.read_members(member, ("algorithm", "spki"), where=where)
            if values["algorithm"] not in ALGORITHMS:
                expected = f"one of {', '.join(ALGORITHMS)}"
                self.refuse(expected, values["algorithm"], where=f"{where}.algorithm", code="UNSUPPORTED_ALGORITHM")
                continue
            spki = read_base64(values["spki"])
            if spki is None or len(spki) > _MAX_SPKI_NBYTES:
                self.refuse("a key in base64", values["spki"], where=f"{where}.spki", code="BAD_BASE64")
                continue
            keys[name] = PublicKey(algorithm=values["algorithm"], spki=spki)
            if keys[name].id != name:
                message = f"Expected the digest of the key, {keys[name].id}, as its id, got {shorten_repr(name)}."
                self.report.add("BAD_KEY_ID", message)
        return keys

    def _read_role(self, name: str, value: object, *, keys: Mapping[str, PublicKey]) -> Role:
        where = f"roles[{shorten_repr(name)}]"
        if not _ROLE_NAME.fullmatch(name):
            self.refuse("1 to 64 lower-case letters, digits, '-' and '_'", name, where="the name of a role")
        values = self.read_members(value, ("keys", "models", "slots", "threshold"), where=where)
        ids = frozenset(self.read_words(values["keys"], MAX_KEYS, where=f"{where}.keys"))
        for one in sorted(ids - keys.keys()):
            self.report.add("UNKNOWN_KEY", f"Expected keys that are listed in {where}, got {shorten_repr(one)}.")
        threshold = values["threshold"]
        if type(threshold) is not int or not 1 <= threshold <= len(ids):  # True is no integer (B15)
            expected = f"an integer from 1 to {len(ids)}, the number of its keys,"
            self.refuse(expected, threshold, where=f"{where}.threshold", code="BAD_THRESHOLD")
            threshold = 1
        models, slots = (
            None
            if values[part] is None
            else frozenset(self.read_words(values[part], _MAX_NAMES, where=f"{where}.{part}"))
            for part in ("models", "slots")
        )
        if name == ROOT_ROLE and (models, slots) != (None, None):
            self.refuse("null", "names", where=f"{where}.models and .slots")
        return Role(keys=ids, threshold=threshold, models=models, slots=slots)
