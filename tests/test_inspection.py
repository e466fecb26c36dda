"""Reading modules: every name of every tensor, and a refusal that names all that no slot can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import ModuleError, NotMaterializedError, UncopyableError, UnswappableError
from hotglm.model.inspection import contract_of, find_state
from support.swaps import make_class, same_bits


class Tied(nn.Module):
    """Two tied matrices, a layer under two names, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(2)
        self.again = self.norm
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.register_parameter("absent", None)

    def forward(self, ids: torch.Tensor, *, scale: float = 1.0) -> Any:
        return self.head(self.again(self.embed(ids))) * scale


def test_every_name_is_found_in_registration_order() -> None:
    """Persistent names are exactly those of `state_dict`, aliases included, in its order."""
    entries = list(find_state(Tied()))
    assert [entry.name for entry in entries if entry.persistent] == list(Tied().state_dict())
    assert [entry.name for entry in entries if not entry.persistent] == ["table"]
    kinds = {entry.name: entry.kind for entry in entries}
    assert (kinds["embed.weight"], kinds["norm.running_mean"], kinds["table"]) == ("parameter", "buffer", "buffer")
    assert all(getattr(entry.owner, entry.name.rpartition(".")[2]) is entry.tensor for entry in entries)


def test_ties_name_the_first_name_of_their_group() -> None:
    """Tied parameters and layers under two names point at the first name; what is not tied points nowhere."""
    state = contract_of(Tied()).state
    assert state["embed.weight"].tied == state["head.weight"].tied == "embed.weight"
    assert state["norm.weight"].tied == state["again.weight"].tied == "norm.weight"
    assert state["table"].tied is None


def test_views_and_equal_shapes_are_no_ties() -> None:
    """Only the same elements in the same order are tied: a transpose, a slice and empty tensors are not."""
    weight = torch.randn(2, 2)
    module = nn.ParameterDict(
        {"w": weight, "t": weight.t(), "row": weight[0], "e1": torch.empty(0), "e2": torch.empty(0)}
    )
    assert all(spec.tied is None for spec in contract_of(module).state.values())


def test_a_contract_has_state_and_call() -> None:
    """Shapes, dtypes, persistence and the signature of `forward` are in the contract; no tensor is changed."""
    module = Tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    contract = contract_of(module)
    spec = contract.state["norm.num_batches_tracked"]
    assert (spec.dtype, spec.shape, spec.kind, spec.persistent) == ("int64", (), "buffer", True)
    assert contract.state["table"].persistent is False
    assert contract.call is not None
    assert [argument.name for argument in contract.call.arguments] == ["ids", "scale"]
    assert same_bits(before, dict(module.state_dict()))


# -- what no slot can hold ---------------------------------------------------------------------------------------------


class MyTensor(torch.Tensor):
    """A tensor subclass."""


UNSUPPORTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "sparse": (lambda m: m.register_buffer("bad", torch.eye(2).to_sparse()), "sparse"),
    "csr": (lambda m: m.register_buffer("bad", torch.eye(2).to_sparse_csr()), "sparse"),
    "quantised": (
        lambda m: m.register_buffer("bad", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        "quantised",
    ),
    "nested": (lambda m: m.register_buffer("bad", torch.nested.nested_tensor([torch.ones(2)])), "nested"),
    "subclass": (lambda m: m.register_buffer("bad", torch.ones(2).as_subclass(MyTensor)), "MyTensor"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*nested tensors.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*TypedStorage.*")
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_tensor_that_no_slot_can_hold_is_refused_by_name(kind: str) -> None:
    """Sparse, quantised, nested and subclassed tensors are refused when the slot is made (G13)."""
    prepare, word = UNSUPPORTED[kind]
    with pytest.raises(UncopyableError) as caught:
        hotglm.ModuleSlot(make_class(prepare)(), name="model")
    assert [(problem.code, problem.tensor) for problem in caught.value.problems] == [("UNSUPPORTED_TENSOR", "bad")]
    assert word in str(caught.value)


def test_lazy_and_meta_tensors_are_all_named() -> None:
    """What has no memory yet is refused, every one of it, with how to give it some (G09)."""
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    with pytest.raises(NotMaterializedError) as caught:
        hotglm.ModuleSlot(module, name="model")
    assert [problem.tensor for problem in caught.value.problems] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert "to_empty" in caught.value.remedy


def test_a_source_module_with_meta_tensors_is_refused_and_the_live_one_serves() -> None:
    """The same holds for a module that is staged."""
    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="model")
    x = torch.ones(1, 2)
    before = slot(x)
    with pytest.raises(NotMaterializedError):
        slot.update(nn.Linear(2, 2, device="meta"), version="0.0.1")
    assert same_bits(slot(x), before)


def test_all_unsupported_parts_are_named_at_once() -> None:
    """Modules and tensors that cannot be held are in one error."""

    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return 1

    def prepare(model: Any) -> None:
        model.extra = Extra()
        model.inner = hotglm.ModuleSlot(nn.Linear(1, 1), name="inner")
        model.register_buffer("sparse", torch.eye(2).to_sparse())

    with pytest.raises(UncopyableError) as caught:
        hotglm.ModuleSlot(make_class(prepare)(), name="model")
    codes = [problem.code for problem in caught.value.problems]
    assert codes == ["NESTED_SLOT", "EXTRA_STATE", "UNSUPPORTED_TENSOR"]
    assert "'inner'" in str(caught.value)


def test_a_slot_is_no_module_for_another_slot() -> None:
    """A slot around a slot is refused, as a module and as a source."""
    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="model")
    with pytest.raises(UncopyableError, match="the module itself"):
        hotglm.ModuleSlot(slot, name="outer")
    with pytest.raises(UncopyableError, match="the module itself"):
        slot.update(hotglm.ModuleSlot(nn.Linear(2, 2), name="model"), version="0.0.1")


def _trace(module: nn.Module) -> Any:
    return torch.jit.trace(module, torch.ones(1, 2))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compile_", [torch.jit.script, _trace])
@pytest.mark.parametrize("where", ["root", "part", "attribute"])
def test_torchscript_is_refused_by_name(compile_: Callable[[nn.Module], nn.Module], where: str) -> None:
    """Scripted and traced modules, whose code has its own tensors, are refused wherever they are (G14)."""
    scripted = compile_(nn.Linear(2, 2))
    if where == "attribute":
        slot = hotglm.ModuleSlot(make_class(lambda m: setattr(m, "f", [scripted.forward]))(), name="model")
        with pytest.raises(ModuleError, match="TorchScript"):
            slot.update(slot.state_dict())
        return
    module = scripted if where == "root" else nn.Sequential(nn.Linear(2, 2), scripted)
    with pytest.raises(UnswappableError) as caught:
        hotglm.ModuleSlot(module, name="model")
    assert caught.value.code == "CANNOT_SWAP_COMPILED"


@pytest.mark.parametrize("thing", [None, 3, nn.Linear, {"weight": torch.ones(2)}])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    """A slot is made around a module object."""
    with pytest.raises(ModuleError):
        hotglm.ModuleSlot(thing, name="model")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.float8_e5m2]
)
def test_every_plain_dtype_can_be_held(dtype: torch.dtype) -> None:
    """Half, bfloat16, double, complex and fp8 tensors are updated from a mapping, bit for bit (G13)."""

    def prepare(model: Any) -> None:
        model.table = nn.Parameter(torch.randn(3).to(dtype), requires_grad=False)

    slot = hotglm.ModuleSlot(make_class(prepare)(), name="model")
    state = {name: tensor.clone() for name, tensor in make_class(prepare)().state_dict().items()}
    slot.update(state, version="0.0.1")
    assert same_bits(slot.state_dict()["table"], state["table"])
