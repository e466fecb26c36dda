"""Receipts: what was done, what was proved and how long each part took (P12).

Rules this module keeps: a receipt is data; it holds no generation, module or tensor, so that keeping every receipt of a
service's life costs no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hotglm.problem import shorten_repr
from hotglm.slot.memory import MemoryPlan
from hotglm.slot.policies import InPlaceRecord
from hotglm.slot.requantize import QuantizedFrom
from hotglm.verdict import Verdict
from hotglm.version import Version
from hotglm.weights.yielding import PaceRecord

__all__ = ["Origins", "Receipt", "StageTiming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """How long one part of a stage took, in seconds, and the bytes it moved where it moved any."""

    part: str
    duration_s: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where the bytes of a version came from; none of it counts what a mapping or module brought.

    Attributes:
        read_nbytes: read from files: tensors, and payloads of deltas.
        copied_nbytes: copied from the generation that was live.
        found_nbytes: found in the spare, where an earlier version had left them, and proved.
        decoded_nbytes: size of the tensors that deltas were applied to.
        drifted: live tensors that were no longer what their digests said, and were taken from files instead.
    """

    read_nbytes: int = 0
    copied_nbytes: int = 0
    found_nbytes: int = 0
    decoded_nbytes: int = 0
    drifted: tuple[str, ...] = ()

    def explain(self) -> str:
        """Return them as one line; empty where nothing was reused or decoded."""
        if not (self.copied_nbytes or self.found_nbytes or self.decoded_nbytes or self.drifted):
            return ""
        parts = [f"{self.read_nbytes} bytes read", f"{self.copied_nbytes} copied from the live version"]
        parts += [f"{self.found_nbytes} found in the spare"] if self.found_nbytes else []
        parts += [f"{self.decoded_nbytes} made by deltas"] if self.decoded_nbytes else []
        names = ", ".join(map(shorten_repr, self.drifted[:10]))
        parts += [f"written since it was loaded, and so read again: {names}"] if names else []
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The record of one commit, rollback or refusal.

    Attributes:
        action: `"committed"`, `"rolled back"` or `"refused"`.
        slot: name of the slot.
        old_version: what was live before.
        new_version: what is live now; for a refusal, what was offered, where that is known.
        old_number: generation that was live before.
        new_number: generation that is live now; for a refusal, the one that still is.
        source: what the weights came from, in words.
        digest: digest of what is live now.
        digests: digest of each of its tensors.
        quantized_from: the plain weights that the slot has quantised it from (`Requantize`), which is what a signature
            covers; None where it came as it is.
        verdict: the decision, where there was one.
        plan: where the memory came from.
        timings: the parts of the stage, in order.
        checks: what was proved, in words.
        carried: derived state that kept its value, by name.
        refreshed: refresh methods that ran.
        converted: tensors whose dtype was converted.
        origins: where the bytes came from.
        migration: what was done to bring the weights to the code's layout, in words; empty where nothing was.
        recompiles: pieces of code that torch compiled while it was staged; 0 where what had been compiled for the live
            version serves this one, too. What passes had compiled since is in `slot.status().recompiles`.
        recaptures: device graphs that torch or hotglm captured while it was staged; 0 where its memory has its graphs.
        commit_s: time from entering the commit to the new generation being visible, in seconds.
        at_s: wall-clock time, seconds since 1970.
        code: error code of a refusal, else empty.
        in_place: where the slot swaps in place, what that did and what was compared afterwards.
        pace: where the load yielded, how much it worked and paused.
    """

    action: str
    slot: str
    old_version: Version
    new_version: Version | None
    old_number: int
    new_number: int
    source: str = ""
    digest: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    quantized_from: QuantizedFrom | None = None
    verdict: Verdict | None = None
    plan: MemoryPlan | None = None
    timings: tuple[StageTiming, ...] = ()
    checks: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    refreshed: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    origins: Origins = field(default_factory=Origins)
    migration: tuple[str, ...] = ()
    recompiles: int = 0
    recaptures: int = 0
    commit_s: float = 0.0
    at_s: float = 0.0
    code: str = ""
    in_place: InPlaceRecord | None = None
    pace: PaceRecord | None = None

    @property
    def stage_s(self) -> float:
        """Seconds from the start of the stage to the proved spare."""
        return sum(timing.duration_s for timing in self.timings)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that were loaded."""
        return sum(timing.nbytes for timing in self.timings if timing.part == "load")

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as data that `json.dumps` takes."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("verdict", "plan")}
        plain |= {
            "old_version": str(self.old_version),
            "new_version": None if self.new_version is None else str(self.new_version),
            "digests": dict(self.digests),
            "origins": dataclasses.asdict(self.origins),
            "timings": [dataclasses.asdict(timing) for timing in self.timings],
            "verdict": None if self.verdict is None else self.verdict.explain(),
            "plan": None if self.plan is None else self.plan.explain(),
            "quantized_from": None if self.quantized_from is None else dataclasses.asdict(self.quantized_from),
            "in_place": None if self.in_place is None else dataclasses.asdict(self.in_place),
            "pace": None if self.pace is None else dataclasses.asdict(self.pace),
        }
        return plain

    def explain(self) -> str:
        """Return the receipt as text of a few lines."""
        versions = f"{self.old_version} -> {self.new_version}"
        numbers = f"generation {self.old_number} -> {self.new_number}"
        lines = [f"{self.slot}: {self.action} {versions} ({numbers}) in {self.commit_s * 1e6:.0f} us"]
        if self.timings:
            parts = ", ".join(f"{timing.part} {timing.duration_s * 1e3:.1f} ms" for timing in self.timings)
            lines.append(f"  staged from {self.source} in {self.stage_s * 1e3:.1f} ms: {parts}")
        lines += [f"  load: {self.pace.explain()}"] if self.pace else []
        lines += [f"  weights: {origins}"] if (origins := self.origins.explain()) else []
        lines += [f"  migrated: {line}" for line in self.migration]
        lines += [f"  {self.in_place.explain()}"] if self.in_place else []
        lines += [f"  digest {self.digest}"] if self.digest else []
        lines += [f"  quantised from weights {_name_digest(self.quantized_from)}"] if self.quantized_from else []
        lines += [f"  proved: {', '.join(self.checks)}"] if self.checks else []
        lines += [f"  compiled: {self.recompiles}"] if self.recompiles else []
        lines += [f"  recorded graphs: {self.recaptures}"] if self.recaptures else []
        lines += [f"  recomputed: {', '.join(self.refreshed)}"] if self.refreshed else []
        lines += [f"  carried over: {', '.join(self.carried)}"] if self.carried else []
        return "\n".join(lines)


def _name_digest(weights: QuantizedFrom) -> str:
    return "that were not hashed" if weights.digest is None else f"of digest {weights.digest}"
