"""The structural copier: walks a module's objects and gives back the same structure over other tensors.

Rules this module keeps: see `model/twin.py`; here is how they are kept.

[Note: tensors that are not registered]
`copy.deepcopy` of a tensor is a torch function, so a `TorchFunctionMode`, which is local to the thread, sees every
tensor the copier reaches, however deep in lists, dicts or objects. One that overlaps registered state becomes the
same view of the spare. Any other is cloned if it may be carried over (`model/derived.py`), and refused if not.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hotglm.errors import Problem, StaleStateError, UncopyableError, shorten_repr
from hotglm.model.derived import Marks, find_refreshed_names, may_carry_over
from hotglm.model.extents import extent_nbytes, overlaps_itself
from hotglm.model.inspection import StateEntry, find_state
from hotglm.model.references import (
    copies_itself,
    find_captured,
    has_plain_state,
    is_array,
    is_inert,
    iterate_items,
    name_tensor,
    reaches,
    why_uncopyable,
)
from hotglm.problem import describe_exception
from hotglm.weights.arena import Lease
from hotglm.weights.layout import Layout
from hotglm.weights.workers import yield_gil_when_due

__all__ = ["ChangedWhileCopiedError", "Copier", "Twin"]

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor of C
_SHAREABLE_FAILURES = (TypeError, NotImplementedError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A structural copy over an arena, with its tensors by name.

    Attributes:
        module: the copy.
        views: every registered name and the tensor it has in the arena (ties share memory).
        carried: names of unregistered or non-persistent state that keeps the value it had.
        loose: the copies of that state, and of what is recomputed.
    """

    module: nn.Module
    views: Mapping[str, torch.Tensor]
    carried: tuple[str, ...]
    loose: tuple[torch.Tensor, ...]


class ChangedWhileCopiedError(Exception):
    """A container of the serving module changed size while it was walked."""


@dataclass(slots=True)
class _Findings:
    stale: list[Problem] = field(default_factory=list)
    uncopyable: list[Problem] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        if self.stale:
            raise StaleStateError(
                "Expected all derived state to be declared, got some that would keep its old value after a swap.",
                problems=[*self.stale, *self.uncopyable],
                remedy="recompute it in a method marked @hotglm.refresh(<attribute>), make it a persistent buffer, "
                "or vouch for it with ModuleSlot(..., constants=[<pattern>]).",
            )
        if self.uncopyable:
            raise UncopyableError(
                "Expected a module that can be copied structurally.",
                problems=self.uncopyable,
                remedy="make the named attributes or hooks refer to `self` instead of to captured modules or tensors.",
            )


class Copier(TorchFunctionMode):
    """One copy of one module. As a function mode it answers for the tensors that `deepcopy` reaches."""

    def __init__(
        self,
        root: nn.Module,
        *,
        layout: Layout,
        lease: Lease | None,
        constants: Sequence[str],
        marks: Marks | None,
    ) -> None:
        super().__init__()
        self._root = root
        self._layout = layout
        self._lease = lease
        self._constants = constants
        self._marks = marks
        self.loose: list[torch.Tensor] = []  # of the module that is copied: neither weights nor views of them
        self._findings = _Findings()
        self._memo: dict[int, Any] = {}
        self._keep: list[object] = []  # what the memo names by id must not die and lend its id to another object
        self._views: dict[str, torch.Tensor] = {}
        self._tree: dict[int, str] = {}
        self._where: tuple[str, nn.Module] = ("", root)

    def copy(self) -> Twin:
        """Return the copy; see `twin.copy_module` for what it raises."""
        # Staging may run in a thread whose caller is in inference mode; parameters must be ordinary tensors all the
        # same.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._map_state()
            modules = list(self._root.named_modules())
            self._tree = {id(module): path for path, module in modules}
            for _, module in modules:
                if has_plain_state(type(module)):  # empty for now, so that children can refer to their parents
                    self._remember(module, module.__new__(type(module)))
            self._map_weakrefs()
            with self:
                for path, module in reversed(modules):  # children come after parents in named_modules
                    self._copy_one(path, module)
                    yield_gil_when_due()
            self._findings.raise_if_any()
            twin = self._memo[id(self._root)]
            loose = tuple(self._memo[id(tensor)] for tensor in self.loose)
            return Twin(module=twin, views=self._views, carried=tuple(self._findings.carried), loose=loose)

    # -- registered state ----------------------------------------------------------------------------------------------

    def _map_state(self) -> None:
        for entry in find_state(self._root):
            known = self._memo.get(id(entry.tensor))
            if known is None:
                known = self._map_tensor(entry)
            self._views[entry.name] = known.detach()
            if not entry.persistent:
                self.loose.append(entry.tensor)
                self._judge(entry.name, entry.tensor, owner=entry.owner, marks=self._marks)

    def _map_tensor(self, entry: StateEntry) -> torch.Tensor:
        source = entry.tensor
        view = self._view(self._layout.offsets[entry.name], source)
        if isinstance(source, nn.Parameter):
            view = nn.Parameter(view, requires_grad=source.requires_grad)
        else:
            view.requires_grad_(source.requires_grad)
        self._remember(source, view)
        if source._backward_hooks or getattr(source, "_post_accumulate_grad_hooks", None):
            self._refuse("", entry.name, "it has hooks of its own (register_hook), which torch does not copy")
        for name, value in list(vars(source).items()) if hasattr(source, "__dict__") else ():
            setattr(view, name, value)
        return view

    def _view(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        if self._lease is None:
            return torch.empty_strided(like.shape, [0] * like.dim(), dtype=like.dtype, device="meta")
        stride = None if like.is_contiguous() or overlaps_itself(like) else like.stride()
        return self._lease.view(offset, dtype=like.dtype, shape=like.shape, stride=stride)

    def _remember(self, source: object, result: object) -> None:
        self._memo[id(source)] = result
        self._keep.append(source)

    # -- modules and their attributes ----------------------------------------------------------------------------------

    def _copy_one(self, path: str, module: nn.Module) -> None:
        twin = self._memo.get(id(module))
        if twin is not None and not has_plain_state(type(module)):  # copied already, by way of another attribute
            return
        self._where = (path, module)
        snapshot = dict(vars(module))
        self._map_references(path, snapshot)
        try:
            if twin is not None:
                snapshot.pop("_compiled_call_impl", None)
                for name, value in snapshot.items():
                    vars(twin)[name] = self._copy_attribute(path, name, value)
            else:
                self._remember(module, copy.deepcopy(module, self._memo))
        except RuntimeError as failure:
            if "changed size" in str(failure) or "mutated" in str(failure):
                raise ChangedWhileCopiedError(f"module {shorten_repr(path or type(module).__name__)}") from failure
            raise
        except _SHAREABLE_FAILURES as failure:
            self._refuse(
                path, type(module).__name__, f"its class copies itself and failed: {describe_exception(failure)}"
            )
            self._remember(module, module)

    def _copy_attribute(self, path: str, name: str, value: object) -> object:
        try:
            return self._copy_inert(value) if is_inert(value) else copy.deepcopy(value, self._memo)
        except _SHAREABLE_FAILURES as failure:
            # Locks, clients, loggers, handles: nothing about them depends on the weights, so both generations share
            # them, unless they lead back into the module or to tensors that may have been computed from it.
            if self._leads_inside(value):
                self._refuse(
                    path, name, f"it cannot be copied ({describe_exception(failure)}) and leads back into the module"
                )
            reaches(value, self._judge_shared)
            return value

    def _copy_inert(self, value: object) -> object:
        """Copy as `deepcopy` does, without its machinery: a module has some 15 empty hook dictionaries and numbers."""
        if not isinstance(value, (dict, list, set)):
            return value
        if id(value) not in self._memo:
            self._remember(value, type(value)())
        return self._memo[id(value)]

    def _judge_shared(self, value: object) -> bool:
        if isinstance(value, torch.Tensor) and not self._is_inside(value):
            self._copy_tensor(value, self._memo)
        return False

    def _map_references(self, path: str, attributes: Mapping[str, object]) -> None:
        """Enter into the memo what `deepcopy` would treat wrongly, or not see: hooks, generators, foreign owners."""
        for name, value in attributes.items():
            if is_inert(value) or name in ("_parameters", "_buffers"):  # registered state is in the memo already
                continue
            is_hooks = name.endswith("_hooks") and isinstance(value, dict)
            for item in iterate_items(value):
                if inspect.isfunction(item):
                    self._judge_function(path, name, item, is_hook=is_hooks)
                elif why := why_uncopyable(item, self._is_inside):
                    self._refuse(path, name, why)
                elif is_array(item):
                    self._judge_array(path, name, torch.from_numpy(item))
                elif self._is_shared(item) or (is_hooks and item is not value and self._is_stateful_hook(item)):
                    self._remember(item, item)

    def _is_shared(self, item: object) -> bool:
        if isinstance(item, types.MethodType):
            return id(item.__self__) not in self._tree  # a method of somebody else's object stays that object's
        return isinstance(item, torch.Generator)  # a stream of random numbers goes on

    def _is_stateful_hook(self, item: object) -> bool:
        return not copies_itself(item) and not self._leads_inside(item)  # it goes on with the state it has

    def _leads_inside(self, value: object) -> bool:
        return reaches(value, self._is_inside)

    def _map_weakrefs(self) -> None:
        """Enter every weak reference to a part of the module, wherever the copy will meet it."""
        for source in list(self._keep):
            twin = self._memo[id(source)]
            for reference in weakref.getweakrefs(source):
                is_proxy = isinstance(reference, weakref.ProxyTypes)
                self._remember(reference, weakref.proxy(twin) if is_proxy else weakref.ref(twin))

    def _judge_array(self, path: str, name: str, array: torch.Tensor) -> None:
        if self._find_overlap(array) is not None:
            self._refuse(path, name, "it is a numpy array over a weight, and arrays do not follow into a copy")
        else:
            self._judge(f"{path}.{name}" if path else name, array, owner=self._where[1], marks=None)

    def _judge_function(self, path: str, name: str, function: Callable[..., object], *, is_hook: bool) -> None:
        for captured in find_captured(function):
            if self._leads_inside(captured):
                label = getattr(function, "__qualname__", repr(function))
                self._refuse(path, name, f"the function {label} has captured a part of the module it is attached to")
                return
            if not is_hook:  # a hook may keep statistics; what else a function brings along is taken for a cache
                reaches(captured, self._judge_shared)

    def _is_inside(self, value: object) -> bool:
        if isinstance(value, nn.Module):
            return id(value) in self._tree
        if isinstance(value, torch.Tensor):
            return id(value) in self._memo or self._find_overlap(value) is not None
        return False

    def _refuse(self, path: str, name: str, why: str) -> None:
        where = f"{path}.{name}" if path else name
        problem = Problem(code="UNCOPYABLE", message=f"Cannot carry over {shorten_repr(where)}: {why}")
        if problem not in self._findings.uncopyable:
            self._findings.uncopyable.append(problem)

    # -- tensors that are not registered -----------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._copy_tensor(args[0], args[1])
        if func == _GET_DATA and id(args[0]) not in self._memo and isinstance(args[0], nn.Parameter):
            self._copy_tensor(args[0], self._memo)  # Parameter.__deepcopy__ asks no function mode
        return func(*args, **(kwargs or {}))

    def _copy_tensor(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) in memo:
            known: torch.Tensor = memo[id(tensor)]
            return known
        offset = self._find_overlap(tensor)
        if offset is not None:
            result = self._view(offset, tensor)
        else:
            path, owner = self._where
            self.loose.append(tensor)
            self._judge(name_tensor(path, owner, tensor), tensor, owner=owner, marks=self._marks)
            result = tensor.detach().clone() if self._lease is not None else tensor
        self._remember(tensor, result)
        return result

    def _find_overlap(self, tensor: torch.Tensor) -> int | None:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_meta:
            return None
        if overlaps_itself(tensor):
            return None
        return self._layout.find_offset(tensor.data_ptr(), extent_nbytes(tensor))

    def _judge(self, name: str, tensor: torch.Tensor, *, owner: nn.Module, marks: Marks | None) -> None:
        if may_carry_over(name, tensor, owner=owner, constants=self._constants, marks=marks):
            if name.rpartition(".")[2] not in find_refreshed_names(owner):
                self._findings.carried.append(name)
            return
        what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        self._findings.stale.append(
            Problem(
                code="STALE_STATE",
                message=f"Expected a declaration for {shorten_repr(name)} ({what}), which no file carries and which "
                f"{type(owner).__name__}, or a pass, may have computed from weights, got none",
                tensor=name,
            )
        )
