"""A model on a CUDA device: the rows of several modules over one setting, or one row that says that there is no device.

Rules this module keeps: time on a device is rare. A part that fails says so in a row of its own, and the others are
measured; each row is printed as soon as it is there; and `--parts` names those that are wanted. Nothing here has been
run on a device yet.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from benchmarks import device_compiled, device_flip, device_in_place, device_proof
from benchmarks.bench import Bench, Row
from benchmarks.device_setting import Setting, open_scratch, to_note

__all__ = ["PARTS", "gather", "measure"]

_Part: TypeAlias = Callable[[Bench, Setting], list[Row]]

PARTS: dict[str, _Part] = {
    "flip": device_flip.measure,
    "in-place": device_in_place.measure,
    "proof": device_proof.measure,
    "compiled": device_compiled.measure,
}
"""What is measured, by the name that `--parts` takes, in the order of the table."""


def measure(bench: Bench) -> list[Row]:
    """Return the rows of all parts that are wanted, or one that says that there is no device."""
    if not torch.cuda.is_available():
        return [to_note("no device: nothing was measured", note="torch sees no CUDA device on this machine")]
    wanted = {name: part for name, part in PARTS.items() if name in (bench.parts or PARTS)}
    with open_scratch(bench) as directory:
        return gather(wanted, bench, Setting.make(bench, directory))


def gather(parts: Mapping[str, _Part], bench: Bench, setting: Setting) -> list[Row]:
    """Return the rows of each part; of one that fails, a row that says why. Memory is given back between them."""
    rows: list[Row] = []
    for name, part in parts.items():
        print(f"==> device: {name}", file=sys.stderr, flush=True)
        found = _measure(name, part, bench, setting)
        for row in found:
            print(f"    {row.name}: {row.ratio:.4g} {row.ratio_name} {row.target}", file=sys.stderr, flush=True)
        rows += found
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _measure(name: str, part: _Part, bench: Bench, setting: Setting) -> list[Row]:
    try:
        return part(bench, setting)
    except Exception as error:  # noqa: BLE001 - whatever one part dies of must not cost the rows of the others
        traceback.print_exc()
        return [to_note(f"part {name!r} failed", note=f"{type(error).__name__}: {error}")]
