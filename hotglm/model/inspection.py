"""Reading a module: its state, by name, and the contract it makes.

Rules this module keeps:

- Every name under which `state_dict` would list a tensor is listed, aliases included, in registration order.
- Nothing is read but metadata; no tensor is copied, moved or written.
- Of a tensor subclass that wraps others (`model/wrappers.py`), what is inside is listed, by inner names:
  that has the memory.
- What a slot cannot hold (lazy, meta, sparse, quantised, other subclasses, other devices, compiled modules) is refused
  here, all of it at once, before anything else is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from hotglm.call_spec import CallSpec
from hotglm.config_spec import ConfigSpec
from hotglm.contract import Contract, StateSpec
from hotglm.errors import (
    ModuleError,
    NotMaterializedError,
    Problem,
    UncopyableError,
    UnswappableError,
    shorten_repr,
)
from hotglm.model.compiled import is_optimized
from hotglm.model.recording import record_outputs
from hotglm.model.registry import find_definition
from hotglm.model.wrappers import PLAIN, find_leaves, is_wrapper
from hotglm.weights import places
from hotglm.weights.dtypes import dtype_name

_CANNOT_SWAP = "CANNOT_SWAP_COMPILED"

__all__ = [
    "StateEntry",
    "contract_of",
    "describe_module",
    "find_state",
    "find_tensor_fault",
    "group_by_wrapper",
    "verify_holdable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateEntry:
    """One name of one tensor of a module.

    Attributes:
        name: full dotted name, as in `state_dict`.
        tensor: the parameter or buffer itself.
        kind: parameter or buffer.
        persistent: whether `state_dict` has it.
        owner: the submodule it is registered on.
        wrapper: what is registered there, where `tensor` is inside of it; else None.
        inner: the name inside the wrapper, which `name` ends in; empty without one.
    """

    name: str
    tensor: torch.Tensor
    kind: Literal["parameter", "buffer"]
    persistent: bool
    owner: nn.Module
    wrapper: torch.Tensor | None = None
    inner: str = ""

    @property
    def registered(self) -> torch.Tensor:
        """The parameter or buffer that the module has."""
        return self.tensor if self.wrapper is None else self.wrapper

    @property
    def registered_name(self) -> str:
        """Its full dotted name."""
        return self.name if self.wrapper is None else self.name.removesuffix(f".{self.inner}")


def find_state(module: nn.Module) -> Iterator[StateEntry]:
    """Yield every parameter and buffer of `module` under every name it has, in registration order."""
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield from _open_wrapper(
                    StateEntry(name=prefix + name, tensor=parameter, kind="parameter", persistent=True, owner=owner)
                )
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                persistent = name not in owner._non_persistent_buffers_set
                yield from _open_wrapper(
                    StateEntry(name=prefix + name, tensor=buffer, kind="buffer", persistent=persistent, owner=owner)
                )


def _open_wrapper(entry: StateEntry) -> Iterator[StateEntry]:
    if type(entry.tensor) in PLAIN or not is_wrapper(entry.tensor):
        yield entry
        return
    for inner, leaf in find_leaves(entry.tensor):
        yield replace(entry, name=f"{entry.name}.{inner}", tensor=leaf, wrapper=entry.tensor, inner=inner)


def group_by_wrapper(entries: Iterable[StateEntry]) -> Iterator[tuple[torch.Tensor, list[StateEntry]]]:
    """Yield each wrapper once, with the entries of what is inside, under the first of its names."""
    groups: dict[int, list[StateEntry]] = {}
    for entry in entries:
        if entry.wrapper is not None:
            group = groups.setdefault(id(entry.wrapper), [])
            if not group or group[0].registered_name == entry.registered_name:
                group.append(entry)
    for group in groups.values():
        yield group[0].registered, group


def contract_of(module: nn.Module, *, inputs: Iterable[Any] = (), is_fixed: bool = False) -> Contract:
    """Return what `module` promises: its state, the signature of its `forward`, and what its `versioned` mark declares.

    Args:
        module: any module; its tensors are only looked at.
        inputs: golden inputs, each one tensor, a tuple of positional arguments or a mapping of keyword arguments; a
            copy of the module runs once for each, and what comes back is recorded. Two batch sizes prove more than one.
        is_fixed: whether the module stays and only its weights are swapped, so that it may be TorchScript.

    Returns:
        The contract. `state` has every name, with `tied` naming the first name of its group.

    Raises:
        ModuleError: the module holds tensors that no slot can hold, all named.
        ArgumentError: the module does not take some of `inputs`, all named.
    """
    verify_holdable(module, is_fixed=is_fixed)
    return replace(describe_module(module), outputs=record_outputs(module, inputs))


def describe_module(module: nn.Module) -> Contract:
    """Return the contract of a module that no slot need be able to hold, such as one on the meta device."""
    entries = list(find_state(module))
    groups: dict[object, list[str]] = {}
    for entry in entries:
        groups.setdefault(_identity(entry.tensor), []).append(entry.name)
    state: dict[str, StateSpec] = {}
    for entry in entries:
        group = groups[_identity(entry.tensor)]
        state[entry.name] = StateSpec(
            name=entry.name,
            shape=tuple(entry.tensor.shape),
            dtype=dtype_name(entry.tensor.dtype),
            kind=entry.kind,
            persistent=entry.persistent,
            tied=group[0] if len(group) > 1 else None,
        )
    definition = find_definition(type(module))
    return Contract(
        state=MappingProxyType(state),
        call=CallSpec.of(module.forward),
        config=ConfigSpec.of(definition.config) if definition and definition.config else None,
        capabilities=definition.capabilities if definition else frozenset(),
        requires=definition.requires if definition else (),
    )


def _identity(tensor: torch.Tensor) -> object:
    # Two names are tied when they are the same elements in the same order. Empty tensors share no element, and those on
    # the meta device have no address.
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def verify_holdable(module: nn.Module, *, is_fixed: bool = False) -> None:
    """Refuse a module with tensors or parts that no slot can hold, naming every one; see `contract_of`.

    Raises:
        NotMaterializedError: lazy or meta tensors.
        UncopyableError: sparse, quantised, nested, or subclassed tensors, those of an unknown device, extra state.
        UnswappableError: TorchScript, or what torch.compile returned, among others.
        ModuleError: it is not a module, or is itself a slot.
    """
    if not isinstance(module, nn.Module):
        raise ModuleError(
            f"Expected an nn.Module, got {shorten_repr(type(module).__name__)}.", remedy="pass the model object itself."
        )
    missing = [
        Problem(
            code="NOT_MATERIALIZED", message="Expected a tensor with memory, got a lazy or meta one", tensor=entry.name
        )
        for entry in find_state(module)
        if nn.parameter.is_lazy(entry.tensor) or entry.tensor.is_meta
    ]
    if missing:
        raise NotMaterializedError(
            "Expected a module whose tensors are all in memory.",
            problems=missing,
            remedy="run one forward pass of a lazy module, or `to_empty` and load a meta one, before handing it over.",
        )
    problems = [*_find_unsupported_modules(module, is_fixed=is_fixed), *_find_unsupported_tensors(module)]
    if problems:
        if any(problem.code == _CANNOT_SWAP for problem in problems):
            raise UnswappableError(
                "Expected code that takes its weights from the module, got some that has its own.",
                problems=problems,
                remedy="give the slot the module that the named part was made from, and compile that in place: "
                "module.compile(), or slot.compile(); what is TorchScript as a whole takes swap=hotglm.InPlace().",
            )
        raise UncopyableError(
            "Expected a module that can be copied structurally.",
            problems=problems,
            remedy="replace the named parts by plain dense tensors, on the CPU or a CUDA device, and ordinary modules.",
        )


def _find_unsupported_modules(root: nn.Module, *, is_fixed: bool) -> Iterator[Problem]:
    if is_fixed and isinstance(root, torch.jit.ScriptModule):
        return  # model/scripted.py looks into it
    for slot in _find_slots(root):
        where = shorten_repr(slot)
        yield Problem(code="NESTED_SLOT", message=f"Expected no slot inside a slot's module, got one at {where}")
    for path, module in root.named_modules():
        where = shorten_repr(path or type(root).__name__)
        if isinstance(module, torch.jit.ScriptModule):
            yield Problem(
                code=_CANNOT_SWAP,
                message=f"Expected an eager module at {where}, got TorchScript, whose tensors are fixed",
            )
        elif is_optimized(module):
            yield Problem(
                code=_CANNOT_SWAP,
                message=f"Expected a module at {where}, got what torch.compile returns, which calls the one module it "
                f"was made from",
            )
        elif type(module).get_extra_state is not nn.Module.get_extra_state:
            yield Problem(
                code="EXTRA_STATE",
                message=f"Expected state in tensors only, got get_extra_state() at {where}",
            )


def _find_slots(root: nn.Module) -> Iterator[str]:
    if hasattr(root, "__hotglm_slot__"):
        yield "the module itself"
        return
    for path, module in root.named_modules():  # a slot among them answers with its modules and leaves itself out
        for name, part in module._modules.items():
            if hasattr(part, "__hotglm_slot__"):
                yield f"{path}.{name}" if path else name


def _find_unsupported_tensors(root: nn.Module) -> Iterator[Problem]:
    for entry in find_state(root):
        if reason := find_tensor_fault(entry.tensor):
            yield Problem(
                code="UNSUPPORTED_TENSOR",
                message=f"Expected a plain dense tensor on the CPU or a CUDA device, got {reason}",
                tensor=entry.name,
                found=type(entry.tensor).__name__,
            )


def find_tensor_fault(tensor: torch.Tensor) -> str | None:
    """Return what keeps `tensor` from being a plain dense one on a device we know, as the rest of a sentence."""
    if type(tensor) not in PLAIN:
        return f"the subclass {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if not places.active.supports(tensor):
        return f"one on {tensor.device}"
    return None
