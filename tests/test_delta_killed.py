"""Deltas made, materialised, published and collected: killed anywhere, the old state or the new one is there (C15)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotglm.deltas.making import make_delta
from hotglm.deltas.materializing import materialize
from hotglm.deltas.publishing import DeltaPolicy, publish_delta
from hotglm.release.store_opening import open_store
from support.deltas import State, pack_state, read_tree, write_state
from support.kill_scenarios import verify_store
from support.power_loss import cuts, record
from support.sweeping import directory, run_program, sweep

__all__ = ["directory"]  # a fixture for every test here

PROGRAM = "support.delta_sweep"
STATES: tuple[State, State] = (
    {"w": ("F32", (200,), bytes(800)), "kept": ("F32", (3,), bytes(12)), "odd": ("I8", (1,), b"a")},
    {"w": ("F32", (200,), bytes(799) + b"x"), "kept": ("F32", (3,), bytes(12)), "odd": ("I8", (1,), b"b")},
)
LEAST_CALLS = {"make-delta": 80, "materialize": 60, "publish-delta": 100, "collect-chain": 60}
STEPS = {"make-delta": 9, "materialize": 7, "publish-delta": 11, "collect-chain": 40}


@pytest.mark.parametrize("name", LEAST_CALLS)
def test_a_killed_change_is_done_or_not(name: str, directory: Path) -> None:
    """C15: SIGKILL in front of some calls leaves the old state or the new one, and the next try works."""
    assert sweep(name, "kill", STEPS[name], directory, program=PROGRAM) >= LEAST_CALLS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST_CALLS)
@pytest.mark.parametrize("how", ["kill", "torn", "EIO", "ENOSPC", "EMFILE"])
def test_a_change_that_ends_at_any_call_is_done_or_not(name: str, how: str, directory: Path) -> None:
    """C15, long form: every call, killed, torn or failing."""
    assert sweep(name, how, 1, directory, program=PROGRAM) > 0


def test_the_sweep_finds_a_planted_bug(directory: Path) -> None:
    """S15: a collection that forgets what deltas build on is seen at once."""
    done = run_program(PROGRAM, "planted-collect", "kill", 50, directory)
    assert done.returncode != 0
    assert "cannot be made" in done.stderr


# -- power cuts --------------------------------------------------------------------------------------------------------


def test_a_power_cut_leaves_no_part_of_a_delta(directory: Path) -> None:
    """S1, C15: after a cut anywhere a delta that was published is whole and can be made, or is not there."""
    store = open_store(directory / "store", creates=True)
    sources = [write_state(directory / str(number), state) for number, state in enumerate(STATES)]
    publish_delta(store, sources[0], name="ranker", version="1.0")
    policy = DeltaPolicy(max_ratio=1)

    def change() -> None:
        publish_delta(store, sources[1], name="ranker", version="1.1", policy=policy)

    recorder = record(Path(store.path), change)
    for number, (path, is_over) in enumerate(cuts(recorder, directory)):
        left = open_store(path)
        versions = verify_store(left)
        assert versions in ([["1.0", "1.1"]] if is_over else [["1.0"], ["1.0", "1.1"]])
        if len(versions) == 2:
            made = directory / f"made-{number}"
            with left.open_release("1.1") as release, materialize(release, made) as full:
                assert full.result_digest == release.result_digest
            assert (made / "model.safetensors").read_bytes() == (sources[1] / "model.safetensors").read_bytes()


def test_a_power_cut_leaves_no_part_of_what_is_materialised(directory: Path) -> None:
    """R2, C15: what was materialised is a whole release or is not there."""
    releases = directory / "releases"
    old, new = (pack_state(releases, number, state) for number, state in enumerate(STATES, 1))
    make_delta(old, new, releases / "delta").close()
    recorder = record(releases, lambda: materialize(releases / "delta", releases / "made").close())
    wanted = read_tree(new)
    for path, is_over in cuts(recorder, directory):
        assert (path / "made").exists() or not is_over
        if (path / "made").exists():
            assert read_tree(path / "made") == wanted
