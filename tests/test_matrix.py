"""All 25 hops of a model of five versions, through the plugin that users test theirs with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hotglm import testing
from hotglm.testing.cell_run import CellRun
from hotglm.testing.cells import Cell
from support import family


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute alone: its teams of threads would wait for each other on the cores that traffic keeps busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hotglm_model(hotglm_plan: Cell) -> testing.ModelFamily:
    """The family; each running version keeps its own code, or makes way for the class of the incoming version."""
    keeps_code = hotglm_plan.axis("code", "running") == "running"
    return testing.ModelFamily(
        make_model=family.make_model,
        make_inputs=lambda version: family.make_input(),
        make_cold=lambda running, incoming: family.make_model(
            running, family.convert(family.make_checkpoint(incoming), incoming, running)
        ),
        options={"migrations": family.MIGRATIONS} if keeps_code else {},
    )


@pytest.mark.hotglm_matrix(model=family.NAME, running=family.VERSIONS)
def test_every_hop(hotglm_cell: CellRun) -> None:
    """Each version swaps under the code of each other, up and down, and equals a cold load by plain torch, bit for bit.

    The weights go through as many migrations as there are versions in between.
    """
    result = hotglm_cell.verify()
    distance = family.VERSIONS.index(result.cell.running) - family.VERSIONS.index(result.cell.incoming)
    assert result.code_version == result.cell.running
    assert (result.num_up, result.num_down) == (max(distance, 0), max(-distance, 0))


@pytest.mark.hotglm_matrix(
    model=family.NAME, running=["1.4"], incoming=["1.0", "1.4", "3.0"], axes={"code": ["incoming"]}
)
def test_a_version_brings_its_own_code(hotglm_cell: CellRun) -> None:
    """Where the class of the incoming version is registered it takes over, and nothing has to be migrated."""
    result = hotglm_cell.verify()
    assert result.code_version == result.cell.incoming
    assert not result.path


@pytest.mark.hotglm_matrix(
    model=family.NAME, running=["1.0", "3.0"], axes={"dtype": ["bfloat16"], "compile": ["off", "eager"]}
)
def test_hops_into_another_dtype_and_a_compiled_model(hotglm_cell: CellRun) -> None:
    """A service in another dtype than the files, compiled or not, gets what a cold load in that dtype has."""
    hotglm_cell.verify()


@pytest.mark.parametrize("target", family.VERSIONS)
@pytest.mark.parametrize("source", family.VERSIONS)
def test_there_and_back_is_where_it_was(source: str, target: str) -> None:
    """Going from any version to any other and back gives the same bits and the same config."""
    state, config = family.make_checkpoint(source), family.make_config(source)
    there = testing.assert_round_trip(family.MIGRATIONS, state, source=source, target=target, config=config)
    expected = family.convert(state, source, target)
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[name], expected[name]) for name in expected)


def test_a_way_back_that_loses_something_is_caught() -> None:
    """A version whose new words are not zero does not survive the way down, and the tensor is named."""
    state = family.make_checkpoint("2.1")
    state["embed.weight"][-1] = 1
    with pytest.raises(AssertionError, match=r"2\.1 -> 2\.0 and back .*\n.*embed\.weight"):
        testing.assert_round_trip(family.MIGRATIONS, state, source="2.1", target="2.0")


def test_a_fault_in_each_step_and_unit_of_a_migration_changes_nothing() -> None:
    """A migrated update that fails at any step or at any group of tensors leaves the slot as it was."""
    slot, state = family.make_slot("3.0"), family.make_checkpoint("1.0", seed=1)
    counts = testing.assert_faults_change_nothing(
        slot,
        lambda: slot.update(state, version="1.0"),
        inputs=family.make_input(),
        kinds=["migration_step", "migration_unit"],
    )
    assert counts["migration_step"] >= 4  # steps of every path that is planned, and there may be several
    assert counts["migration_unit"] >= 1
