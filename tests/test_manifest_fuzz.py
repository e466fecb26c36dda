"""Mutated manifests and records: refused with a typed error, or read and spelt as they stand; nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hotglm.errors import ReleaseError, StoreError
from hotglm.manifest import format_manifest, parse_manifest
from hotglm.manifest_fields import Manifest
from hotglm.release.ledger import Label, LabelMove, ReleaseId, read_record, write_ledger
from support.deltas import small_delta
from support.mutator import mutate_bytes
from support.releases import small_manifest

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**64, 1.5, "", "x", "\ud800", "../x", "\x00", [], [1], [[]], {}, {"a": 1},
    "sha256:" + "0" * 64, "2026-01-01T00:00:00Z", "hotglm.release/1",
)  # fmt: skip


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Return a document with one place changed: a value replaced, a member dropped, renamed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        way = rng.random()
        if way < 0.1:
            del changed[key]
        elif way < 0.2:
            changed[rng.choice(["x", "", "a/b", "\n", key + "x"])] = changed.pop(key)
        else:
            changed[key] = mutate_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def fuzz(seed: int, num: int, original: Manifest) -> tuple[int, set[str]]:
    """Parse `num` mutations; return how many were taken, and every code that one was refused with."""
    rng = random.Random(seed)
    good = format_manifest(original)
    document = json.loads(good)
    num_taken, codes = 0, set()
    for _ in range(num):
        if rng.random() < 0.4:
            text = mutate_bytes(good, good, rng)
        else:
            is_inside = "delta" in document and rng.random() < 0.7
            changed = {**document, "delta": mutate_value(document["delta"], rng)} if is_inside else None
            changed = mutate_value(document, rng) if changed is None else changed
            text = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        try:
            manifest = parse_manifest(text)
        except ReleaseError as error:
            codes |= {problem.code for problem in error.problems}
        else:
            num_taken += 1
            assert format_manifest(manifest) == text
    return num_taken, codes


def test_mutated_manifests_never_surprise() -> None:
    """A38: thousands of mutations are refused with typed errors, or say something else in its one spelling."""
    num_taken, codes = fuzz(5, 3000, small_manifest())
    assert num_taken > 30
    assert len(codes) >= 18  # the mutations reach this many kinds of refusal


def test_mutated_deltas_never_surprise() -> None:
    """C05, C06: the same for deltas, whose field `delta` is a large part of the manifest."""
    num_taken, codes = fuzz(6, 3000, small_delta())
    assert num_taken > 30
    assert sum(code.startswith("DELTA_") for code in codes) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_more_mutations_never_surprise(seed: int) -> None:
    """A38, long form."""
    fuzz(seed, 100_000, small_delta() if seed % 2 else small_manifest())


def test_mutated_records_never_surprise(tmp_path: Path) -> None:
    """B28: a label that is not what was written is a typed error, or a label."""
    rng = random.Random(3)
    path = tmp_path / "stable.json"
    move = LabelMove(release=ReleaseId(sequence=1, version="1.0", digest="sha256:0"), moved_at="2026-01-01")
    write_ledger(str(path), Label(name="stable", revision=1, moves=(move,)))
    good = path.read_bytes()
    document = json.loads(good)
    num_refused = 0
    for _ in range(500):
        is_bytes = rng.random() < 0.5
        text = mutate_bytes(good, good, rng) if is_bytes else json.dumps(mutate_value(document, rng)).encode()
        path.write_bytes(text)
        try:
            label = read_record(str(path), Label)
            assert label is not None
            assert isinstance(label.release.sequence, int)
        except StoreError:
            num_refused += 1
    assert num_refused > 250
