"""Steps that change values and neither names nor shapes: what fits may still be of another layout, and is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hotglm
from hotglm.migration.expression import TensorSpec
from hotglm.migration.operation import Operation
from support.buffers import make_slot


def spec(*shape: int) -> TensorSpec:
    """Return the spec of a float32 tensor."""
    return TensorSpec(dtype="float32", shape=shape)


def make(*operations: Operation) -> hotglm.Migrations:
    """Return migrations with one step from 1.0 to 2.0."""
    migrations = hotglm.Migrations("ranker")
    migrations.state("1.0", "2.0", operations)
    return migrations


@pytest.mark.parametrize(
    "operation",
    [
        hotglm.Scale("a", 3.0),
        hotglm.Transpose("a", 0, 1),
        hotglm.Apply(lambda given: {"a": given["a"] + 1}, ("a",), {"a": spec(2, 2)}),
    ],
    ids=lambda operation: type(operation).__name__,
)
@pytest.mark.parametrize("version", ["1.0", "1.9", "2.0rc1", "3.0"])
def test_weights_of_another_layout_that_fit_are_refused_where_no_path_leads_from_them(
    version: str, operation: Operation
) -> None:
    """Where a step that only changes values lies between weights and code, and cannot be gone, they are not loaded."""
    migrations = hotglm.Migrations("ranker")
    migrations.state(">=1.5,<1.6", "2.0", [operation])
    migrations.state("2.0", "3.0", [operation, hotglm.Drop("gone", optional=True)])
    slot = make_slot(migrations, a=torch.zeros(2, 2))
    with pytest.raises(hotglm.IncompatibleError) as caught:
        slot.update({"a": torch.ones(2, 2)}, version=version)
    assert [problem.code for problem in caught.value.problems] == ["NO_PATH"]
    assert "keeps both" in str(caught.value)
    assert torch.equal(slot.state_dict()["a"], torch.zeros(2, 2))
    slot.update({"a": torch.ones(2, 2)}, version="1.5" if not isinstance(operation, hotglm.Apply) else "2.1")
    assert slot.state_dict()["a"].any()


def save_plain(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a file that says nothing of itself."""
    save_file(dict(tensors), path)
    return path


def test_a_file_without_a_version_is_not_taken_for_the_layout_that_it_fits_alone(tmp_path: Path) -> None:
    """A plain file that fits the code, and what came before a step that only changes values, is refused until told."""
    slot = make_slot(make(hotglm.Scale("a", 2.0)), a=torch.zeros(2))
    plain = save_plain(tmp_path / "plain.safetensors", {"a": torch.ones(2)})
    with pytest.raises(hotglm.UnknownVersionError) as caught:
        slot.update(plain)
    assert [problem.code for problem in caught.value.problems] == ["SILENT_STEP"]
    assert slot.state_dict()["a"].tolist() == [0.0, 0.0]
    slot.update(plain, version="1.0")
    assert slot.state_dict()["a"].tolist() == [2.0, 2.0]
    slot.update(plain, version="2.0")
    assert slot.state_dict()["a"].tolist() == [1.0, 1.0]
    slot.update({"a": torch.full((2,), 3.0)})  # what runs beside the service comes from its own code
    assert slot.state_dict()["a"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [
        ([hotglm.Rename("b", "a"), hotglm.Scale("a", 2.0)], [1.0, 1.0]),
        ([hotglm.Rename("b", "a", optional=True)], [1.0, 1.0]),
    ],
    ids=["renamed too", "optional"],
)
def test_a_file_without_a_version_is_used_where_its_names_tell(
    operations: list[Operation], wanted: list[float], tmp_path: Path
) -> None:
    """A plain file that fits the code is used as it is where every known step would need, or make, something else."""
    slot = make_slot(make(*operations), a=torch.zeros(2))
    slot.update(save_plain(tmp_path / "plain.safetensors", {"a": torch.ones(2)}))
    assert slot.state_dict()["a"].tolist() == wanted
