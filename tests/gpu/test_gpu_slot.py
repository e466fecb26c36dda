"""CUDA: what goes live on a device is what a cold load gives, bit for bit, from every kind of source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotglm
from hotglm.errors import MemoryPlanError, NonFiniteError

pytestmark = pytest.mark.gpu


def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.BatchNorm1d(1024), nn.Linear(1024, 256)).to(dtype).eval()


X = torch.linspace(-1, 1, 16 * 256).view(16, 256).bfloat16()


@pytest.mark.parametrize("kind", ["file", "mapping", "mapping on the device", "module", "other dtype", "release"])
def test_a_warm_swap_equals_a_cold_load(tmp_path: Path, kind: str) -> None:
    """Outputs and digests of a swap onto the device are those of the module that was loaded cold, and of a CPU slot."""
    policy = hotglm.StagePolicy(convert_dtypes=True)
    new = make(1, torch.float32 if kind == "other dtype" else torch.bfloat16)
    source: Any = new.state_dict()
    if kind in ("file", "other dtype", "release"):
        source = tmp_path / "a.safetensors"
        save_file(new.state_dict(), source)
    if kind == "release":
        hotglm.pack(source, tmp_path / "release", name="m", version="1.0.1", sequence=1)
        source = tmp_path / "release"
    if kind == "module":
        source = new
    if kind == "mapping on the device":
        source = {name: tensor.cuda() for name, tensor in new.state_dict().items()}
    slot = hotglm.ModuleSlot(make().cuda(), name="m", version="1.0.0", policy=policy)
    plain = hotglm.ModuleSlot(make(), name="m", version="1.0.0", policy=policy)
    receipts = [each.update(source, version="1.0.1") for each in (slot, plain)]
    assert receipts[0].digest == receipts[1].digest
    cold = make(1).cuda()
    assert {parameter.device.type for parameter in slot.parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.equal(slot(X.cuda()), cold(X.cuda()))
    slot.rollback()
    with torch.no_grad():
        assert torch.equal(slot(X.cuda()), make().cuda()(X.cuda()))


def test_what_cannot_go_live_changes_nothing(tmp_path: Path) -> None:
    """NaN is refused; the live generation still serves, bit for bit."""
    slot = hotglm.ModuleSlot(make().cuda(), name="m", version="1.0.0")
    with torch.no_grad():
        before = slot(X.cuda())
    bad = {name: tensor.clone() for name, tensor in make(1).state_dict().items()}
    bad["0.weight"][7, 7] = torch.nan
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        slot.update(tmp_path / "bad.safetensors", version="1.0.1")
    with torch.no_grad():
        assert torch.equal(slot(X.cuda()), before)


def test_a_spare_that_the_device_cannot_hold_changes_nothing() -> None:
    """A device that is full refuses the plan, by name; the live generation still serves, bit for bit."""
    slot, state = hotglm.ModuleSlot(nn.Linear(4096, 4096).cuda(), name="m", version="1.0.0"), torch.ones(4096, 4096)
    before = slot.state_dict()["weight"].cpu()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - (8 << 20)), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(MemoryPlanError, match="cuda:0"):
            slot.update({"weight": state, "bias": torch.ones(4096)}, version="1.0.1")
    finally:
        del taken
        torch.cuda.empty_cache()
    assert torch.equal(slot.state_dict()["weight"].cpu(), before)
    slot.update({"weight": state, "bias": torch.ones(4096)}, version="1.0.1")
    assert torch.equal(slot.state_dict()["weight"].cpu(), state)


DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
)


class Zoo(nn.Module):
    """Tensors of every dtype, of shapes that are easily forgotten, tied, strided and large."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for dtype in DTYPES:
            for number, shape in enumerate([(), (0, 3), (7,), (5, 3), (1, 1, 9)]):
                values = torch.rand(shape, generator=generator) * (2 if dtype is torch.bool else 100)
                self.register_buffer(f"{dtype}_{number}".replace(".", "_"), values.to(dtype))
        self.large = nn.Parameter(torch.rand(1000, 1000, generator=generator), requires_grad=False)
        self.tied = self.large
        self.turned = nn.Parameter(torch.rand(4, 6, generator=generator).t(), requires_grad=False)
        self.register_buffer("every_other", torch.rand(64, generator=generator)[::2])


@pytest.mark.parametrize("kind", ["file", "mapping", "mapping on the device", "module", "module on the device"])
def test_every_dtype_and_shape_arrives(tmp_path: Path, kind: str) -> None:
    """Digests and bytes are those of a slot on the processor: of all dtypes, scalars, empty, tied and strided ones."""
    slots = [hotglm.ModuleSlot(Zoo(0).to(place), name="m", version="1.0.0") for place in ("cuda", "cpu")]
    for number in (1, 2, 3):
        source: Any = Zoo(number)
        if kind == "module on the device":
            source = source.cuda()
        if "module" not in kind:
            source = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
        if kind == "file":
            del source["tied"]
            save_file(source, tmp_path / f"{number}.safetensors")
            source = tmp_path / f"{number}.safetensors"
        if kind == "mapping on the device":
            source = {name: tensor.cuda() for name, tensor in source.items()}
        receipts = [slot.update(source, version=f"1.0.{number}") for slot in slots]
        assert receipts[0].digest == receipts[1].digest
        found, expected = [slot.state_dict() for slot in slots]
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert (tensor.device.type, tensor.dtype, tensor.shape) == (
                "cuda",
                expected[name].dtype,
                expected[name].shape,
            )
            flat = [each.cpu().contiguous().reshape(-1) for each in (tensor, expected[name])]
            assert not tensor.numel() or torch.equal(*(each.view(torch.uint8) for each in flat)), name


def test_a_module_on_the_device_and_the_processor(tmp_path: Path) -> None:
    """Parts in both places go live together, each where it was."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Linear(64, 64)
            self.far = nn.Linear(64, 64).cuda()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.far(self.near(x).cuda())
            return found

    slot, new = hotglm.ModuleSlot(Both(), name="m", version="1.0.0"), Both()
    save_file({name: tensor.cpu() for name, tensor in new.state_dict().items()}, tmp_path / "a.safetensors")
    receipt = slot.update(tmp_path / "a.safetensors", version="1.0.1")
    x = torch.ones(3, 64)
    assert torch.equal(slot(x), new(x))
    assert receipt.plan is not None
    assert [part.name for part in receipt.plan.devices] == ["cuda:0"]
    assert [parameter.device.type for parameter in slot.parameters()] == ["cpu", "cpu", "cuda", "cuda"]


def test_derived_state_and_warm_up_run_on_the_device(tmp_path: Path) -> None:
    """A refresh and a warm-up in the spare work on its tensors, in the autocast mode of the caller."""
    kinds: list[tuple[str, torch.dtype]] = []

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64))
            self.register_buffer("norm", torch.zeros(()), persistent=False)

        @hotglm.refresh("norm")
        def _refresh(self) -> None:
            self.get_buffer("norm").copy_(self.weight.detach().norm())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = x @ self.weight / self.get_buffer("norm")
            kinds.append((found.device.type, (x @ self.weight).dtype))
            return found

    x = torch.ones(2, 64, device="cuda")
    slot = hotglm.ModuleSlot(Scaled().cuda(), name="m", version="1.0.0", policy=hotglm.StagePolicy(warm_up=(x,)))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        slot.update({"weight": torch.full((64, 64), 2.0)}, version="1.0.1")
    assert kinds == [("cuda", torch.bfloat16)]
    assert float(slot.live.module.get_buffer("norm")) == 128.0
