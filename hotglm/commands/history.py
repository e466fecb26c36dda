"""The history of a store as values: releases with what leads to them, and the columns that their picture is drawn in.

Rules this module keeps:

- A release that is broken is in the history, with the reason.
- A delta stands in the column that leads down to its base; what has no base in the store starts a column of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hotglm.commands.release_text import describe_release
from hotglm.envelope import ENVELOPE_NAME
from hotglm.errors import SourceError
from hotglm.release.directory import open_release
from hotglm.release.ledger import Label, ServiceState
from hotglm.release.store_reading import StoredRelease, StoreReader

__all__ = ["Entry", "History", "Row", "plan_rows", "read_history"]

_MAX_COLUMNS = 12
"""More deltas than that on different bases at once are not drawn; their base is named all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One release.

    Attributes:
        stored: its number, version and path.
        facts: what identifies it, as JSON values; None where it cannot be read.
        refusal: why it cannot be read.
        base: number of its base, where it is a delta of a release that is in the store.
        is_signed: whether an envelope stands beside its manifest; nothing is verified here.
    """

    stored: StoredRelease
    facts: Mapping[str, object] | None
    refusal: str | None
    base: int | None = None
    is_signed: bool = False

    @property
    def nbytes(self) -> int:
        """Size of what it carries, in bytes; 0 where it cannot be read."""
        return 0 if self.facts is None else int(str(self.facts["nbytes"]))

    @property
    def what(self) -> str:
        """What it is: full, a delta of something, or broken."""
        if self.facts is None:
            return f"broken: {self.refusal}"
        base = self.facts["base"]
        if not isinstance(base, Mapping):
            return "full"
        return f"delta on {base['version']}{'' if self.base is not None else ', which is not here'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the picture, from top to bottom, newest first.

    Attributes:
        entry: the release.
        column: where it stands.
        has_above: whether a delta above leads down to it in its own column.
        merges: other columns from which deltas lead to it.
        passes: columns that pass by.
        continues: whether its column leads on, to its base.
    """

    entry: Entry
    column: int
    has_above: bool
    merges: tuple[int, ...]
    passes: tuple[int, ...]
    continues: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a store holds and remembers.

    Attributes:
        path: of the store.
        entries: its releases, newest first.
        num_older: how many older ones are left out.
        labels: where labels lead and led.
        services: what services confirmed, try and refuse.
    """

    path: str
    entries: Sequence[Entry]
    num_older: int
    labels: Mapping[str, Label]
    services: Mapping[str, ServiceState]

    def find_labels(self, entry: Entry) -> list[str]:
        """Return the labels that lead to a release."""
        sequence = entry.stored.sequence
        return sorted(name for name, label in self.labels.items() if label.release.sequence == sequence)

    def find_marks(self, entry: Entry) -> Iterator[tuple[str, str]]:
        """Yield what services think of a release: `"confirmed"`, `"trial"` or `"refused"`, and which service."""
        sequence = entry.stored.sequence
        for name, state in sorted(self.services.items()):
            if state.confirmed is not None and state.confirmed.sequence == sequence:
                yield "confirmed", name
            if any(trial.release.sequence == sequence for trial in state.trials):
                yield "trial", name
            if any(refusal.release.sequence == sequence for refusal in state.refused):
                yield "refused", name


def read_history(store: StoreReader, *, newest: int | None) -> History:
    """Read what a store holds: the newest releases, or all of them.

    Raises:
        StoreError: a record is damaged. SourceReadError: something cannot be listed.
    """
    labels, services = store.read_labels(), store.read_services()
    stored = list(reversed(store.find_releases()))
    shown = stored if newest is None else stored[:newest]
    here = {(one.sequence, str(one.version)) for one in shown}
    return History(
        path=store.path,
        entries=[_read(one, here=here) for one in shown],
        num_older=len(stored) - len(shown),
        labels=labels,
        services=services,
    )


def _read(stored: StoredRelease, *, here: set[tuple[int, str]]) -> Entry:
    try:
        with open_release(stored.path) as release:
            delta = release.manifest.delta
            base = None if delta is None else delta.base
            is_here = base is not None and (base.sequence, str(base.version)) in here
            return Entry(
                stored=stored,
                facts=describe_release(release),
                refusal=None,
                base=base.sequence if base is not None and is_here else None,
                is_signed=os.path.lexists(os.path.join(release.path, ENVELOPE_NAME)),
            )
    except SourceError as error:  # a history shows what is broken, too
        return Entry(stored=stored, facts=None, refusal=error.code)


def plan_rows(entries: Sequence[Entry]) -> Iterator[Row]:
    """Yield the lines of the picture: each release in the column in which a delta above waits for it, or a free one."""
    waiting: list[int | None] = []  # by column: the number of the release that it leads down to
    for entry in entries:
        sequence = entry.stored.sequence
        found = [column for column, base in enumerate(waiting) if base == sequence]
        column = found[0] if found else _find_free(waiting)
        goes_on = entry.base is not None and entry.base < sequence and column < _MAX_COLUMNS
        yield Row(
            entry=entry,
            column=column,
            has_above=bool(found),
            merges=tuple(found[1:]),
            passes=tuple(at for at, base in enumerate(waiting) if base is not None and base != sequence),
            continues=goes_on,
        )
        for at in found:
            waiting[at] = None
        waiting += [None] * (column + 1 - len(waiting))
        waiting[column] = entry.base if goes_on else None
        while waiting and waiting[-1] is None:
            waiting.pop()


def _find_free(waiting: Sequence[int | None]) -> int:
    return next((column for column, base in enumerate(waiting) if base is None), len(waiting))
