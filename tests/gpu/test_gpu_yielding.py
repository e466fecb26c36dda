"""CUDA: loads that yield bring what others bring, and leave the copy engine alone between two pieces.

`PYTHONPATH=. python3 -m pytest -m gpu tests/gpu`. That a missing wait is found out is tested on the fake device
(tests/test_yielding_loads.py): a copy of 1 MiB is over here before anybody could look.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.weights.cuda import CudaDevice
from hotglm.weights.pace import PIECE_NBYTES

pytestmark = pytest.mark.gpu

SMALL_NBYTES = 64 << 10
POLICY = hotglm.StagePolicy(pace=hotglm.Yielding(max_share=1.0, min_share=0.25))


def make_module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)).cuda()


@pytest.mark.parametrize("kind", ["file", "mapping on the host", "mapping on the device"])
def test_a_load_that_yields_brings_what_others_bring(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece, each seen done before the next copy is submitted; the same weights, bit for bit."""
    state = {name: tensor.detach().clone() for name, tensor in make_module(1).state_dict().items()}
    on_host = {name: tensor.cpu() for name, tensor in state.items()}
    save_file(on_host, tmp_path / "a.safetensors")
    sources = {"file": tmp_path / "a.safetensors", "mapping on the host": on_host, "mapping on the device": state}
    sizes, copy = list[int](), CudaDevice.copy

    def watch(device: CudaDevice, source: torch.Tensor, target: torch.Tensor) -> None:
        if sizes and target.numel() > SMALL_NBYTES:  # small tensors may take several copies for one piece
            assert device._side.query(), "a copy was submitted while another was under way"
        sizes.append(target.numel())
        copy(device, source, target)

    slot = hotglm.ModuleSlot(make_module(0), name="m", version="1.0.0", policy=POLICY)
    monkeypatch.setattr(CudaDevice, "copy", watch)
    receipt = slot.update(sources[kind], version="1.0.1")  # type: ignore[arg-type]
    monkeypatch.undo()
    assert receipt.pace is not None
    assert receipt.pace.busy_s > 0
    assert not sizes or max(sizes) <= PIECE_NBYTES
    found = slot.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert slot.verify_live().digest == receipt.digest
