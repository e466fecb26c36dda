"""The structural copier: walks a module's objects and gives back the same structure over other tensors.

Rules this module keeps: see `model/twin.py`; here is how they are kept.

[Note: tensors that are not registered]
`copy.deepcopy` of a tensor is a torch function, so a `TorchFunctionMode`, which is local to the thread, sees every
tensor the copier reaches, however deep in lists, dicts or objects. One that overlaps registered state becomes the
same view of the spare. Any other is cloned if it may be carried over (`model/derived.py`), and refused if not.

[Note: what deepcopy does not do]
Before an attribute is copied, what `deepcopy` would copy and should not (slots, generators of random numbers, objects
of somebody else) is entered into its memo. After all are copied, what came along uncopied (functions and what they have
captured, caches, objects that cannot be copied) is found in the result (`model/verification.py`).
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hotglm.errors import shorten_repr
from hotglm.model.captured import AbsentGraph, stays_behind
from hotglm.model.compiled import COMPILED_CALL, bind_twins, rebind
from hotglm.model.copied import ChangedWhileCopiedError, Twin
from hotglm.model.derived import Marks
from hotglm.model.extents import Parts, overlaps_itself
from hotglm.model.findings import Findings
from hotglm.model.inspection import StateEntry, find_state, group_by_wrapper
from hotglm.model.references import (
    CONTAINERS,
    TooManyObjectsError,
    copies_itself,
    describes_quantised,
    has_plain_state,
    is_a,
    is_array,
    is_fake,
    is_inert,
    is_slot,
    leads_nowhere,
    reaches,
    turn_reference,
    walk,
    why_uncopyable,
)
from hotglm.model.verification import INSIDE, TOO_LARGE, Place, Verifier, name_tensor
from hotglm.model.wrappers import is_wrapper, rebuild
from hotglm.problem import describe_exception
from hotglm.weights.arena import Lease
from hotglm.weights.layout import Layout
from hotglm.weights.workers import yield_gil_when_due

__all__ = ["Copier"]

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor of C
_SHAREABLE_FAILURES = (TypeError, NotImplementedError, RecursionError)
_DICTS = (dict, collections.OrderedDict)
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_NOT_CARRIED = frozenset({COMPILED_CALL})  # bound anew
_LOOSE_WRAPPER = "it is a tensor subclass that wraps others, and is neither a parameter nor a buffer"


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
        is_fixed: bool = False,
    ) -> None:
        super().__init__()
        self._is_fixed = is_fixed
        self._root = root
        self._layout = layout
        self._lease = lease
        self._marks = marks
        self.loose: list[torch.Tensor] = []  # of the module that is copied: neither weights nor views of them
        self._findings = Findings(constants=constants)
        self._entries = list(find_state(root))
        self._parts = Parts(root, self._entries, layout)
        self._memo: dict[int, Any] = {}
        self._plain: dict[type, bool] = {}  # classes of modules, and whether an instance is its __dict__ alone
        self._keep: list[object] = []  # what the memo names by id must not die and lend its id to another object
        self._views: dict[str, torch.Tensor] = {}
        self._place = Place(path="", name="", owner=root)
        self._copied: list[tuple[Place, object, str]] = []  # attributes of the copy, and why they are shared, if so
        self._prepared: dict[int, object] = {}
        self._refused: dict[int, object] = {}
        self._outside: dict[int, object] = {}

    def copy(self) -> Twin:
        """Return the copy; see `twin.copy_module` for what it raises."""
        # Staging may run in a thread whose caller is in inference mode; parameters must be ordinary tensors all the
        # same.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._map_state()
            modules = list(self._root.named_modules())
            for _, module in modules:
                if self._is_plain(module):  # empty for now, so that children can refer to their parents
                    self._remember(module, module.__new__(type(module)))
            self._map_weakrefs()
            with self:
                for path, module in reversed(modules):  # children come after parents in named_modules
                    self._copy_one(path, module)
                    yield_gil_when_due()
                self._copy_attributes_of_tensors()
            for path in bind_twins(modules, self._memo):
                self._findings.refuse(path, COMPILED_CALL, "it is no call that torch.compile has made")
            self._verify(modules)
            self._findings.raise_if_any()
            twin = self._memo[id(self._root)]
            loose = tuple(self._memo[id(tensor)] for tensor in self.loose)
            return Twin(module=twin, views=self._views, carried=self._findings.carried, loose=loose)

    # -- registered state ----------------------------------------------------------------------------------------------

    def _map_state(self) -> None:
        for entry in self._entries:
            known = self._memo.get(id(entry.tensor))
            if known is None:
                known = self._map_tensor(entry)
            self._views[entry.name] = known.detach()
            if not entry.persistent:
                self.loose.append(entry.tensor)
                name = entry.registered_name
                self._findings.judge(name, entry.tensor, owner=entry.owner, marks=self._marks, is_buffer=True)
        for wrapper, entries in group_by_wrapper(self._entries):
            self._map_wrapper(wrapper, entries)

    def _map_tensor(self, entry: StateEntry) -> torch.Tensor:
        source = entry.tensor
        view = self._view(self._layout.offsets[entry.name], source)
        if isinstance(source, nn.Parameter):
            view = nn.Parameter(view, requires_grad=source.requires_grad)
        else:
            view.requires_grad_(source.requires_grad)
        self._remember(source, view)
        self._findings.refuse_hooks(entry.name, source)
        return view

    def _map_wrapper(self, wrapper: torch.Tensor, entries: list[StateEntry]) -> None:
        """Make a wrapper of the same kind over the views of what is inside; the dry run has only the old ones."""
        name = entries[0].registered_name
        is_dry = self._lease is None
        leaves = {entry.inner: entry.tensor if is_dry else self._memo[id(entry.tensor)] for entry in entries}
        self._findings.refuse_hooks(name, wrapper)
        try:
            self._remember(wrapper, rebuild(wrapper, leaves))
        except Exception as failure:  # noqa: BLE001 - the subclass's code may raise anything
            self._findings.refuse(
                "", name, f"{type(wrapper).__name__} cannot be made again: {describe_exception(failure)}"
            )
            self._remember(wrapper, wrapper)

    def _copy_attributes_of_tensors(self) -> None:
        """Copy what users have set on parameters and buffers; it may refer to any part of the module."""
        done: set[int] = set()
        for entry in self._entries:
            tensor, twin = entry.registered, self._memo[id(entry.registered)]
            if not vars(tensor) or id(tensor) in done:
                continue
            done.add(id(tensor))
            own = () if entry.wrapper is None else vars(twin)  # of its class, and made with it
            attributes = {name: value for name, value in vars(tensor).items() if name not in own}
            path, _, leaf = entry.registered_name.rpartition(".")
            for name, value in attributes.items():
                place = Place(path=path, name=f"{leaf}.{name}", owner=entry.owner)
                self._prepare(place, value)
                setattr(twin, name, self._copy_attribute(place, value))

    def _view(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        if self._lease is None:
            return torch.empty_strided(like.shape, [0] * like.dim(), dtype=like.dtype, device="meta")
        stride = None if like.is_contiguous() or overlaps_itself(like) else like.stride()
        return self._lease.view(offset, dtype=like.dtype, shape=like.shape, stride=stride)

    def _find_twin(self, part: object) -> object | None:
        return self._memo.get(id(part)) if self._parts.has(part) else None

    def _remember(self, source: object, result: object) -> None:
        self._memo[id(source)] = result
        self._keep.append(source)

    def _map_weakrefs(self) -> None:
        """Enter every weak reference to a part of the module, wherever the copy will meet it."""
        for reference, part in self._parts.references:
            twin = self._memo.get(id(part))
            if twin is None:  # a module that copies itself
                continue
            if (turned := turn_reference(reference, twin)) is not None:
                self._remember(reference, turned)

    # -- modules and their attributes ----------------------------------------------------------------------------------

    def _copy_one(self, path: str, module: nn.Module) -> None:
        twin = self._memo.get(id(module))
        if twin is not None and not self._is_plain(module):  # copied already, by way of another attribute
            return
        attributes = [
            (name, value, None if is_inert(value) else Place(path=path, name=name, owner=module))
            for name, value in list(vars(module).items())
            if name not in _NOT_CARRIED and not describes_quantised(name, value)
            if not (self._is_fixed and name == "forward" and stays_behind(value))  # by `make_graphed_callables`
        ]
        for _, value, place in attributes:
            if place is not None:
                self._prepare(place, value)
        try:
            if twin is None:
                self._place = Place(path=path, name=INSIDE, owner=module)
                self._remember(module, copy.deepcopy(module, self._memo))
            else:
                for name, value, place in attributes:
                    vars(twin)[name] = self._copy_inert(value) if place is None else self._copy_attribute(place, value)
        except RuntimeError as failure:
            if "changed size" in str(failure) or "mutated" in str(failure):
                raise ChangedWhileCopiedError(f"module {shorten_repr(path or type(module).__name__)}") from failure
            raise
        except _SHAREABLE_FAILURES as failure:
            why = f"its class copies itself and failed: {failure}"
            self._findings.refuse(path, type(module).__name__, why)
            self._remember(module, module)

    def _copy_attribute(self, place: Place, value: object) -> object:
        if place.name in _REGISTERED and (known := self._copy_registered(value)) is not None:
            return known
        self._place, why = place, ""
        try:
            result = copy.deepcopy(value, self._memo)
        except _SHAREABLE_FAILURES as failure:
            # Locks, clients, loggers, handles: nothing about them depends on the weights, so both generations share
            # them, unless they lead back into the module or to tensors that may have been computed from it.
            result, why = value, f"it cannot be copied ({failure}) and leads back into the module"
        if place.name not in _REGISTERED:
            self._copied.append((place, result, why))
        return result

    # `deepcopy` would do what the next two do, and its machinery would take most of the time of a copy.

    def _copy_registered(self, value: object) -> object | None:
        """Copy a dictionary of parameters, buffers or modules whose copies are known; None if it is anything else."""
        if not isinstance(value, dict) or type(value) not in _DICTS or id(value) in self._memo:
            return None
        parts = list(value.items())
        found = {name: self._memo.get(id(part)) for name, part in parts}
        if any(part is not None and found[name] is None for name, part in parts):
            return None
        result = type(value)(found)
        self._remember(value, result)
        return result

    def _copy_inert(self, value: object) -> object:
        """Copy a plain value, or a plain container with nothing in it: a module has some 15 empty ones."""
        kind = type(value)
        if kind not in CONTAINERS:
            return value
        result = self._memo.get(id(value))
        if result is None:
            result = self._memo[id(value)] = kind()
            self._keep.append(value)
        return result

    def _is_plain(self, module: nn.Module) -> bool:
        cls = type(module)
        known = self._plain.get(cls)
        if known is None:
            known = self._plain[cls] = has_plain_state(cls)
        return known

    # -- what deepcopy would copy and should not -----------------------------------------------------------------------

    def _prepare(self, place: Place, value: object) -> None:
        """Enter into the memo what `deepcopy` would treat wrongly: hooks, generators, foreign owners, slots."""
        if is_inert(value) or place.name in _REGISTERED:
            return
        if place.name in _HOOKS and isinstance(value, dict):
            self._share_stateful_hooks(value)
        try:
            for item, _ in walk(value, seen=self._prepared, is_end=self._is_not_copied):
                if id(item) in self._memo:
                    continue
                if (other := self._replace(item, place)) is not None:
                    self._remember(item, other)
                elif why := why_uncopyable(item, self._parts.has):
                    self._findings.refuse(place.path, place.name, why)
                    self._refused[id(item)] = item
                    self._remember(item, item)
                elif is_array(item) and not self._parts.has(item):
                    self._findings.judge_array(place.full_name, item, owner=place.owner)
                elif is_array(item) or self._is_shared(item):
                    self._remember(item, item)
        except TooManyObjectsError:
            self._findings.refuse(place.path, place.name, TOO_LARGE)

    def _replace(self, item: object, place: Place) -> object | None:
        return AbsentGraph(place.full_name) if self._is_fixed and stays_behind(item) else rebind(item, self._find_twin)

    def _share_stateful_hooks(self, hooks: dict[Any, object]) -> None:
        for hook in list(hooks.values()):
            if isinstance(hook, (types.FunctionType, types.MethodType)) or is_inert(hook) or copies_itself(hook):
                continue
            if not self._leads_inside(hook):
                self._remember(hook, hook)  # it goes on with the state it has

    def _is_not_copied(self, item: object) -> bool:
        if id(item) in self._memo or leads_nowhere(item) or is_a(item, torch.Tensor) or is_a(item, type):
            return True
        return is_a(item, types.FunctionType) or (is_a(item, nn.Module) and self._parts.has(item))

    def _is_shared(self, item: object) -> bool:
        if is_a(item, types.MethodType):  # a method of somebody else's object stays that object's
            return not self._leads_inside(item.__self__)
        return is_a(item, torch.Generator) or is_slot(item)  # a stream of random numbers goes on

    def _leads_inside(self, value: object) -> bool:
        return reaches(value, self._parts.has, known=self._outside)

    # -- what deepcopy has not copied ----------------------------------------------------------------------------------

    def _verify(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Look for what came along uncopied, in every attribute of the copy."""
        kinds = (nn.Module, torch.Tensor)
        made = [
            item
            for item in self._memo.values()
            if type(item) not in CONTAINERS and (is_a(item, kinds) or is_array(item))
        ]
        old = {id(module) for _, module in modules}
        verifier = Verifier(
            parts=self._parts,
            findings=self._findings,
            made=[item for item in made if id(item) not in old and not (is_array(item) and self._parts.has(item))],
            foreign=self.loose,
            known=self._refused,
            judge=self._judge_shared,
        )
        for path, module in modules:
            verifier.verify_classes(module, path)
            twin = self._memo.get(id(module))
            if not self._is_plain(module) and twin is not None and twin is not module:
                for name, value in list(vars(twin).items()):
                    self._copied.append((Place(path=path, name=name, owner=module), value, ""))
        for place, value, why in self._copied:
            verifier.verify(value, place, is_code=place.name in _HOOKS, why=why)
            yield_gil_when_due()

    def _judge_shared(self, tensor: torch.Tensor, place: Place) -> None:
        """Judge a tensor that both generations refer to, by way of a function or an object that cannot be copied."""
        if is_wrapper(tensor):
            self._findings.refuse(place.path, place.name, _LOOSE_WRAPPER)
            return
        self._findings.judge(place.full_name, tensor, owner=place.owner, marks=self._marks)
        if id(tensor) not in self._memo:
            self.loose.append(tensor)
            self._remember(tensor, tensor)

    # -- tensors that are not registered -------------------------------------------------------------------------------

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
        if is_fake(tensor):  # what a graph has noted of values; it has none itself
            return tensor
        if is_wrapper(tensor):
            self._findings.refuse(self._place.path, self._place.name, _LOOSE_WRAPPER)
            self._remember(tensor, tensor)
            return tensor
        offset = self._parts.find_offset(tensor)
        if offset is not None:
            result = self._view(offset, tensor)
        else:
            self.loose.append(tensor)
            owner = self._place.owner
            self._findings.judge(name_tensor(self._place, tensor), tensor, owner=owner, marks=self._marks)
            result = tensor.detach() if self._lease is None else tensor.detach().clone()
        self._remember(tensor, result)
        return result
