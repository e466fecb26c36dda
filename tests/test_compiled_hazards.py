"""What a swap would not reach in compiled code: each hazard is shown with torch alone, then refused by a slot (G14)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import StaleStateError, UnswappableError
from support.compiled_fixtures import fresh_dynamo
from support.compiled_models import WIDTH, Model, draw, make
from support.swaps import same_bits

__all__ = ["fresh_dynamo"]  # a fixture for every test here

X = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


class Frozen:
    """A model compiled by inductor, and the setting that its code was made under."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))
        self.config: Any = torch._inductor.config


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    """Inductor's settings, and a cache of compiled code of its own."""
    return Frozen(tmp_path, monkeypatch)


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_frozen_code_is_refused(frozen: Frozen) -> None:
    """Under freezing the weights are constants: a write in place reaches nothing, and the slot takes no such code."""
    with frozen.config.patch(freezing=True), torch.no_grad():
        model: Any = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval())
        before = model(X)
        model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
        assert same_bits(model(X), before)  # the hazard
        with pytest.raises(UnswappableError) as caught:
            hotglm.ModuleSlot(model, name="model", version="1.0.0")
    assert caught.value.code == "CANNOT_SWAP_FROZEN"
    with pytest.raises(UnswappableError):  # it is what it was, whatever the setting is now
        hotglm.ModuleSlot(model, name="model", version="1.0.0")


def test_freezing_that_is_turned_on_later_is_refused(frozen: Frozen) -> None:
    """What would be compiled from now on would hold constants: the next stage says so, and the live one serves on."""
    slot = hotglm.ModuleSlot(make("in place"), version="1.0.0")
    with frozen.config.patch(freezing=True), pytest.raises(UnswappableError, match="without freezing"):
        slot.update(draw(slot, 1), version="1.0.1")
    assert slot.version == hotglm.Version("1.0.0")
    assert slot.status().num_refused == 1


def test_freezing_that_was_on_for_one_pass_is_refused(frozen: Frozen) -> None:
    """What a pass has had compiled under freezing holds constants, though it was off before and after."""
    model: Any = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval())
    slot = hotglm.ModuleSlot(model, name="model", version="1.0.0", swap=hotglm.InPlace())
    with frozen.config.patch(freezing=True), torch.no_grad():
        before = slot(X)
        tensors = {name: tensor.clone() for name, tensor in slot.state_dict().items()}
        for tensor in slot.live.module.state_dict().values():
            tensor.zero_()
        assert same_bits(slot(X), before)  # the hazard
        slot.live.module.load_state_dict(tensors)
    with torch.no_grad():
        with pytest.raises(UnswappableError) as caught:
            slot.update(draw(slot, 1), version="1.0.1")
        assert caught.value.code == "CANNOT_SWAP_FROZEN"
        assert same_bits(slot(X), before)
        torch._dynamo.reset()
        state = draw(slot, 1)
        slot.update(state, version="1.0.1")
        assert same_bits(slot(X), nn.functional.linear(X, state["0.weight"], state["0.bias"]))


def test_frozen_methods_and_options_are_refused(frozen: Frozen) -> None:
    """Freezing is found in the options of one compiled method; other compilers know no freezing."""
    with pytest.raises(UnswappableError, match="fast"):
        hotglm.ModuleSlot(make("method", options={"freezing": True}), version="1.0.0")
    with frozen.config.patch(freezing=True):
        hotglm.ModuleSlot(make("method", backend="eager"), version="1.0.0")


# -- hooks -------------------------------------------------------------------------------------------------------------


def add_hook(module: nn.Module, calls: list[int]) -> None:
    """Have every pass of a part noted."""
    module.register_forward_hook(lambda *_: calls.append(1))


def test_a_hook_after_the_first_pass_is_refused() -> None:
    """Dynamo never looks at hooks again: one that is registered later never runs, and the next stage says so."""
    slot = hotglm.ModuleSlot(make("in place", backend="eager"), version="1.0.0")
    before = slot(X)
    calls: list[int] = []
    add_hook(slot.live.module.get_submodule("first"), calls)
    slot(X)
    assert calls == []  # the hazard
    with pytest.raises(UnswappableError, match="'first'") as caught:
        slot.update(draw(slot, 1), version="1.0.1")
    assert caught.value.code == "CANNOT_SWAP_HOOKED"
    assert same_bits(slot(X), before)


def test_forgetting_compiled_code_is_a_remedy() -> None:
    """After `torch._dynamo.reset()` the hook runs, in this generation and in the next."""
    slot = hotglm.ModuleSlot(make("in place", backend="eager"), version="1.0.0")
    slot(X)
    calls: list[int] = []
    add_hook(slot.live.module.get_submodule("first"), calls)
    torch._dynamo.reset()
    slot(X)
    slot.update(draw(slot, 1), version="1.0.1")
    slot(X)
    assert calls == [1, 1]


def test_hooks_that_torch_sees_are_taken() -> None:
    """Hooks from before the first pass run in every generation, and so do those of the compiled module itself."""
    calls: list[int] = []
    model = make("in place", backend="eager")
    add_hook(model.first, calls)
    slot = hotglm.ModuleSlot(model, version="1.0.0")
    slot(X)
    add_hook(slot.live.module, calls)
    slot(X)
    slot.update(draw(slot, 1), version="1.0.1")
    slot(X)
    assert len(calls) == 1 + 2 + 2


def test_guarded_hooks_are_taken() -> None:
    """Where torch was told to guard hooks, a late one runs, and costs one compilation, which the status counts."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        slot = hotglm.ModuleSlot(make("in place", backend="eager"), version="1.0.0")
        slot(X)
        slot.update(draw(slot, 1), version="1.0.1")
        slot(X)
        calls: list[int] = []
        add_hook(slot.live.module.get_submodule("first"), calls)
        slot(X)
        assert calls == [1]
        assert slot.status().recompiles == 1
        slot.update(draw(slot, 2), version="1.0.2")
        slot(X)
        assert calls == [1, 1]


# -- TorchScript, exported and quantised modules -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_frozen_script_is_refused() -> None:
    """`torch.jit.freeze` makes constants of the weights and folds them: where they came from no longer matters."""
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.BatchNorm1d(1)).eval()
    x = X[:, None]
    script: Any = torch.jit.freeze(torch.jit.script(model))
    before = script(x)
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
    assert same_bits(script(x), before)  # the hazard
    assert not list(script.parameters())
    with pytest.raises(UnswappableError, match="TorchScript"):
        hotglm.ModuleSlot(script, name="model", version="1.0.0")


class WithTable(nn.Module):
    """A model whose table is in no state dict."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        found: torch.Tensor = self.linear(x) + torch.tensor([self.shift] * WIDTH)
        return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_module_swaps_and_its_constants_are_refused() -> None:
    """An exported module is swapped like any other; constants that export has lifted out of the code are refused."""
    plain: Any = torch.export.export(Model().eval(), (X,)).module()
    slot = hotglm.ModuleSlot(plain, name="model", version="1.0.0")
    new = Model().eval()
    slot.update(new.state_dict(), version="1.0.1")
    with torch.no_grad():
        assert torch.allclose(slot(X), new(X), atol=1e-5)

    lifted: Any = torch.export.export(WithTable(1.0).eval(), (X,)).module()
    other = WithTable(2.0).eval()
    lifted.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.allclose(lifted(X) + 1, other(X), atol=1e-5)  # the hazard: the table is the old one's
    slot = hotglm.ModuleSlot(lifted, name="model", version="1.0.0")
    before = slot(X)
    with pytest.raises(StaleStateError, match="lifted_tensor_0"):
        slot.update(other.state_dict(), version="1.0.1")
    assert same_bits(slot(X), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_swap_by_modules_only() -> None:
    """Packed weights are in no file: a state dict of torch.ao's layers is refused, a module quantised anew is taken."""
    first, second = _quantise(), _quantise()
    slot = hotglm.ModuleSlot(first, name="model", version="1.0.0", accept="major")
    before, expected = slot(X), second(X)
    with pytest.raises(hotglm.SourceError, match="_packed_params"):
        slot.update(second.state_dict(), version="1.0.1")
    assert same_bits(slot(X), before)
    slot.update(second, version="1.0.1")
    assert same_bits(slot(X), expected)
    slot.rollback()
    assert same_bits(slot(X), before)


def _quantise() -> Any:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    return quantise(nn.Sequential(nn.Linear(WIDTH, WIDTH)), {nn.Linear})


class Halved(torch.Tensor):
    """A wrapper subclass like those of quantisation libraries: it has no memory of its own, only an inner tensor."""

    qdata: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        """Wrap `inner`."""
        made: Any = torch.Tensor._make_wrapper_subclass
        found: Self = made(cls, inner.shape, dtype=torch.float32)
        found.qdata = inner.half()
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the inner tensors."""
        return ["qdata"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute on what is inside."""
        plain = torch.utils._pytree.tree_map_only(Halved, lambda one: one.qdata.float(), (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        return Halved(result) if func is torch.ops.aten.detach.default else result


def test_wrapper_subclasses_are_refused_by_name() -> None:
    """Parameters that only wrap others, and that nobody can make again from these, are named (G13)."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight = nn.Parameter(Halved(torch.ones(WIDTH, WIDTH)), requires_grad=False)
    expected = layer(X)
    layer.weight.data.copy_(torch.zeros(WIDTH, WIDTH))
    assert same_bits(layer(X), expected)  # the hazard: the write went into a temporary
    with pytest.raises(hotglm.UncopyableError, match="the subclass Halved"):
        hotglm.ModuleSlot(layer, name="model", version="1.0.0")
