"""AOTInductor packages in a slot: constants are the slot's, and weights inside the code are refused (G14)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import ArgumentError, TensorValueError, UnswappableError
from hotglm.integrations import aoti
from hotglm.integrations.aoti import load_package
from support.swaps import same_bits

WIDTH = 8
X = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
SHIFT = torch.ones(1)
UNUSED = ("*.num_batches_tracked",)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Exported(nn.Module):
    """A model with small weights, a table that no file carries, and an argument by keyword."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.tensor([2.0 + seed]))
        self.register_buffer("table", torch.arange(float(WIDTH)), persistent=False)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it; x: (batch, WIDTH)."""
        return {"y": self.norm(self.linear(x)) * self.scale + self.table + shift}


class Packages:
    """The same model, built in two ways."""

    def __init__(self, directory: Path) -> None:
        model = Exported().eval()
        with torch.no_grad():
            batch = {0: torch.export.Dim("batch", min=2, max=64)}
            shapes = {"x": batch, "shift": None}
            program = torch.export.export(model, (X,), {"shift": SHIFT}, dynamic_shapes=shapes)
            self.kept = self._build(program, directory / "kept.pt2", always_keep_tensor_constants=True)
            self.inlined = self._build(program, directory / "inlined.pt2")

    def _build(self, program: Any, path: Path, **options: Any) -> str:
        return str(torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    """Two packages of `Exported`, compiled once."""
    directory = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory / "cache"))
        yield Packages(directory)


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of a model, by name."""
    return {name: tensor for name, tensor in Exported(seed).state_dict().items() if "num_batches" not in name}


def answer(seed: int) -> torch.Tensor:
    """Return what a model that was never exported answers."""
    with torch.no_grad():
        found: torch.Tensor = Exported(seed).eval()(X, shift=SHIFT)["y"]
    return found


@pytest.fixture
def slot(packages: Packages) -> hotglm.ModuleSlot:
    """A slot around the package whose weights can be swapped."""
    memory = hotglm.MemoryPolicy(drain_timeout_s=0.1)
    module = load_package(packages.kept, weights=state_of(0))
    return hotglm.ModuleSlot(module, name="model", version="1.0.0", memory=memory)


def test_swaps_reach_every_weight(slot: hotglm.ModuleSlot, packages: Packages) -> None:
    """20 swaps of a package: each answers what the eager model answers and what a cold load does; rollback, too."""
    events: list[hotglm.Event] = []
    slot.subscribe(events.append)
    assert torch.allclose(slot(X, shift=SHIFT)["y"], answer(0), atol=1e-5)
    for seed in range(1, 21):
        receipt = slot.update(state_of(seed), version=f"1.0.{seed}")
        found = slot(X, shift=SHIFT)["y"]
        assert torch.allclose(found, answer(seed), atol=1e-5)
        assert receipt.refreshed == ("_refresh_container",)
    assert same_bits(slot(X, shift=SHIFT)["y"], load_package(packages.kept, weights=state_of(20))(X, shift=SHIFT)["y"])
    slot.rollback()
    assert torch.allclose(slot(X, shift=SHIFT)["y"], answer(19), atol=1e-5)
    assert not [event for event in events if "Held" in type(event).__name__]  # torch keeps no generation (P9)
    code: Any = slot.live.module._code
    assert len(code._runners) <= 4


def test_a_session_keeps_its_version(slot: hotglm.ModuleSlot) -> None:
    """A session computes with the weights it began with, while others are committed (P1)."""
    with slot.acquire() as generation:
        before = generation.module(X, shift=SHIFT)["y"]
        for seed in (1, 2, 3):
            slot.update(state_of(seed), version=f"1.0.{seed}")
        assert same_bits(generation.module(X, shift=SHIFT)["y"], before)
        assert not same_bits(slot(X, shift=SHIFT)["y"], before)


def test_no_copy_is_kept_and_nothing_is_left(packages: Packages) -> None:
    """A generation computes with the slot's own tensors; the code is unpacked once and removed at the end."""
    module = load_package(packages.kept, weights=state_of(0))
    code: Any = module._code
    directory = Path(code._directory)
    slot = hotglm.ModuleSlot(module, name="model", version="1.0.0")
    del module, code
    slot.update(state_of(1), version="1.0.1")
    before = slot(X, shift=SHIFT)["y"]
    slot.live.module.get_parameter("linear.bias").data.add_(1)  # not to be done; it shows whose memory that is
    assert not same_bits(slot(X, shift=SHIFT)["y"], before)
    assert slot.status().arenas_nbytes < 4096
    gone = weakref.ref(slot.live.module)
    del slot
    gc.collect()
    assert gone() is None
    assert not directory.exists()


def test_a_failed_stage_leaves_the_live_one(slot: hotglm.ModuleSlot) -> None:
    """Weights of another shape are refused, and the live version answers what it answered, bit for bit."""
    before = slot(X, shift=SHIFT)["y"]
    with pytest.raises(hotglm.IncompatibleError):
        slot.update({**state_of(1), "scale": torch.ones(2)}, version="1.0.1")
    with pytest.raises(hotglm.IncompatibleError):
        slot.update({"linear.weight": state_of(1)["linear.weight"]}, version="1.0.1")
    assert same_bits(slot(X, shift=SHIFT)["y"], before)


def test_a_copy_computes_with_its_own_weights(slot: hotglm.ModuleSlot) -> None:
    """A deep copy of the slot goes its own way."""
    copied = copy.deepcopy(slot)
    before = slot(X, shift=SHIFT)["y"]
    copied.update(state_of(1), version="1.0.1")
    assert same_bits(slot(X, shift=SHIFT)["y"], before)
    assert torch.allclose(copied(X, shift=SHIFT)["y"], answer(1), atol=1e-5)


def test_weights_inside_the_code_are_refused(packages: Packages) -> None:
    """A package that has inlined small weights mixes two models when it is updated; loading it names each of them."""
    package = torch._inductor.aoti_load_package(packages.inlined)
    known = package.get_constant_fqns()
    other = state_of(1)
    package.load_constants({name: other[name] for name in known if name in other}, check_full_update=False)
    mixed = package(X, shift=SHIFT)["y"]  # the hazard: accepted, and neither the old model nor the new one
    assert not torch.allclose(mixed, answer(0), atol=1e-3)
    assert not torch.allclose(mixed, answer(1), atol=1e-3)
    with pytest.raises(UnswappableError) as caught:
        load_package(packages.inlined, weights=state_of(0))
    assert {problem.tensor for problem in caught.value.problems} == set(other) - set(known)
    assert caught.value.code == "CANNOT_SWAP_INLINED"
    assert "always_keep_tensor_constants" in caught.value.remedy


def test_what_the_graph_does_not_use_has_to_be_named(packages: Packages) -> None:
    """A name that the package lacks is taken for a weight inside its code, until the caller says otherwise."""
    state = Exported().state_dict()
    with pytest.raises(UnswappableError) as caught:
        load_package(packages.kept, weights=state)
    assert [problem.tensor for problem in caught.value.problems] == ["norm.num_batches_tracked"]
    slot = hotglm.ModuleSlot(load_package(packages.kept, weights=state, unused=UNUSED), name="model", version="1.0.0")
    slot.update(Exported(1).state_dict(), version="1.0.1")
    assert torch.allclose(slot(X, shift=SHIFT)["y"], answer(1), atol=1e-5)


def test_weights_of_another_model_are_refused(packages: Packages) -> None:
    """Weights whose shape or dtype is not the package's never reach its code, which would read past their end."""
    bad = {**state_of(0), "scale": torch.ones(2), "linear.bias": torch.ones(WIDTH, dtype=torch.float64)}
    with pytest.raises(TensorValueError) as caught:
        load_package(packages.kept, weights=bad)
    assert {problem.tensor for problem in caught.value.problems} == {"scale", "linear.bias"}


def test_a_package_in_a_module_is_refused(packages: Packages) -> None:
    """A module that keeps a package shares it with every copy, so that all versions would answer alike."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.package = torch._inductor.aoti_load_package(packages.kept)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.package(x, shift=SHIFT)["y"]
            return found

    model = Keeping().eval()
    assert same_bits(copy.deepcopy(model)(X), model(X))  # the hazard: one package for both
    slot = hotglm.ModuleSlot(model, name="model", version="1.0.0")
    before = slot(X)
    with pytest.raises(UnswappableError, match="AOTInductor package"):
        slot.update(Keeping().state_dict(), version="1.0.1")
    assert same_bits(slot(X), before)


def test_what_is_no_package_is_refused(tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other files, other settings and a torch that cannot do it are refused by name."""
    other = tmp_path / "model.pt2"
    other.write_bytes(b"no archive")
    with pytest.raises(ArgumentError, match="Expected an AOTInductor package"):
        load_package(other, weights={})
    with pytest.raises(ArgumentError, match="runner"):
        load_package(packages.kept, weights=state_of(0), num_runners=0)
    monkeypatch.setattr(aoti, "_RUNNER", "Gone")
    with pytest.raises(UnswappableError, match="Expected a torch"):
        load_package(packages.kept, weights=state_of(0))
