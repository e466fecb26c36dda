"""What failed for a reason that may pass, and when each of it is tried again.

Rules this module keeps:

- Pure. Bytes are told apart by their key; each has a back-off of its own.
- Bounded: of more than 64 the oldest is forgotten. With a label one is remembered, since only one can be wanted.
- What is kept of an error is what it says: no traceback, whose frames would hold a whole version in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from hotglm.errors import HotglmError
from hotglm.version import Version
from hotglm.watching.scanning import Target

__all__ = ["Retries", "Retry"]

_MAX_REMEMBERED = 64
"""More than a look steps over, so that what it can meet is never forgotten for the sake of something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """A release that failed for a reason that may pass.

    Attributes:
        key: which bytes.
        version: of the release.
        attempt: how often it failed in a row.
        at_s: when it is tried again.
        error: how it failed last; None where that is not known.
    """

    key: str
    version: Version
    attempt: int
    at_s: float
    error: HotglmError | None = None


@dataclass(slots=True, kw_only=True)
class Retries:
    """All that is to be tried again. Stored whole by the thread of one watcher, and read by any.

    Attributes:
        is_label: whether a label is followed.
    """

    is_label: bool
    _all: dict[str, Retry] = field(default_factory=dict)

    def find(self, target: Target) -> Retry | None:
        """Return when a release is tried again; None where it has not failed."""
        return self._all.get(target.key)

    def is_waiting(self, target: Target, now_s: float) -> bool:
        """Tell whether a release must not be tried yet."""
        retry = self.find(target)
        return retry is not None and now_s < retry.at_s

    def left_s(self, now_s: float) -> float:
        """Return how long it is until something is due; infinite where nothing will be."""
        return min((one.at_s - now_s for one in self._all.values() if now_s < one.at_s), default=math.inf)

    def find_next_s(self) -> float | None:
        """Return when the first is tried again; None where nothing is."""
        return min((one.at_s for one in self._all.values()), default=None)

    def add(self, target: Target, *, attempt: int, at_s: float, error: HotglmError) -> None:
        """Note that a release failed, and when it is tried again."""
        said = copy.copy(error)  # without its traceback
        retry = Retry(key=target.key, version=target.version, attempt=attempt, at_s=at_s, error=said)
        others = [] if self.is_label else [one for one in self._all.values() if one.key != target.key]
        self._all = {one.key: one for one in (*others, retry)[-_MAX_REMEMBERED:]}

    def clear(self) -> None:
        """Forget all: whatever failed may be tried at once."""
        self._all = {}

    def forget(self, target: Target) -> None:
        """Forget a release that will not be tried again."""
        self._keep(lambda one: one.key != target.key)

    def forget_up_to(self, target: Target) -> None:
        """Forget what a release that went live makes pointless."""
        self._keep(lambda one: target.version < one.version)

    def forget_gone(self, target: Target | None, *, now_s: float) -> None:
        """Forget what was due and above the target of a look: it would have been the target if it were still there."""
        if not self.is_label:
            self._keep(lambda one: now_s < one.at_s or (target is not None and one.version <= target.version))

    def _keep(self, is_kept: Callable[[Retry], bool]) -> None:
        self._all = {} if self.is_label else {key: one for key, one in self._all.items() if is_kept(one)}
