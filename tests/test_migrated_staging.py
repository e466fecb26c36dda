"""A slot runs weights of any version that a path leads from; the classic family of five versions, in all 25 hops."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from support import family

HOPS = list(itertools.product(family.VERSIONS, repeat=2))


@pytest.mark.parametrize("kind", ["file", "mapping"])
@pytest.mark.parametrize(("running", "incoming"), HOPS)
def test_every_version_serves_weights_of_every_other(running: str, incoming: str, kind: str, tmp_path: Path) -> None:
    """Staged in code of any version, weights of any other are bit for bit what plain torch makes of them."""
    state = family.make_checkpoint(incoming, seed=1)
    slot = family.make_slot(running)
    source: Any = state
    if kind == "file":
        source = tmp_path / "w.safetensors"
        hotglm.save_weights(state, source, version=incoming, name=family.NAME, config=family.make_config(incoming))
    receipt = slot.update(source, version=incoming)
    cold = family.make_model(running, family.convert(state, incoming, running))
    expected, found = cold.state_dict(), slot.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(slot(family.make_input()), cold(family.make_input()))
    assert str(slot.version) == incoming
    assert bool(receipt.migration) == (running != incoming)
