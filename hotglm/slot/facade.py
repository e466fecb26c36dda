"""The part of a slot that makes it an `nn.Module`: everything a module can be asked is asked of the live one.

Rules this module keeps:

- One call, one generation: a delegated method is looked up on the live module and runs there to its end.
- `_parameters`, `_buffers` and `_modules` show those of the live module, so that code of torch that looks into a
  module, instead of calling it, finds what is live and adds no prefix to names. They are copies that refuse to be
  written, because such code would write the live module, and restore it in whichever is live by then. The hook
  dictionaries are the live module's own.
- What would change weights in place or move them elsewhere is refused, unless it changes nothing. (`apply` and
  `requires_grad_` do go to the live module: docs/concepts.md has the list.)
- A name with a leading underscore may be set on the slot itself, for the bookkeeping of frameworks; any other is
  refused, because it would be gone, or wrong, after the next update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from hotglm.errors import SlotStateError, UnswappableError
from hotglm.model.compiled import bind, settle
from hotglm.model.graphed import find_graphed
from hotglm.model.wrappers import shares_memory

if TYPE_CHECKING:
    from hotglm.slot.admission import Admission

__all__ = ["ModuleFacade"]


_FUNCTIONAL_CALL = "torch.nn.utils._named_member_accessor"
"""The module of torch whose `getattr` is there to replace what it finds; `torch.func.functional_call` ends there."""

_FUNCTIONALLY = "torch.func.functional_call(copy.deepcopy(slot.live.module), ...), or slot.update(...)"


def _refuse_write(what: str, instead: str) -> NoReturn:
    raise SlotStateError(f"Expected the live version to stay as it is, got {what}.", remedy=f"use {instead}.")


class _Snapshot(dict[str, Any]):
    """What a dictionary of the live module holds; cannot be written."""

    __slots__ = ()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_write("a write to one of the slot's dictionaries", _FUNCTIONALLY)

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as the plain dictionary that it shows."""
        return dict, (dict(self),)


_SNAPSHOTS: dict[str, Callable[..., Any]] = {
    "_parameters": _Snapshot,
    "_buffers": _Snapshot,
    "_modules": _Snapshot,
    "_non_persistent_buffers_set": frozenset,
}


class ModuleFacade(nn.Module):
    """An `nn.Module` that stands for `self._admission.live.generation.module`."""

    __hotglm_slot__ = True
    _admission: Admission

    def __init__(self) -> None:
        """Never called: a slot has no parts of its own to initialise."""
        raise TypeError("ModuleFacade is made by ModuleSlot only")

    @property
    def _live_module(self) -> nn.Module:
        return self._admission.live.generation.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; the same as calling the slot."""
        return self(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set training mode on the live module and on those held for rollback; later generations copy it."""
        live = self._admission.live
        for generation in (*live.held, live.generation):
            generation.module.train(mode=mode)
        return self

    def eval(self) -> Any:
        """Set evaluation mode; see `train`."""
        return self.train(mode=False)

    @property
    def training(self) -> bool:  # torch declares a plain attribute
        """Whether the live module is in training mode."""
        return self._live_module.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._live_module.training = mode

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the live module in place (`nn.Module.compile`), and those held for rollback; later ones are, too.

        Raises:
            UnswappableError: its passes replay graphs (`hotglm.integrations.cuda_graphs`).
        """
        live = self._admission.live
        module = live.generation.module
        if find_graphed(module):
            raise UnswappableError(
                "Expected a module without device graphs, which a compilation would leave out, got some.",
                remedy="compile first: graphed(torch.compile(module), inputs).",
            )
        module.compile(*args, **kwargs)
        settle(module)
        for held in live.held:
            vars(held.module)["_compiled_call_impl"] = bind(module._compiled_call_impl, held.module)
        self._admission.refresh_call()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let conversions pass that change nothing; refuse those that would move or convert live weights."""
        module = self._live_module
        for tensor in (*module.parameters(), *module.buffers()):
            probe = torch.empty(1, dtype=tensor.dtype)
            fn(probe)
            if probe.untyped_storage().is_shared():  # done in place, so it must be found out on something else
                self.share_memory()
            with torch.no_grad():
                result = fn(tensor)
            if result is not tensor and not shares_memory(result, tensor):
                _refuse_write("conversion or move of the live weights", "slot.update(converted_module)")
        return self

    def share_memory(self) -> NoReturn:
        """Refuse: live weights lie in the slot's own memory."""
        _refuse_write("share_memory() on a slot", "slot.live.module.state_dict() in shared memory of your own")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: it writes live weights in place, tensor by tensor. `slot.update(state_dict)` does not."""
        _refuse_write("load_state_dict() on a slot, which tears passes", "slot.update(state_dict)")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_write("load_state_dict() on a module that has a slot in it", "slot.update(state_dict) for that part")

    def register_parameter(self, name: str, param: Any) -> NoReturn:
        """Refuse; see `__setattr__`."""
        _refuse_write(f"parameter {name!r} on a slot", "slot.update(module)")

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> NoReturn:
        """Refuse; see `__setattr__`."""
        _refuse_write(f"buffer {name!r} on a slot", "slot.update(module)")

    def add_module(self, name: str, module: Any) -> NoReturn:
        """Refuse; see `__setattr__`."""
        _refuse_write(f"submodule {name!r} on a slot", "slot.update(module)")

    def register_module(self, name: str, module: Any) -> NoReturn:
        """Refuse; see `__setattr__`."""
        self.add_module(name, module)

    def set_submodule(self, target: str, module: Any, strict: bool = False) -> NoReturn:
        """Refuse; see `__setattr__`."""
        self.add_module(target, module)

    def set_extra_state(self, state: Any) -> NoReturn:
        """Refuse: extra state is not part of a version."""
        _refuse_write("extra state", "slot.update(module)")

    def __getattr__(self, name: str) -> Any:
        """Return the live module's attribute; a bound method runs in that generation to its end."""
        if name == "_admission":  # not there yet: a slot that is being made
            raise AttributeError(name)
        if sys._getframe(1).f_globals.get("__name__") == _FUNCTIONAL_CALL:  # it asks for a part to write that part
            _refuse_write("functional_call on a slot, which writes the live module for all threads", _FUNCTIONALLY)
        return self._admission.admit(getattr(self._live_module, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set bookkeeping names (with a leading underscore) on the slot; refuse others."""
        if name == "__class__":  # parametrize does it
            _refuse_write("another class for a slot", "it on the module before it is given to the slot")
        if name == "_orig_mod":  # of what torch.compile returned: nothing would change for passes
            _refuse_write("another module behind the compiled one", "slot.update(module)")
        if name.startswith("_") or isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(
            f"Cannot set {name!r} on a slot: the next update would undo it. Set it on the module before it is given to "
            f"the slot, or on slot.live.module, from which later generations copy it."
        )

    def __delattr__(self, name: str) -> None:
        """Delete what was set on the slot itself."""
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        """List the slot's own names and the live module's."""
        return sorted({*object.__dir__(self), *dir(self._live_module)})

    def __repr__(self) -> str:
        """Show the live generation and its module."""
        generation = self._admission.live.generation
        inner = repr(generation.module).replace("\n", "\n  ")
        return f"{type(self).__name__}({generation.name!r}, version {generation.version}, {inner})"


def _delegate(name: str) -> Callable[..., Any]:
    original = getattr(nn.Module, name)

    def method(self: ModuleFacade, *args: Any, **kwargs: Any) -> Any:
        module = self._live_module
        result = getattr(module, name)(*args, **kwargs)
        return self if result is module else result

    method.__name__, method.__doc__, method.__module__ = name, original.__doc__, original.__module__
    return method


def _view(name: str) -> property:
    def look(self: ModuleFacade) -> Any:
        return getattr(self._live_module, name)

    def copy(self: ModuleFacade) -> Any:
        return _SNAPSHOTS[name](getattr(self._live_module, name))

    return property(copy if name in _SNAPSHOTS else look)


_RUN_ON_THE_SLOT = frozenset(
    # These end in `self._apply`, which decides.
    {"to", "to_empty", "cuda", "cpu", "xpu", "ipu", "hpu", "mtia", "type", "float", "double", "half", "bfloat16"}
)
"""Methods of `nn.Module` that are not delegated although the facade does not define them."""


def _find_delegated() -> Iterator[str]:
    for name, value in vars(nn.Module).items():
        special = name.startswith("__") or name in _RUN_ON_THE_SLOT or name in vars(ModuleFacade)
        if callable(value) and not special:
            yield name


for _name in list(_find_delegated()):
    setattr(ModuleFacade, _name, _delegate(_name))
for _name in vars(nn.Module()):
    if _name != "training":
        setattr(ModuleFacade, _name, _view(_name))
