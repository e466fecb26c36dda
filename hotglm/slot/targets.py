"""Where each tensor of a twin is filled, and which names fill the same memory.

Rules this module keeps: of names that share memory one fills it, and that one covers all of it; the others are
compared with it.
"""

from __future__ import annotations

import bisect

from hotglm.errors import Problem, UncopyableError
from hotglm.model.extents import extent_nbytes
from hotglm.model.inspection import StateEntry
from hotglm.model.twin import Twin
from hotglm.weights.layout import Layout
from hotglm.weights.proof import Target

__all__ = ["find_targets"]


def find_targets(twin: Twin, layout: Layout, entries: list[StateEntry]) -> dict[str, Target]:
    """Return where each name goes; names whose tensors overlap share a key, so that one fills and the others compare.

    Raises:
        UncopyableError: persistent tensors overlap and none of them covers the others.
    """
    targets: dict[str, Target] = {}
    keys: dict[int, str] = {}
    spans = sorted(layout.spans, key=lambda span: span.offset)
    for entry in entries:
        view, offset = twin.views[entry.name], layout.offsets[entry.name]
        at = bisect.bisect_right(spans, offset, key=lambda span: span.offset) - 1
        span = spans[at] if view.numel() else None
        covers = span is None or extent_nbytes(view) == span.nbytes
        key = entry.name if span is None else keys.setdefault(span.offset, entry.name)
        targets[entry.name] = Target(view=view, offset=offset, key=key, covers=covers)
    covered = {target.key for target in targets.values() if target.covers}
    problems = [
        Problem(code="OVERLAP", message="Expected a tensor of its own, or inside another one", tensor=entry.name)
        for entry in entries
        if entry.persistent and targets[entry.name].key not in covered
    ]
    if problems:
        raise UncopyableError(
            "Expected tensors that overlap to have one that covers the others, got partial overlaps.",
            problems=problems,
            remedy="give the named tensors memory of their own, or make one a view of the other.",
        )
    return targets
