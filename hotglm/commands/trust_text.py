"""What `hotglm trust` prints of roots and memory."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from hotglm.commands.release_text import show_time
from hotglm.errors import shorten_repr
from hotglm.record import write_record
from hotglm.roots import Role, Roots
from hotglm.trust.state import AcceptedRelease, TrustState

__all__ = ["describe_roots", "describe_state", "show_roots", "show_state"]


def describe_roots(roots: Roots) -> dict[str, object]:
    """Return roots as JSON values."""
    return {
        "version": roots.version,
        "expires": None if roots.expires_at is None else show_time(roots.expires_at),
        "keys": {name: key.algorithm for name, key in roots.keys.items()},
        "roles": {
            name: {
                "keys": sorted(role.keys),
                "threshold": role.threshold,
                "models": None if role.models is None else sorted(role.models),
                "slots": None if role.slots is None else sorted(role.slots),
            }
            for name, role in roots.roles.items()
        },
    }


def show_roots(roots: Roots) -> Iterator[str]:
    """Yield roots in lines of text."""
    expires = "never expires" if roots.expires_at is None else f"expires {show_time(roots.expires_at)}"
    yield f"roots version {roots.version}, {expires}"
    for name, role in roots.roles.items():
        yield f"role {name}: {role.threshold} of {len(role.keys)}{_show_limits(role)}"
        yield from (f"  {key_id}  {roots.keys[key_id].algorithm}" for key_id in sorted(role.keys))
    used = {key_id for role in roots.roles.values() for key_id in role.keys}
    yield from (f"revoked {key_id}" for key_id in roots.keys if key_id not in used)


def _show_limits(role: Role) -> str:
    models = "" if role.models is None else f", models {', '.join(map(shorten_repr, sorted(role.models)))}"
    slots = "" if role.slots is None else f", slots {', '.join(map(shorten_repr, sorted(role.slots)))}"
    return models + slots


def describe_state(state: TrustState, *, now: datetime) -> dict[str, object]:
    """Return what is remembered as JSON values; ages are in seconds."""
    return {
        "records": [
            {
                "slot": record.slot or None,
                "model": record.model,
                "floor_version": None if record.floor_version is None else str(record.floor_version),
                "floor_sequence": record.floor_sequence,
                "accepted_s_ago": int(_age(record.accepted[0], now).total_seconds()) if record.accepted else None,
                "accepted": write_record(record.accepted),
                "confirmed": None if record.confirmed is None else write_record(record.confirmed),
            }
            for record in state.records
        ],
        "journal": write_record(state.journal),
    }


def show_state(state: TrustState, *, now: datetime) -> Iterator[str]:
    """Yield what is remembered in lines of text."""
    for record in state.records:
        where = f", slot {shorten_repr(record.slot)}" if record.slot else ""
        yield f"model {shorten_repr(record.model)}{where}: floor {record.floor_version}, number {record.floor_sequence}"
        for one in record.accepted:
            yield f"  accepted {one.version}, number {one.sequence}, {_age(one, now).days} days ago  {one.digest[:23]}"
        if record.confirmed is not None:
            yield f"  confirmed {record.confirmed.version}, number {record.confirmed.sequence}"
    for entry in state.journal:
        yield f"{entry.at}  {shorten_repr(entry.what)}  {shorten_repr(entry.reason)}"


def _age(release: AcceptedRelease, now: datetime) -> timedelta:
    return now - datetime.fromisoformat(release.at)
